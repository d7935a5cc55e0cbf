"""`lm merge`: make one whole model of an adapter and its base."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from cli.options import Json, Quiet


def merge(
    model: Annotated[str, typer.Argument(help="Adapter: folder, or name under checkpoints/.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to make, checkpoints/NAME.")],
    prompt: Annotated[
        Optional[list[str]], typer.Option("-p", "--prompt", help="Compare on this too; repeatable.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge an adapter into its base, as a checkpoint that needs neither.

    The sums are made in fp32. What was written is read back and compared with
    base and adapter on a few prompts: the largest difference of a logit, and
    how many likeliest tokens agree. Exit code 7, and no folder, if a logit
    moved by more than 1e-4 of the largest one.

    \b
    lm merge my-lora -o checkpoints/my-model
    lm merge my-lora -o checkpoints/my-model -p "Dear customer," --json
    """
    import dataclasses

    from cli.importing import tidy_interrupt
    from cli.options import CHECKPOINTS
    from cli.render import emit_json, say, size
    from engine.finetune import merge as merging
    from engine.hardware import use_threads
    from engine.runs import find

    folder = find(model, CHECKPOINTS)
    use_threads(0)
    with tidy_interrupt():
        made = merging.merge(folder, out, prompt or [])
    if as_json:
        facts = dataclasses.asdict(made) | {"folder": str(out), "base": str(made.base)}
        emit_json("merge", {"adapter": str(folder)} | facts)
        return
    if not made.base_known:
        say(
            f"the adapter does not say which weights it was trained beside; took {made.base}", quiet
        )
    if made.int8:
        say("tuned beside 8-bit matrices, merged onto the full ones: figures were with 8", quiet)
    say(
        f"compared on {made.prompts} prompts: largest logit difference {made.difference:.1e}"
        f" (limit {made.limit:.1e}), {made.agreed} of {made.tokens} tokens agree",
        quiet,
    )
    say(f"made {out}: {made.matrices} matrices of {made.base} changed, {size(made.bytes)}", quiet)
    name = out.name if out.parent.name == "checkpoints" else out
    say(f"next: lm generate 'Once' -m {name}", quiet)
