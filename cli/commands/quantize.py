"""`lm quantize`: make a checkpoint smaller and faster."""

from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from cli.options import Json, Quiet


def quantize(
    model: Annotated[str, typer.Argument(help="Checkpoint: folder, or name under checkpoints/.")],
    to: Annotated[
        Literal["int8", "int4"],
        typer.Option(
            "--to", help="int8: a scale for each 64 of a row; int4: scale and minimum for each 32."
        ),
    ],
    out: Annotated[
        Optional[Path],
        typer.Option("-o", "--out", help="Folder to make; checkpoints/NAME-int8 or -int4."),
    ] = None,
    calibrate: Annotated[
        Optional[str],
        typer.Option(
            metavar="TEXT|none",
            help="int4: what it is calibrated by: a file, folder or glob; else stdlib and pydoc.",
        ),
    ] = None,
    windows: Annotated[
        int, typer.Option(min=2, max=4096, help="Pieces of that text, of 512 tokens.")
    ] = 32,
    keep: Annotated[
        Optional[list[str]],
        typer.Option(help="int4: matrices that keep 8 bits too, like down_proj; repeatable."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the quantized checkpoint that is there.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Round a checkpoint's matrices to 8 or 4 bits, as a checkpoint of its own.

    A quarter of fp32's size in int8, a sixth or so in int4, and faster about as
    much, since generating on a CPU is reading weights. Norms and biases stay in
    fp32. To try a format without writing anything: `lm generate --dtype int8`.

    int4 is calibrated: the model reads some text, and each matrix is rounded so
    that it still gives what it gave on that, which takes minutes. Without
    --calibrate it reads Python's standard library and manual; text of the kind
    that you will use is better. `--calibrate none` rounds at once and loses
    more. Embedding, head and the values of attention keep 8 bits.

    \b
    lm quantize smollm2 --to int8
    lm quantize smollm2 --to int4
    lm quantize smollm2 --to int4 --keep down_proj
    lm quantize tuned --to int4 --calibrate letters.txt -o checkpoints/small
    """
    import dataclasses
    import time

    from cli.options import CHECKPOINTS
    from engine.runs import find

    folder = find(model, CHECKPOINTS)  # before torch is imported, which takes seconds
    from cli.importing import follow, tidy_interrupt
    from cli.render import emit_json, percent, say, size
    from engine.config import DataConfig
    from engine.data.corpora import open_corpus
    from engine.errors import RecipeError
    from engine.interop.quantizing import Quantized
    from engine.interop.quantizing import quantize as quantizing
    from engine.peak import peak_memory

    began = time.perf_counter()
    out = out or CHECKPOINTS / f"{Path(model).resolve().name}-{to}"
    if to == "int8" and calibrate not in (None, "none"):
        raise RecipeError("--calibrate is for int4; int8 loses too little to need it")
    if to == "int8" and keep:
        raise RecipeError("--keep is for int4; in int8 all matrices have 8 bits")
    sources = {None: ["stdlib", "pydoc"], "none": []}.get(calibrate, [calibrate])
    corpora = [open_corpus(source, DataConfig()) for source in sources if to == "int4"]
    with tidy_interrupt():
        events = quantizing(
            folder, out, to, force=force, corpora=corpora, windows=windows, fine=keep or ()
        )
        made = follow(events, Quantized, quiet)
    seconds = time.perf_counter() - began
    if as_json:
        facts = dataclasses.asdict(made) | {"folder": str(out), "original": str(folder)}
        emit_json("quantize", facts | {"seconds": seconds, "peak_memory": peak_memory()})
        return
    say(
        f"weights  {size(made.bytes_before)} → {size(made.bytes)}, {made.bits_per_weight:.2f} bits"
        f" each, {made.matrices} matrices in {seconds:.1f} s",
        quiet,
    )
    if told := made.calibration:
        before, after = told["perplexity_before"], told["perplexity"]
        say(
            f"perplexity  {before:.3f} → {after:.3f} ({after / before - 1:+.2%}) on"
            f" {size(told['held_out_bytes'])} that were not calibrated by",
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
