"""A training run from its first step to its last: steps, plans, evaluations and checkpoints.

What it starts from is a `Job` (`job.py`). `go` is a generator of records, in order: `Prepared`,
then `TrainStep`, `Plan`, `Evaluated` and `Saved` as they happen, and last `Finished` or
`Interrupted`. The command line shows them; nothing here prints.
"""

import dataclasses
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from engine import checkpoint
from engine.config import Recipe
from engine.cost import parameters, train_flops
from engine.data.pack import PackProgress
from engine.errors import DivergenceError, RecipeError
from engine.machine import matmul_peak
from engine.manifest import read_json
from engine.model.transformer import Transformer
from engine.peak import peak_memory
from engine.recipe import dump, duration
from engine.text.tokenizer import Tokenizer
from engine.train.evaluate import Score
from engine.train.gradient import Share, Sums
from engine.train.job import Job, Objective
from engine.train.log import MetricsLog
from engine.train.loop import TrainStep, train
from engine.train.plan import Plan, Planner
from engine.train.prepare import Doing, predict_memory
from engine.train.team import together

EVALUATIONS = 5  # in a run, unless eval.every says otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Everything is in place and the first step comes next."""

    recipe: Recipe  # with every size filled in
    folder: Path
    model: Transformer
    tokenizer: Tokenizer
    objective: Objective
    start: int  # first step of this process; 0 unless resumed
    machine: dict[str, str]  # device, threads, processes, versions: what exactness depends on
    changed: list[str]  # in which of these a resumed run differs from before
    parameters: int
    flops_per_token: int
    peak_flops: float
    memory: dict[str, int]  # bytes that each part is expected to take at the peak


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """The model was scored on held-out text."""

    step: int
    score: Score
    best: bool  # lowest bits per byte so far
    final: bool  # at the end, on more text and with overlapping windows


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint is on disk."""

    step: int
    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Interrupted:
    """The run was asked to stop; it finished its step and saved."""

    step: int
    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The run is complete."""

    step: int
    best_step: int  # the step whose model is delivered and scored
    folder: Path
    model: Transformer
    score: Score
    tokens: int
    seconds: float
    peak_memory: int


Event = (
    Doing | PackProgress | Prepared | TrainStep | Plan | Evaluated | Saved | Interrupted | Finished
)


def go(job: Job, stop: Callable[[], bool]) -> Iterator[Event]:
    """Train to the end, to the first `stop`, or to a divergence; save in each case.

    `stop` is asked after every step; when it says yes, the run saves and ends with `Interrupted`.

    Raises: RecipeError if a run to be continued began on other text; ResourceError;
    DivergenceError, after saving the last good state.
    """
    recipe, saved = job.recipe, job.saved
    if saved and saved.state["data"] != job.objective.digest:
        raise RecipeError(
            f"what {recipe.data.train} holds is not what this run was started on (digest"
            f" {saved.state['data'][:12]}, now {job.objective.digest[:12]}); restore it or start"
            " anew"
        )
    kernels = job.precision.kernels
    machine = {"device": str(job.device), "dtype": job.precision.name}
    machine |= {"kernels": "ours" if kernels else f"torch's: {kernels.reason}"}
    machine |= {"threads": str(job.threads), "processes": str(recipe.train.processes)} | versions()
    before = saved.state["machine"] if saved else machine
    prepared = Prepared(
        recipe=recipe,
        folder=job.folder,
        model=job.model,
        tokenizer=job.tokenizer,
        objective=job.objective,
        start=saved.state["step"] if saved else 0,
        machine=machine,
        changed=[
            f"{k} was {v}, is {machine.get(k)}" for k, v in before.items() if machine.get(k) != v
        ],
        parameters=sum(parameters(recipe.model).values()),
        flops_per_token=train_flops(recipe.model, recipe.data.seq_len),
        peak_flops=matmul_peak(job.device, job.precision.dtype),
        memory=predict_memory(recipe, job.precision),
    )
    share = Share(
        model=job.model,
        batches=job.objective.batches,
        loss=job.objective.loss,
        seed=recipe.run.seed,
        dtype=job.precision.dtype,
    )
    if recipe.train.processes > 1:
        yield Doing(what=f"starting {recipe.train.processes} processes")
    with together(share, recipe.train.processes, job.threads) as gradient:
        yield prepared
        yield from _Run(job, prepared, gradient).go(stop)


