"""From a finetuning recipe to what it learns from: rows as samples, and the base's own text.

Next on the arrow: `engine/finetune/run.py`, which makes a run of it.
"""

import math
from collections.abc import Generator, Iterator, Set
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from engine.config import DataConfig, ModelConfig, Recipe, TokenizerConfig
from engine.data.corpora import open_corpus, scan, spool
from engine.data.examples import Example
from engine.data.formats import detect, examples
from engine.data.pack import PackProgress, Shards, pack
from engine.data.rows import Rows, open_rows
from engine.data.samples import Sample, Tally, make_samples
from engine.errors import DataError, RecipeError
from engine.recipe import load
from engine.text.tokenizer import Tokenizer
from engine.train.prepare import Doing

FILES = ("jsonl", "parquet")  # kinds of file, which lm train can be told; rows are told from those


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """Rows of one side, as the model reads them."""

    samples: list[Sample]
    tally: Tally
    tasks: dict[str, str]  # place of a row → the kind of question it says it is, if it says so


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """The rows, ready to be learned from."""

    format: str
    rule: str  # how the held-out rows were chosen, in words
    train: Side
    valid: Side
    test: Side | None  # rows of kinds that are never trained, if the data has any
    own_text: Shards | None  # what the base was trained on, or what data.replay names


def check_settings(recipe: Recipe, base: ModelConfig) -> None:
    """Refuse settings that finetuning would not follow. Raises: RecipeError naming the first."""
    if recipe.model not in (ModelConfig(), base):
        raise RecipeError("model.* comes from the base when finetuning; leave it out")
    if recipe.tokenizer != TokenizerConfig():
        raise RecipeError("tokenizer.* comes from the base when finetuning; leave it out")
    if recipe.data.column != DataConfig().column:
        raise RecipeError(
            f"data.column={recipe.data.column} is for lm train; rename the fields of rows with"
            f" data.columns=text={recipe.data.column}"
        )
    if recipe.data.format in FILES:
        raise RecipeError(
            f"data.format={recipe.data.format} is a kind of file; finetuning wants a kind of row:"
            " auto, text, prompt, alpaca, messages, sharegpt or tokens"
        )
    lora = recipe.train.lora
    if lora.rank and recipe.run.dtype == "int8":
        raise RecipeError(
            "run.dtype=int8 multiplies matrices that learn in 8 bits; with train.lora.rank="
            f"{lora.rank} they are frozen: use run.dtype=auto (train.lora.base=int8 saves memory)"
        )
    longest = max(recipe.data.seq_len, recipe.eval.seq_len)
    if longest > base.max_seq_len:
        raise RecipeError(
            f"data.seq_len or eval.seq_len is {longest}; the base reads {base.max_seq_len} tokens"
        )


def read_rows(
    recipe: Recipe,
    tokenizer: Tokenizer,
    folder: Path,
    stdin: BinaryIO | None,
    now: datetime,
) -> Generator[Doing, None, tuple[str, str, dict[str, Side]]]:
    """Read all rows and make samples of them; `now` is the clock of chat templates.

    Returns: the format of the rows, how some were held out, and the sides train, valid and
    perhaps test.
    Raises: DataError naming the rows that are wrong.
    """
    data = recipe.data
    yield Doing(what=f"reading {data.train}")
    piped = spool(stdin, folder / "stdin") if data.train == "-" else None
    sides = open_rows(data.train, piped=piped)
    if data.valid:
        sides["valid"] = open_rows(data.valid)["train"]
    format = data.format if data.format != "auto" else detect(sides["train"], data.columns).format
    if "valid" in sides:
        rule, held = f"all of {sides['valid'].name}", None
    elif format == "text" and _is_one(examples(sides["train"], format, data.columns)):
        whole = _side(examples(sides["train"], format, data.columns), recipe, tokenizer, now)
        return format, *_one_text(whole, data.holdout)
    else:
        held = _held_out(sides["train"], format, data)
        rule = f"rows whose content's sha256 is 0 modulo {data.holdout}"
        rule = rule if len(held) > 1 else "the row whose content's sha256 is the lowest"
    yield Doing(what="tokenising")
    made = {}
    for name in ("train", "valid", "test"):
        if name in sides or name == "valid":
            rows = examples(sides.get(name, sides["train"]), format, data.columns)
            if held is not None and name != "test":
                rows = _chosen(rows, held, name == "valid")
            made[name] = _side(rows, recipe, tokenizer, now)
    for name in ("train", "valid"):
        if not made[name].tally.learned:
            raise DataError(f"{data.train}: no token of the {name} side is learned; see data.learn")
    return format, rule, made


