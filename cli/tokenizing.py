"""Text as several kinds of tokenizer see it: pieces with their places, and where they differ."""

import codecs
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from cli.counting import DEFAULT_MODEL, Special, class_of, counters_of
from cli.inputs import not_utf8, printable
from cli.render import console, emit, emit_json, say
from engine.errors import CheckpointError, DataError, RecipeError

if TYPE_CHECKING:
    from engine.text.counting import TokenCounter
    from engine.text.tokenizer import Tokenizer

STYLES = ("black on bright_cyan", "black on bright_yellow", "black on bright_green")
SHOWN = 20  # places where tokenizers differ
Pieces = list[tuple[int, bytes]]


class Seer(Protocol):
    """A tokenizer that can show its pieces."""

    name: str

    @property
    def vocab_size(self) -> int:
        """The number of tokens, special ones too."""
        ...

    def pieces(self, data: bytes, special: Special) -> Pieces:
        """Return the tokens of `data`, with their bytes."""
        ...

    def decode(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of `ids`."""
        ...

    def places(self, data: bytes, starts: Sequence[int]) -> list[int]:
        """Return where in `data` lie these places of what it was read as."""
        ...


class FromCheckpoint:
    """A tokenizer from a file; bytes that are not UTF-8 become tokens of one byte."""

    def __init__(self, name: str, tokenizer: "Tokenizer") -> None:
        self.name, self.tokenizer = name, tokenizer
        self.vocab_size = tokenizer.vocab_size

    def pieces(self, data: bytes, special: Special) -> Pieces:
        """Return the tokens of `data`, with their bytes."""
        if special == "error":
            text = data.decode("utf-8", "replace")
            refuse([(s, n) for n in self.tokenizer.special.values() if (s := text.find(n)) >= 0])
        if special == "parse":
            ids = self.tokenizer.encode_template(data.decode("utf-8", "replace"))
        else:
            ids = self.tokenizer.encode_bytes(data)
        return [(token, self.tokenizer.pieces[token]) for token in ids]

    def decode(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of `ids`."""
        return self.tokenizer.decode_bytes(ids)

    def places(self, data: bytes, starts: Sequence[int]) -> list[int]:
        """Return the same places: every byte is read."""
        return list(starts)


class FromCounter:
    """A published encoding; bytes that are not UTF-8 become U+FFFD, as on the way to its model."""

    def __init__(self, counter: "TokenCounter") -> None:
        from engine.text.merging import BytePairs

        self.name, self.counter = counter.name, counter
        size = counter.source.ranks.size if isinstance(counter.source, BytePairs) else 0
        self.vocab_size = max([size, *(token + 1 for token in counter.source.special.values())])

    def pieces(self, data: bytes, special: Special) -> Pieces:
        """Return the tokens of `data`, with their bytes."""
        text = data.decode("utf-8", "replace")
        if (lost := text.count("\ufffd") - data.count("\ufffd".encode())) > 0:
            say(f"{not_utf8(lost)}: U+FFFD instead")
        if special == "text":
            return self.counter.pieces(text)
        spans = self.counter.special_spans(text)
        if special == "error":
            refuse([(start, name) for start, _, name in spans])
        found: Pieces = []
        at = 0
        for start, end, name in spans:
            found += self.counter.pieces(text[at:start])
            found.append((self.counter.source.special[name], name.encode()))
            at = end
        return found + self.counter.pieces(text[at:])

    def decode(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of `ids`."""
        return self.counter.decode_bytes(ids)

    def places(self, data: bytes, starts: Sequence[int]) -> list[int]:
        """Return the places in `data`, where U+FFFD may stand for fewer bytes or more."""
        return originals(data, starts)


def originals(data: bytes, starts: Sequence[int]) -> list[int]:
    """Return the places in `data` of places in its text, where bytes that are none are U+FFFD.

    A place inside of such a character is where its bytes begin.
    """
    lost: list[tuple[int, int]] = []  # where they begin, and end, in `data`

    def _note(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeDecodeError)
        lost.append((error.start, error.end))
        return "\ufffd", error.end

    codecs.register_error("lm-note", _note)
    data.decode("utf-8", "lm-note")
    found, shift, pending = [], 0, iter([*lost, (len(data) + 1, 0)])
    begin, end = next(pending)
    for start in starts:
        while start + shift >= begin + 3:
            shift += end - begin - 3
            begin, end = next(pending)
        found.append(min(start + shift, begin))
    return found


def refuse(found: Sequence[tuple[int, str]]) -> None:
    """Raise DataError if special-looking text was found."""
    if found:
        at, name = min(found)
        raise DataError(
            f"character {at + 1} begins {name!r}, which looks like a control token; --special text"
            " takes it as ordinary text, parse as one token"
        )


def seer_of(model: str | None) -> Seer:
    """Return the tokenizer that -m names; without, that of the only checkpoint, or the default.

    Raises: RecipeError for a name that is not known, or one whose tokenizer is not published.
    """
    from cli.options import CHECKPOINTS, the_model
    from engine.runs import list_runs

    if model is None:
        only = len(list_runs(CHECKPOINTS)) == 1
        model = str(the_model(None, "tokenizer.json")) if only else DEFAULT_MODEL
        say(f"for {printable(model)}, as no -m says")
    if model.endswith(".json") and not os.path.exists(model):
        raise CheckpointError(f"{model}: no such file")
    counter = counters_of([model])[0]
    if counter.exactness != "exact":
        counter.encode("")  # says why not
    return _seer(counter)


def _seer(counter: "TokenCounter") -> Seer:
    tokenizer = getattr(counter.source, "tokenizer", None)
    return FromCheckpoint(counter.name, tokenizer) if tokenizer else FromCounter(counter)


def show_pieces(seer: Seer, data: bytes, pieces: Pieces, as_json: bool) -> None:
    """Show one tokenizer's pieces: coloured for a person, lines of offset, id, piece for a pipe."""
    shown = [piece.decode("utf-8", "replace") for _, piece in pieces]
    starts = starts_of(seer, pieces, data)
    if as_json:
        rows = [
            {"id": token, "piece": text, "start": start, "end": end}
            for (token, _), text, (start, end) in zip(
                pieces, shown, itertools.pairwise(starts), strict=True
            )
        ]
        counts = {"tokens": len(pieces), "bytes": len(data), "vocab_size": seer.vocab_size}
        emit_json("tokenize", counts | {"pieces": rows})
        return
    out = console()
    if out.is_terminal:
        _coloured(out, [token for token, _ in pieces], shown)
    else:
        for start, (token, _), text in zip(starts, pieces, shown, strict=False):
            emit(f"{start}\t{token}\t{text!r}")
    ratio = f" · {len(data) / len(pieces):.2f} bytes/token" if pieces else ""
    tokens = "token" if len(pieces) == 1 else "tokens"
    say(f"{len(pieces):,} {tokens} · {len(data):,} bytes{ratio}")


def starts_of(seer: Seer, pieces: Pieces, data: bytes) -> list[int]:
    """Return where each piece begins, and where the last one ends, in bytes."""
    # Some tokenizers put a space before the text; it is in the first piece and not in the text.
    lead = len(seer.decode(token for token, _ in pieces)) - sum(len(p) for _, p in pieces)
    starts = list(itertools.accumulate((len(piece) for _, piece in pieces), initial=lead))
    starts[0] = 0
    return seer.places(data, starts)


@dataclass(frozen=True)
class Difference:
    """A stretch of text that not all tokenizers split alike: its start, and the pieces of each."""

    start: int
    pieces: tuple[tuple[bytes, ...], ...]


def differences(
    seers: Sequence[Seer], found: Sequence[Pieces], data: bytes
) -> Iterator[Difference]:
    """Yield the stretches, between places where all have a boundary, that are split differently."""
    places = [starts_of(seer, pieces, data) for seer, pieces in zip(seers, found, strict=True)]
    shared = sorted(set.intersection(*map(set, places)))
    at = [0] * len(seers)
    for start, end in itertools.pairwise(shared):
        stretch = []
        for index, starts in enumerate(places):
            first = at[index]
            while starts[at[index]] < end:
                at[index] += 1
            stretch.append(tuple(piece for _, piece in found[index][first : at[index]]))
        if len({tuple(map(len, pieces)) for pieces in stretch}) > 1:
            yield Difference(start, tuple(stretch))


def compare(models: Sequence[str], data: bytes, special: Special, as_json: bool) -> None:
    """Show several tokenizers on one text: how many tokens each needs, and where they differ."""
    counters = counters_of(models)
    if len(counters) < 2:
        raise RecipeError("--compare needs two tokenizers: -m gpt-5 --compare gpt-4")
    seers = [_seer(counter) for counter in counters if counter.exactness == "exact"]
    found = [seer.pieces(data, special) for seer in seers]
    differing = list(differences(seers, found, data)) if len(seers) > 1 else []
    exact = dict(zip((s.name for s in seers), zip(seers, found, strict=True), strict=True))
    rows: list[dict[str, object]] = []
    for counter in counters:
        if counter.name in exact:
            seer, pieces = exact[counter.name]
            row = {"tokens": len(pieces), "vocab_size": seer.vocab_size}
        else:  # nobody has published where its tokens begin
            row = {"tokens": counter.count(data.decode("utf-8", "replace"))}
        rows.append({"model": counter.name, **row, "class": class_of(counter)})
    if as_json:
        shown = [
            {"start": d.start, "pieces": [[_text(p) for p in pieces] for pieces in d.pieces]}
            for d in differing
        ]
        value = {"bytes": len(data), "tokenizers": rows, "differences": shown}
        emit_json("tokenize/compare", value)
        return
    _print_compared(rows, len(data))
    _print_differences(seers, differing)
    if len(seers) > 1:
        places = "place" if len(differing) == 1 else "places"
        say(f"split differently in {len(differing):,} {places} of {len(data):,} bytes")


def _print_compared(rows: Sequence[dict[str, Any]], size: int) -> None:
    """Print a line per tokenizer: tokens, bytes per token, name, and the class of an estimate."""
    out = console()
    for row in rows:
        tokens, estimate = row["tokens"], row["class"] != "exact"
        ratio = f"{size / tokens:.2f}" if tokens else "-"
        if out.is_terminal:
            out.print(f"[bold]{tokens:>9,}[/] tokens {ratio:>6} bytes/token", end="  ")
            out.print(row["model"] + f" ({row['class']})" * estimate, markup=False)
        else:
            name = printable(row["model"])
            emit("\t".join([str(tokens), ratio, name, *[row["class"]] * estimate]))


def _print_differences(seers: Sequence[Seer], differing: Sequence[Difference]) -> None:
    """Print the first places that differ, a line per tokenizer: offset, name, ‹pieces›."""
    out, width = console(), max((len(seer.name) for seer in seers), default=0)
    for difference in differing[:SHOWN]:
        for seer, pieces in zip(seers, difference.pieces, strict=True):
            marked = "".join(f"‹{_visible(_text(piece))}›" for piece in pieces)
            if out.is_terminal:
                line = f"  at {difference.start:<6,} {seer.name:<{width}}  {marked}"
                out.print(line, markup=False)
            else:
                emit(f"{difference.start}\t{printable(seer.name)}\t{marked}")
    if len(differing) > SHOWN:
        say(f"and {len(differing) - SHOWN:,} more; --json has all")


def _text(piece: bytes) -> str:
    return piece.decode("utf-8", "backslashreplace")  # half a character shows as its bytes


def _visible(text: str) -> str:
    text = text.replace("\t", "→").replace("\r", "␍").replace("\n", "⏎")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _coloured(out, tokens: list[int], shown: list[str]) -> None:
    """Print the pieces on alternating backgrounds, then their ids in the same colours."""
    from rich.text import Text

    line, ids = Text(), Text()
    for index, (token, piece) in enumerate(zip(tokens, shown, strict=True)):
        ids.append(str(token), style=STYLES[index % len(STYLES)]).append(" ")
        ends = piece.count("\n")
        line.append(_visible(piece) + "\n" * bool(ends), style=STYLES[index % len(STYLES)])
    out.print(line)
    out.print(ids)
