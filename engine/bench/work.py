"""The works themselves: each prepares once and can then be done again and again, under one clock.

They call what the commands call: `prefill` and `generate` over the decoder of `lm generate`, the
rows of one cache as its `--batch` does, `train` as `lm train`. There is no second loop to measure.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from engine.bench.cases import Case, What
from engine.bench.subject import Loaded, Subject, random_ids
from engine.clock import Clock
from engine.cost import decode_flops, prefill_flops, train_flops
from engine.generate.decode import generate, prefill
from engine.generate.decoder import Run, Weighed
from engine.generate.writer import Token
from engine.hardware import keep_heap
from engine.recipe import override
from engine.train.drill import drill, random_windows
from engine.train.log import MetricsLog
from engine.train.loop import train
from engine.train.precision import choose_precision
from engine.train.prepare import build_model
from engine.train.schedule import ENDLESS, lr_factor
from engine.train.team import check_processes

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
    dtype: str  # what `auto` turned out to be; so are the next two
    kernels: str
    kv: str = ""
    flops: float | None = None
    bytes: float | None = None


def prefilling(case: Case, subject: Subject, loaded: Loaded, clock: Clock) -> Work:
    """Read a prompt and say the first token, from its text to the screen."""
    decoder, tokenizer = loaded
    (ids,) = random_ids(subject, tokenizer, 1, case.prompt)
    text = tokenizer.decode_bytes(ids)
    settings = replace(subject.sample, max_tokens=1)

    def do() -> Taken:
        """The tokens made of the text are not those it came from, but about as many."""
        tokenizer.prompt(text)
        clock.lap("tokenize")
        start = prefill(decoder, ids, decoder.cache(len(ids) + 1), clock=clock)
        stream = generate(decoder, tokenizer, start, settings, seed=0, clock=clock)
        times = _write(stream, clock)
        return Taken(tokens=len(ids), seconds=clock.seconds["prefill"], times=times)

    return _work(
        do,
        decoder,
        flops=prefill_flops(subject.config, case.prompt),
        bytes=decoder.bytes_read(0) / case.prompt,
    )


def decoding(case: Case, subject: Subject, loaded: Loaded, clock: Clock) -> Work:
    """Continue a prompt that has been read already, token by token."""
    decoder, tokenizer = loaded
    (ids,) = random_ids(subject, tokenizer, 1, max(1, case.depth))
    start = prefill(decoder, ids, decoder.cache(len(ids) + case.tokens, rows=2))
    settings = replace(subject.sample, max_tokens=case.tokens)

    def do() -> Taken:
        """The first token came out of the prompt; the others took a pass each."""
        stream = generate(decoder, tokenizer, start.copied(1), settings, seed=0, clock=clock)
        return _passes(_write(stream, clock), rows=1)

    return _decode_work(do, case, decoder)


def batching(case: Case, subject: Subject, loaded: Loaded, clock: Clock) -> Work:
    """Continue several prompts together, or one without its cache."""
    decoder, tokenizer = loaded
    prompts = random_ids(subject, tokenizer, case.batch, case.depth)
    most = min(tokenizer.vocab_size, subject.config.vocab_size)

    def do() -> Taken:
        """Take the likeliest token of each row: what is measured is how they share a pass."""
        texts = [list(prompt) for prompt in prompts]
        cache, stage, times = decoder.cache(case.depth + case.tokens, case.batch), "prefill", []
        for _ in range(case.tokens):
            if not case.cache:
                cache = decoder.cache(len(texts[0]), case.batch)
            held = zip(texts, cache.lengths, strict=True)
            runs = [Run(row, ids[done:]) for row, (ids, done) in enumerate(held)]
            logits_BV = decoder.forward(cache, runs)[:, :most]
            clock.lap(stage)
            for text, token in zip(texts, logits_BV.argmax(axis=1).tolist(), strict=True):
                text.append(token)
            times.append(time.perf_counter())
            clock.lap("sample")
            stage = "decode"
        return _passes(times, rows=case.batch)

    if case.cache:
        return _decode_work(do, case, decoder)
    length = case.depth + case.tokens // 2
    flops = length * prefill_flops(subject.config, length)
    return _work(do, decoder, flops=flops, bytes=decoder.bytes_read(0))


def loading(case: Case, subject: Subject, clock: Clock) -> Work:
    """Load the checkpoint as `lm generate` would; from memory, if its file was read before."""
    decoder, _ = subject.loaded(case)
    size = decoder.bytes

    def do() -> Taken:
        """What is mapped from disk is read only when it is used."""
        before = clock.latest
        subject.loaded(case)
        clock.lap("load")
        return Taken(tokens=size, seconds=clock.latest - before, times=[])

    return replace(_work(do, decoder), kv="")


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
            model,
            optimizer,
            gradient,
            recipe.train,
            start=0,
            steps=lambda step: ENDLESS,
            factor=partial(lr_factor, steps=ENDLESS, config=recipe.train.schedule),
            clock=clock,
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


WORKS: dict[What, Callable[[Case, Subject, Loaded, Clock], Work]] = {
    "prefill": prefilling,
    "decode": decoding,
    "batch": batching,
    "kv": batching,
}


def _work(do: Callable[[], Taken], decoder: Weighed, **costs: float) -> Work:
    """Add who computes, and in what: "native int8" names both."""
    kernels, dtype = decoder.name.split()
    return Work(do=do, dtype=dtype, kernels=kernels, kv=decoder.kv, **costs)


def _decode_work(do: Callable[[], Taken], case: Case, decoder: Weighed) -> Work:
    """Add what a token costs in the middle of the answer."""
    depth = case.depth + case.tokens // 2
    flops, bytes = decode_flops(decoder.config, depth), decoder.bytes_read(depth, case.batch)
    return _work(do, decoder, flops=flops, bytes=bytes)


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
