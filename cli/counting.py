"""Counting what was gathered, for one model or several: rows, sums, groups, the budget."""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cli.inputs import BinaryFile, FileDiff, Gathered, Reader, Source, printable
from engine.errors import DataError, EngineError, LimitError, RecipeError

if TYPE_CHECKING:
    from engine.text.counting import TokenCounter
    from engine.text.frames import Part

DEFAULT_MODEL = "gpt-5"
# A comma stands before three digits: what 1,5k is depends on the country.
NUMBER = r"((?:\d{1,3}(?:,\d{3})+|\d+(?:_\d+)*)(?:\.\d+)?)([kKmM]?)"
MOST_TOKENS = 10**15
NAMED = 3  # contributors, files left out: so many by name
LONGEST_SPECIAL = 128  # characters of special-looking text that a block may end in
Special = Literal["text", "parse", "error"]
By = Literal["file", "folder", "ext"]


@dataclass(frozen=True)
class Row:
    """One input, or a group of them: its size and its tokens for each model."""

    name: str
    bytes: int
    tokens: tuple[int, ...]
    replaced: int = 0  # runs of bytes that were not UTF-8
    specials: int = 0  # pieces of text that look like control tokens
    files: int = 1
    parts: tuple[tuple["Part", ...], ...] = ()  # of a conversation, for each model
    changed: tuple[tuple[int, int], ...] = ()  # tokens added and removed, for each model


@dataclass
class Report:
    """Everything that was counted, and what was not."""

    counters: Sequence["TokenCounter"]
    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    problems: list[EngineError] = field(default_factory=list)  # inputs that could not be read
    several: bool = False  # inputs were named, even if one is left
    requests: bool = False  # each row goes to the model alone, not all of them together

    @property
    def totals(self) -> tuple[int, ...]:
        """The tokens of all rows, for each model."""
        return tuple(sum(row.tokens[i] for row in self.rows) for i in range(len(self.counters)))

    def prompts(self, index: int) -> list[int]:
        """Return the tokens of each prompt for a model: of each request, or of all rows as one."""
        rows = [row.tokens[index] for row in self.rows]
        return rows if self.requests else [sum(rows)]

    def unknown(self, index: int) -> list[str]:
        """Return the kinds of parts that a model's count leaves out, because nobody knows them."""
        parts = [part for row in self.rows if row.parts for part in row.parts[index]]
        return sorted({part.kind for part in parts if part.tokens is None})


def number_of_tokens(word: str | None, option: str) -> int | None:
    """Read 8000, 200_000, 128k (thousands), 128K (1024), 1m or 1M.

    Raises: RecipeError if it is none of these.
    """
    if word is None:
        return None
    found = re.fullmatch(NUMBER, word.strip(), re.ASCII)
    unit = {"": 1, "k": 1000, "K": 1024, "m": 1000**2, "M": 1024**2}
    number = Decimal(re.sub("[_,]", "", found[1])) * unit[found[2]] if found else None
    if number is None or number > MOST_TOKENS:
        raise RecipeError(f"{option} {word[:40]!r}: not a number of tokens, like 8000 or 128k")
    return round(number)


def counters_of(models: Sequence[str] | None, default: str | None = None) -> list["TokenCounter"]:
    """Return a counter for each model of -m, which may also hold several, separated by commas.

    Raises: RecipeError with the nearest names for a model that is not known.
    """
    from cli.options import token_places
    from engine.text.counting import counter_for

    places = token_places()
    names = names_of(models or ([default] if default else []))
    return [counter_for(name, places=places) for name in names]


def names_of(models: Sequence[str]) -> list[str]:
    """Return the names in the words of -m, each once.

    Raises: RecipeError for a word that holds none.
    """
    names: list[str] = []
    for word in models:
        parts = [word] if os.path.exists(word) else [part.strip() for part in word.split(",")]
        if not any(parts):
            raise RecipeError(f"-m {word!r} names no model; gpt-5 would be one")
        names += filter(None, parts)
    return list(dict.fromkeys(names))


