"""The works themselves: each prepares once and can then be done again and again, under one clock.

They call what the commands call: `prefill` and `generate` as `lm generate` does, `greedy` as the
answers of `lm finetune`, `train` as `lm train`. There is no second loop to measure.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch

from engine.bench.cases import Case, What
from engine.bench.subject import Subject, random_ids
from engine.clock import Clock
from engine.cost import decode_bytes, decode_flops, prefill_flops, train_flops
from engine.generate.batching import greedy
from engine.generate.decode import generate, prefill
from engine.generate.reference import TorchDecoder
from engine.generate.writer import Token
from engine.hardware import keep_heap
from engine.model.transformer import Transformer
from engine.recipe import override
from engine.text.tokenizer import Tokenizer
from engine.train.drill import drill, random_windows
from engine.train.log import MetricsLog
from engine.train.loop import train
from engine.train.precision import choose_precision
from engine.train.prepare import build_model
from engine.train.team import check_processes

Model = tuple[Transformer, Tokenizer]
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "int8"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What one repetition did: so many tokens in so many seconds, and when each came."""

    tokens: int  # for `load`, bytes
    seconds: float  # that these tokens took, of the whole repetition
    times: list[float]  # of time.perf_counter()


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Something to repeat, and what it costs per token by the model's shape (None: not known)."""

    do: Callable[[], Taken]
    dtype: str  # what `auto` turned out to be
    kernels: str = ""  # of a training step: ours or torch
    flops: float | None = None
    bytes: float | None = None


def prefilling(case: Case, subject: Subject, model: Model, clock: Clock) -> Work:
    """Read a prompt and say the first token, from its text to the screen."""
    transformer, tokenizer = model
    (ids,) = random_ids(subject, tokenizer, 1, case.prompt)
    text = tokenizer.decode_bytes(ids)
    settings, decoder = replace(subject.sample, max_tokens=1), TorchDecoder(transformer)

    def do() -> Taken:
        """The tokens made of the text are not those it came from, but about as many."""
        tokenizer.prompt(text)
        clock.lap("tokenize")
        start = prefill(decoder, ids, decoder.cache(len(ids) + 1), clock=clock)
        stream = generate(decoder, tokenizer, start, settings, seed=0, clock=clock)
        times = _write(stream, clock)
        return Taken(tokens=len(ids), seconds=clock.seconds["prefill"], times=times)

    return Work(
        do=do,
        dtype=_dtype(case, transformer),
        flops=prefill_flops(subject.config, case.prompt),
        bytes=weight_bytes(transformer) / case.prompt,
    )


def decoding(case: Case, subject: Subject, model: Model, clock: Clock) -> Work:
    """Continue a prompt that has been read already, token by token."""
    transformer, tokenizer = model
    (ids,) = random_ids(subject, tokenizer, 1, max(1, case.depth))
    decoder = TorchDecoder(transformer)
    start = prefill(decoder, ids, decoder.cache(len(ids) + case.tokens, rows=2))
    settings = replace(subject.sample, max_tokens=case.tokens)

    def do() -> Taken:
        """The first token came out of the prompt; the others took a pass each."""
        stream = generate(decoder, tokenizer, start.copied(1), settings, seed=0, clock=clock)
        return _passes(_write(stream, clock), rows=1)

    return _decode_work(do, case, subject, transformer)


def batching(case: Case, subject: Subject, model: Model, clock: Clock) -> Work:
    """Continue several prompts together, or one without its cache."""
    transformer, tokenizer = model
    prompts = random_ids(subject, tokenizer, case.batch, case.depth)
    most = min(tokenizer.vocab_size, subject.config.vocab_size)

    def do() -> Taken:
        """Ids go back to the main memory each time, where an end would be looked for."""
        times = []
        for next_B1 in greedy(
            transformer, prompts, case.tokens, most, cached=case.cache, clock=clock
        ):
            next_B1.tolist()
            times.append(time.perf_counter())
            clock.lap("sample")
        return _passes(times, rows=case.batch)

    if case.cache:
        return _decode_work(do, case, subject, transformer)
    length = case.depth + case.tokens // 2
    return Work(
        do=do,
        dtype=_dtype(case, transformer),
        flops=length * prefill_flops(subject.config, length),
        bytes=weight_bytes(transformer),
    )


