"""`lm quantize`: make a checkpoint smaller and faster."""

from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from cli.options import Json, Quiet


def quantize(
    model: Annotated[str, typer.Argument(help="Checkpoint: folder, or name under checkpoints/.")],
    to: Annotated[
        Literal["int8", "int4"],
        typer.Option("--to", help="int8: a scale a row; int4: scale and minimum for each 32."),
    ],
    out: Annotated[
        Optional[Path],
        typer.Option("-o", "--out", help="Folder to make; checkpoints/NAME-int8 or -int4."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the quantized checkpoint that is there.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Round a checkpoint's matrices to 8 or 4 bits, as a checkpoint of its own.

    A quarter or an eighth of fp32's size, and faster about as much, since
    generating on a CPU is reading weights. In int4 the embedding and the head
    have 8 bits. Norms and biases stay in fp32. To try a format without writing
    anything: `lm generate --dtype int8`.

    \b
    lm quantize smollm2 --to int8
    lm quantize stdlib --to int4 -o checkpoints/small
    """
    import dataclasses
    import time

    from cli.options import CHECKPOINTS
    from engine.runs import find

    folder = find(model, CHECKPOINTS)  # before torch is imported, which takes seconds
    from cli.importing import follow, tidy_interrupt
    from cli.render import emit_json, percent, say, size
    from engine.interop.quantizing import Quantized
    from engine.interop.quantizing import quantize as quantizing
    from engine.peak import peak_memory

    began = time.perf_counter()
    out = out or CHECKPOINTS / f"{Path(model).resolve().name}-{to}"
    with tidy_interrupt():
        made = follow(quantizing(folder, out, to, force=force), Quantized, quiet)
    seconds = time.perf_counter() - began
    if as_json:
        facts = dataclasses.asdict(made) | {"folder": str(out), "original": str(folder)}
        emit_json("quantize", facts | {"seconds": seconds, "peak_memory": peak_memory()})
        return
    say(
        f"weights  {size(made.bytes_before)} → {size(made.bytes)}, {made.matrices} matrices in"
        f" {seconds:.1f} s",
        quiet,
    )
    say(
        f"error    {percent(made.mean_error)} of a matrix in the mean,"
        f" {percent(made.largest_error)} at most ({made.largest})",
        quiet,
    )
    say(f"made {out} (peak memory {size(peak_memory())})", quiet)
    name = out.name if out.parent == CHECKPOINTS else out
    say(f"next: lm generate 'Once' -m {name}", quiet)
