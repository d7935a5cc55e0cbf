"""Files to rows, each with its place: JSON lines, JSON, CSV, parquet and text, plain or gzipped.

A row that cannot be parsed is a `Row` too and says why, so that one pass finds every bad one. What
is wrong with a file as a whole is raised. All but a JSON array is read in flat memory. Next on the
arrow: `engine/data/formats.py`, which knows what a row means.
"""

import csv
import glob
import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

from engine.config import DataConfig
from engine.data.corpora import open_corpus, walk
from engine.data.documents import open_parquet, read_text
from engine.data.tasks import TASK_SOURCES
from engine.errors import DataError

CORPORA = ("stdlib", "pydoc")  # whose documents are rows too
LOOKED_AT = 1 << 16  # bytes at the beginning of a file that tell what it is
BOM = "\ufeff"
KINDS = {
    **{".jsonl": "lines", ".ndjson": "lines", ".json": "json", ".parquet": "parquet"},
    **{".csv": "csv", ".tsv": "csv", ".txt": "text"},
}
SPLITS = {"train": "train", "test": "test"}
SPLITS |= dict.fromkeys(("valid", "validation", "val", "dev"), "valid")
SPLIT = re.compile(rf"({'|'.join(sorted(SPLITS, reverse=True))})(?![a-z])", re.IGNORECASE)
# A pipe has no ending to go by: a first line of cells with one of these names is a CSV header.
HEADERS = {"text", "prompt", "completion", "instruction", "output", "messages", "conversations"}
BETWEEN = re.compile(r"[ \t\r\n]*([,\]]?)[ \t\r\n]*")
FIX_ENCODING = "convert it, for example with iconv -t utf-8 -f"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row as it was parsed, or why it could not be."""

    where: str  # file:line; file:number in a JSON array or parquet; the file alone if it is text
    value: object = None
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows that can be read again and again, each time from the files."""

    name: str
    files: tuple[str, ...] = ()
    read: Callable[[], Iterator[Row]]

    def __iter__(self) -> Iterator[Row]:
        """Yield every row in a fixed order. Raises: DataError if there is none."""
        row = None
        for row in self.read():
            yield row
        if row is None:
            raise DataError(f"{self.name}: no rows in it")


def made_rows(name: str, make: Callable[[], Iterable[object]]) -> Rows:
    """Return the values that `make` yields as rows named name:1, name:2 and so on."""

    def _read() -> Iterator[Row]:
        for number, value in enumerate(make(), 1):
            yield Row(where=f"{name}:{number}", value=value)

    return Rows(name=name, read=_read)


def open_rows(source: str, *, piped: Path | None = None) -> dict[str, Rows]:
    """Find the rows that `source` names: a file, a folder, a glob, - for `piped`, or a corpus.

    A folder with files (or folders) named train, valid, validation, val, dev or test is read by
    these names; of any other, all files of rows are for training.

    Returns: Rows under "train", and under "valid" and "test" where there are any.
    Raises: DataError if there is nothing to read, or a file is empty, binary or unreadable.
    """
    if source in CORPORA:
        corpus = open_corpus(source, DataConfig())
        return {"train": made_rows(source, lambda: ({"text": text} for text in corpus.documents()))}
    if source in TASK_SOURCES:
        return {
            side: made_rows(f"{source}, {side}", make)
            for side, make in TASK_SOURCES[source].items()
        }
    if source == "-":
        assert piped is not None
        return {"train": _rows("standard input", [("stdin", piped)])}
    if not source:
        raise DataError("no rows named; data.train takes a file, folder, glob or -")
    # os.path rather than Path: it answers False, not with an exception, for impossible names.
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        return _open_folder(source, path)
    if os.path.exists(path):
        if not path.is_file():
            raise DataError(f"{source}: not a file that can be read twice; pipe it in and use -")
        return {"train": _rows(source, [(path.name, path)])}
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    files = [(file.as_posix(), file) for file in found if file.is_file()]
    if not files:
        raise DataError(f"{source}: no such file, folder or pattern")
    return {"train": _rows(source, files)}


def _open_folder(source: str, folder: Path) -> dict[str, Rows]:
    """Share out the files of rows below a folder by their names."""
    files = [(file.relative_to(folder).as_posix(), file) for file in sorted(walk(folder))]
    files = [(name, path) for name, path in files if _ending(path) in KINDS]
    if not files:
        raise DataError(f"{source}: no file of rows in this folder; they end in {', '.join(KINDS)}")
    shares: dict[str, list[tuple[str, Path]]] = {}
    for name, path in files:
        named = [match for part in Path(name).parts if (match := SPLIT.match(part))]
        if named:
            shares.setdefault(SPLITS[named[0][1].lower()], []).append((name, path))
    if not shares:
        return {"train": _rows(source, files)}
    if "train" not in shares:
        raise DataError(f"{source}: files named {', '.join(shares)} but none named train")
    return {split: _rows(f"{source} ({split})", share) for split, share in shares.items()}


