"""Named sources of text: the standard library, its manual, or the user's own files.

A `Corpus` is a list of files with stable names and the promise to read them in the same order
every time. `scan` reads it once to count, check and fingerprint it. `engine/data/documents.py`
reads a file; next on the arrow, `engine/data/pack.py` turns it all into tokens.
"""

import dataclasses
import glob
import hashlib
import os
import shutil
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from engine.config import DataConfig
from engine.data.documents import NotText, Piece, read_documents
from engine.errors import DataError, ResourceError
from engine.runs import has_begun

# Left out of `stdlib`: tests, other people's packages, tables and demos. What remains is code that
# people wrote to be read.
STDLIB_WITHOUT = {
    *("test", "tests", "idle_test", "site-packages", "lib2to3", "encodings", "pydoc_data"),
    *("idlelib", "turtledemo", "distutils", "ensurepip"),
}


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Files, or texts held in memory, under stable names."""

    name: str
    files: list[tuple[str, Path]] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    format: str = "auto"
    column: str = "text"
    lenient: bool = False  # a folder or glob: `scan` leaves out files that are not text

    def pieces(self) -> Iterator[Piece]:
        """Yield every document in a fixed order, in flat memory."""
        for name, _ in self.texts:
            yield from self.read(name, None)
        for name, path in self.files:
            yield from self.read(name, path)

    def documents(self) -> Iterator[str]:
        """Yield the text of every document that has any, whole."""
        parts: list[str] = []
        for piece in self.pieces():
            parts.append(piece.text)
            if piece.end:
                if text := "".join(parts):
                    yield text
                parts = []

    def read(self, name: str, path: Path | None) -> Iterator[Piece]:
        """Yield the documents of one source: of the file at `path`, or of a text in memory."""
        if path is not None:
            return read_documents(name, path, self.format, self.column)
        return iter([Piece(document=name, text=dict(self.texts)[name], end=True)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """What one pass over a corpus found: sizes, and a digest of every name and byte of text."""

    documents: int
    bytes: int
    held_out: int  # documents that `held_out()` picks
    digest: str
    dropped: Counter[str]  # files left out, by reason

    @property
    def splits_by_name(self) -> bool:
        """Whether there are documents enough on both sides to hold out whole ones."""
        return 0 < self.held_out < self.documents


def held_out(document: str, one_in: int) -> bool:
    """Decide by name alone whether a document is held out, so that it never changes sides."""
    return (
        int(hashlib.sha256(document.encode("utf-8", "surrogateescape")).hexdigest(), 16) % one_in
        == 0
    )


def spool(stdin: BinaryIO | None, file: Path) -> Path:
    """Copy standard input to a file, in flat memory, unless a copy is there already.

    Raises: DataError if there is no standard input; ResourceError if the disk is full.
    """
    if file.is_file():
        return file
    if stdin is None or stdin.isatty():
        raise DataError("- means standard input, and nothing is piped in")
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        with temporary.open("wb") as copy:
            shutil.copyfileobj(stdin, copy, 1 << 20)
        os.replace(temporary, file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ResourceError(f"{file}: cannot be written: {error.strerror or error}") from None
    return file


def open_corpus(source: str, config: DataConfig, piped: Path | None = None) -> Corpus:
    """Find the files that `source` names: stdlib, pydoc, a file, a folder or a glob.

    "-" is `piped`, the copy of standard input.

    Raises: DataError if there is nothing to read.
    """
    if source == "stdlib":
        return stdlib()
    if source == "pydoc":
        from pydoc_data import topics

        texts = sorted(topics.topics.items())
        return Corpus(name="pydoc", texts=[(name, text) for name, text in texts])
    options: dict[str, Any] = {"name": source, "format": config.format, "column": config.column}
    if source == "-":
        assert piped is not None
        return Corpus(files=[("stdin", piped)], **{**options, "name": "standard input"})
    if not source:
        raise DataError("no text named; data.train takes stdlib, pydoc, a file, folder, glob or -")
    # os.path rather than Path: it answers False, not with an exception, for impossible names.
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        files = [(file.relative_to(path).as_posix(), file) for file in sorted(walk(path))]
        return Corpus(files=files, lenient=True, **options)
    if os.path.exists(path):
        if not path.is_file():
            raise DataError(f"{source}: not a file that can be read twice; pipe it in and use -")
        return Corpus(files=[(path.name, path)], **options)
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    found = [file for file in found if file.is_file()]
    if not found:
        raise DataError(
            f"{source}: no such file, folder or pattern; the built-in corpora are stdlib and pydoc"
        )
    return Corpus(files=[(file.as_posix(), file) for file in found], lenient=True, **options)


def walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder but for hidden ones and for runs, which are not text."""
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.is_file():
            yield entry
        elif entry.is_dir() and not entry.is_symlink() and not has_begun(entry):
            yield from walk(entry)


def stdlib(root: Path | None = None) -> Corpus:
    """Return the running interpreter's standard library, or one at `root`, as source files.

    Raises: DataError if the interpreter came without them.
    """
    folder = root or Path(sysconfig.get_path("stdlib"))
    files = [
        (file.relative_to(folder).as_posix(), file)
        for file in sorted(folder.rglob("*.py"))
        if not STDLIB_WITHOUT & set(file.relative_to(folder).parts)
    ]
    if len(files) < 100 and not root:
        raise DataError(
            f"{folder} holds {len(files)} Python files: this interpreter ships without its"
            " library's source; give a folder of text as data.train"
        )
    return Corpus(name="stdlib", files=files)


def scan(corpus: Corpus, one_in: int) -> tuple[Corpus, Scan]:
    """Read a corpus once: check that it can be read, count it, fingerprint it.

    Returns: the corpus without the files that hold no text (counted in `dropped`), and the counts.
    Raises: DataError if any file is unreadable or if there is no text at all.
    """
    digest = hashlib.sha256()
    documents = size = held = 0
    kept: list[tuple[str, Path]] = []
    dropped: Counter[str] = Counter()
    sources = [(name, None) for name, _ in corpus.texts] + corpus.files
    for name, path in sources:
        own, own_size = hashlib.sha256(), 0
        try:
            for piece in corpus.read(name, path):
                data = piece.text.encode("utf-8", "surrogatepass")
                own.update(data)
                own_size += len(data)
                if piece.end:
                    own.update(
                        f"\0{piece.document}\0{own_size}\0".encode("utf-8", "surrogateescape")
                    )
                    documents += 1
                    held += held_out(piece.document, one_in)
        except NotText as error:
            if not corpus.lenient:
                raise
            dropped[error.kind] += 1
            continue
        if path is not None:
            kept.append((name, path))
        digest.update(own.digest())
        size += own_size
    if not size:
        reasons = ", ".join(f"{count} {kind}" for kind, count in dropped.items())
        why = f" (left out: {reasons})" if reasons else ""
        raise DataError(f"{corpus.name}: no text to read{why}")
    found = Scan(
        documents=documents, bytes=size, held_out=held, digest=digest.hexdigest(), dropped=dropped
    )
    return dataclasses.replace(corpus, files=kept), found
