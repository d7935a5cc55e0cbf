"""`lm plan`: what a run will take, before it is started, and whether it is a good idea.

    recipe ─ sizes ─ text or rows, counted ─ a few steps rehearsed ─ Forecast, or a refusal

How many steps fit a budget, while a run is under way, is decided in `engine/train/plan.py`; memory
by part is in `engine/memory.py`. What is known to fail is refused; what is only unwise is a note.

Sources: Hoffmann et al. 2022, arXiv:2203.15556 (tokens per parameter); Muennighoff et al. 2023,
arXiv:2305.16264 (repeated text); Gowda & May 2020, arXiv:2004.02334 (how often a token must occur).
"""

import dataclasses
import shutil
import tempfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from engine.config import Recipe
from engine.cost import forward_flops, lora_parameters, parameters, train_flops
from engine.data.amount import Amount, measure_text
from engine.data.batches import SampleBatches
from engine.data.samples import with_template
from engine.errors import DataError, RecipeError, ResourceError
from engine.finetune.prepare import check_settings as check_tuning
from engine.finetune.prepare import read_rows, replay_rows
from engine.finetune.run import find_base
from engine.hardware import check_memory, pick_device
from engine.manifest import read_config
from engine.memory import needed_memory
from engine.recipe import duration
from engine.rehearsal import Rehearsed, Tuned, rehearse
from engine.text.tokenizer import load_tokenizer
from engine.train.plan import MEASURED
from engine.train.prepare import (
    Doing,
    check_settings,
    fill_vocabulary,
    predict_memory,
    ready_precision,
)
from engine.train.run import EVALUATIONS
from engine.train.team import check_processes

TOKENS_PER_PARAMETER = 20  # that a given number of FLOPs is best spent on (Hoffmann)
NEAR = 3.0  # times more or fewer tokens than that cost little
REPEATS = 4  # passes over a text that teach nearly as much as new text (Muennighoff)
SEEN = 100  # times that most tokens of a vocabulary should occur in the text (Gowda & May)
KEPT = 3  # checkpoints on disk at most: best, last, and the one being written
BYTES_PER_TOKEN = 4.0  # of rows, roughly
TOKENIZER = 100  # bytes of tokenizer.json per token, about
REHEARSED = 8  # batches of rows, by whose lengths steps are rehearsed


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a run will take."""

    recipe: Recipe  # with every size filled in
    tuned: bool  # a base is finetuned
    parameters: dict[str, int]  # by group
    trained: int  # of these and of a LoRA
    flops_per_token: int
    text: Amount | None  # what is learned from; None if it cannot be read yet
    tokens_per_step: float
    memory: dict[str, int]  # bytes by part, at the peak
    checkpoint: int  # bytes on disk
    rehearsed: Rehearsed | None
    steps: int | None  # None if they depend on steps that were not measured
    scoring: float | None  # seconds that evaluations take, all of them
    notes: list[str]  # what is unwise

    @property
    def tokens(self) -> int | None:
        """Tokens that are trained on, repeated ones too."""
        return round(self.steps * self.tokens_per_step) if self.steps else None

    @property
    def epochs(self) -> float | None:
        """Passes over the text."""
        return self.tokens / self.text.tokens if self.tokens and self.text else None

    @property
    def flops(self) -> int | None:
        """FLOPs of all steps."""
        return self.tokens * self.flops_per_token if self.tokens else None

    @property
    def seconds(self) -> float | None:
        """Time of the steps, and of the evaluations as far as they can be told."""
        if not (self.steps and self.rehearsed):
            return None
        return self.steps * self.rehearsed.seconds_per_step + (self.scoring or 0.0)

    @property
    def disk(self) -> int:
        """Bytes on disk at the most."""
        return KEPT * self.checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """What is known of a run before anything is measured."""

    recipe: Recipe
    text: Amount | None
    tokens_per_step: float
    tuned: Tuned | None = None


def forecast(
    recipe: Recipe,
    folder: Path,
    cache: Path,
    checkpoints: Path,
    *,
    finetune: bool,
    measure: bool = True,
    stdin: BinaryIO | None = None,
) -> Iterator[Doing | Forecast]:
    """Say what a run into `folder` would take; yields what it does, and last the `Forecast`.

    Raises: RecipeError, DataError, CheckpointError or ResourceError, as the run itself would; and
    RecipeError for what is known to fail.
    """
    device = pick_device(recipe.run.device)
    check_processes(recipe, device)
    if finetune:
        task = yield from _plan_tuning(recipe, folder, checkpoints, stdin)
    else:
        check_settings(recipe)
        yield Doing(what=f"reading {recipe.data.train}")
        amount = measure_text(recipe, folder, cache)
        recipe = fill_vocabulary(
            recipe, amount.vocabulary if amount else recipe.tokenizer.vocab_size
        )
        per_step = float(recipe.train.batch_size * recipe.data.seq_len)
        task = _Task(recipe=recipe, text=amount, tokens_per_step=per_step)
    recipe = task.recipe
    _refuse(task)
    precision = yield from ready_precision(recipe, device, cache, finetune=finetune)
    memory = predict_memory(recipe, precision)
    check_memory(needed_memory(memory), device, "this run")
    checkpoint = checkpoint_bytes(recipe, memory)
    _check_disk(KEPT * checkpoint, folder)
    rehearsed = None
    if measure:
        yield Doing(what="measuring a few steps")
        rehearsed = rehearse(recipe, cache, task.tuned)
    yield _conclude(task, memory, checkpoint, rehearsed)


def _plan_tuning(
    recipe: Recipe, folder: Path, checkpoints: Path, stdin: BinaryIO | None
) -> Generator[Doing, None, _Task]:
    """Read the rows as finetuning does."""
    base = find_base(recipe, folder, checkpoints)
    config, tokenizer = read_config(base), load_tokenizer(base)
    if recipe.data.chat != "plain":
        tokenizer = with_template(tokenizer)
    check_tuning(recipe, config)
    with tempfile.TemporaryDirectory() as place:
        now = datetime.now()
        _, _, sides = yield from read_rows(recipe, tokenizer, Path(place), stdin, now)
    recipe = dataclasses.replace(recipe, model=config)
    samples, train = sides["train"].samples, recipe.train
    packs = SampleBatches(
        samples,
        capacity=recipe.data.seq_len,
        packs=train.batch_size,
        parts=train.accumulate,
        seed=recipe.run.seed,
        packing=recipe.data.packing,
    )
    sizes = [packs.size(chosen) for chosen in packs.bins]
    replayed = replay_rows(recipe, sizes)
    longest = sorted(range(len(sizes)), key=lambda number: -sizes[number])[: train.batch_size]
    numbers = dict.fromkeys([*longest, *packs.epoch(0)[: REHEARSED * train.batch_size].tolist()])
    rows = [
        (len(samples[index].ids), int(samples[index].learned.sum()))
        for number in numbers
        for index in packs.bins[number]
    ]
    text = Amount(
        tokens=sides["train"].tally.tokens,
        held_tokens=sides["valid"].tally.tokens,
        bytes_per_token=BYTES_PER_TOKEN,
        vocabulary=tokenizer.vocab_size,
        how="",
    )
    per_step = train.batch_size * sum(sizes) / len(sizes) + replayed * recipe.data.seq_len
    tuned = Tuned(base=str(base), rows=rows, replayed=replayed)
    return _Task(recipe=recipe, text=text, tokens_per_step=per_step, tuned=tuned)


def checkpoint_bytes(recipe: Recipe, memory: dict[str, int]) -> int:
    """Return the bytes of a checkpoint on disk: weights, or adapter, and the optimizer's state."""
    lora, model = recipe.train.lora, recipe.model
    weights = 4 * sum(parameters(model).values())
    if lora.rank:
        weights = 4 * lora_parameters(model, lora.rank, lora.targets)
    return weights + memory["optimizer"] + TOKENIZER * model.vocab_size


