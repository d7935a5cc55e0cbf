"""From a recipe to everything the first step needs: folder, text, tokenizer, tokens, model.

Next on the arrow: `engine/train/pretrain.py`, which knows what to learn from them.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, get_args

import torch

from engine import checkpoint
from engine.config import FileFormat, Recipe
from engine.data.corpora import open_corpus, scan, spool
from engine.data.pack import PackProgress, Shards, pack, sides
from engine.errors import CheckpointError, RecipeError
from engine.hardware import check_memory
from engine.manifest import read_json, read_manifest
from engine.memory import needed_memory, training_memory
from engine.model.transformer import Transformer, initialise
from engine.recipe import dump, fields, flatten, load, override, to_dict
from engine.runs import TOKENIZER, create_run, has_begun, tidy
from engine.text.tokenizer import Tokenizer, learn, load_tokenizer
from engine.train.optim import Optimizers
from engine.train.precision import Precision, choose_precision, first_build


@dataclass(frozen=True, slots=True, kw_only=True)
class Doing:
    """A stage that takes a while has begun."""

    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """The text, ready to be learned from."""

    tokenizer: Tokenizer
    shards: Shards
    dropped: dict[str, int]  # files left out, by reason


@dataclass(frozen=True, slots=True)
class SavedRun:
    """What a run to be continued left behind."""

    folder: Path
    state: dict[str, Any]


def check_settings(recipe: Recipe) -> None:
    """Refuse settings that only finetuning follows. Raises: RecipeError naming the first."""
    values, usual = flatten(to_dict(recipe)), flatten(to_dict(Recipe()))
    for key, field in fields().items():
        foreign = key.startswith("train.lora.") or field.metadata["doc"].startswith("finetune:")
        if foreign and values[key] != usual[key]:
            raise RecipeError(f"{key} is for lm finetune, and lm train would not follow it")
    if recipe.data.format not in get_args(FileFormat):
        raise RecipeError(
            f"data.format={recipe.data.format} is for the rows of lm finetune; lm train takes"
            f" {', '.join(get_args(FileFormat))}"
        )


def ready_precision(
    recipe: Recipe, device: torch.device, cache: Path, *, finetune: bool
) -> Generator[Doing, None, Precision]:
    """Choose how to multiply, and say so before kernels are built. Raises: ResourceError."""
    if building := first_build(recipe.run, device, cache):
        yield Doing(what=building)
    return choose_precision(recipe.run, device, cache, finetune=finetune)


def open_folder(recipe: Recipe, folder: Path, resume: bool, force: bool) -> SavedRun | None:
    """Make the folder of a new run, or find the state to continue from.

    Raises: RecipeError if there is a run and neither `resume` nor `force` is set, or if its recipe
    differs.
    """
    written = folder / "recipe.yaml"
    if force or (not has_begun(folder) and not (resume and written.is_file())):
        if resume:
            raise RecipeError(f"{folder} holds no run to resume; leave --resume out to start one")
        _refuse_foreign(folder)
        create_run(folder, dump(recipe))
        return None
    if not resume:
        raise RecipeError(
            f"{folder} already holds a run; continue it with --resume, replace it with --force, or"
            " choose another folder with -o"
        )
    if not written.is_file():
        raise CheckpointError(f"{written} is missing: there is no telling what this run was")
    before = load(written.read_text(encoding="utf-8"), str(written))
    differences = [
        f"{key} was {old!r}, is {new!r}" for key, old, new in _differences(before, recipe)
    ]
    if differences:
        raise RecipeError(
            f"{folder} was started with another recipe ({'; '.join(differences)}); resume with the"
            " same one, or choose another folder with -o"
        )
    tidy(folder)
    last = folder / "last"
    if last.is_symlink() and not last.exists():
        raise CheckpointError(f"{last} names {last.readlink()}, which is gone; start over: --force")
    if not last.exists():
        return None  # stopped before its first checkpoint: start again, to the same result
    read_manifest(last, hash_up_to=math.inf)
    return SavedRun(last.resolve(), read_json(last / "state" / "state.json"))


def _refuse_foreign(folder: Path) -> None:
    """Refuse to clear a folder whose files carry our names but are the user's own.

    Raises: RecipeError naming the file.
    """
    if has_begun(folder):
        return
    written = folder / "recipe.yaml"
    found = [folder / name for name in TOKENIZER if (folder / name).exists()]
    foreign = found[0] if found and not written.exists() else None
    if written.exists():  # a failed start left exactly what `dump` writes
        text = written.read_text(encoding="utf-8", errors="replace")
        try:
            foreign = None if dump(load(text, str(written))) == text else written
        except RecipeError:
            foreign = written
    if foreign:
        raise RecipeError(f"{foreign} is not a run's and would be lost; choose another -o")


def _differences(a: Any, b: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, old, new) for every field in which two recipes differ."""
    for field in dataclasses.fields(a):
        key, old, new = f"{prefix}{field.name}", getattr(a, field.name), getattr(b, field.name)
        if dataclasses.is_dataclass(old):
            yield from _differences(old, new, f"{key}.")
        elif old != new and key not in ("run.name", "train.processes"):
            yield key, old, new


