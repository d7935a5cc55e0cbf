"""Cut text to a number of tokens: streams into blocks, documents to a limit, books into chunks.

A prefix of a text has other tokens than the text: "internationali" takes more than
"international". So a place is first found from the tokens and then tried out, a few characters
further on and back, by counting again from the last place that no token can span.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, islice
from typing import Literal, Protocol

from engine.errors import RecipeError

Strategy = Literal["head", "tail", "middle"]
BLOCK = 1 << 18  # characters
LOOK = 12  # characters that are tried beyond the place where the tokens end
NOWHERE = "(?!)"
NEAR = 1 << 10  # characters in which a place to count from is looked for


class Counts(Protocol):
    """What cutting needs to know of a tokenizer."""

    @property
    def cut(self) -> str | None:
        """A pattern of places that no token spans, whatever the text; None if none is known."""
        ...

    def count(self, text: str) -> int:
        """Return the number of tokens of `text`."""
        ...

    def lengths(self, text: str) -> list[int] | None:
        """Return the number of bytes of each token, or None if they do not add up to the text."""
        ...


def blocks(chunks: Iterable[str], cut: str | None, size: int = BLOCK) -> Iterator[str]:
    """Yield the text of `chunks` in blocks whose tokens are those of the whole.

    Blocks grow beyond `size` only where there is no place to cut, or no place is known.
    """
    place = re.compile(cut or NOWHERE)
    held: list[str] = []
    length, edge = 0, ""  # the last two characters may be one side of a place to cut
    for chunk in chunks:
        text, begin = edge + chunk, 0
        while len(text) - begin + length >= size:
            found = place.search(text, begin + max(1, size - length))
            if found is None:
                break
            yield "".join([*held, text[begin : found.start()]])
            held, length, begin = [], 0, found.start()
        keep = max(begin, len(text) - 2)
        held.append(text[begin:keep])
        length, edge = length + keep - begin, text[keep:]
    if last := "".join([*held, edge]):
        yield last


def head(text: str, limit: int, counts: Counts, start: int = 0) -> int:
    """Return where the longest beginning of `text[start:]` with at most `limit` tokens ends."""
    width = 6 * limit + 64
    while True:
        window = text[start : start + width]
        found = _beginning(window, limit, counts)
        if found < len(window) - LOOK or start + width >= len(text):
            return start + found
        width *= 2


def tail(text: str, limit: int, counts: Counts) -> int:
    """Return where the longest end of `text` with at most `limit` tokens begins."""
    width = 6 * limit + 64
    while True:
        window = text[max(0, len(text) - width) :]
        found = _end(window, limit, counts)
        if found > LOOK or width >= len(text):
            return len(text) - len(window) + found
        width *= 2


def fit(text: str, limit: int, strategy: Strategy, counts: Counts, gap: str = "\n…\n") -> str:
    """Return as much of `text` as `limit` tokens hold: its head, its tail, or both around `gap`."""
    if strategy == "tail":
        return text[tail(text, limit, counts) :]
    end = head(text, limit, counts)
    if strategy == "head" or end == len(text):
        return text[:end]
    room = limit - counts.count(gap)
    while room > 0:
        last = tail(text, room // 2, counts)
        kept = text[: head(text, room - room // 2, counts)] + gap + text[last:]
        over = counts.count(kept) - limit
        if over <= 0:
            return kept
        room -= over
    return text[:end]


def split(text: str, size: int, overlap: int, counts: Counts) -> Iterator[str]:
    """Yield chunks of at most `size` tokens; each repeats up to `overlap` of the one before.

    Raises: RecipeError if the overlap leaves no room, or one character alone is over the limit.
    """
    if not 0 <= overlap < size:
        raise RecipeError(f"an overlap of {overlap} does not fit into chunks of {size} tokens")
    start = end = 0
    while end < len(text):
        stop = head(text, size, counts, start)
        if stop == end:  # the overlap left no room for another character
            start, stop = end, head(text, size, counts, end)
        if stop == end:
            needed = counts.count(text[end])
            raise RecipeError(
                f"the character {text[end]!r} takes {needed} tokens; chunks of {size} cannot"
                " hold it"
            )
        yield text[start:stop]
        end = stop
        start = start + tail(text[start:stop], overlap, counts) if overlap else stop


def _beginning(text: str, limit: int, counts: Counts) -> int:
    """Return the end of the longest beginning that fits."""
    lengths = counts.lengths(text)
    if lengths is None:
        return _bisect(len(text), lambda size: counts.count(text[:size]) <= limit)
    ends = list(accumulate(lengths[:limit], initial=0))
    place = len(_bytes(text)[: ends[-1]].decode("utf-8", "ignore"))
    near = re.compile(counts.cut or NOWHERE).finditer(text, max(0, place - NEAR), max(0, place - 2))
    anchor = max((found.start() for found in near), default=0)
    anchor, room = _room(ends, len(_bytes(text[:anchor])), limit, anchor, 0)
    fits = _remember(lambda end: counts.count(text[anchor:end]) <= room)
    return _furthest(place, anchor, len(text), 1, fits)


def _end(text: str, limit: int, counts: Counts) -> int:
    """Return the beginning of the longest end that fits."""
    lengths = counts.lengths(text)
    if lengths is None:
        size = _bisect(len(text), lambda size: counts.count(text[len(text) - size :]) <= limit)
        return len(text) - size
    ends = list(accumulate(islice(reversed(lengths), limit), initial=0))
    data = _bytes(text)
    place = len(text) - len(data[len(data) - ends[-1] :].decode("utf-8", "ignore"))
    found = re.compile(counts.cut or NOWHERE).search(text, place + 2, place + NEAR)
    anchor = found.start() if found else len(text)
    anchor, room = _room(ends, len(_bytes(text[anchor:])), limit, anchor, len(text))
    fits = _remember(lambda begin: counts.count(text[begin:anchor]) <= room)
    return _furthest(place, anchor, 0, -1, fits)


def _room(ends: list[int], size: int, limit: int, anchor: int, border: int) -> tuple[int, int]:
    """Return where to count from, and how many tokens there may be from there on.

    The tokens that fill `size` bytes between the border and the anchor need no counting again.
    """
    tokens = bisect_left(ends, size)
    if tokens < len(ends) and ends[tokens] == size:
        return anchor, limit - tokens
    return border, limit


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _furthest(place: int, anchor: int, border: int, step: int, fits: Callable[[int], bool]) -> int:
    """Return a place that fits, as far from `anchor` that none within LOOK beyond it does."""
    while place != anchor and not fits(place):
        place -= step
    while True:
        reach = min(LOOK, abs(border - place))
        beyond = [place + step * ahead for ahead in range(reach, 0, -1)]
        further = next((other for other in beyond if fits(other)), None)
        if further is None:
            return place
        place = further


def _remember(fits: Callable[[int], bool]) -> Callable[[int], bool]:
    """Answer for a place only once."""
    answers: dict[int, bool] = {}

    def ask(place: int) -> bool:
        if place not in answers:
            answers[place] = fits(place)
        return answers[place]

    return ask


def _bisect(size: int, fits: Callable[[int], bool]) -> int:
    """Return the largest size that fits, if sizes above one that does not do not either."""
    low, high = 0, size + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