def loading(case: Case, subject: Subject, clock: Clock) -> Work:
    """Load the checkpoint as `lm generate` would; from memory, if its file was read before."""
    model, _ = subject.loaded(case.dtype)
    size = sum(t.nbytes for t in chain(model.parameters(), model.buffers()))

    def do() -> Taken:
        """What is mapped from disk is read only when it is used."""
        before = clock.latest
        subject.loaded(case.dtype)
        clock.lap("load")
        return Taken(tokens=size, seconds=clock.latest - before, times=[])

    return Work(do=do, dtype=_dtype(case, model))


@contextmanager
def training(case: Case, subject: Subject, clock: Clock) -> Iterator[Work]:
    """Take training steps on random tokens, in the shape and with the settings of the recipe."""
    assert subject.recipe
    recipe, device = override(subject.recipe, run={"dtype": case.dtype}), subject.device
    check_processes(recipe, device)
    keep_heap()
    precision = choose_precision(recipe.run, device, subject.cache, finetune=False)
    model, optimizer = build_model(recipe, device, precision, None)
    batches = random_windows(recipe, recipe.train.batch_size)
    team = drill(model, batches, recipe, precision, case.threads, clock)
    with tempfile.TemporaryDirectory() as folder, team as gradient:
        log = MetricsLog(Path(folder) / "metrics.jsonl", keep_until=0)
        endless = train(
            model, optimizer, gradient, recipe.train, start=0, steps=lambda _: 1 << 40, clock=clock
        )

        def do() -> Taken:
            """One update, noted as a run would note it."""
            before, step = clock.latest, next(endless)
            log.write({"step": step.step, "loss": step.loss, "grad_norm": step.grad_norm})
            clock.lap("log")
            return Taken(tokens=step.seen, seconds=clock.latest - before, times=[clock.latest])

        try:
            name = NAMES[precision.dtype] if case.dtype == "auto" else case.dtype
            flops = train_flops(recipe.model, recipe.data.seq_len)
            kernels = "ours" if precision.kernels else "torch"
            yield Work(do=do, dtype=name, kernels=kernels, flops=flops)
        finally:
            log.close()


WORKS: dict[What, Callable[[Case, Subject, Model, Clock], Work]] = {
    "prefill": prefilling,
    "decode": decoding,
    "batch": batching,
    "kv": batching,
}


def weight_bytes(model: Transformer) -> int:
    """Return the bytes that a pass over one token reads: all weights, of the embedding one row."""
    tables = [model.embed_positions] if model.embed_positions is not None else []
    tables += [] if model.config.tie_embeddings else [model.embed_tokens]
    every = sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers()))
    return every - sum(table.weight.nbytes for table in tables)


def _dtype(case: Case, model: Transformer) -> str:
    """Name the precision that a case is computed in."""
    return NAMES[model.embed_tokens.weight.dtype] if case.dtype == "auto" else case.dtype


def _decode_work(do: Callable[[], Taken], case: Case, subject: Subject, model: Transformer) -> Work:
    """Add what a token costs in the middle of the answer."""
    depth, weights = case.depth + case.tokens // 2, weight_bytes(model)
    number = model.embed_tokens.weight.element_size()
    return Work(
        do=do,
        dtype=_dtype(case, model),
        flops=decode_flops(subject.config, depth),
        bytes=decode_bytes(subject.config, depth, case.batch, weights, number),
    )


def _write(stream: Iterator[Token], clock: Clock) -> list[float]:
    """Write the text as it comes, as `lm generate` does, to nowhere."""
    times = []
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        for token in stream:
            nowhere.write(token.text)
            nowhere.flush()
            times.append(time.perf_counter())
            clock.lap("write")
    return times


def _passes(times: list[float], rows: int) -> Taken:
    """Count the tokens after the first of each row, and the time they took."""
    return Taken(tokens=rows * (len(times) - 1), seconds=times[-1] - times[0], times=times)
