"""What to count: files, folders, globs, a pipe, a diff, read as a stream of text in flat memory.

Nothing is left out silently: what was is gathered under its reason, for stderr and for JSON.
"""

import codecs
import glob
import io
import itertools
import os
import shutil
import stat
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

from cli.walking import Walk, git, printable, unreadable
from engine.errors import DataError, RecipeError

BLOCK = 1 << 20
LOOKED_AT = 8192  # a NUL byte among so many makes a file binary, as it does for git
SPOOLED = 64 << 20  # of a pipe that is read more than once, kept in memory
REPLACEMENT = "\ufffd"
STDIN = "-"


class BinaryFile(DataError):
    """A file is not text."""


@dataclass(frozen=True)
class Source:
    """One thing to count; without a path its bytes are given, or it is standard input."""

    name: str
    path: Path | None = None
    data: bytes | None = None

    def open(self, again: bool = False) -> IO[bytes]:
        """Return its bytes as a stream; with `again`, one that can be rewound.

        Raises: DataError if it cannot be read, or is a device, which may never end.
        """
        if self.data is not None:
            return io.BytesIO(self.data)
        try:
            if self.path and _endless(self.path):
                raise DataError(f"{printable(self.name)}: a device, not a file")
            stream = self.path.open("rb") if self.path else sys.stdin.buffer
        except OSError as error:
            raise unreadable(self.name, error) from None
        if not again or stream.seekable():
            return stream
        spooled = cast(IO[bytes], tempfile.SpooledTemporaryFile(SPOOLED))  # noqa: SIM115
        shutil.copyfileobj(stream, spooled, BLOCK)
        spooled.seek(0)
        return spooled


def _endless(path: Path) -> bool:
    """Whether a path is a device that may never end; the empty one does."""
    mode = path.stat().st_mode
    device = stat.S_ISCHR(mode) or stat.S_ISBLK(mode)
    return device and not path.samefile(os.devnull)


@dataclass
class Gathered:
    """The sources, what was left out, by reason, and what could not be read."""

    sources: list[Source] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    problems: list[DataError] = field(default_factory=list)