def class_of(counter: "TokenCounter") -> str:
    """Say how well a counter knows: exact, or estimated with its interval."""
    if counter.exactness == "exact":
        return "exact"
    return f"estimated ± {100 * counter.plus_minus:.0f} %"


def count_all(gathered: Gathered, counters: Sequence["TokenCounter"], special: Special) -> Report:
    """Count every source, several files at once; one that cannot be read does not stop the others.

    Raises: the error of the only source; DataError if every one is left out.
    """
    report = Report(
        counters,
        left_out=gathered.left_out,
        problems=list(gathered.problems),
        several=len(gathered.sources) + len(gathered.problems) > 1,
    )

    def _attempt(source: Source) -> Row | EngineError:
        try:
            return count_source(source, counters, special)
        except EngineError as error:
            return error

    parallel = _worth_threads(gathered.sources, counters)
    results = _side_by_side(_attempt, gathered.sources, parallel)
    for source, result in zip(gathered.sources, results, strict=True):
        if isinstance(result, Row):
            report.rows.append(result)
        elif isinstance(result, BinaryFile) and report.several:
            gathered.left_out["binary"].append(source.name)
        elif report.several:
            report.problems.append(result)
        else:
            raise result
    if not report.rows and report.problems:
        raise report.problems[0]
    if not report.rows and gathered.left_out:
        raise DataError(f"no text to count; {left_out_line(gathered.left_out)}")
    return report


def _worth_threads(sources: Sequence[Source], counters: Sequence["TokenCounter"]) -> bool:
    """Tell whether to count several files at once; counters that prepare for it do so now."""
    if len(sources) < 2:
        return False
    size = sum(s.path.stat().st_size for s in sources if s.path and os.path.isfile(s.path))
    return all([counter.expect(size) for counter in counters])


def _side_by_side(
    work: Callable[[Source], Row | EngineError], sources: Sequence[Source], parallel: bool
) -> Iterable[Row | EngineError]:
    """Work on many sources, with a thread per core if counting lets go of the interpreter."""
    if not parallel:
        return map(work, sources)
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(work, sources))


def count_source(source: Source, counters: Sequence["TokenCounter"], special: Special) -> Row:
    """Count one source for each model; models with the same tokenizer share the work.

    Raises: BinaryFile; DataError if it cannot be read or, where asked, looks special.
    """
    found: dict[tuple[object, ...], tuple[int, int]] = {}
    reader = None
    with source.open(again=len({_key(c) for c in counters}) > 1) as stream:
        for counter in counters:
            if _key(counter) in found:
                continue
            if reader:
                stream.seek(0)
            reader = Reader(source.name, stream, refuse_binary=source.path is not None)
            found[_key(counter)] = _count(reader, counter, special)
    assert reader
    return Row(
        source.name,
        reader.bytes,
        tuple(found[_key(counter)][0] for counter in counters),
        reader.replaced,
        max(specials for _, specials in found.values()),
    )


def _key(counter: "TokenCounter") -> tuple[object, ...]:
    """Return what counters that count alike have in common."""
    from engine.text.encodings import ENCODINGS

    published = counter.tokenizer in ENCODINGS
    return (counter.tokenizer, counter.factor) if published else (counter.name,)


def _count(reader: Reader, counter: "TokenCounter", special: Special) -> tuple[int, int]:
    """Return the tokens of a text, and how many of its pieces look like control tokens."""
    if special == "parse":
        return parsed("".join(reader), counter)
    watched = _Watched(reader, counter, special)
    return counter.count_stream(watched), watched.specials


class _Watched:
    """A stream of text in which special-looking text is found on the way."""

    def __init__(self, reader: Reader, counter: "TokenCounter", special: Special) -> None:
        self.reader, self.counter, self.refuse = reader, counter, special == "error"
        self.specials = 0

    def __iter__(self) -> Iterator[str]:
        tail = ""
        for block in self.reader:
            text = tail + block
            for _, end, name in self.counter.special_spans(text):
                self.specials += end > len(tail)
                if self.refuse:
                    raise DataError(
                        f"{printable(self.reader.name)}: holds {name!r}, which looks like a control"
                        " token; --special text counts it as ordinary text, parse as one token"
                    )
            tail = text[-LONGEST_SPECIAL:]
            yield block


