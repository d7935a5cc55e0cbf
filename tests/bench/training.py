"""Rows of a training step of 13.8 M parameters: ours beside plain torch, eager and compiled."""

import statistics
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch

from cli.options import cache_folder
from engine.config import OptimConfig, Recipe, RunConfig
from engine.cost import train_flops
from engine.data.batches import Batch
from engine.errors import ResourceError
from engine.hardware import has_fast_bf16, keep_heap, pick_device, use_threads
from engine.machine import matmul_peaks
from engine.model.transformer import Transformer
from engine.recipe import override
from engine.train.drill import drill
from engine.train.loop import TrainStep, train
from engine.train.optim import Optimizers
from engine.train.precision import Precision, choose_precision
from engine.train.prepare import build_model
from engine.train.schedule import ENDLESS, lr_factor
from tests.bench.pairs import alternate
from tests.bench.plain import LENGTH, ROWS, SHAPE, trainer
from tests.bench.report import Missing, Options, Result, versus

WORK = ROWS * LENGTH
EAGER, COMPILED, COMPILED_BF16 = "plain fp32", "plain fp32 compiled", "plain bf16 compiled"
Step = Callable[[], object]


def dtypes() -> list[str]:
    """Name every precision that a recipe may ask for."""
    names = typing.get_args(typing.get_type_hints(RunConfig)["dtype"])
    return [name for name in names if name != "auto"]


def recipe(**run: str) -> Recipe:
    """Return the defaults of `lm train` with the shape of the row."""
    sizes, data = {"batch_size": ROWS}, {"seq_len": LENGTH}
    return override(Recipe(model=SHAPE), train=sizes, data=data, run=run)


def fixed_batch() -> Batch:
    """Return random tokens, each with the one after it as its target."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randint(0, SHAPE.vocab_size, (ROWS, LENGTH + 1), generator=random)
    return Batch(tokens_BT=rows[:, :-1].contiguous(), targets_BT=rows[:, 1:].contiguous())


class Fixed:
    """The same batch at every step, in as many parts as the recipe says; it can be pickled."""

    def __init__(self, batch: Batch, parts: int) -> None:
        pieces = zip(batch.tokens_BT.chunk(parts), batch.targets_BT.chunk(parts), strict=True)
        self.parts = [Batch(tokens_BT=tokens, targets_BT=targets) for tokens, targets in pieces]

    def __call__(self, number: int) -> Sequence[Batch]:
        return self.parts


@contextmanager
def steps_of(
    model: Transformer,
    optimizer: Optimizers,
    precision: Precision,
    settings: Recipe,
    batch: Batch,
    threads: int,
) -> Iterator[Callable[[], TrainStep]]:
    """Give a function that takes one step of the real training loop with these settings."""
    own = settings.train
    with drill(model, Fixed(batch, own.accumulate), settings, precision, threads) as gradient:
        steps = train(
            model,
            optimizer,
            gradient,
            own,
            start=0,
            steps=lambda step: ENDLESS,
            factor=partial(lr_factor, steps=ENDLESS, config=own.schedule),
        )
        yield lambda: next(steps)


def measure(
    settings: dict[str, Recipe], peers: dict[str, Step], options: Options
) -> dict[str, list[float]]:
    """Time some settings of ours and some peers, all in turn, on one batch.

    Settings that this machine has no kernels for are left out.
    """
    keep_heap()
    batch = fixed_batch()
    with ExitStack() as stack:
        sides: dict[str, Step] = {}
        for name, own in settings.items():
            threads = use_threads(own.run.threads)
            try:
                precision = chosen(own)
            except ResourceError:
                continue
            model, optimizer = build_model(own, pick_device(own.run.device), precision, None)
            steps = steps_of(model, optimizer, precision, own, batch, threads)
            sides[name] = stack.enter_context(steps)
        return alternate(sides | peers, options.rounds)


def peer(**kind: bool) -> Step:
    """Return a step of the plain peer on the row's batch."""
    batch = fixed_batch()
    return trainer(batch.tokens_BT, batch.targets_BT, **kind)


def resolved() -> str:
    """Name the precision that run.dtype=auto takes here."""
    dtype = chosen(recipe(device="cpu")).dtype
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(dtype, str(dtype).split(".")[1])


def chosen(settings: Recipe, *, finetune: bool = False) -> Precision:
    """Choose as `lm train` or `lm finetune` would, with the kernels where they keep them."""
    device = pick_device(settings.run.device)
    return choose_precision(settings.run, device, cache_folder(), finetune=finetune)


def eager(options: Options) -> Iterator[Result]:
    """Our defaults beside the eager peer; and ours with the peer's optimizer."""
    ours, adamw = f"lm {resolved()} muon", f"lm {resolved()} adamw"
    usual = recipe(device="cpu")
    same = override(usual, train={"optim": OptimConfig(name="adamw")})
    times = measure({ours: usual, adamw: same}, {EAGER: peer()}, options)
    for name in (ours, adamw):
        yield versus(times, name, EAGER, WORK)


def precisions(options: Options) -> Iterator[Result]:
    """Each run.dtype beside the eager peer."""
    settings = {f"lm {name}": recipe(device="cpu", dtype=name) for name in dtypes()}
    times = measure(settings, {EAGER: peer()}, options)
    for name in settings:
        yield versus(times, name, EAGER, WORK)


def compiled(options: Options) -> Iterator[Result]:
    """Our defaults beside torch.compile, in fp32 and in bf16 by autocast."""
    peers = {COMPILED: peer(compiled=True), COMPILED_BF16: peer(bf16=True, compiled=True)}
    try:
        for step in peers.values():
            step()  # compiles: not to be taken for its speed
    except Exception as error:
        if type(error).__module__.startswith("torch"):  # inductor found no C++ compiler
            said = str(error).strip().splitlines()[0]
            raise Missing(f"torch.compile does not work here: {said[:120]}") from None
        raise
    ours = f"lm {resolved()}"
    times = measure({ours: recipe(device="cpu")}, peers, options)
    faster = min(peers, key=lambda name: statistics.median(times[name]))
    for name in peers:
        note = "the faster peer, which counts" if name == faster else ""
        yield versus(times, ours, name, WORK).noted(note)


def share(options: Options) -> Iterator[Result]:
    """The share of the machine's matmul peak that a step reaches, by precision.

    Where bf16 is only emulated it has no peak worth a share; the row of dtypes has its time.
    """
    device = pick_device("cpu")
    names = [name for name in dtypes() if name != "bf16" or has_fast_bf16(device)]
    settings = {f"lm {name}": recipe(device="cpu", dtype=name) for name in names}
    times = measure(settings, {}, options)
    peaks = matmul_peaks(device)
    for name, own in settings.items():
        if name not in times or own.run.dtype not in peaks:
            yield Result(ours=name, note=f"skipped: no products in {own.run.dtype} here")
            continue
        reached = train_flops(SHAPE, LENGTH) * WORK / statistics.median(times[name])
        peak = peaks[own.run.dtype]
        note = f"{reached / 1e12:.3f} of {peak / 1e12:.3f} TFLOP/s in {own.run.dtype}"
        value = reached / peak
        yield Result(ours=name, unit="of peak", value=value, note=note, raw={name: times[name]})