class Reader:
    """The text of a stream, a block at a time; bytes that are not UTF-8 become U+FFFD."""

    def __init__(self, name: str, stream: IO[bytes], refuse_binary: bool) -> None:
        self.name, self.stream, self.refuse_binary = name, stream, refuse_binary
        self.bytes = self.replaced = 0

    def __iter__(self) -> Iterator[str]:
        """Yield the text. Raises: BinaryFile; DataError if reading fails."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        tail = b""
        while block := self._read():
            if self.refuse_binary and not self.bytes and b"\0" in block[:LOOKED_AT]:
                wide = block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
                found = "UTF-16; iconv -f UTF-16 -t UTF-8 makes it UTF-8" if wide else "not text"
                raise BinaryFile(f"{printable(self.name)}: a binary file, {found}")
            self.bytes += len(block)
            text = decoder.decode(block)
            # U+FFFD that was there before is no replacement.
            written = (tail + block).count(REPLACEMENT.encode())
            self.replaced += text.count(REPLACEMENT) - written
            tail = (tail + block)[-2:]
            yield text
        rest = decoder.decode(b"", final=True)
        self.replaced += len(rest)
        yield rest

    def _read(self) -> bytes:
        try:
            return self.stream.read(BLOCK)
        except OSError as error:
            raise unreadable(self.name, error) from None


def gather(words: Sequence[str], text: str | None, everything: bool) -> Gathered:
    """Find what the words of a command line name: files, folders, globs, `-` for the pipe.

    Without words and without `text` it is the pipe. `everything` takes hidden and git-ignored
    files of folders too.

    Raises: DataError if no name leads anywhere; RecipeError if there is nothing to count.
    """
    found = Gathered()
    if text is not None:
        found.sources.append(Source("text", data=text.encode("utf-8", "surrogateescape")))
    elif not words:
        if sys.stdin.isatty():
            raise RecipeError(
                "nothing to count: name files or folders, pipe text in, or use --text"
            )
        words = [STDIN]
    walk = Walk(everything, found.left_out, found.problems)
    for word in words:
        try:
            found.sources += _named(word, walk)
        except DataError as error:
            found.problems.append(error)
    if found.problems and not found.sources:
        raise found.problems[0]
    unique: dict[str, Source] = {}
    for source in found.sources:
        key = os.path.realpath(source.path) if source.path else source.name
        if key in unique:
            found.left_out["named twice"].append(source.name)
        unique.setdefault(key, source)
    found.sources = list(unique.values())
    return found


def _named(word: str, walk: Walk) -> Iterator[Source]:
    """Yield the sources that one word names."""
    if word == STDIN or os.path.normpath(word) in ("/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"):
        yield Source(STDIN)
        return
    if not word:
        raise DataError("an empty name is no file; . is this folder")
    path = Path(os.path.expanduser(word))
    if os.path.isdir(path):
        yield from (Source(str(file), file) for file in walk.folder(path))
    elif not os.path.lexists(path) and glob.has_magic(str(path)):
        files = list(walk.pattern(str(path)))
        if not files:
            raise DataError(f"{printable(word)}: no file matches")
        yield from (Source(str(file), file) for file in files)
    else:
        try:
            path.stat()
        except OSError as error:
            raise unreadable(word, error) from None
        yield Source(word, path)


def not_utf8(places: int) -> str:
    """Say in how many places bytes were no text."""
    return f"{places:,} {'place is' if places == 1 else 'places are'} not UTF-8"


@dataclass(frozen=True)
class FileDiff:
    """What a diff says about one file."""

    name: str
    text: str  # bytes that are not UTF-8 are surrogates here, as Python escapes them
    added: str
    removed: str


def read_diff(revision: str, words: Sequence[str]) -> list[FileDiff]:
    """Return the diff from a revision to the working tree, file by file.

    `--staged` is the diff from the last commit to the index.

    Raises: RecipeError if there is no repository or no such revision.
    """
    staged = revision in ("--staged", "--cached")
    if revision.startswith("-") and not staged:
        raise RecipeError(f"--git-diff {revision}: not a revision, like HEAD or main~2")
    # A dirty submodule would be looked at with the programs that its configuration names.
    options = ["--no-color", "--no-ext-diff", "--no-textconv", "--ignore-submodules=dirty"]
    asked = [*options, "--cached" if staged else revision, "--", *words]
    filters = _filters()
    process = git(Path(), "diff", *asked, without=filters)
    if process is None:
        raise RecipeError("--git-diff needs the program git")
    if process.returncode:
        reason = process.stderr.decode("utf-8", "replace").strip().split("\n")[0]
        if "not a git repository" in reason.lower():
            reason = "this folder is in no git repository"
        raise RecipeError(f"--git-diff {revision}: {reason}")
    listed = git(Path(), "diff", "--name-only", "-z", *asked, without=filters)
    names = [os.fsdecode(n) for n in (listed.stdout if listed else b"").split(b"\0") if n]
    text = process.stdout.decode("utf-8", "surrogateescape")
    # Inside a hunk every line begins with a space, a sign or a backslash.
    starts = [0, *(at + 1 for at in _positions(text, "\ndiff --")), len(text)]
    parts = [text[a:b] for a, b in itertools.pairwise(starts) if a < b]
    if len(names) != len(parts):
        names = [part.split("\n", 1)[0] for part in parts]
    return [FileDiff(name, part, *_sides(part)) for name, part in zip(names, parts, strict=True)]


def _filters() -> list[str]:
    """Return the settings by which this repository has git run programs on what it compares.

    Those of the user, like git-lfs, stay; in the repository's own configuration they may be
    anybody's.

    Source: gitattributes(5), filter: an empty command is none.
    """
    words = ("--show-scope", "--name-only", "-z", "--get-regexp", r"^filter\.")
    process = git(Path(), "config", *words)
    found = [os.fsdecode(word) for word in (process.stdout if process else b"").split(b"\0")]
    pairs = zip(found[::2], found[1::2], strict=False)
    own = {name.rpartition(".")[0] for scope, name in pairs if scope in ("local", "worktree")}
    return [f"{name}.{key}" for name in sorted(own) for key in ("clean", "process", "required")]


def _positions(text: str, mark: str) -> Iterator[int]:
    at = text.find(mark)
    while at >= 0:
        yield at
        at = text.find(mark, at + 1)


def _sides(part: str) -> tuple[str, str]:
    """Return the lines that a file's diff adds, and those that it removes."""
    part = part.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    _, mark, hunks = part.partition("\n@@")
    lines = (mark + hunks).split("\n")
    added = "".join(line[1:] + "\n" for line in lines if line.startswith("+"))
    removed = "".join(line[1:] + "\n" for line in lines if line.startswith("-"))
    return added, removed
