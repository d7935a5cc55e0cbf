"""What `lm data check` shows: the figures of a set of rows, or one row as the model learns it."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from rich.text import Text

from cli.inputs import printable
from cli.render import console, emit, emit_json, say
from engine.config import Recipe
from engine.data.batches import SampleBatches
from engine.data.census import Census, Passing, Piece, explain, take_census
from engine.data.corpora import spool
from engine.data.examples import Example
from engine.data.formats import detect, examples
from engine.data.rows import open_rows
from engine.data.samples import Sample, Tally, make_samples, with_template
from engine.errors import DataError
from engine.finetune.prepare import hold_out
from engine.text.tokenizer import Tokenizer, load_tokenizer

BAR = 40  # characters of the longest bar
FEW = 0.05  # a smaller share of learned tokens is worth a word
UNLIMITED = 1 << 40  # tokens


@dataclass(kw_only=True)
class Side:
    """Rows of one side, counted, and as samples."""

    name: str
    passed: Passing
    tally: Tally = field(default_factory=Tally)
    samples: list[Sample] = field(default_factory=list)

    @property
    def census(self) -> Census:
        """The figures."""
        return take_census(self.passed, self.tally)


@dataclass(kw_only=True)
class Checked:
    """What there is to show."""

    recipe: Recipe
    tokenizer: Tokenizer
    model: Path
    format: str
    train: Side
    valid: Side | None = None
    row: Example | None = None  # the one that was asked for
    packed: list[Sample] = field(default_factory=list)  # of rows that are not held out
    batches: SampleBatches | None = None  # of these; None if there are none


def check(recipe: Recipe, model: Path, folder: Path, stdin: BinaryIO, row: str | None) -> Checked:
    """Read all rows as `lm finetune` does, but only count those that are too long.

    A copy of standard input is kept in `folder` while it is read.

    Raises: DataError naming the rows that are wrong, or if there is no row `row`.
    """
    data = recipe.data
    tokenizer = load_tokenizer(model)
    tokenizer = tokenizer if data.chat == "plain" else with_template(tokenizer)
    piped = spool(stdin, folder / "stdin") if data.train == "-" else None
    sides = open_rows(data.train, piped=piped)
    if data.valid:
        sides["valid"] = open_rows(data.valid)["train"]
    rows = sides["train"]
    format = data.format if data.format != "auto" else detect(rows, data.columns).format
    wanted: list[Example] = []
    watched = _watch(examples(rows, format, data.columns), row, wanted)
    train = _side(Side(name=rows.name, passed=Passing(watched)), recipe, tokenizer, format)
    checked = Checked(recipe=recipe, tokenizer=tokenizer, model=model, format=format, train=train)
    if "valid" in sides:
        others = examples(sides["valid"], format, data.columns)
        passed = Passing(others, train.passed.digests)
        side = Side(name=sides["valid"].name, passed=passed)
        checked.valid = _side(side, recipe, tokenizer, format)
    if row is not None and not wanted:
        raise DataError(f"{train.name}: no row {row} among its {train.tally.rows:,}")
    checked.row = wanted[0] if wanted else None
    _pack(checked)
    return checked


def _watch(
    examples: Iterator[Example], row: str | None, wanted: list[Example]
) -> Iterator[Example]:
    """Pass examples on and put the one that `row` names, as errors name it, into `wanted`."""
    for example in examples:
        if row is not None and not wanted and f":{example.where}".endswith(f":{row}"):
            wanted.append(example)
        yield example


def _side(side: Side, recipe: Recipe, tokenizer: Tokenizer, format: str) -> Side:
    """Make the samples of one side."""
    data = recipe.data
    stops = data.overlong == "error" or (data.overlong == "split" and format != "text")
    side.samples = list(
        make_samples(
            side.passed,
            tokenizer,
            chat=data.chat,
            learn=data.learn,
            limit=data.seq_len,
            overlong="drop" if stops else data.overlong,
            tally=side.tally,
        )
    )
    return side


def _pack(checked: Checked) -> None:
    """Pack the samples as the run will, those of rows that it holds out left aside."""
    passed, recipe = checked.train.passed, checked.recipe
    held = set()
    if checked.valid is None and len(passed.digests) > 1:
        held = hold_out(passed.digests, recipe.data.holdout)
    checked.packed = [s for s in checked.train.samples if passed.places[s.where] not in held]
    if checked.packed:
        checked.batches = SampleBatches(
            checked.packed,
            capacity=recipe.data.seq_len,
            packs=recipe.train.batch_size,
            parts=recipe.train.accumulate,
            seed=recipe.run.seed,
            packing=recipe.data.packing,
        )


def show(checked: Checked, as_json: bool) -> None:
    """Show the figures of all rows, and say on stderr what is worth a word."""
    if as_json:
        valid = checked.valid and dataclasses.asdict(checked.valid.census)
        value = {"source": checked.train.name, "model": str(checked.model)}
        value |= {"format": checked.format, "seq_len": checked.recipe.data.seq_len}
        value |= {"train": dataclasses.asdict(checked.train.census), "valid": valid}
        packs = checked.batches and len(checked.batches.bins)
        emit_json("data/check", value | {"packs": packs or 0})
    else:
        _print_side(checked, checked.train)
        if checked.valid:
            _print_side(checked, checked.valid)
        _print_packs(checked)
    for side in filter(None, (checked.train, checked.valid)):
        for warning in _warnings(checked, side.name, side.census):
            say(f"warning: {warning}")


def _print_side(checked: Checked, side: Side) -> None:
    """Print the figures of one side, a line each."""
    found, data = side.census, checked.recipe.data
    console().print(printable(side.name), style="bold", markup=False)
    emit(f"rows        {found.rows:,} of {checked.format}; {found.duplicates:,} duplicates")
    if lengths := found.lengths:
        emit(
            f"tokens      {lengths.least:,} to {lengths.most:,} a row, median {lengths.median:,},"
            f" 90 % ≤ {lengths.p90:,}, 99 % ≤ {lengths.p99:,}"
        )
        most = max(bar.rows for bar in lengths.bars)
        width = len(f"{lengths.most:,}")
        for bar in lengths.bars:
            drawn = "█" * -(-bar.rows * BAR // most)
            emit(f"  {bar.low:>{width},}–{bar.high:<{width},}  {drawn:<{BAR}}  {bar.rows:,}")
    emit(f"too long    {found.overlong:,} rows over data.seq_len={data.seq_len}{_fate(found)}")
    share = found.learned / max(1, found.tokens)
    emit(f"learned     {found.learned:,} of {found.tokens:,} tokens, {share:.1%}")
    emit(f"ends        learned in {found.stops:,} of {found.answers:,} answers")
    emit(f"lookalikes  {found.lookalikes:,} rows spell control tokens, which stay text")
    if side is checked.valid:
        emit(f"shared      {found.shared:,} rows are among those to train on")


def _fate(found: Census) -> str:
    """Say what became of rows that are too long."""
    words = {"dropped": found.dropped, "split": found.split, "cut": found.cut}
    said = [f"{number:,} {word}" for word, number in words.items() if number]
    tokens = f" by {found.cut_tokens:,} tokens" if found.cut else ""
    return f": {', '.join(said)}{tokens}" if said else ""


def _print_packs(checked: Checked) -> None:
    """Print how many sequences the rows fill."""
    if checked.batches:
        bins, data = checked.batches.bins, checked.recipe.data
        full = sum(len(sample.ids) for sample in checked.packed) / (len(bins) * data.seq_len)
        held = len(checked.train.samples) - len(checked.packed)
        aside = f"; {held:,} samples held out" if held else ""
        emit(f"packs       {len(bins):,} of up to {data.seq_len:,} tokens, {full:.1%} full{aside}")


def _warnings(checked: Checked, name: str, found: Census) -> Iterator[str]:
    """Say what would spoil the run or its figures."""
    data = checked.recipe.data
    if found.overlong and found.dropped and data.overlong in ("error", "split"):
        yield (
            f"{name}: {found.overlong:,} rows are too long, and data.overlong={data.overlong} stops"
            " the run; they are left out here"
        )
    if found.tokens and found.learned < FEW * found.tokens:
        yield f"{name}: only {found.learned / found.tokens:.1%} of the tokens are learned"
    if found.stops < found.answers:
        ends = ", ".join(checked.tokenizer.special.get(i, str(i)) for i in checked.tokenizer.ends)
        yield (
            f"{name}: {found.answers - found.stops:,} answers do not end with what generation stops"
            f" at ({ends or 'nothing'}); the model will not learn to stop there"
        )
    if found.shared:
        yield f"{name}: {found.shared:,} rows are trained on too; their score says little"


def show_row(checked: Checked, ids: bool, as_json: bool) -> None:
    """Show one row as it is learned, or what its parts are."""
    row = checked.row
    assert row is not None
    samples = [sample for sample in checked.train.samples if sample.where == row.where]
    left_out = not samples
    if left_out:
        data = checked.recipe.data
        options = {"chat": data.chat, "learn": data.learn, "limit": UNLIMITED}
        samples = list(make_samples([row], checked.tokenizer, overlong="error", **options))
    for sample in samples:
        pieces = explain(sample, checked.tokenizer)
        place = _place(checked, sample)
        if as_json:
            fate = place | {"left_out": left_out, "cut": sample.cut, "part": sample.part}
            shown = [dataclasses.asdict(piece) for piece in pieces]
            emit_json("data/check/row", {"row": row.where, **fate, "pieces": shown})
            continue
        _print_head(checked, sample, place, left_out)
        if ids:
            for number, piece in enumerate(pieces):
                mark = "learned" if piece.learned else "-"
                emit(f"{number:>6}  {piece.id:>7}  {mark:<7}  {piece.text!r}")
        else:
            _print_pieces(pieces)


def _place(checked: Checked, sample: Sample) -> dict[str, Any]:
    """Return the pack of a sample, where it begins there, and how many others are in it."""
    number = next((n for n, other in enumerate(checked.packed) if other is sample), None)
    if number is None or checked.batches is None:
        return {"pack": None, "offset": None, "beside": None}
    place = checked.batches.where(number)
    return {"pack": place.pack, "offset": place.offset, "beside": len(place.samples) - 1}


def _print_head(checked: Checked, sample: Sample, place: dict[str, Any], left_out: bool) -> None:
    """Print what became of a row, above it."""
    part = f" part {sample.part}" if sample.part else ""
    learned = int(sample.learned.sum())
    head = f"{printable(sample.where)}{part}: {len(sample.ids):,} tokens, {learned:,} learned"
    console().print(head, style="bold", markup=False)
    if sample.cut:
        emit(f"{sample.cut:,} tokens were cut to fit data.seq_len={checked.recipe.data.seq_len}")
    if left_out:
        emit(f"left out: longer than data.seq_len={checked.recipe.data.seq_len}")
    elif place["pack"] is None:
        emit(f"held out: its content's sha256 is 0 modulo {checked.recipe.data.holdout}")
    elif checked.batches is not None:
        emit(
            f"pack {place['pack'] + 1:,} of {len(checked.batches.bins):,}, from its token"
            f" {place['offset'] + 1:,} on, with {place['beside']:,} others"
        )


def _print_pieces(pieces: list[Piece]) -> None:
    """Print the text of a row: in colour on a terminal, else with marks around what is learned."""
    out = console()
    if out.is_terminal:
        line = Text()
        for (learned, control), group in groupby(pieces, lambda p: (p.learned, p.control)):
            colour = "green" if learned else "cyan" if control else "dim"
            text = _visible("".join(piece.text for piece in group))
            line.append(text, style=f"bold {colour}" if control else colour)
        out.print(line)
        return
    stretches = [
        (learned, "".join(piece.text for piece in group))
        for learned, group in groupby(pieces, lambda piece: piece.learned)
    ]
    emit("".join(f"⟦{text}⟧" if learned else text for learned, text in stretches))


def _visible(text: str) -> str:
    """Return text whose line ends are kept, and whose other odd characters are spelled out."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