class _Run:
    """Steps, evaluations and saves, in a fixed order."""

    def __init__(self, job: Job, prepared: Prepared, gradient: Callable[[int], Sums]) -> None:
        self.job, self.machine, self.gradient = job, prepared.machine, gradient
        self.recipe, self.folder, self.model = job.recipe, job.folder, job.model
        self.objective = job.objective
        state = job.saved.state if job.saved else {}
        self.step: int = state.get("step", 0)
        self.tokens: int = state.get("tokens", 0)
        self.best: float | None = state.get("best")
        self.each_evaluation = 0.0  # seconds of the newest
        self.score: tuple[int, float | None] = (-1, None)  # the newest evaluation's step and figure
        self.elapsed: float = state.get("seconds", 0.0)  # of earlier processes
        self.began = time.perf_counter()
        self.planner = Planner(self.recipe.train, self.folder / "plan.json")
        self.saved_step, self.saved_at = self.step if job.saved else -1, self.began

    def seconds(self) -> float:
        """Return the time trained, in all processes of this run."""
        return self.elapsed + time.perf_counter() - self.began

    def go(self, stop: Callable[[], bool]) -> Iterator[Event]:
        """Take the steps."""
        job, recipe = self.job, self.recipe
        steps = train(
            self.model,
            job.optimizer,
            self.gradient,
            recipe.train,
            start=self.step,
            steps=self.planner.steps,
            factor=self.planner.factor,
        )
        begun = self.step if job.saved else -1
        self.log = MetricsLog(self.folder / "metrics.jsonl", begun)
        yield from self.planner.plans[-1:]  # a resumed run's, so that its length is known
        try:
            if job.first_look and not self.step:
                yield self._look()
            for event in steps:
                self.step, self.tokens = event.step, self.tokens + event.seen
                row = {"step": event.step, "loss": event.loss, "lr": event.lr}
                row |= {"grad_norm": event.grad_norm, "tokens": self.tokens}
                self.log.write(row | {"seconds": round(self.seconds(), 3)})
                yield event
                yield from self._between_steps(event)
                if stop() and self.step < self.planner.steps(self.step):
                    yield from self._save(best=False)
                    yield Interrupted(step=self.step, folder=self.folder)
                    return
            yield from self._finish()
        except DivergenceError as error:
            # Weights that are finite may be good: the batch may be to blame. Others are not kept.
            if all(parameter.isfinite().all() for parameter in self.model.parameters()):
                yield from self._save(best=False)
            where = f"{self.folder}/last holds step {max(0, self.saved_step)}"
            raise DivergenceError(
                f"{error}; {where}" if self.saved_step >= 0 else str(error)
            ) from None
        finally:
            self.log.close()

    def _between_steps(self, event: TrainStep) -> Iterator[Event]:
        """Plan, evaluate and save where one is due after a step."""
        planner, total = self.planner, self.planner.steps(self.step)
        planner.observe(event.seconds)
        if planner.due(self.step):
            if not planner.plans:  # an evaluation is measured too: the budget has to hold some
                yield from self._evaluate()
            each, every = self.each_evaluation, self.recipe.eval.every
            left = EVALUATIONS * (1 - self.seconds() / duration(self.recipe.train.budget))
            other, extra = (0.0, each / every) if every else (max(0.0, left) * each, 0.0)
            plan = planner.decide(self.step, self.seconds(), other, extra)
            total = plan.steps
            yield plan
        if self.step < total and self._evaluation_due(total):
            yield from self._evaluate()
        if self.step < total and self._save_due():
            yield from self._save(best=False)

    def _evaluation_due(self, total: int) -> bool:
        if self.step == self.score[0]:
            return False
        if [plan.at for plan in self.planner.plans[:1]] == [self.step]:
            return True  # a resumed run repeats the evaluation that its plan was made with
        every = self.recipe.eval.every
        if not every:
            if not self.planner.known(self.step):
                return False
            every = max(1, round(total / EVALUATIONS))
            if total - self.step < every / 2:  # the end brings one anyway
                return False
        return self.step % every == 0

    def _save_due(self) -> bool:
        every = self.recipe.eval.save_every
        if every.isdigit():
            return self.step % int(every) == 0
        return time.perf_counter() - self.saved_at >= duration(every)

    def _evaluate(self) -> Iterator[Event]:
        """Score a part of the held-out text; save if the figure is the best so far."""
        began = self.seconds()
        look = self._look()
        best = self.best is None or look.score.bits_per_byte < self.best
        if best:
            self.best = look.score.bits_per_byte
        yield dataclasses.replace(look, best=best)
        if best:
            yield from self._save(best=True)
        self.each_evaluation = self.seconds() - began

    def _look(self) -> Evaluated:
        """Score a part of the held-out text and log it."""
        result = self.objective.evaluate(self.model)
        self.score = (self.step, result.bits_per_byte)
        self._log_score(self.step, result, final=False)
        return Evaluated(step=self.step, score=result, best=False, final=False)

    def _log_score(self, step: int, result: Score, final: bool) -> None:
        row = {"step": step, "valid_bpb": result.bits_per_byte, "valid_loss": result.loss}
        row |= {"valid_bytes": result.bytes, "final": final}
        self.log.write(row | {"seconds": round(self.seconds(), 3)})

    def _save(self, best: bool) -> Iterator[Event]:
        """Write a checkpoint of this step, unless it is there already."""
        if self.step == self.saved_step and not best:
            return
        snapshot = checkpoint.Snapshot(
            step=self.step,
            model=self.model,
            tokenizer=self.job.tokenizer,
            recipe_yaml=dump(self.recipe),
            sample=self.recipe.sample,
            facts={
                **self.objective.lineage(),
                "tokens_seen": self.tokens,
                "valid_bpb": self.score[1] if self.score[0] == self.step else None,
                "train_seconds": round(self.seconds(), 1),
                "tokenizer": self.job.tokenizer.digest,
                "machine": self.machine,
            },
            optimizer=self.job.optimizer.state(),
            base=self.job.base,
            state={
                "step": self.step,
                "tokens": self.tokens,
                "best": self.best,
                "seconds": self.seconds(),
                "data": self.objective.digest,
                "kept": dict(self.job.kept),
                "machine": self.machine,
            },
        )
        self.log.sync()  # no checkpoint is ahead of its log
        written = checkpoint.save(self.folder, snapshot, best)
        self.saved_step, self.saved_at = self.step, time.perf_counter()
        yield Saved(step=self.step, folder=written)

    def _finish(self) -> Iterator[Event]:
        """Evaluate and save the end state like those before it, then score what is delivered."""
        seconds = self.seconds()
        if self.saved_step != self.step:
            yield from self._evaluate()
            yield from self._save(best=False)
        yield Doing(what="scoring the held-out text")
        best = (self.folder / "best").resolve()
        best_step = read_json(best / "manifest.json")["step"]
        model = self.model
        if best_step != self.step:  # the best came before the end, and it is what -m NAME loads
            model, _ = checkpoint.load_model(best, self.job.device)
        result = self.objective.judge(model)
        self._log_score(best_step, result, final=True)
        yield Evaluated(step=best_step, score=result, best=True, final=True)
        yield Finished(
            step=self.step,
            best_step=best_step,
            folder=self.folder,
            model=model,
            score=result,
            tokens=self.tokens,
            seconds=seconds,
            peak_memory=peak_memory(),
        )


def versions() -> dict[str, str]:
    """Name the versions of everything that a run's numbers depend on."""
    return {
        "lm-workbench": metadata.version("lm-workbench"),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "tokenizers": metadata.version("tokenizers"),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