def _check_disk(needed: int, folder: Path) -> None:
    """Refuse checkpoints that the disk has no room for. Raises: ResourceError."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if needed > free:
        raise ResourceError(
            f"{folder}: checkpoints take up to {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are"
            " free; choose another folder with -o"
        )


def _refuse(task: _Task) -> None:
    """Refuse what is known to fail, before anything is measured. Raises: RecipeError, DataError."""
    recipe, train = task.recipe, task.recipe.train
    if train.steps and train.schedule.warmup > train.steps:
        raise RecipeError(
            f"train.schedule.warmup={train.schedule.warmup} is longer than the run of"
            f" {train.steps} steps: the learning rate never gets up; lower it"
        )
    tokens = task.text.tokens if task.text and not task.tuned else 1 << 40
    if (tokens - 1) // recipe.data.seq_len < 2:  # as `WindowBatches` has it
        raise DataError(
            f"{recipe.data.train} holds {tokens:,} tokens to train on, too few for data.seq_len="
            f"{recipe.data.seq_len}; lower it or give more text"
        )


def _conclude(
    task: _Task, memory: dict[str, int], checkpoint: int, rehearsed: Rehearsed | None
) -> Forecast:
    """Put together what is known. Raises: RecipeError if the budget holds too few steps."""
    recipe, train, lora = task.recipe, task.recipe.train, task.recipe.train.lora
    groups = parameters(recipe.model)
    added = lora_parameters(recipe.model, lora.rank, lora.targets) if lora.rank else 0
    steps, each, scoring = train.steps or None, rehearsed and rehearsed.seconds_per_step, None
    if rehearsed and each:
        look, last = _scoring(task, rehearsed)
        every, budget = recipe.eval.every, duration(train.budget)
        looks = (steps or budget / each) / every if every else EVALUATIONS
        scoring = looks * look + last
        if not steps:
            steps = int((budget - looks * look) / each)
            if steps <= MEASURED:
                raise RecipeError(
                    f"train.budget={train.budget} holds {max(0, steps)} steps of {each:.2g} s, and"
                    f" {MEASURED} of them only measure; give it {30 * each:.0f}s or more, or set"
                    " train.steps"
                )
    made = Forecast(
        recipe=recipe,
        tuned=bool(task.tuned),
        parameters=groups,
        trained=added or sum(groups.values()),
        flops_per_token=train_flops(recipe.model, recipe.data.seq_len),
        text=task.text,
        tokens_per_step=task.tokens_per_step,
        memory=memory,
        checkpoint=checkpoint,
        rehearsed=rehearsed,
        steps=steps,
        scoring=scoring,
        notes=[],
    )
    return dataclasses.replace(made, notes=list(_notes(made)))


def _scoring(task: _Task, rehearsed: Rehearsed) -> tuple[float, float]:
    """Return the seconds of an evaluation on the way, and of the one at the end.

    A forward pass takes a third of a step's FLOPs, at the speed of the step.
    """
    recipe, text = task.recipe, task.text
    if text is None:
        return 0.0, 0.0
    context = recipe.data.seq_len
    share = forward_flops(recipe.model, context) / train_flops(recipe.model, context)
    each = share * rehearsed.seconds_per_step / rehearsed.tokens  # seconds per token scored
    limits = (recipe.eval.bytes, recipe.eval.final_bytes)
    some, all_ = (min(text.held_tokens, limit / text.bytes_per_token) for limit in limits)
    return each * some, each * all_ * (1 if task.tuned else recipe.eval.overlap)


def best_parameters(flops: float, flops_per_parameter: float) -> float:
    """Return the size that FLOPs are best spent on, if it sees 20 tokens per parameter.

    With N parameters, `flops_per_parameter` · N · 20 N FLOPs are spent.
    Source: Hoffmann et al. 2022, arXiv:2203.15556, section 3.
    """
    return (flops / (flops_per_parameter * TOKENS_PER_PARAMETER)) ** 0.5


def _notes(plan: Forecast) -> Iterator[str]:
    """Say what is unwise, and what would be wiser."""
    recipe, text = plan.recipe, plan.text
    schedule = recipe.train.schedule
    if plan.steps and schedule.name == "wsd":
        stable = (1 - schedule.decay) * plan.steps
        if schedule.warmup > stable:
            yield (
                f"the rate falls from step {stable:.0f} on, before the warm-up of"
                f" {schedule.warmup} steps is over; lower train.schedule.warmup"
            )
    optim, width = recipe.train.optim, recipe.model.d_model
    if optim.lr >= (1.0 if optim.name == "muon" else width**-0.5):
        yield (
            f"train.optim.lr={optim.lr:g} moves a matrix in a step by as much as it is large; it"
            " will learn, but far worse than at a tenth"
        )
    if not plan.tuned:
        yield from _size_notes(plan)
        yield from _vocabulary_notes(recipe.model.vocab_size, text)


def _size_notes(plan: Forecast) -> Iterator[str]:
    """Hold the size of the model, and how often the text is read, against what others found."""
    total = sum(plan.parameters.values())
    if plan.tokens and plan.flops:
        ratio = plan.tokens / total
        best = best_parameters(plan.flops, plan.flops_per_token / total)
        fit = f"this many FLOPs would feed {best:,.0f} parameters with {20 * best:,.0f} tokens"
        if ratio < TOKENS_PER_PARAMETER / NEAR:
            yield f"too large for the budget: {ratio:.1f} tokens per parameter, 20 are best; {fit}"
        elif ratio > TOKENS_PER_PARAMETER * NEAR:
            yield f"small for the budget: {ratio:.0f} tokens per parameter, 20 are best; {fit}"
    if plan.epochs and plan.epochs > REPEATS:
        yield (
            f"the text is read {plan.epochs:.1f} times; after {REPEATS} times repeating it teaches"
            " less and less: give more text, or fewer steps"
        )


def _vocabulary_notes(rows: int, text: Amount | None) -> Iterator[str]:
    """Hold the vocabulary against the text that has to teach it."""
    if text and text.tokens < SEEN * text.vocabulary:
        yield (
            f"{text.tokens:,} tokens show each of {text.vocabulary:,} entries of the vocabulary"
            f" {text.tokens / text.vocabulary:.0f} times on average; most should come"
            f" {SEEN} times: lower tokenizer.vocab_size"
        )
    if text and rows > text.vocabulary:
        yield f"model.vocab_size={rows} has rows that no token uses; leave it at 0"
