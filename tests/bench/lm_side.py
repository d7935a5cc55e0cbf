"""Our side of rows about answering, in a process of its own that imports what `lm` would.

    python -m tests.bench.lm_side timed FOLDER DTYPE DEPTH NEW REPEATS [ROWS]
    python -m tests.bench.lm_side share FOLDER DTYPE NEW REPEATS
    python -m tests.bench.lm_side prefixed FOLDER DTYPE SHARED REPEATS
    python -m tests.bench.lm_side memory FOLDER DTYPE DEPTH NEW
    python -m tests.bench.lm_side scored FOLDER DTYPE FILE

Each prints one JSON object. A first round is left out of timings. What only some need is imported
by them, so that a process holds no more than the command would.
"""

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cli.options import cache_folder
from engine.config import SampleConfig
from engine.generate.decode import generate, prefill
from engine.generate.decoder import Cache, Decoder, Run, Weighed
from engine.generate.load import load_decoder
from engine.text.tokenizer import Tokenizer

DEPTH = 8  # tokens of a prompt that is there to be continued
WINDOW = 512  # tokens of a text that are scored together
ASKED, PROMPT, ANSWER = 20, 32, 64  # prompts, tokens of each, tokens of its continuation


def prompt_of(depth: int, row: int = 0) -> list[int]:
    """Return the same ids on every side: none of SmolLM2's first twenty, which are controls."""
    return [20 + (7919 * place + 101 * row) % 40_000 for place in range(depth)]


def load(folder: str, dtype: str) -> tuple[Weighed, Tokenizer]:
    """Load a model as `lm generate` does."""
    return load_decoder(Path(folder), device="cpu", dtype=dtype, cache=cache_folder())


def likeliest(decoder: Decoder, cache: Cache, runs: Sequence[Run]) -> list[int]:
    """Return the next id of each run."""
    return decoder.forward(cache, runs).argmax(-1).tolist()


def timed(folder: str, dtype: str, depth: int, new: int, repeats: int, rows: int = 1) -> dict:
    """Time reading a prompt, and a token of continuing it; several rows go on together."""
    decoder, tokenizer = load(folder, dtype)
    tokenizer.ends = frozenset()  # every side writes as many tokens
    run = _alone if rows == 1 else _together
    found = [run(decoder, tokenizer, depth, new, rows) for _ in range(1 + repeats)][1:]
    reading, writing = zip(*found, strict=True)
    return {"name": decoder.name, "prefill": reading, "decode": writing}


def _alone(
    decoder: Decoder, tokenizer: Tokenizer, depth: int, new: int, rows: int
) -> tuple[float, float]:
    """Answer by the stream that the command writes."""
    settings = SampleConfig(temperature=0, max_tokens=new)
    began = time.perf_counter()
    start = prefill(decoder, prompt_of(depth), decoder.cache(depth + new))
    read = time.perf_counter()
    times = [token.time for token in generate(decoder, tokenizer, start, settings, seed=0)]
    return read - began, (times[-1] - times[0]) / (new - 1)


def _together(
    decoder: Decoder, tokenizer: Tokenizer, depth: int, new: int, rows: int
) -> tuple[float, float]:
    """Continue some rows, each by a prompt of its own."""
    cache = decoder.cache(depth + new, rows)
    began = time.perf_counter()
    ids = likeliest(decoder, cache, [Run(row, prompt_of(depth, row)) for row in range(rows)])
    read = time.perf_counter()
    for _ in range(new - 1):
        ids = likeliest(decoder, cache, [Run(row, [id]) for row, id in enumerate(ids)])
    return read - began, (time.perf_counter() - read) / (new - 1)


