"""Rows of what is learned in a time: bits per byte beside compressors, wall time beside nanoGPT."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.train.log import read_metrics
from tests.bench.apart import own, turn
from tests.bench.pairs import Ratio
from tests.bench.prose import prose
from tests.bench.report import Missing, Options, Result
from tests.conftest import ROOT

LM = (sys.executable, "-c", "from cli.main import main; main()")
# Settings for a model that has seconds, not minutes: small, and many short steps.
BRISK = (
    "tokenizer.vocab_size=512",
    "model.d_model=128",
    "model.n_heads=2",
    "model.n_layers=3",
    "data.seq_len=128",
    "train.batch_size=8",
    "eval.every=1000000",
)
SHARES = (1 / 8, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 3 / 4, 1)  # of nanoGPT's time, tried until one will do


def lm(*words: object) -> tuple[float, str]:
    """Run a command of ours: its wall time, from starting to ended, and its standard output.

    Raises: Missing with its last words if it fails.
    """
    began = time.perf_counter()
    ended = subprocess.run(
        [*LM, *map(str, words)], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if ended.returncode:
        raise Missing(f"lm {words[0]}: {ended.stderr.strip().splitlines()[-1]}")
    return time.perf_counter() - began, ended.stdout


def stdlib(options: Options) -> Iterator[Result]:
    """`lm train stdlib` with its own budget, scored beside compressors that read the same text."""
    with tempfile.TemporaryDirectory() as temporary:
        words = ("train", "stdlib", "-o", Path(temporary) / "run", "--json", *options.overrides)
        _, out = lm(*words)
    said = json.loads(out.strip().splitlines()[-1])
    yield from beside_compressors(said)


def beside_compressors(said: dict[str, Any]) -> Iterator[Result]:
    """Lay out what `lm train --json` said, best compressor first."""
    own_bits = said["bits_per_byte"]
    facts = f"{said['step']} steps, {said['tokens']:,} tokens, {said['seconds']:.0f} s"
    rows = said["baselines"].items()
    for name, bits in sorted(rows, key=lambda row: row[1] or float("inf")):
        note = facts if bits else f"{name} could not run here"
        yield Result(
            ours="lm train stdlib",
            peer=name,
            unit="bpb",
            value=own_bits,
            other=bits,
            ratio=Ratio(value=bits / own_bits) if bits else None,
            note=note,
        )


def nanogpt(options: Options) -> Iterator[Result]:
    """The wall time in which `lm train` gets as good as nanoGPT's README run on the same text.

    Both times are of whole processes: starting, reading, training, looking on the way. Ours also
    learns a tokenizer, saves checkpoints and scores itself at the end. Both are scored on all of
    the held-out text by windows of their own context that move on by a quarter of it.
    """
    text = prose()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = text.save(folder)
        peer = turn(own("nanogpt", *files, time.time()))
        for share in SHARES:
            bits, seconds, steps = brisk(folder, files, share * peer["seconds"])
            reached = bits <= peer["bits_per_byte"]
            yield Result(
                ours=f"lm train, budget {share * peer['seconds']:.0f} s",
                peer="nanoGPT's README run",
                unit="s",
                value=seconds,
                other=peer["seconds"],
                ratio=Ratio(value=peer["seconds"] / seconds) if reached else None,
                note=f"{bits:.3f} / {peer['bits_per_byte']:.3f} bpb, {steps} steps, text"
                f" {text.digest}" + ("" if reached else ": not as good yet"),
            )
            if reached:
                return


def brisk(folder: Path, files: tuple[Path, Path], budget: float) -> tuple[float, float, int]:
    """Train on the prose: (bits per byte, wall time of the command, steps)."""
    run = folder / "run"
    data = (f"data.train={files[0]}", f"data.valid={files[1]}", f"train.budget={budget:.2f}s")
    options = ("-o", run, "--force", "-q", "--cache", folder / "cache")
    seconds, _ = lm("train", "text", *data, *BRISK, *options)
    last = [row for row in read_metrics(run / "metrics.jsonl") if row.get("final")][-1]
    return last["valid_bpb"], seconds, last["step"]
