"""Rows to examples, all of one format: found over every row, its columns renamed, its errors told.

    text      {"text"}
    prompt    {"prompt", "completion"}: texts, or lists of messages
    alpaca    {"instruction", "input", "output", "system", "history"}
    messages  {"messages", "tools"}: messages have role, content, and train or weight
    sharegpt  {"conversations"}: messages have from and value (either may be under either name)
    tokens    {"input_ids", "labels" | "mask"}

Nothing is guessed from the first row alone: `detect` reads them all, and `examples` finds every bad
row before it gives up. What one row means is in `engine/data/examples.py`. Next on the arrow:
`engine/data/samples.py`.
"""

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from engine.data.examples import CONVERT, MASKS, Example, is_share_gpt, type_of
from engine.data.rows import Row
from engine.errors import DataError, RecipeError
from engine.values import nearest

SHOWN = 5  # problems that are told; the others are counted
NEEDED = {  # columns of each format, in the order it is looked for
    "messages": ("messages",),
    "sharegpt": ("messages",),  # the first message tells it from those
    "prompt": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "tokens": ("input_ids",),
    "text": ("text",),
}
EXTRA = ("input", "system", "history", "tools", *MASKS, "attention_mask")
OTHER_NAMES = {  # what others call these columns
    "prompt": ("question", "query", "instruction", "input"),
    "completion": ("answer", "response", "output", "target", "chosen"),
    "instruction": ("prompt", "question"),
    "output": ("response", "answer", "completion"),
    "messages": ("conversation", "dialogue", "dialog", "chosen"),
    "text": ("content", "document"),
}
PREFERENCES = (("chosen", "rejected"), ("response_j", "response_k"))


@dataclass(frozen=True, slots=True)
class Detected:
    """The one format of all rows; counts of it, and of rows that are "unknown" or "unreadable"."""

    format: str
    counts: dict[str, int]


class BadRows(DataError):
    """Rows that cannot be used: the first problems, a line each, and how many more there are."""

    def __init__(self, problems: list[str], count: int) -> None:
        self.count = count
        more = count - len(problems)
        super().__init__(*problems, *([f"… and {more:,} more"] if more else []))

    def __str__(self) -> str:
        """Return one problem a line."""
        return "\n".join(str(DataError(line)) for line in self.args)


def detect(rows: Iterable[Row], columns: str = "") -> Detected:
    """Find the format of `rows`, looking at each.

    Raises: DataError if there is none, or more than one, or the rows are preferences.
    """
    reader = _Columns(columns)
    counts: Counter[str] = Counter()
    first: dict[str, tuple[str, dict[str, Any]]] = {}
    problems: list[str] = []
    for row in rows:
        try:
            value = reader.read(row)
        except DataError as error:
            counts["unreadable"] += 1
            problems += [str(error)] * (len(problems) < SHOWN)
            continue
        _refuse_preferences(value, row.where)
        format = _format_of(value, reader.paths)
        counts[format] += 1
        first.setdefault(format, (row.where, value))
    found = [format for format, _ in counts.most_common() if format in NEEDED]
    if len(found) > 1:
        most, least = found[0], found[-1]
        raise DataError(
            f"{first[least][0]}: looks like {least}, but {counts[most]:,} of {counts.total():,}"
            f" rows look like {most}; write all rows of a run alike"
        )
    if not found and problems:
        raise BadRows(problems, counts["unreadable"])
    if not found:
        where, value = first["unknown"]
        raise DataError(f"{where}: {_lacks(value, _closest(value))}{_header_hint(where)}")
    return Detected(found[0], dict(counts))


def examples(rows: Iterable[Row], format: str, columns: str = "") -> Iterator[Example]:
    """Yield what each row means; after a bad row, only look for more of them.

    Raises: BadRows after the last row if any were bad.
    """
    reader, convert = _Columns(columns), CONVERT[format]
    problems: list[str] = []
    bad = 0
    for row in rows:
        try:
            value = reader.read(row)
            if any(value.get(column) is None for column in NEEDED[format]):
                raise DataError(f"{row.where}: {_lacks(value, format)}")
            example = convert(value, row.where)
        except DataError as error:
            bad += 1
            problems += [str(error)] * (bad <= SHOWN)
            continue
        if not bad:
            yield example
    if bad:
        raise BadRows(problems, bad)
    for ours, theirs in reader.unseen.items():
        raise DataError(f'data.columns: no row has "{theirs}", which {ours} is read from')


