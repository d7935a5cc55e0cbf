"""Text as several kinds of tokenizer see it: pieces with their places, and where they differ."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cli.counting import Special, counters_of
from cli.inputs import not_utf8, printable
from cli.render import console, emit, emit_json, say
from engine.errors import DataError, RecipeError

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


def refuse(found: Sequence[tuple[int, str]]) -> None:
    """Raise DataError if special-looking text was found."""
    if found:
        at, name = min(found)
        raise DataError(
            f"character {at + 1} begins {name!r}, which looks like a control token; --special text"
            " takes it as ordinary text, parse as one token"
        )


def seer_of(model: str | None) -> Seer:
    """Return the tokenizer that -m names; without, that of the only checkpoint there is.

    Raises: RecipeError for a name that is not known, or one whose tokenizer is not published.
    """
    from cli.options import the_model

    if model is None or (model.endswith(".json") and not Path(model).exists()):
        from engine.text.tokenizer import load_tokenizer

        path = Path(model) if model else the_model(None, "tokenizer.json")
        return FromCheckpoint(str(path), load_tokenizer(path))
    counter = counters_of([model])[0]
    if counter.exactness != "exact":
        counter.encode("")  # says why not
    tokenizer = getattr(counter.source, "tokenizer", None)
    return FromCheckpoint(model, tokenizer) if tokenizer else FromCounter(counter)


def show_pieces(seer: Seer, data: bytes, pieces: Pieces, as_json: bool) -> None:
    """Show one tokenizer's pieces: coloured for a person, lines of offset, id, piece for a pipe."""
    shown = [piece.decode("utf-8", "replace") for _, piece in pieces]
    starts = starts_of(seer, pieces)
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
    say(f"{len(pieces):,} tokens · {len(data):,} bytes{ratio}")


def starts_of(seer: Seer, pieces: Pieces) -> list[int]:
    """Return where each piece begins, and where the last one ends, in bytes."""
    # Some tokenizers put a space before the text; it is in the first piece and not in the text.
    lead = len(seer.decode(token for token, _ in pieces)) - sum(len(p) for _, p in pieces)
    starts = list(itertools.accumulate((len(piece) for _, piece in pieces), initial=lead))
    starts[0] = 0
    return starts


@dataclass(frozen=True)
class Difference:
    """A stretch of text that not all tokenizers split alike: its start, and the pieces of each."""

    start: int
    pieces: tuple[tuple[bytes, ...], ...]


def differences(seers: Sequence[Seer], found: Sequence[Pieces]) -> Iterator[Difference]:
    """Yield the stretches, between places where all have a boundary, that are split differently."""
    places = [starts_of(seer, pieces) for seer, pieces in zip(seers, found, strict=True)]
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
    seers = [seer_of(model) for model in models]
    if len(seers) < 2:
        raise RecipeError("--compare needs two tokenizers: -m gpt-5 --compare gpt-4")
    found = [seer.pieces(data, special) for seer in seers]
    differing = list(differences(seers, found))
    if as_json:
        rows = [
            {"model": seer.name, "tokens": len(pieces), "vocab_size": seer.vocab_size}
            for seer, pieces in zip(seers, found, strict=True)
        ]
        places = [
            {"start": d.start, "pieces": [[_text(p) for p in pieces] for pieces in d.pieces]}
            for d in differing
        ]
        value = {"bytes": len(data), "tokenizers": rows, "differences": places}
        emit_json("tokenize/compare", value)
        return
    out = console()
    for seer, pieces in zip(seers, found, strict=True):
        ratio = f"{len(data) / len(pieces):.2f}" if pieces else "-"
        if out.is_terminal:
            out.print(f"[bold]{len(pieces):>9,}[/] tokens {ratio:>6} bytes/token", end="  ")
            out.print(seer.name, markup=False)
        else:
            emit(f"{len(pieces)}\t{ratio}\t{printable(seer.name)}")
    if out.is_terminal:
        _print_differences(out, seers, differing)
    say(f"split differently in {len(differing):,} places of {len(data):,} bytes")


def _print_differences(out, seers: Sequence[Seer], differing: Sequence[Difference]) -> None:
    """Print the first places that differ, a line per tokenizer, under their offset."""
    from rich.text import Text

    width = max(len(seer.name) for seer in seers)
    for difference in differing[:SHOWN]:
        out.print(f"[dim]at byte {difference.start:,}[/]")
        for seer, pieces in zip(seers, difference.pieces, strict=True):
            line = Text(f"  {seer.name:<{width}}  ")
            for index, piece in enumerate(pieces):
                line.append(_visible(_text(piece)), style=STYLES[index % len(STYLES)])
            out.print(line)
    if len(differing) > SHOWN:
        out.print(f"[dim]and {len(differing) - SHOWN:,} more; --json has all[/]")


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