def _is_one(rows: Iterator[Example]) -> bool:
    return len(list(islice(rows, 2))) == 1


def _one_text(side: Side, one_in: int) -> tuple[str, dict[str, Side]]:
    """Hold out the end of the one text there is. Raises: DataError if it is too short."""
    cut = -max(1, round(len(side.samples) / one_in))
    if len(side.samples) < 2:
        raise DataError("one text of one sequence: give more, or data.overlong=split with a longer")
    ends = {"train": side.samples[:cut], "valid": side.samples[cut:]}
    made = {}
    for name, samples in ends.items():
        tally = replace(
            side.tally,
            samples=len(samples),
            tokens=sum(len(sample.ids) for sample in samples),
            learned=sum(int(sample.learned.sum()) for sample in samples),
        )
        made[name] = replace(side, samples=samples, tally=tally)
    return f"the last 1/{one_in} of the one text", made


def _held_out(rows: Rows, format: str, data: DataConfig) -> set[str]:
    """Choose rows by their content, so that a row never changes sides; one at the least."""
    digests = {example.digest for example in examples(rows, format, data.columns)}
    if len(digests) < 2:
        raise DataError(
            f"{data.train}: {len(digests)} distinct rows cannot be trained on and held out too;"
            " give more, or others as data.valid"
        )
    return hold_out(digests, data.holdout)


def hold_out(digests: Set[str], one_in: int) -> set[str]:
    """Return the digests of rows to hold out: one in so many, but not all and at least one."""
    held = {digest for digest in digests if int(digest, 16) % one_in == 0}
    return held if 0 < len(held) < len(digests) else {min(digests)}


def _chosen(rows: Iterator[Example], held: set[str], wanted: bool) -> Iterator[Example]:
    return (example for example in rows if (example.digest in held) == wanted)


def _side(rows: Iterator[Example], recipe: Recipe, tokenizer: Tokenizer, now: datetime) -> Side:
    """Make the samples of one side."""
    data, tally, tasks = recipe.data, Tally(), dict[str, str]()

    def watched() -> Iterator[Example]:
        """Note the task of each row on its way."""
        for example in rows:
            if example.task:
                tasks[example.where] = example.task
            yield example

    samples = list(
        make_samples(
            watched(),
            tokenizer,
            chat=data.chat,
            learn=data.learn,
            limit=data.seq_len,
            overlong=data.overlong,
            now=now,
            tally=tally,
        )
    )
    return Side(samples=samples, tally=tally, tasks=tasks)


def own_text(
    recipe: Recipe, base: Path, tokenizer: Tokenizer, cache: Path
) -> Generator[Doing | PackProgress, None, Shards | None]:
    """Tokenise what must not be forgotten: data.replay, or the text that the base learned.

    Returns: its shards, or None if the base came from elsewhere or its text is gone.
    Raises: DataError if data.replay cannot be read, or is needed and there is none.
    """
    data = DataConfig(train=recipe.data.replay, holdout=recipe.data.holdout)
    if not recipe.data.replay:
        found = _data_of(base)
        if found is None:
            if recipe.train.replay:
                raise DataError(
                    f"train.replay={recipe.train.replay:g} mixes in what {base} was trained on,"
                    " which is not known or was piped in; name a text: data.replay=pydoc"
                )
            return None
        data = found
    yield Doing(what=f"reading {data.train}")
    try:
        train = scan(open_corpus(data.train, data), data.holdout)
        valid = scan(open_corpus(data.valid, data), data.holdout) if data.valid else None
    except DataError:
        if recipe.data.replay or recipe.train.replay:
            raise
        return None  # it was there once; the run goes on without its figures, and says so
    return (yield from pack(train, valid, tokenizer, data.holdout, cache))


def _data_of(base: Path) -> DataConfig | None:
    """Return the text that a checkpoint of ours was trained on."""
    written = base / "recipe.yaml"
    if not written.is_file():
        return None
    recipe = load(written.read_text(encoding="utf-8"), str(written))
    data = recipe.data
    if recipe.train.base:  # tuned before: what it had to keep then, it has to keep now
        return replace(DataConfig(), train=data.replay) if data.replay else None
    return None if data.train == "-" or data.valid == "-" else data


def replay_rows(recipe: Recipe, packs: list[int]) -> int:
    """Return how many windows of replayed text a batch of these packs, in tokens, gets."""
    share = recipe.train.replay
    tokens = recipe.train.batch_size * sum(packs) / len(packs)
    return math.ceil(tokens * share / (1 - share) / recipe.data.seq_len) if share else 0