def prepare_data(
    recipe: Recipe, folder: Path, cache: Path, stdin: BinaryIO | None
) -> Generator[Doing | PackProgress, None, Data]:
    """Read the corpora, learn or load the tokenizer, tokenise; yields progress, returns `Data`."""
    data = recipe.data
    yield Doing(what=f"reading {data.train}")
    piped = spool(stdin, folder / "stdin") if data.train == "-" else None
    train = scan(open_corpus(data.train, data, piped), data.holdout)
    valid = scan(open_corpus(data.valid, data), data.holdout) if data.valid else None
    # The run's own copy wins: from the first step on, nothing outside the folder can change it.
    own = folder / "tokenizer.json"
    if own.is_file():
        tokenizer = load_tokenizer(own, exact=True)
    elif recipe.tokenizer.path:
        tokenizer = load_tokenizer(Path(recipe.tokenizer.path), exact=True)
    else:
        yield Doing(what=f"learning a tokenizer of {recipe.tokenizer.vocab_size:,} tokens")
        texts = (p.text for side, p in sides(train, valid, data.holdout) if side == "train")
        tokenizer = learn(texts, recipe.tokenizer)
    if not own.is_file():
        tokenizer.save(folder, recipe.model.max_seq_len)
    yield Doing(what="tokenising")
    shards = yield from pack(train, valid, tokenizer, data.holdout, cache)
    dropped = train[1].dropped + (valid[1].dropped if valid else Counter())
    return Data(tokenizer=tokenizer, shards=shards, dropped=dict(dropped))


def fill_vocabulary(recipe: Recipe, tokens: int) -> Recipe:
    """Give the model the tokenizer's vocabulary. Raises: RecipeError if it has a smaller one."""
    wish = recipe.model.vocab_size
    if wish and wish < tokens:
        raise RecipeError(
            f"model.vocab_size={wish} is smaller than the tokenizer's {tokens}; leave it at 0"
        )
    return override(recipe, model={"vocab_size": wish or tokens})


def predict_memory(recipe: Recipe, precision: Precision) -> dict[str, int]:
    """Say what each part of a run takes at its peak; the recipe has every size filled in."""
    return training_memory(
        recipe.model,
        recipe.train,
        recipe.train.batch_size // recipe.train.accumulate,
        recipe.data.seq_len,
        precision.name,
        ours=bool(precision.kernels),
    )


def build_model(
    recipe: Recipe, device: torch.device, precision: Precision, saved: SavedRun | None
) -> tuple[Transformer, Optimizers]:
    """Make the model and its optimizer: new from the seed, or exactly as they were saved."""
    check_memory(needed_memory(predict_memory(recipe, precision)), device, "training this model")
    if not saved:
        model = Transformer(recipe.model, recipe.train.dropout)
        initialise(model, torch.Generator().manual_seed(recipe.run.seed))
        model = model.to(device)
        precision.prepare(model)
        return model, Optimizers(model, recipe.train.optim)
    model, _ = checkpoint.load_model(saved.folder, device, recipe.train.dropout)
    if model.config != recipe.model:
        raise CheckpointError(f"{saved.folder}: its model is not the one of its recipe.yaml")
    precision.prepare(model)
    optimizer = Optimizers(model, recipe.train.optim)
    path = saved.folder / "state" / "optimizer.safetensors"
    optimizer.load_state(checkpoint.load_tensors(path, device))
    return model, optimizer