class _Columns:
    """Our names for the columns of others, as `data.columns` gives them: ours=theirs,…"""

    def __init__(self, text: str) -> None:
        self.paths: dict[str, str] = {}
        known = {*EXTRA, *(name for names in NEEDED.values() for name in names)}
        for pair in filter(None, map(str.strip, text.split(","))):
            ours, _, theirs = (part.strip() for part in pair.partition("="))
            if not theirs:
                raise RecipeError(f"data.columns: {pair} is not like prompt=question")
            if ours in self.paths:
                raise RecipeError(f"data.columns: {ours} is named twice")
            if ours not in known:
                raise RecipeError(f"data.columns: no format reads {ours}{nearest(ours, known)}")
            self.paths[ours] = theirs
        self.unseen = dict(self.paths)

    def read(self, row: Row) -> dict[str, Any]:
        """Return a row under our names. Raises: DataError if it is no object or lacks a column."""
        if row.problem:
            raise DataError(f"{row.where}: {row.problem}")
        if not isinstance(row.value, dict):
            raise DataError(
                f'{row.where}: a row is an object like {{"text": "…"}}, not {type_of(row.value)}'
            )
        found = {k: v for k, v in row.value.items() if k not in self.paths.values()}
        for ours, theirs in self.paths.items():
            try:
                found[ours] = _follow(row.value, theirs)
                self.unseen.pop(ours, None)
            except (LookupError, TypeError, ValueError):
                if ours not in EXTRA:  # those may be left out
                    near = nearest(theirs, row.value)
                    what = f'{row.where}: no "{theirs}", which data.columns reads {ours} from'
                    raise DataError(what + near) from None
        if found.get("messages") is None and "conversations" in found:
            found["messages"] = found.pop("conversations")
        return found


def _follow(value: Any, path: str) -> Any:
    """Return what a dotted path leads to: a key that has dots, or keys and places in lists."""
    if isinstance(value, dict) and path in value:
        return value[path]
    for part in path.split("."):
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


def _format_of(row: dict[str, Any], renamed: Iterable[str]) -> str:
    """Return the format of a row; one that a column was renamed for comes before others."""
    renamed = set(renamed)
    for format in sorted(NEEDED, key=lambda name: renamed.isdisjoint(NEEDED[name])):
        if all(row.get(column) is not None for column in NEEDED[format]):
            if format == "messages" and is_share_gpt(_first_message(row["messages"])):
                return "sharegpt"
            return format
    return "unknown"


def _first_message(talk: Any) -> Any:
    if isinstance(talk, str):
        try:
            talk = json.loads(talk)
        except (ValueError, RecursionError):
            return None
    return talk[0] if isinstance(talk, list) and talk else None


def _refuse_preferences(row: dict[str, Any], where: str) -> None:
    """Raise DataError for a row that compares or judges answers: not all are to be learned."""
    pair = next((p for p in PREFERENCES if all(row.get(name) is not None for name in p)), None)
    judged = isinstance(row.get("label"), bool) and row.get("completion") is not None
    if pair:
        ours = "messages" if isinstance(row[pair[0]], list) else "completion"
        raise DataError(
            f'{where}: "{pair[0]}" and "{pair[1]}" are preferences, which alignment learns from;'
            f" to finetune on the first alone: data.columns={ours}={pair[0]}"
        )
    if judged:
        raise DataError(
            f'{where}: "label" says which answers are good, which alignment learns from; to'
            " finetune on all of them: data.format=prompt"
        )


def _closest(row: dict[str, Any]) -> str:
    """Return the format that a row comes nearest to, "" if to none."""

    scores = {}
    for format, columns in NEEDED.items():
        there = [1 if c in row else 0.9 * bool(_other_name(row, c)) for c in columns]
        scores[format] = sum(there) / len(columns)
    best = max(scores, key=lambda format: scores[format])
    return best if scores[best] else ""


def _other_name(row: dict[str, Any], column: str) -> str:
    """Return the column of a row that is probably meant to be `column`, "" if there is none."""
    has = [name for name, value in row.items() if value is not None]
    known = [name for name in OTHER_NAMES.get(column, ()) if name in has]
    return next(iter(known or difflib.get_close_matches(column, has, 1, 0.75)), "")


def _lacks(row: dict[str, Any], format: str) -> str:
    """Say which columns of a format a row lacks, what it has, and how to name them."""
    has = ", ".join(f'"{name}"' for name, value in row.items() if value is not None) or "nothing"
    if not format:
        wanted = " | ".join(", ".join(columns) for columns in dict.fromkeys(NEEDED.values()))
        return f"columns are {has}, of no format; expected {wanted} (data.columns renames)"
    lacking = [column for column in NEEDED[format] if row.get(column) is None]
    what = " and ".join(f'"{c}" is null' if c in row else f'no "{c}"' for c in lacking)
    names = {column: _other_name(row, column) for column in lacking}
    hint = ",".join(f"{ours}={theirs}" for ours, theirs in names.items())
    return f"{what}; the row has {has}" + (f": data.columns={hint}" if all(names.values()) else "")


def _header_hint(where: str) -> str:
    """Say what a CSV file begins with, if that may be what it lacks."""
    is_csv = re.search(r"\.[ct]sv(\.gz)?:\d+$", where, re.IGNORECASE)
    return "; the first line of a CSV file names the columns" if is_csv else ""