def _rows(name: str, files: list[tuple[str, Path]]) -> Rows:
    """Return the rows of files that hold something that can be read."""
    kinds = [_kind(*file) for file in files]

    def _read() -> Iterator[Row]:
        for file, kind in zip(files, kinds, strict=True):
            yield from _read_file(*file, kind)

    return Rows(name=name, files=tuple(name for name, _ in files), read=_read)


def _ending(path: Path) -> str:
    """Return the ending that tells the kind of a file, whether or not .gz comes after it."""
    return "".join([suffix for suffix in path.suffixes if suffix.lower() != ".gz"][-1:]).lower()


def _open(path: Path) -> IO[bytes]:
    """Open a file to read its bytes, unzipped if its name or its first bytes say gzip."""
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b" or path.suffix.lower() == ".gz"
    return cast(IO[bytes], gzip.open(path)) if zipped else path.open("rb")


def _kind(name: str, path: Path) -> str:
    """Return how a file is to be read. Raises: DataError if there is no text in it."""
    try:
        with _open(path) as file:
            head = file.read(LOOKED_AT)
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(name, error) from None
    if not head.strip():
        raise DataError(f"{name}: an empty file")
    if head.startswith(b"PAR1") or _ending(path) == ".parquet":
        return "parquet"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{name}: UTF-16, not UTF-8; {FIX_ENCODING} utf-16")
    if b"\0" in head:
        where = head.index(b"\0")
        raise DataError(f"{name}: a binary file (NUL at byte {where}); expected rows of text")
    kind = KINDS.get(_ending(path)) or _guess(head)
    return _lines_or_whole(head, kind) if kind in ("lines", "json") else kind


def _beginning(head: bytes) -> str:
    return head.decode("utf-8", "replace").lstrip(BOM).lstrip()


def _guess(head: bytes) -> str:
    """Tell the kind of a file that has no ending we know by its beginning."""
    text = _beginning(head)
    if text[:1] in ("{", "["):
        return "json"
    cells = {cell.strip(' "\r') for cell in re.split("[,;\t]", text.split("\n", 1)[0])}
    return "csv" if cells & HEADERS else "text"


def _lines_or_whole(head: bytes, kind: str) -> str:
    """Tell JSON lines from one value over several lines, as each is often named like the other."""
    text = _beginning(head)
    first, more, _ = text.partition("\n")
    try:
        if more:
            json.loads(first)
        complete = True
    except (ValueError, RecursionError):
        complete = False
    if text.startswith("["):
        return "lines" if complete and kind == "lines" else "json"
    return "lines" if complete else kind


def _read_file(name: str, path: Path, kind: str) -> Iterator[Row]:
    """Yield the rows of one file."""
    try:
        with _open(path) as file:
            yield from READERS[kind](name, file)
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(name, error) from None


def _unreadable(where: str, error: Exception) -> DataError:
    return DataError(f"{where}: cannot be read: {getattr(error, 'strerror', None) or error}")


def _read_text(name: str, file: IO[bytes]) -> Iterator[Row]:
    """Yield a text file as one row."""
    text = "".join(piece.text for piece in read_text(name, file))
    yield Row(where=name, value={"text": text.removeprefix(BOM)})


def _lines(name: str, file: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    """Yield the place and the bytes of each line. Raises: DataError if reading fails."""
    number = 0
    try:
        for number, line in enumerate(file, 1):
            yield f"{name}:{number}", line.removeprefix(BOM.encode()) if number == 1 else line
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(f"{name}:{number + 1}", error) from None


def _read_lines(name: str, file: IO[bytes]) -> Iterator[Row]:
    """Yield the rows of JSON lines; those that are blank do not count."""
    for where, line in _lines(name, file):
        if line.strip():
            try:
                yield Row(where=where, value=_loads(line.decode().strip()))
            except UnicodeDecodeError as error:
                problem = f"not UTF-8 at byte {error.start + 1} of the line; {FIX_ENCODING} latin1"
                yield Row(where=where, problem=problem)
            except (ValueError, RecursionError) as error:
                yield Row(where=where, problem=_broken(error))


def _read_json(name: str, file: IO[bytes]) -> Iterator[Row]:
    """Yield the elements of a JSON array one by one, or the one value that is no array."""
    try:
        text = b"".join(line for _, line in _lines(name, file)).decode()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}:{line}: not UTF-8; {FIX_ENCODING} latin1") from None
    at = len(text) - len(text.lstrip())
    if text[at] != "[":
        value, problem = None, ""
        try:
            value = _loads(text)
        except (ValueError, RecursionError) as error:
            problem = f"not valid JSON, neither line by line nor as a whole: {error}"
        yield Row(where=f"{name}:1", value=value, problem=problem)
        return
    yield from _elements(name, text, at + 1)


