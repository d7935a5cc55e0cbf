"""`lm finetune`: adapt a checkpoint to rows of questions and answers, and see what it cost.

The run itself is that of pretraining (`engine/train/run.py`) with another objective. Before its
first step the longest batch is tried, so that memory runs out now or never; after its last, the
delivered model is held against its base: what it answers, and what it has forgotten.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from engine import checkpoint
from engine.adapter_config import MERGE, is_adapter, weights_digest
from engine.config import DataConfig, Recipe
from engine.data.corpora import open_corpus
from engine.data.samples import Sample, with_template
from engine.errors import RecipeError, ResourceError
from engine.finetune.answers import Question, TaskScore, answer, tally, usual_answers
from engine.finetune.forgetting import Forgetting, Text, compare, measure, take, take_tokens
from engine.finetune.objective import Finetuning
from engine.finetune.prepare import Side, Tuning, check_settings, own_text, read_rows
from engine.hardware import check_memory, keep_heap, pick_device, use_threads
from engine.matrices import refuse_quantized
from engine.memory import needed_memory
from engine.model.lora import add_lora
from engine.model.transformer import Transformer
from engine.peak import peak_memory
from engine.recipe import override
from engine.runs import find, hold
from engine.text.tokenizer import Tokenizer
from engine.train.evaluate import documents
from engine.train.job import Job
from engine.train.optim import Optimizers
from engine.train.precision import Precision
from engine.train.prepare import Doing, SavedRun, open_folder, predict_memory, ready_precision
from engine.train.run import Event, Finished, go
from engine.train.team import check_processes


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """The longest batch fits."""

    tokens: int
    peak_memory: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """How the questions of one side were answered: task by task, and last of all in all."""

    side: str  # valid: rows held out; test: kinds of question that are never trained
    before: list[TaskScore]
    after: list[TaskScore]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """The delivered model beside its base: what each answers, and other texts before and after."""

    answers: list[Answered]  # empty if no questions were asked
    texts: list[Forgetting]


def run(
    recipe: Recipe,
    folder: Path,
    cache: Path,
    checkpoints: Path,
    *,
    resume: bool = False,
    force: bool = False,
    stdin: BinaryIO | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Event | Probed | Compared]:
    """Finetune as `recipe` describes into `folder`, or continue or replace what is there.

    The base is looked for by folder, then by name under `checkpoints`.

    Raises: RecipeError if there is no base, or what `engine.train.pretrain.run` raises it for;
    DataError, CheckpointError, ResourceError, DivergenceError.
    """
    keep_heap()
    threads = use_threads(recipe.run.threads)
    device = pick_device(recipe.run.device)
    check_processes(recipe, device)
    base = find_base(recipe, folder, checkpoints)
    precision = yield from ready_precision(recipe, device, cache, finetune=True)
    # What is there is replaced when base, rows and memory are good; a pipe can be read only once.
    late = force and not resume and recipe.data.train != "-"
    with hold(folder):
        saved = None if late else open_folder(recipe, folder, resume, force)
        yield Doing(what=f"loading {recipe.train.base}")
        model, tokenizer = checkpoint.load_model(base, device, recipe.train.dropout)
        if recipe.data.chat != "plain":
            tokenizer = with_template(tokenizer)
        check_settings(recipe, model.config)
        # Chat templates may write the date: a resumed run has to find that of its beginning.
        began = saved.state["kept"]["now"] if saved else datetime.now().isoformat()
        now = datetime.fromisoformat(began)
        format, rule, sides = yield from read_rows(recipe, tokenizer, folder, stdin, now)
        text = yield from own_text(recipe, base, tokenizer, cache)
        tuning = Tuning(
            format=format,
            rule=rule,
            train=sides["train"],
            valid=sides["valid"],
            test=sides.get("test"),
            own_text=text,
        )
        given, recipe = recipe, override(recipe, model=base_sizes(model))
        objective = Finetuning(recipe, tuning, tokenizer, base, weights_digest(base))
        model = build_model(model, recipe, device, precision, saved)
        optimizer = Optimizers(model, recipe.train.optim)
        if saved:
            state = saved.folder / "state" / "optimizer.safetensors"
            optimizer.load_state(checkpoint.load_tensors(state, device))
        yield Doing(what="trying the longest batch")
        yield _probe(model, objective)
        if late:
            open_folder(given, folder, resume, force)
        job = Job(
            recipe=recipe,
            folder=folder,
            objective=objective,
            model=model,
            tokenizer=tokenizer,
            optimizer=optimizer,
            saved=saved,
            device=device,
            precision=precision,
            threads=threads,
            base=base if recipe.train.lora.rank else None,
            kept={"now": began},
            first_look=True,
        )
        for event in go(job, stop):
            if isinstance(event, Finished):
                yield from _compare(job, objective, event.model)
            yield event


def find_base(recipe: Recipe, folder: Path, checkpoints: Path) -> Path:
    """Find the checkpoint to start from, which the run must not be written over.

    Raises: RecipeError if none is named, or no rows, if it is an adapter, or lies in `folder`.
    """
    if not recipe.train.base:
        raise RecipeError("which model is to be finetuned? Give -m NAME, or train.base=NAME")
    if recipe.data.train == DataConfig().train and recipe.data.format != "text":
        raise RecipeError("which rows are to be learned? Give data.train=FILE")
    base = find(recipe.train.base, checkpoints).resolve()
    if is_adapter(base):
        raise RecipeError(f"{recipe.train.base} is an adapter; {MERGE.format(recipe.train.base)}")
    refuse_quantized(base, "be finetuned")
    own = folder.resolve()
    if own == base or own in base.parents or base in own.parents:
        raise RecipeError(f"{folder} holds the base; choose another folder with -o")
    return base


def base_sizes(model: Transformer) -> dict[str, object]:
    """Return the settings of a model by name."""
    config = model.config
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def build_model(
    model: Transformer,
    recipe: Recipe,
    device: torch.device,
    precision: Precision,
    saved: SavedRun | None,
) -> Transformer:
    """Make the base what is trained: itself, or LoRA beside it; or load what was saved of it.

    Raises: ResourceError if training it does not fit.
    """
    lora = recipe.train.lora
    if saved:
        model, _ = checkpoint.load_model(saved.folder, device, recipe.train.dropout)
    elif lora.rank:
        add_lora(model, lora, torch.Generator().manual_seed(recipe.run.seed))
    check_memory(
        needed_memory(predict_memory(recipe, precision)),
        device,
        "finetuning this model",
        "train.batch_size / train.accumulate or data.seq_len (or set train.recompute=true)",
    )
    precision.prepare(model)
    return model


def _probe(model: Transformer, objective: Finetuning) -> Probed:
    """Compute the gradient of the longest batch and throw it away.

    Raises: ResourceError if memory does not suffice.
    """
    tokens = 0
    model.train()
    try:
        for part in objective.mixture.longest():
            loss, _ = objective.loss(model, part.to(model.embed_tokens.weight.device))
            loss.backward()
            tokens = max(tokens, part.tokens_BT.numel())
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        if "alloc" not in str(error) and "memory" not in str(error):
            raise
        raise ResourceError(
            f"memory ran out on the longest batch, {tokens:,} tokens or more at a time; raise"
            " train.accumulate, lower data.seq_len, or set train.recompute=true"
        ) from None
    for parameter in model.parameters():
        parameter.grad = None
    return Probed(tokens=tokens, peak_memory=peak_memory())


def _compare(job: Job, objective: Finetuning, tuned: Transformer) -> Iterator[Doing | Compared]:
    """Hold the delivered model against its base."""
    tuning, tokenizer = objective.tuning, job.tokenizer
    yield Doing(what="comparing with the base")
    base, _ = checkpoint.load_model(objective.base, job.device)
    usual = usual_answers(_rows(tuning.train, tokenizer))
    answers = []
    for name, side in (("valid", tuning.valid), ("test", tuning.test)):
        if side and (asked := questions(side, tuning.format, tokenizer, job.recipe.eval.answers)):
            scores = [tally(answer(model, tokenizer, asked), usual) for model in (base, tuned)]
            answers.append(Answered(side=name, before=scores[0], after=scores[1]))
    context = job.recipe.eval.seq_len or job.recipe.data.seq_len
    found = []
    for text in texts(job.recipe, tuning, tokenizer, context):
        sides = [measure(model, tokenizer, text, context) for model in (base, tuned)]
        found.append(compare(text, *sides, seed=job.recipe.run.seed))
    yield Compared(answers=answers, texts=found)


def questions(side: Side, format: str, tokenizer: Tokenizer, most: int) -> list[Question]:
    """Choose rows, evenly, `most` at the most, to be answered word for word."""
    asked = [sample for sample in side.samples if _is_question(sample)] if most else []
    chosen = []
    for sample in asked[:: max(1, len(asked) // max(1, most))][:most]:
        chosen.append(
            Question(
                task=side.tasks.get(sample.where, format),
                ids=sample.ids[: int(sample.learned.argmax())].tolist(),
                expected=_answer(sample, tokenizer),
            )
        )
    return chosen


def _is_question(sample: Sample) -> bool:
    """Tell whether a sample is a prompt and then one answer, whole."""
    begins = np.flatnonzero(np.diff(sample.learned.astype(int)) == 1)  # nothing or a prompt before
    return len(begins) == 1 and begins[0] > 0 and not sample.cut


def _answer(sample: Sample, tokenizer: Tokenizer) -> str:
    """Return the text that a sample teaches, without its end."""
    ids = sample.ids[sample.learned].tolist()
    return tokenizer.decode([token for token in ids if token not in tokenizer.ends])


def _rows(side: Side, tokenizer: Tokenizer) -> Iterator[dict[str, str]]:
    """Yield task and answer of every row that is a question."""
    for sample in side.samples:
        if _is_question(sample):
            task = side.tasks.get(sample.where, "")
            yield {"task": task, "completion": _answer(sample, tokenizer)}


def texts(recipe: Recipe, tuning: Tuning, tokenizer: Tokenizer, context: int) -> Sequence[Text]:
    """Return what is scored before and after: the base's own held-out text, and eval.texts."""
    chosen = []
    if tuning.own_text:
        tokens = tuning.own_text.tokens("valid")
        name = f"{recipe.data.replay or 'what the base learned'}, held out"
        whole = list(documents(tokens, tokenizer.end_of_text))
        most = recipe.eval.bytes
        chosen.append(take_tokens(name, whole, tokenizer, context=context, max_bytes=most))
    for source in filter(None, map(str.strip, recipe.eval.texts.split(","))):
        corpus = open_corpus(source, recipe.data)
        chosen.append(take(corpus, tokenizer, context=context, max_bytes=recipe.eval.bytes))
    return chosen
