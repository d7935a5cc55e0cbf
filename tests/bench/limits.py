"""SmolLM2-135M held to limits: cold start, memory, bandwidth, quality, a prefix read before."""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Any

from tests.bench.apart import Command, own, turn
from tests.bench.inference import LLAMA, the_model
from tests.bench.lm_side import ANSWER
from tests.bench.pairs import LEAST, Ratio
from tests.bench.prose import prose
from tests.bench.report import Missing, Options, Result, versus
from tests.conftest import ROOT

LM = (sys.executable, "-m", "cli.main")
PROMPT, NEW = "Once upon a time", 8
DEPTH, WRITTEN = 512, 64  # tokens read and written while memory is watched
SCORED = 100_000  # bytes of text whose perplexity is taken
SHARED = 1000  # tokens that a second request begins with, as the first did


@contextmanager
def quantized(options: Options, dtype: str) -> Iterator[Path]:
    """Give the model in another format, as `lm quantize` writes it, for a while."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / dtype
        words = ("quantize", str(the_model(options)), "--to", dtype, "-o", str(out))
        done = subprocess.run([*LM, *words], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise Missing(f"lm quantize: {done.stderr.strip().splitlines()[-1][:200]}")
        yield out


def waits(times: Mapping[str, Sequence[float]], ours: str, peer: str, note: str) -> Result:
    """Compare two sides in seconds, which are the better the fewer."""
    found = versus(times, ours, peer, 1, "s")
    if found.ratio is None:
        return found.noted(f"{found.note}; {note}")
    seconds = {"value": median(times[ours]), "other": median(times[peer])}
    return dataclasses.replace(found, **seconds, note=note)


def first_byte(command: Command) -> float:
    """Return the seconds until a command has written something. Raises: Missing if it does not."""
    began = time.perf_counter()
    try:
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    except OSError as error:
        raise Missing(f"{command[0]}: {error.strerror}") from None
    with process:
        assert process.stdout
        found = process.stdout.read(1)
        taken = time.perf_counter() - began
        said = process.communicate()[1].decode(errors="replace").strip().splitlines()
    if not found or process.returncode:
        raise Missing(f"ended with {process.returncode}: {(said or ['nothing'])[-1][:200]}")
    return taken


def cold(options: Options) -> Iterator[Result]:
    """The whole command, from the start of its process to the first byte of text."""
    script = Path(__file__).with_name("llama_cpp_first.py")
    with quantized(options, "int8") as folder:
        generate = ("generate", PROMPT, "-m", folder, "--temperature", "0", "--quiet")
        sides: dict[str, Command] = {
            "lm int8": [*LM, *generate, "--max-tokens", str(NEW)],
            LLAMA: [options.llama_python, script, options.gguf, PROMPT, str(NEW)],
        }
        times: dict[str, list[float]] = {name: [] for name in sides}
        failed: dict[str, str] = {}
        for number in range(1 + max(LEAST, options.rounds.most)):
            for name in [*sides][:: -1 if number % 2 else 1]:
                if name not in failed:
                    try:
                        times[name].append(first_byte(sides[name]))
                    except Missing as error:
                        failed[name] = f"{name}: {error}"
    # The first time reads files from disk, and compiles what there is to compile.
    warm = {name: taken[1:] for name, taken in times.items() if name not in failed}
    yield waits(warm, "lm int8", LLAMA, "; ".join(failed.values()))


def memory(options: Options) -> Iterator[Result]:
    """The most memory of an answer, beside what weights and cache need."""
    with quantized(options, "int8") as folder:
        found = turn(own("lm_side", "memory", folder, "auto", DEPTH, WRITTEN))
    held = found["held"]
    for ours, peak in (
        ("the whole process", found["peak"]),
        ("without interpreter and libraries", found["peak"] - found["before"]),
    ):
        yield Result(
            ours=ours,
            peer="weights + cache",
            unit="MB",
            value=peak / 1e6,
            other=held / 1e6,
            ratio=Ratio(value=peak / held),
            note=found["name"],
        )


def share(options: Options) -> Iterator[Result]:
    """How fast weights are read while decoding, beside the fastest that memory can be read."""
    for dtype in ("int8", "int4", "bf16"):
        found = turn(own("lm_side", "share", the_model(options), dtype, WRITTEN, 5))
        ours, work = f"lm {dtype}", found["bytes"] / 1e9
        times = {ours: found["decode"], "a plain read": found["read"]}
        note = f"{found['name']}, {work * 1e3:,.0f} MB a token"
        yield versus(times, ours, "a plain read", work, "GB/s").noted(note)


def prefix(options: Options) -> Iterator[Result]:
    """The time to the first token of a prompt whose first 1,000 tokens were read before."""
    found = turn(own("lm_side", "prefixed", the_model(options), "int8", SHARED, 5))
    times = {"second request": found["second"], "first request": found["first"]}
    yield waits(times, "second request", "first request", found["name"])


def quality(options: Options) -> Iterator[Result]:
    """Perplexity, and how far greedy text goes before it leaves that of fp32."""
    text = prose().valid[-SCORED:]
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "task.json"

        def scored(dtype: str, **more: object) -> dict[str, Any]:
            task.write_text(json.dumps({"text": text} | more), encoding="utf-8")
            return turn(own("lm_side", "scored", the_model(options), dtype, task))

        answers = scored("fp32")["answers"]
        found = {dtype: scored(dtype, answers=answers) for dtype in ("bf16", "int8", "int4")}
    for dtype, side in found.items():
        a, b = side["perplexity"], found["bf16"]["perplexity"]
        agreed = side["agreed"]
        note = f"{side['name']}, {a:.3f} or {a / b - 1:+.2%}"
        note += f"; {mean(agreed):.1f} of {ANSWER} tokens as in fp32, all of them"
        yield Result(
            ours=f"lm {dtype}",
            peer="lm bf16",
            unit="ppl",
            value=a,
            other=b,
            ratio=Ratio(value=a / b),
            note=f"{note} for {agreed.count(ANSWER)} of {len(agreed)} prompts",
            raw={f"lm {dtype}": agreed},
        )
