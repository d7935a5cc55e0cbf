"""Content that cannot write control tokens: stand-ins before rendering, ids after it.

Where content could write a special token, its characters are replaced by private-use characters, as
many for as many. What then reads as a special token was written by the template and becomes a
control token; what does so only after the stand-ins are turned back is encoded as ordinary text.
Without such content, the ids are those of the whole text.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

from engine.errors import CheckpointError, DataError
from engine.text.tokenizer import Tokenizer

STRUCTURE = ("role", "type")  # the program's words; `<|{{ role }}|>` may well be a token
NAME = re.compile(r"[\w-]+")
# Characters for private use: too many for one conversation to hold all of them.
PRIVATE = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))
MAX_DEPTH = 100  # of a conversation: far below what Python can recurse into
NOBODY = "\U0010fffe"  # a code point that is never a character

Encode = Callable[[str], list[int]]
Spans = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class _Controls:
    """What a tokenizer has for control tokens; the same for all conversations."""

    ids: Mapping[str, int]  # of all special tokens
    names: frozenset[str]  # without added words like `<think>`, which are read in any text
    pattern: re.Pattern[str]  # the longest of them at a place
    unknown: frozenset[str]  # stand for characters that have no token, so they come from any text
    alphabet: tuple[str, ...]
    written: str  # what else a template may write, which stand-ins must not occur in


@lru_cache(maxsize=2)
def _controls(tokenizer: Tokenizer) -> _Controls:
    ids = {token: token_id for token_id, token in tokenizer.special.items() if token}
    names = {token for token, token_id in ids.items() if token_id not in tokenizer.encode(token)}
    longest_first = sorted(names, key=lambda token: (-len(token), token))
    unknown = {tokenizer.special.get(token_id, "") for token_id in tokenizer.encode(NOBODY)}
    # JSON escapes quotes and backslashes, and templates trim spaces: these stay as they are.
    alphabet = {c for c in "".join(ids) if not (c.isspace() or c in '"\\')}
    return _Controls(
        ids,
        frozenset(names),
        re.compile("|".join(map(re.escape, longest_first)) or "$."),
        frozenset(unknown),
        tuple(sorted(alphabet)),
        str(tokenizer.settings),
    )


class Guard:
    """Stand-ins for the characters that the special tokens of a tokenizer are made of."""

    def __init__(self, given: object, tokenizer: Tokenizer) -> None:
        """Choose stand-ins that occur nowhere in `given`, all that a template will be given."""
        self.tokenizer, self.known = tokenizer, _controls(tokenizer)
        self.special = "\n".join(self.known.ids)
        alphabet = self.known.alphabet
        taken = "\n".join([*_strings(given), tokenizer.template or "", self.known.written])
        free = (c for c in PRIVATE if chr(c) not in taken and f"\\u{c:04x}" not in taken)
        chosen = list(islice(free, len(alphabet) + 3))
        if len(chosen) < len(alphabet) + 3:
            raise DataError("the conversation holds every character for private use")
        # Three to mark places: where a message is left open, where an answer begins and ends.
        self.end, self.begin_answer, self.end_answer = (chr(chosen.pop()) for _ in range(3))
        self.all = dict(zip(map(ord, alphabet), chosen, strict=True))
        # Words stay readable for a template that compares them; no token is made of words alone.
        self.signs = {c: s for c, s in self.all.items() if not (chr(c).isalnum() or chr(c) == "_")}
        self.back = {stand_in: character for character, stand_in in self.all.items()}

    def mark(self, given: Any) -> Any:
        """Put stand-ins into every special token."""

        def _marked(text: str) -> str:
            pieces = []
            done = 0
            for start, end in self.spans(text):
                pieces += text[done:start], text[start:end].translate(self.all)
                done = end
            return "".join([*pieces, text[done:]])

        return _changed(given, _marked, _marked)

    def probe(self, given: Any) -> Any:
        """Put stand-ins wherever part of a special token could begin or end."""

        def _marked(text: str) -> str:
            inside = text.strip() in self.special  # all of it may be the middle of a token
            return text.translate(self.all if inside else self.signs)

        return _changed(given, _marked, lambda key: key.translate(self.signs))

    def spans(self, text: str) -> Spans:
        """Return where `text` reads as a control token: the first of all, the longest there."""
        return [match.span() for match in self.known.pattern.finditer(text)]

    def controls(self, text: str) -> list[str]:
        """Return the control tokens that `text` reads as, in order."""
        return [text[start:end] for start, end in self.spans(text)]

    def until(self, shaded: str, ids: Collection[int]) -> int:
        """Return where the first control token of these `ids` ends; 0 without any."""
        found = (b for a, b in self.spans(shaded) if self.known.ids[shaded[a:b]] in ids)
        return next(found, 0)

    def unescape(self, text: str) -> str:
        """Turn stand-ins that a template has escaped as JSON can into themselves."""
        known = {f"\\u{stand_in:04x}": chr(stand_in) for stand_in in [*self.back, ord(self.end)]}
        return re.sub(r"\\u[0-9a-f]{4}", lambda match: known.get(match[0], match[0]), text)

    def reveal(self, text: str) -> str:
        """Turn stand-ins back into the characters they stand for."""
        return text.translate(self.back)

    def literal(self, shaded: str) -> Spans:
        """Return where a rendering with stand-ins only looks like a special token."""
        text = self.reveal(shaded)
        return sorted(set(self.spans(text)) - set(self.spans(shaded))) if text != shaded else []

    def encode(self, shaded: str) -> list[int]:
        """Return the ids of a rendering with stand-ins, with just the control tokens it reads as.

        Raises: CheckpointError if the tokenizer makes control tokens of ordinary text.
        """
        text = self.reveal(shaded)
        plain, template = self.tokenizer.encode, self.tokenizer.encode_template

        def _look_up(text: str) -> list[int]:
            return [self.known.ids[token] for token in self.controls(text)]

        # Cut as little as possible; where special tokens overlap, cut at every control token.
        for cuts, inside, outside in (
            (self.literal(shaded), plain, template),
            (self.spans(shaded), _look_up, plain),
        ):
            ids = _encode_pieces(text, cuts, inside, outside)
            special = self.tokenizer.special
            found = [special[token_id] for token_id in ids if token_id in special]
            if self._frame(found) == self._frame(self.controls(shaded)):
                return ids
        raise CheckpointError("the tokenizer makes control tokens of ordinary text")

    def ends(self, shaded: str, ids: list[int]) -> dict[int, int]:
        """Return, for where each control token of a rendering ends, how many ids it is up to there.

        Nothing can join across a control token, so this needs no other encoding.
        """
        special = self.tokenizer.special
        spans = [(a, b) for a, b in self.spans(shaded) if self._frame([shaded[a:b]])]
        found = [n for n, i in enumerate(ids, 1) if i in special and self._frame([special[i]])]
        # From the right, because the first of the ids may be a BOS that no template wrote.
        return {b: n for (_, b), n in zip(reversed(spans), reversed(found), strict=False)}

    def _frame(self, tokens: Iterable[str]) -> list[str]:
        """Return the control tokens among `tokens`, but those that any text may bring."""
        names, unknown = self.known.names, self.known.unknown
        return [token for token in tokens if token in names and token not in unknown]


def _strings(value: Any, depth: int = 0) -> Iterator[str]:
    """Yield every string in a JSON-like value."""
    if depth > MAX_DEPTH:
        raise DataError(f"the conversation is nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for pair in value.items():
            yield from _strings(pair, depth)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item, depth + 1)


def _changed(
    value: Any, change: Callable[[str], str], change_key: Callable[[str], str], under: object = ""
) -> Any:
    """Return a JSON-like value with its strings changed, the names of its structure excepted."""
    if isinstance(value, str):
        return value if under in STRUCTURE and NAME.fullmatch(value) else change(value)
    if isinstance(value, Mapping):
        pairs = ((k, _changed(item, change, change_key, under=k)) for k, item in value.items())
        return {change_key(k) if isinstance(k, str) else k: item for k, item in pairs}
    if isinstance(value, (list, tuple)):
        return [_changed(item, change, change_key, under) for item in value]
    return value


def _encode_pieces(text: str, cuts: Spans, inside: Encode, outside: Encode) -> list[int]:
    """Encode what lies in `cuts`, and between them, each with its own function."""
    ids: list[int] = []
    done = 0
    for start, end in [*cuts, (len(text), len(text))]:
        for piece, encode in ((text[done:start], outside), (text[start:end], inside)):
            if piece:
                ids += _encode_onward(piece, encode) if ids else encode(piece)
        done = end
    return ids


def _encode_onward(piece: str, encode: Encode) -> list[int]:
    """Encode text from the middle of a longer one, so that no space is put before it."""
    newline = encode("\n")
    ids = encode("\n" + piece)
    return ids[len(newline) :] if ids[: len(newline)] == newline else encode(piece)