def status(key: str) -> int:
    """Return a figure of this process's memory in bytes, as Linux tells it."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith(key))


def memory(folder: str, dtype: str, depth: int, new: int) -> dict:
    """Answer once, and say what it took at most and what everything but the model did before."""
    before = status("VmRSS")
    decoder, tokenizer = load(folder, dtype)
    tokenizer.ends = frozenset()
    start = prefill(decoder, prompt_of(depth), decoder.cache(depth + new))
    settings = SampleConfig(temperature=0, max_tokens=new)
    made = len(list(generate(decoder, tokenizer, start, settings, seed=0)))
    assert made == new
    held = Path(folder, "model.safetensors").stat().st_size + start.cache.bytes
    return {"name": decoder.name, "peak": status("VmHWM"), "before": before, "held": held}


def share(folder: str, dtype: str, new: int, repeats: int) -> dict:
    """Time decoding, and plain reads of as many bytes, in turn."""
    from engine.hardware import use_threads
    from engine.machine import memory_bandwidth

    decoder, tokenizer = load(folder, dtype)
    tokenizer.ends = frozenset()
    read, threads = decoder.bytes_read(DEPTH + new // 2), use_threads(0)
    found: dict[str, list[float]] = {"decode": [], "read": []}
    for _ in range(1 + repeats):
        found["decode"].append(_alone(decoder, tokenizer, DEPTH, new, 1)[1])
        found["read"].append(read / memory_bandwidth(threads))
    timed = {key: seconds[1:] for key, seconds in found.items()}
    return timed | {"name": decoder.name, "bytes": read}


def prefixed(folder: str, dtype: str, shared: int, repeats: int) -> dict:
    """Time the first token of a prompt, and of one that begins with as many of the same tokens."""
    from engine.generate.prefixes import Prefixes

    decoder, _ = load(folder, dtype)
    found: dict[str, list[float]] = {"first": [], "second": []}
    with tempfile.TemporaryDirectory() as kept:
        for number in range(1 + repeats):
            prefixes = Prefixes(Path(kept) / str(number))
            for row, key in enumerate(found):
                ids = prompt_of(shared) + prompt_of(DEPTH, 1 + row)
                cache = decoder.cache(len(ids) + 1)
                began = time.perf_counter()
                prefixes.restore(decoder, cache, 0, ids)
                likeliest(decoder, cache, [Run(0, ids[cache.lengths[0] :])])
                found[key].append(time.perf_counter() - began)
                prefixes.store(decoder, cache, 0, ids)
    return {key: seconds[1:] for key, seconds in found.items()} | {"name": decoder.name}


def scored(folder: str, dtype: str, file: str) -> dict:
    """Say how well a text is predicted, and how the likeliest tokens after 20 places go on.

    The file names the text and, once they are known, the continuations of fp32, which each other
    precision is held against: `agreed` is how many tokens of each come as there before the first
    that does not.
    """
    decoder, tokenizer = load(folder, dtype)
    task = json.loads(Path(file).read_text(encoding="utf-8"))
    ids = tokenizer.encode(task["text"])
    nats, count = 0.0, 0
    for begin in range(0, len(ids) - 1, WINDOW):
        window = ids[begin : begin + WINDOW + 1]
        run = Run(0, window[:-1], wanted=len(window) - 1)
        logits = decoder.forward(decoder.cache(WINDOW), [run])
        nats += _nats(logits, window[1:])
        count += len(window) - 1
    step = len(ids) // ASKED
    prompts = [ids[place * step :][:PROMPT] for place in range(ASKED)]
    found = {"name": decoder.name, "perplexity": math.exp(nats / count)}
    if "answers" not in task:
        return found | {"answers": [_answer(decoder, prompt) for prompt in prompts]}
    agreed = [_agreed(decoder, *pair) for pair in zip(prompts, task["answers"], strict=True)]
    return found | {"agreed": agreed}


def _nats(logits: np.ndarray, targets: Sequence[int]) -> float:
    """Return the surprise at some tokens. Shapes: logits (T, V)."""
    chosen = logits[np.arange(len(targets)), targets].astype(np.float64)
    highest = logits.max(-1, keepdims=True)
    total = np.exp(logits - highest).sum(-1, dtype=np.float64)
    return float((np.log(total) + highest[:, 0] - chosen).sum())


def _answer(decoder: Decoder, prompt: list[int]) -> list[int]:
    cache, ids = decoder.cache(PROMPT + ANSWER), []
    run = Run(0, prompt)
    for _ in range(ANSWER):
        ids += likeliest(decoder, cache, [run])
        run = Run(0, ids[-1:])
    return ids


def _agreed(decoder: Decoder, prompt: list[int], answer: list[int]) -> int:
    """Count the tokens before the first that this decoder would not have chosen."""
    run = Run(0, prompt + answer[:-1], wanted=ANSWER)
    chosen = likeliest(decoder, decoder.cache(PROMPT + ANSWER), [run])
    pairs = enumerate(zip(chosen, answer, strict=True))
    return next((place for place, (a, b) in pairs if a != b), ANSWER)


ORDERS: dict[str, Callable[..., dict]] = {
    "timed": timed,
    "share": share,
    "prefixed": prefixed,
    "memory": memory,
    "scored": scored,
}


def main(order: str, folder: str, dtype: str, *words: str) -> None:
    """Do what the command line asks for."""
    numbers = [int(word) if word.isdigit() else word for word in words]
    print(json.dumps(ORDERS[order](folder, dtype, *numbers)))


if __name__ == "__main__":
    main(*sys.argv[1:])
