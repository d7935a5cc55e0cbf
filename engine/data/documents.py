"""Files to documents: text, JSONL and parquet, plain or gzipped, streamed in flat memory.

A document is what is held out as a whole and what an end-of-text token follows: a text file, or
one row of a JSONL or parquet file. It arrives as one or more pieces so that a 5 GB file never has
to fit in memory. Next on the arrow: `engine/data/pack.py`.
"""

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from engine.errors import DataError, ResourceError

PIECE = 1 << 20  # bytes read at a time


class NotText(DataError):
    """A file is not text; in a folder it is left out and counted under `kind`."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A stretch of one document, in order; `end` marks the document's last."""

    document: str
    text: str
    end: bool


def read_documents(name: str, path: Path, format: str, column: str) -> Iterator[Piece]:
    """Yield the documents of one file under the name `name`.

    Raises: DataError naming file and line if it is unreadable, binary, not UTF-8 or malformed.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = bool(suffixes) and suffixes[-1] == ".gz"
    ending = suffixes[-2 if zipped else -1] if len(suffixes) > zipped else ""
    if format == "auto":
        format = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}.get(ending, "text")
    try:
        if format == "parquet":
            yield from _parquet(name, path, column)
            return
        with gzip.open(path, "rb") if zipped else path.open("rb") as opened:
            file = cast(IO[bytes], opened)
            yield from _jsonl(name, file, column) if format == "jsonl" else read_text(name, file)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path}: cannot be read: {reason}") from None


def read_text(name: str, file: IO[bytes]) -> Iterator[Piece]:
    """Yield a text file as one document, cut after line ends where it is long.

    Raises: NotText if it is binary or not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, kept = 0, ""
    while True:
        block = file.read(PIECE)
        if b"\0" in block:
            where = offset + block.index(b"\0")
            raise NotText(f"{name}: a binary file (NUL at byte {where}); expected text", "binary")
        pending = len(decoder.getstate()[0])  # bytes of a character cut by the last block
        try:
            kept += decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            where = offset - pending + error.start
            raise NotText(
                f"{name}: not UTF-8 at byte {where}; convert it, for example with iconv -t utf-8",
                "not UTF-8",
            ) from None
        offset += len(block)
        if not block:
            yield Piece(document=name, text=kept, end=True)
            return
        cut = kept.rfind("\n") + 1
        # One endless line is cut anyway: memory stays flat.
        cut = cut or (len(kept) if len(kept) > 4 * PIECE else 0)
        if cut:
            yield Piece(document=name, text=kept[:cut], end=False)
            kept = kept[cut:]


def _jsonl(name: str, file: IO[bytes], column: str) -> Iterator[Piece]:
    """Yield each row's text as a document named file:line."""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}:{number}: not valid JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            keys = ", ".join(map(repr, row)) if isinstance(row, dict) else f"a {type(row).__name__}"
            raise DataError(
                f"{name}:{number}: no text in field {column!r}, the row has {keys}; set data.column"
            )
        yield Piece(document=f"{name}:{number}", text=row[column], end=True)


@contextmanager
def open_parquet(name: str, file: Path | IO[bytes]) -> Iterator[Any]:
    """Give the open `ParquetFile`; what goes wrong while it is read is the file's fault.

    Raises: DataError if it cannot be read; ResourceError without pyarrow.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ResourceError(
            f"{name}: reading parquet needs pyarrow; pip install 'lm-workbench[parquet]'"
        ) from None
    try:
        with ParquetFile(file) as table:
            yield table
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        if getattr(error, "errno", None):  # the system's word on a file, not pyarrow's
            raise
        raise DataError(f"{name}: not a readable parquet file: {error}") from None


def _parquet(name: str, path: Path, column: str) -> Iterator[Piece]:
    """Yield each row's text as a document named file:row."""
    with open_parquet(name, path) as table:
        yield from _rows(name, table, column)


def _rows(name: str, table: Any, column: str) -> Iterator[Piece]:
    """Yield the rows of an open parquet file."""
    if column not in table.schema_arrow.names:
        columns = ", ".join(table.schema_arrow.names)
        raise DataError(f"{name}: no column {column!r}, it has {columns}; set data.column")
    number = 0
    for batch in table.iter_batches(columns=[column], batch_size=1024):
        for text in batch.column(0).to_pylist():
            number += 1
            if not isinstance(text, str):
                raise DataError(f"{name}:{number}: column {column!r} holds {text!r}, not text")
            yield Piece(document=f"{name}:{number}", text=text, end=True)
