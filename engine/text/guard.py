"""Content that cannot write control tokens: stand-ins before rendering, ids after it.

Where content could write a special token, its characters are replaced by private-use characters, as
many for as many. What then reads as a special token was written by the template and becomes a
control token; what does so only after the stand-ins are turned back is encoded as ordinary text.
Without such content, the ids are those of the whole text.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
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


class Guard:
    """Stand-ins for the characters that the special tokens of a tokenizer are made of."""

    def __init__(self, given: object, tokenizer: Tokenizer) -> None:
        """Choose stand-ins that occur nowhere in `given`, all that a template will be given."""
        self.tokenizer = tokenizer
        self.ids = {token: token_id for token_id, token in tokenizer.special.items() if token}
        self.lengths = sorted({len(token) for token in self.ids}, reverse=True)
        openings = sorted({token[:3] for token in self.ids})  # few, and rare in text
        self.opening = re.compile("|".join(map(re.escape, openings)) or "$.")
        self.special = "\n".join(self.ids)
        # JSON escapes quotes and backslashes, and templates trim spaces: these stay as they are.
        alphabet = sorted(c for c in set(self.special) if not (c.isspace() or c in '"\\'))
        taken = "\n".join([*_strings(given), tokenizer.template or "", str(tokenizer.settings)])
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
        self._controls: dict[str, bool] = {}
        # What stands for characters that have no token comes from any text.
        self.unknown = {tokenizer.special.get(token_id) for token_id in tokenizer.encode(NOBODY)}

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
        found = []
        at = 0
        while match := self.opening.search(text, at):
            start = at = match.start()
            pieces = (text[start : start + length] for length in self.lengths)
            token = next(filter(self._is_control, pieces), "")
            if token:
                found.append((start, start + len(token)))
            at += len(token) or 1
        return found

    def controls(self, text: str) -> list[str]:
        """Return the control tokens that `text` reads as, in order."""
        return [text[start:end] for start, end in self.spans(text)]

    def _is_control(self, token: str) -> bool:
        """Tell controls from added words like `<think>`, which are read in any text."""
        if token not in self.ids:
            return False
        if token not in self._controls:
            self._controls[token] = self.ids[token] not in self.tokenizer.encode(token)
        return self._controls[token]

    def unescape(self, text: str) -> str:
        """Turn stand-ins that a template has escaped as JSON can into themselves."""
        known = {f"\\u{stand_in:04x}": chr(stand_in) for stand_in in [*self.back, ord(self.end)]}
        return re.sub(r"\\u[0-9a-f]{4}", lambda match: known.get(match[0], match[0]), text)

    def reveal(self, text: str) -> str:
        """Turn stand-ins back into the characters they stand for."""
        return text.translate(self.back)

    def literal(self, shaded: str) -> Spans:
        """Return where a rendering with stand-ins only looks like a special token."""
        return sorted(set(self.spans(self.reveal(shaded))) - set(self.spans(shaded)))

    def encode(self, shaded: str) -> list[int]:
        """Return the ids of a rendering with stand-ins, with just the control tokens it reads as.

        Raises: CheckpointError if the tokenizer makes control tokens of ordinary text.
        """
        text = self.reveal(shaded)
        plain, template = self.tokenizer.encode, self.tokenizer.encode_template

        def _look_up(text: str) -> list[int]:
            return [self.ids[token] for token in self.controls(text)]

        # Cut as little as possible; where special tokens overlap, cut at every control token.
        for cuts, inside, outside in (
            (self.literal(shaded), plain, template),
            (self.spans(shaded), _look_up, plain),
        ):
            ids = _encode_pieces(text, cuts, inside, outside)
            found = (self.tokenizer.special.get(token_id, "") for token_id in ids)
            if self._frame(found) == self._frame(self.controls(shaded)):
                return ids
        raise CheckpointError("the tokenizer makes control tokens of ordinary text")

    def _frame(self, tokens: Iterable[str]) -> list[str]:
        """Return the control tokens among `tokens`, but those that any text may bring."""
        return [t for t in tokens if self._is_control(t) and t not in self.unknown]


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
