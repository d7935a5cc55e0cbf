"""`lm show`: what a model is, where it comes from, what it costs, whether it fits."""

from pathlib import Path
from typing import Annotated

import typer

from cli.options import Json


def show(
    model: Annotated[
        str, typer.Argument(help="Checkpoint: folder, or name; or a .gguf, or a HF folder.")
    ],
    fit: Annotated[
        bool, typer.Option("--fit", help="Memory it needs here, and the largest context.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show a model: shape, parameters, tokenizer, licence, lineage, files.

    Only headers and small files are read, so it is quick for any size. A model
    that is not imported yet is shown too. `lm verify` hashes everything.

    \b
    lm show stdlib
    lm show smollm2 --fit
    lm show model.Q4_K_M.gguf --fit
    lm show checkpoints/stdlib/last --json | jq .parameters
    """
    import os

    from cli import showing
    from cli.options import CHECKPOINTS
    from cli.render import emit_json
    from engine.runs import find

    path = Path(os.path.expanduser(model))
    foreign = os.path.isfile(path / "config.json") and not os.path.exists(path / "manifest.json")
    foreign = foreign and not os.path.exists(path / "adapter_config.json")
    if foreign or (os.path.isfile(path) and path.suffix.lower() == ".gguf"):
        shown = showing.look_outside(path)
    else:
        shown = showing.look(find(model, CHECKPOINTS))
    if as_json:
        emit_json("show", showing.as_json(shown) | ({"fit": showing.fit(shown)} if fit else {}))
    elif fit:
        showing.print_fit(shown)
    else:
        showing.print_shown(shown)
