"""The rows of `make bench`, by name: what each compares, and what is asked of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.bench import copying, learning, limits, small, smollm2, training
from tests.bench.inference import LLAMA, Answering
from tests.bench.report import Options, Result


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A figure of the README's table, or some that are measured together."""

    about: str
    measure: Callable[[Options], Iterator[Result]]
    asked: str = ""  # at least / goal


DECODE = "transformers 6× / 8×, llama.cpp 1.8× / 2.5×, int4 3×"
READ = "llama.cpp 5× / 10×, transformers 1.2× / 1.5×"
PREFILL = {"new": 3, "repeats": 1, "ours": ("bf16", "int8"), "peers": (LLAMA, "transformers bf16")}

ROWS = {
    "train-13m": Row(
        about="training step of 13.8 M parameters beside eager fp32 torch with AdamW",
        measure=training.eager,
        asked="3.5× / 6×",
    ),
    "train-13m-dtypes": Row(
        about="the same in each run.dtype", measure=training.precisions, asked="3.5× / 6×"
    ),
    "train-13m-compiled": Row(
        about="the same beside torch.compile, in fp32 and bf16",
        measure=training.compiled,
        asked="1.3× / 2×",
    ),
    "train-13m-share": Row(
        about="the same as a share of the measured matmul peak, by precision",
        measure=training.share,
        asked="35 % / 50 %",
    ),
    "train-smollm2": Row(
        about="full training step of SmolLM2-135M, 8 × 512, beside the transformers Trainer",
        measure=smollm2.train_step,
        asked="3× / 5×",
    ),
    "train-3m": Row(
        about="training step of the stdlib recipe's shape beside transformers",
        measure=small.train_step,
    ),
    "stdlib": Row(
        about="lm train stdlib: bits per byte beside PPMd and xz that read the same text",
        measure=learning.stdlib,
        asked="below PPMd / 1.25",
    ),
    "nanogpt": Row(
        about="1 MB of prose: time to the bits per byte of nanoGPT's README run on a CPU",
        measure=learning.nanogpt,
        asked="2× / 4×",
    ),
    "bench-overhead": Row(
        about="lm generate beside lm bench doing the same: what watching costs",
        measure=small.overhead,
        asked="≤ 1.02×",
    ),
    "decode-3m": Row(
        about="256 tokens read and 128 generated, in the stdlib recipe's shape",
        measure=small.decode,
    ),
    "decode-smollm2": Row(
        about="SmolLM2-135M, one stream, nothing before it",
        measure=Answering(key="decode", depth=8),
        asked=DECODE,
    ),
    "decode-smollm2-512": Row(
        about="SmolLM2-135M, one stream, 512 tokens before it",
        measure=Answering(key="decode", depth=512),
        asked=DECODE,
    ),
    "decode-smollm2-batch": Row(
        about="SmolLM2-135M, eight streams together",
        measure=Answering(
            key="decode", depth=8, rows=8, peers=("transformers bf16", "transformers fp32")
        ),
        asked="3× / 5×",
    ),
    "prefill-smollm2-512": Row(
        about="SmolLM2-135M, a prompt of 512 tokens",
        measure=Answering(key="prefill", depth=512, **PREFILL),
        asked=READ,
    ),
    "prefill-smollm2-2048": Row(
        about="SmolLM2-135M, a prompt of 2,048 tokens",
        measure=Answering(key="prefill", depth=2048, **PREFILL),
        asked=READ,
    ),
    "prefix-smollm2": Row(
        about="a request whose first 1,000 tokens were read before, to its first token",
        measure=limits.prefix,
        asked="5× / 20×",
    ),
    "bandwidth-smollm2": Row(
        about="decoding as a share of what memory can be read at",
        measure=limits.share,
        asked="75 % / 90 %",
    ),
    "cold-smollm2": Row(
        about="lm generate from its start to the first text, beside llama.cpp",
        measure=limits.cold,
        asked="1× / 2×",
    ),
    "memory-smollm2": Row(
        about="peak memory of int8 beside weights and cache",
        measure=limits.memory,
        asked="≤ 1.5× / 1.2×",
    ),
    "quality-smollm2": Row(
        about="perplexity and greedy text of int8 and int4 beside bf16",
        measure=limits.quality,
        asked="int8 ≤ 1.005×, int4 ≤ 1.04×",
    ),
    "copying": Row(
        about="SmolLM2-135M copies code with small edits: prompt lookup beside plain decoding",
        measure=copying.lookup,
        asked="1.5× / 2.5×",
    ),
}