def _elements(name: str, text: str, at: int) -> Iterator[Row]:
    """Yield the elements of the array that opens before `at`."""

    def _broken_at(what: str, at: int) -> DataError:
        error = json.JSONDecodeError(what, text, at)
        return DataError(f"{name}:{error.lineno}: {_broken(error)}")

    number, mark = 0, ","
    at = len(text) - len(text[at:].lstrip())
    while mark == ",":
        if text[at : at + 1] == "]":
            if number:
                raise _broken_at("a comma before the closing ]", at)
            mark, at = "]", at + 1
            break
        number += 1
        value, problem = None, ""
        try:
            value, end = DECODER.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise _broken_at(error.msg, error.pos) from None
        except (ValueError, RecursionError) as error:
            problem = _broken(error)
            try:  # a reading less strict may find where the element ends
                end = json.JSONDecoder().raw_decode(text, at)[1]
            except (ValueError, RecursionError):
                raise DataError(f"{name}:{number}: {problem}") from None
        yield Row(where=f"{name}:{number}", value=value, problem=problem)
        match = cast(re.Match, BETWEEN.match(text, end))
        mark, at = match[1], match.end()
    if mark != "]":
        raise _broken_at("expected a comma or the closing ]", at)
    if text[at:].strip():
        raise _broken_at("more after the closing ]", at)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON, whose keys must differ: of two values one would be lost."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f'key "{twice}" twice in one object')
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


DECODER = json.JSONDecoder(object_pairs_hook=_distinct, parse_constant=_no_number)


def _loads(text: str) -> Any:
    """Parse one value of JSON, strictly. Raises: ValueError, RecursionError."""
    return DECODER.decode(text)


def _broken(error: Exception) -> str:
    """Say what is wrong with JSON that has its place beside it."""
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "not valid JSON: nested too deeply"
    return f"not valid JSON: {error}".partition("; use sys.")[0]  # advice to programmers


def _read_csv(name: str, file: IO[bytes]) -> Iterator[Row]:
    """Yield the rows below a header line; what separates cells is what the header has most of."""
    # Bytes that are not UTF-8 come through as lone surrogates, so that only their row is bad.
    lines = (line.decode("utf-8", "surrogateescape") for _, line in _lines(name, file))
    first = next(lines)
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        where = f"{name}:{reader.line_num + 1}"
        try:
            cells = next(reader)
            problem = _wrong_cells(cells, header)
        except csv.Error as error:
            cells, problem = [], f"not valid CSV: {error}; is a quote not closed?"
        except StopIteration:
            return
        if problem and not header:
            raise DataError(f"{where}: {problem}")
        if not header:
            header = [cell.strip() for cell in cells]
        elif problem:
            yield Row(where=where, problem=problem)
        elif cells:
            yield Row(where=where, value=dict(zip(header, cells, strict=True)))


def _wrong_cells(cells: list[str], header: list[str]) -> str:
    """Say what is wrong with a line of CSV, if anything; without a header yet, it is the header."""
    text = "".join(cells)
    if "\0" in text:
        return "a NUL byte, as binary files have them"
    if not text.isascii() and re.search("[\udc80-\udcff]", text):
        return f"not UTF-8; {FIX_ENCODING} latin1"
    if not header:
        twice = [cell for cell in cells if cells.count(cell) > 1]
        return f'two columns are named "{twice[0]}"; the first line has the names' if twice else ""
    if cells and len(cells) != len(header):
        return (
            f"cells: {len(cells)}, columns: {len(header)}; put cells that hold commas, quotes or"
            " line ends in quotes"
        )
    return ""


def _read_parquet(name: str, file: IO[bytes]) -> Iterator[Row]:
    """Yield the rows of a parquet file as objects of their columns."""
    number = 0
    with open_parquet(name, file) as table:
        for batch in table.iter_batches(batch_size=256):
            for value in batch.to_pylist():
                number += 1
                yield Row(where=f"{name}:{number}", value=value)


READERS = {
    **{"lines": _read_lines, "json": _read_json, "csv": _read_csv},
    **{"parquet": _read_parquet, "text": _read_text},
}
