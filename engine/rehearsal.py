"""A few steps of a run before the run: the real model, loss and optimizers on random tokens.

    recipe ── a fresh process ── model, optimizers ── steps ── seconds a step, memory at the peak

The process is fresh so that its peak is that of the steps; it ends when the one that started it
does.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from threading import Thread

import numpy as np
import torch

from engine import checkpoint, errors
from engine.config import Recipe
from engine.data.batches import Batch, SampleBatches
from engine.data.samples import Sample
from engine.finetune import run as finetune
from engine.finetune.objective import Mixture
from engine.hardware import keep_heap, pick_device, use_threads
from engine.peak import peak_memory
from engine.recipe import dump, load
from engine.train.drill import drill, random_windows
from engine.train.gradient import Batches
from engine.train.loop import train
from engine.train.optim import Optimizers
from engine.train.precision import choose_precision
from engine.train.prepare import build_model
from engine.train.schedule import ENDLESS, lr_factor

PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from engine.rehearsal import serve; serve()"
WARM_UP, FEWEST, MOST = 2, 3, 40  # steps: not counted, counted at the least, at the most in all
SECONDS = 6.0  # that steps are counted for, once there are enough
LONG = 60.0  # seconds of a step after which one counted is enough


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsed:
    """What steps took."""

    seconds: list[float]  # of each step counted
    tokens: int  # of a step
    before: int  # bytes resident before the model was made
    peak_memory: int  # bytes, of all processes

    @property
    def seconds_per_step(self) -> float:
        """The median: a step that something else on the machine held up does not count."""
        return statistics.median(self.seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """What finetuning adds to a recipe: its base, rows by length, and windows that are replayed."""

    base: str
    rows: list[tuple[int, int]]  # tokens, and how many of them are learned
    replayed: int = 0  # windows a batch


def rehearse(recipe: Recipe, cache: Path, tuned: Tuned | None = None) -> Rehearsed:
    """Take some steps of a run in a process of their own; every size of the recipe is filled in.

    Our kernels are looked for below `cache`.

    Raises: what the first steps of the run would; ResourceError if the process is ended.
    """
    order = {"recipe": dump(recipe), "cache": str(cache), "tuned": asdict(tuned) if tuned else None}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *sys.path],
        stdin=subprocess.PIPE,  # held open: when it closes, the process ends
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        try:
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
            answer, said = process.stdout.readline(), ""
            said = "" if answer else process.stderr.read()
        finally:
            process.kill()
    if not answer:
        if said:
            raise RuntimeError(f"the rehearsal failed:\n{said}")
        raise errors.ResourceError(
            "the rehearsal was ended from outside, perhaps for want of memory; raise"
            " train.accumulate, or make the model smaller"
        )
    found = json.loads(answer)
    if "error" in found:
        raise getattr(errors, found["error"])(found["message"])
    return Rehearsed(**found)


def serve() -> None:
    """Read what to rehearse, rehearse it, write what it took: what the fresh process runs."""
    order = json.loads(sys.stdin.readline())
    Thread(target=_leave, daemon=True).start()
    tuned = order["tuned"]
    try:
        recipe, cache = load(order["recipe"], "plan"), Path(order["cache"])
        found = asdict(measure(recipe, cache, Tuned(**tuned) if tuned else None))
    except errors.EngineError as error:
        found = {"error": type(error).__name__, "message": str(error)}
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


def _leave() -> None:
    """End at once when the other process ends."""
    sys.stdin.read()
    os._exit(1)


def measure(recipe: Recipe, cache: Path, tuned: Tuned | None) -> Rehearsed:
    """Take steps in this process, whose peak has to be that of the steps."""
    keep_heap()
    threads, device = use_threads(recipe.run.threads), pick_device(recipe.run.device)
    precision = choose_precision(recipe.run, device, cache, finetune=tuned is not None)
    before = resident_memory()
    if tuned:
        base, _ = checkpoint.load_model(Path(tuned.base), device, recipe.train.dropout)
        model = finetune.build_model(base, recipe, device, precision, None)
        optimizer = Optimizers(model, recipe.train.optim)
    else:
        model, optimizer = build_model(recipe, device, precision, None)
    batches = _rows(recipe, tuned) if tuned else random_windows(recipe, recipe.train.batch_size)
    processes = recipe.train.processes
    seconds: list[float] = []
    tokens = 0
    with drill(model, batches, recipe, precision, threads) as gradient:
        stream = train(
            model,
            optimizer,
            gradient,
            recipe.train,
            start=0,
            steps=partial(_until, seconds),
            factor=partial(lr_factor, steps=ENDLESS, config=recipe.train.schedule),
        )
        for event in stream:
            seconds.append(event.seconds)
            tokens = event.seen
    peak = peak_memory()
    if device.type == "cuda":
        before, peak = 0, torch.cuda.max_memory_allocated(device)
    elif processes > 1:  # the weights, which all of them see, were counted already
        largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        largest *= 1 if sys.platform == "darwin" else 1024
        weights = sum(parameter.nbytes for parameter in model.parameters())
        peak += (processes - 1) * (largest - weights)
    return Rehearsed(seconds=_counted(seconds), tokens=tokens, before=before, peak_memory=peak)


def _until(seconds: Sequence[float], step: int) -> int:
    """Tell the loop whether to take one more step: the run's length is one more, or this."""
    counted = _counted(seconds)
    enough = len(counted) >= FEWEST and sum(counted) > SECONDS
    enough = enough or len(seconds) >= MOST or (bool(counted) and max(seconds) > LONG)
    return step if enough else step + 1


def _counted(seconds: Sequence[float]) -> list[float]:
    """Leave out the first steps, which set things up."""
    return list(seconds[1 if max(seconds, default=0.0) > LONG else WARM_UP :])


@dataclass(frozen=True, slots=True)
class _LongestFirst:
    """The batches of finetuning after one than which none takes more memory."""

    mixture: Mixture

    def __call__(self, step: int) -> Sequence[Batch]:
        return self.mixture(step) if step else self.mixture.longest()


def _rows(recipe: Recipe, tuned: Tuned) -> Batches:
    """Return the batches of finetuning, over random rows of the given lengths."""
    random, train = np.random.default_rng(recipe.run.seed), recipe.train
    samples = [
        Sample(
            where="",
            ids=random.integers(recipe.model.vocab_size, size=length, dtype=np.int32),
            learned=np.arange(length) >= length - learned,
        )
        for length, learned in tuned.rows
    ]
    packs = SampleBatches(
        samples,
        capacity=recipe.data.seq_len,
        packs=train.batch_size,
        parts=train.accumulate,
        seed=recipe.run.seed,
        packing=recipe.data.packing,
    )
    return _LongestFirst(
        Mixture(packs, random_windows(recipe, tuned.replayed) if tuned.replayed else None)
    )


def resident_memory() -> int:
    """Return the bytes this process holds now; its peak where the system does not tell."""
    status = Path("/proc/self/statm")
    if not status.is_file():
        return peak_memory()
    return int(status.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
