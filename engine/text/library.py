"""The `tokenizers` library, fenced in: whatever a hostile tokenizer.json does to it is one error.

Its Rust code answers most malformed files with an exception, some with a panic (which Python sees
as a BaseException, after a backtrace on stderr) and a few with an attempt to use all memory.
"""

import base64
import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer as FastTokenizer

from engine.errors import CheckpointError

CHARSMAP = re.compile(rb'"precompiled_charsmap"\s*:\s*"([A-Za-z0-9+/]{8})([A-Za-z0-9+/=]*)"')
GROWTH = 1000  # how much longer a normalizer may make a text; published ones at most triple it
HIGHEST = 1 << 22  # ids a vocabulary may span; published ones stay below a million


@contextlib.contextmanager
def fenced(problem: str) -> Iterator[None]:
    """Turn what the library raises into a CheckpointError: `problem`, then its words.

    TypeError and UnicodeEncodeError pass: the library raises them for text with lone surrogates.
    """
    try:
        yield
    except (TypeError, UnicodeEncodeError, CheckpointError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{problem}: {error}; use another copy or tokenizer") from None


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Drop what is written to stderr meanwhile: a panic's backtrace comes before the exception."""
    try:
        kept = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def parse(definition: bytes) -> FastTokenizer:
    """Read the content of a tokenizer.json.

    Raises: CheckpointError if it is malformed or would make any text explode.
    """
    for head, rest in CHARSMAP.findall(definition):
        # The table begins with its size, for which memory is taken before anything is read.
        size = int.from_bytes(base64.b64decode(head)[:4], "little")
        if size > len(head + rest) * 3 // 4:
            raise CheckpointError("its precompiled_charsmap is cut short; use another copy")
    with fenced("it is not a tokenizer.json"):
        inner = FastTokenizer.from_buffer(definition)
    growth = 1
    for step in steps(state(inner.normalizer)):
        growth *= max(1, len(step.get("content", "")))
        if growth > GROWTH:
            raise CheckpointError(
                f"its normalizer makes text {growth:,} times longer; use another tokenizer"
            )
    return inner


def shorter(definition: str) -> str:
    """Write a tokenizer.json with its merges as "a b", not as pairs: it loads in half the time.

    Returned as it is where a merge would then be read otherwise: one with a space in it, or like
    the heading of a file of merges.
    """
    spec = json.loads(definition)
    merges = spec["model"].get("merges")
    if not isinstance(merges, list) or not all(map(_can_be_text, merges)):
        return definition
    spec["model"]["merges"] = [" ".join(pair) for pair in merges]
    return json.dumps(spec, ensure_ascii=False)


def shorten(file: Path) -> None:
    """Write a tokenizer.json, known to be whole, so that it loads faster."""
    file.write_text(shorter(file.read_text(encoding="utf-8")), encoding="utf-8")


def _can_be_text(merge: object) -> bool:
    """Tell whether a merge is a pair that means the same with a space between."""
    match merge:
        case [str(left), str(right)]:
            return " " not in left + right and not left.startswith("#version")
    return False


def span(inner: FastTokenizer) -> int:
    """Return how many ids there are up to the highest; some may have no token.

    Raises: CheckpointError if they are too many.
    """
    count = inner.get_vocab_size(with_added_tokens=True)
    if None not in map(inner.id_to_token, range(min(count, HIGHEST))):
        highest = count - 1  # so many tokens for so many ids leave none for another
    else:
        highest = max(inner.get_vocab(with_added_tokens=True).values(), default=-1)
    if highest >= HIGHEST:
        raise CheckpointError(f"it has a token with the id {highest}; use another copy")
    return highest + 1


def state(part: object) -> dict[str, Any] | None:
    """Return a normalizer, pre-tokenizer, decoder or post-processor as its JSON describes it."""
    return None if part is None else json.loads(cast(Any, part).__getstate__())


def steps(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield the single steps of a normalizer, pre-tokenizer, decoder or post-processor."""
    if part and part.get("type") == "Sequence":
        (several,) = (value for value in part.values() if isinstance(value, list))
        for step in several:
            yield from steps(step)
    elif part:
        yield part


def variant(inner: FastTokenizer, *, parse_special: bool, continuing: bool) -> FastTokenizer:
    """Return a tokenizer that shares the model of `inner` but reads text otherwise.

    With `parse_special`, special tokens written in the text become their ids. With `continuing`,
    the text is taken to follow another: no space is put before it.
    """
    parts = {"normalizer": state(inner.normalizer), "pre_tokenizer": state(inner.pre_tokenizer)}
    if continuing:
        parts = {key: _without_prefix(part) for key, part in parts.items()}
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    other = FastTokenizer.from_str(json.dumps(parts | {"added_tokens": [], "model": empty}))
    other.model = inner.model
    other.add_tokens([token for _, token in sorted(inner.get_added_tokens_decoder().items())])
    other.encode_special_tokens = not parse_special
    return other


def _without_prefix(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a normalizer or pre-tokenizer without what it puts before a text."""
    match part:
        case {"type": "Prepend"}:
            return None
        case {"type": "Sequence", **several}:
            ((key, found),) = several.items()
            kept = [step for step in map(_without_prefix, found) if step]
            return {"type": "Sequence", key: kept}
        case {"type": "Metaspace"}:
            return part | {"prepend_scheme": "never"}
        case {"type": "ByteLevel"}:
            return part | {"add_prefix_space": False}
    return part
