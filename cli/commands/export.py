"""`lm export`: send a checkpoint out to other engines."""

from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from cli.options import Json


def export(
    model: Annotated[str, typer.Argument(help="Checkpoint: folder, or name under checkpoints/.")],
    to: Annotated[
        Literal["gguf", "hf"], typer.Option("--to", help="gguf: one file; hf: a plain folder.")
    ],
    out: Annotated[
        Optional[Path], typer.Option("-o", "--out", help="Where; NAME-DTYPE.gguf or NAME-hf here.")
    ] = None,
    dtype: Annotated[
        Literal["auto", "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"],
        typer.Option("--dtype", help="How to store weights; auto: f16 in a gguf, as is in hf."),
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Write a checkpoint in the form that another engine loads.

    A GGUF file holds tokenizer and chat template too and runs in llama.cpp and
    what is built on it; a folder loads in transformers, vLLM and others.

    \b
    lm export smollm2 --to gguf --dtype q8_0
    lm export stdlib --to hf -o ~/models/stdlib
    """
    from cli.importing import tidy_interrupt
    from cli.options import CHECKPOINTS
    from cli.render import emit_json, say, size
    from engine.errors import RecipeError
    from engine.interop.exporting import to_folder, to_gguf
    from engine.interop.importing import DTYPES
    from engine.runs import find

    folder = find(model, CHECKPOINTS)
    name = Path(model).resolve().name
    if to == "gguf":
        chosen = "f16" if dtype == "auto" else dtype
        out = out or Path(f"{name}-{chosen}.gguf")
        with tidy_interrupt():
            written = to_gguf(folder, out, chosen, name)
        total, kept = written.bytes, written.kept_f16
    else:
        if dtype != "auto" and dtype not in DTYPES:
            raise RecipeError(f"--dtype {dtype} is for --to gguf; a folder takes f32, f16 or bf16")
        out = out or Path(f"{name}-hf")
        with tidy_interrupt():
            total, kept = to_folder(folder, out, dtype), []
    if as_json:
        facts = {"folder": str(folder), "out": str(out), "bytes": total, "kept_f16": kept}
        emit_json("export", facts)
        return
    if kept:
        say(f"{len(kept)} tensors have rows that {dtype} blocks do not divide: kept as f16")
    say(f"wrote {out}, {size(total)}")
    if to == "gguf":
        say(f"next: llama-cli -m {out}")