def parsed(text: str, counter: "TokenCounter") -> tuple[int, int]:
    """Count text in which what looks like a control token is one; returns their number too."""
    tokens, at = 0, 0
    spans = counter.special_spans(text)
    for start, end, _ in spans:
        tokens += counter.count(text[at:start]) + 1
        at = end
    return tokens + counter.count(text[at:]), len(spans)


def count_diff(files: Sequence[FileDiff], counters: Sequence["TokenCounter"]) -> list[Row]:
    """Count a diff: a row for each file, with its added and its removed lines beside the text."""
    rows = []
    for file in files:
        data = file.text.encode("utf-8", "surrogateescape")
        row = count_source(Source(file.name, data=data), counters, "text")
        sides = tuple((c.count(file.added), c.count(file.removed)) for c in counters)
        rows.append(replace(row, changed=sides))
    return rows


def grouped(rows: Sequence[Row], by: By) -> list[Row]:
    """Return the rows added up by folder or by ending; by file they are as they are."""
    if by == "file":
        return list(rows)
    groups: dict[str, list[Row]] = {}
    for row in rows:
        path = Path(row.name)
        key = str(path.parent) if by == "folder" else path.suffix.lower() or "(no ending)"
        groups.setdefault(key, []).append(row)
    return [added(name, group) for name, group in groups.items()]


def added(name: str, rows: Sequence[Row]) -> Row:
    """Return the sum of rows."""
    return Row(
        name,
        sum(row.bytes for row in rows),
        tuple(map(sum, zip(*(row.tokens for row in rows), strict=True))),
        sum(row.replaced for row in rows),
        sum(row.specials for row in rows),
        sum(row.files for row in rows),
        changed=_sum_changes([row.changed for row in rows]),
    )


def _sum_changes(changes: Sequence[tuple[tuple[int, int], ...]]) -> tuple[tuple[int, int], ...]:
    """Return the tokens added and removed by all, for each model; nothing if one has none."""
    if not all(changes):
        return ()
    return tuple(
        (sum(a for a, _ in model), sum(r for _, r in model)) for model in zip(*changes, strict=True)
    )


def left_out_line(left_out: dict[str, list[str]]) -> str:
    """Say what was left out: `left out: 2 binary (a.png, b.png), 1 hidden (.env)`."""
    words = []
    for reason, names in left_out.items():
        some = ", ".join(map(printable, names[:NAMED])) + ", …" * (len(names) > NAMED)
        words.append(f"{len(names)} {reason} ({some})")
    return "left out: " + ", ".join(words)


def check_budget(report: Report, budget: int) -> None:
    """Raise LimitError if any model's count, at the upper end of an estimate, is over the budget.

    Where rows are requests of their own, each must fit. A count that leaves something out cannot
    be held to a budget, and does not pass.
    """
    for index, counter in enumerate(report.counters):
        tokens = max(report.prompts(index), default=0)
        most = counter.interval(tokens)[1]
        unknown = ", ".join(report.unknown(index))
        if most <= budget and not unknown:
            continue
        if most <= budget:
            raise LimitError(
                f"whether {counter.name} keeps to the budget of {budget:,} cannot be known: at"
                f" least {tokens:,} tokens, and not counted: {unknown}"
            )
        largest = sorted(report.rows, key=lambda row: -row.tokens[index])[:NAMED]
        names = ", ".join(f"{printable(row.name)} {row.tokens[index]:,}" for row in largest)
        counted = f"{tokens:,} tokens"
        if counter.plus_minus:
            counted = f"up to {most:,} tokens ({class_of(counter)})"
        raise LimitError(
            f"{counted} for {counter.name}, {most - budget:,} over the budget of {budget:,};"
            f" {'the largest requests' if report.requests else 'most of it'}: {names}"
        )


def on_terminal() -> bool:
    """Tell whether a person reads stdout."""
    return sys.stdout.isatty()
