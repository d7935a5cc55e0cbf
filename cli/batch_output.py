"""The output of a batch: one process writes it, line by line, and another run may go on with it."""

import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

from cli.inputs import Source
from cli.render import emit_bytes
from engine.errors import DataError, InputError, RecipeError, ResourceError
from engine.files import beside, flush

Failed = dict[int, tuple[int, bytes]]  # by their place in the output: lines of input


class Maker(Protocol):
    """What knows the requests of a batch."""

    def digest(self, line: bytes) -> str:
        """Return what tells a line, answered with these settings, from all others."""
        ...

    def learn(self, number: int, line: bytes, record: dict[str, Any]) -> None:
        """Go on with the seeds of an earlier run. Raises: ValueError."""
        ...


def refuse_itself(source: Source, out: Path | None) -> None:
    """Refuse to write the file that is read. Raises: RecipeError."""
    try:
        read = source.path.stat() if source.path else os.fstat(0)
        written = out.stat() if out else os.fstat(1)
    except OSError:  # what is not there is no file twice
        return
    if stat.S_ISREG(read.st_mode) and os.path.samestat(read, written):
        name = out or "standard output"
        raise RecipeError(f"{name}: is the input itself; choose another file with -o")


@contextmanager
def opened(out: Path, resume: bool, force: bool) -> Iterator[FileIO]:
    """Open the output for this process alone, without a buffer: what is written is there.

    Raises: RecipeError if something is there that nobody said what to do with.
    """
    try:
        stream = FileIO(out, "a")  # empties nothing that another process may be writing
    except OSError as error:
        raise ResourceError(f"{out}: cannot be written: {error.strerror or error}") from None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RecipeError(f"{out}: another process is writing it; wait for it") from None
        about = os.fstat(stream.fileno())
        if resume and not stat.S_ISREG(about.st_mode):
            raise RecipeError(f"{out}: is no file that could be gone on with; leave out --resume")
        held = about.st_size  # a device or a pipe has nothing to lose
        if held and not (resume or force):
            raise RecipeError(f"{out}: exists; --resume goes on with it, --force replaces it")
        if held and force:
            stream.truncate(0)
        yield stream


def written(
    output: FileIO, lines: Iterator[tuple[int, bytes]], maker: Maker, failed: Failed
) -> Iterator[dict[str, Any]]:
    """Yield the lines of output that an earlier run wrote, taking as many of the input.

    Those that `failed` are noted: they may be other lines by now. What follows the last whole line
    is cut off.

    Raises: DataError if a line was made from another one or with other settings.
    """
    kept = 0
    with Path(output.name).open("rb") as found:
        for place, data in enumerate(found, start=1):
            if not data.endswith(b"\n"):
                break
            where = f"{output.name}:{place}"
            number, line = next(lines, (0, b""))
            if not number:
                raise DataError(f"{where}: has no line to answer; begin anew with --force")
            try:
                record = json.loads(data)
                same = record["line"] == number
                if "error" in record:
                    failed[place] = number, line
                elif same := same and record["request"] == maker.digest(line):
                    maker.learn(number, line, record)
            except (ValueError, TypeError, KeyError, RecursionError, InputError):
                raise DataError(
                    f"{where}: is no line of a batch; begin anew with --force"
                ) from None
            if not same:
                raise DataError(
                    f"{where}: was made from another line than line {number} of the input, or with"
                    " another model or settings; repeat those, or begin anew with --force"
                )
            kept += len(data)
            yield record
    output.truncate(kept)
    output.seek(kept)


def replaced(output: FileIO, better: Mapping[int, Mapping[str, Any]]) -> FileIO:
    """Put other lines in their places, all at once; return the file that has them, ours as before.

    Raises: ResourceError if the disk refuses; the old file stays.
    """
    path = Path(str(output.name)).resolve()
    temporary = beside(path)
    try:
        with ExitStack() as stack, path.open("rb") as old:
            new = stack.enter_context(FileIO(temporary, "a"))
            fcntl.flock(new, fcntl.LOCK_EX)
            shutil.copymode(path, temporary)
            for place, data in enumerate(old, start=1):
                _put(new, _line(better[place]) if place in better else data)
            flush(temporary)
            os.replace(temporary, path)
            stack.pop_all()  # it stays open
            new.name = output.name
        return new
    except OSError as error:
        raise _refused(output, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def write(output: FileIO | None, record: Mapping[str, Any]) -> None:
    """Write a line at once and whole. Raises: ResourceError if the disk refuses."""
    if output is None:
        emit_bytes(_line(record))
        return
    try:
        _put(output, _line(record))
    except OSError as error:
        raise _refused(output, error) from None


def _line(record: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, in an id
        return json.dumps(record).encode() + b"\n"


def _put(output: FileIO, data: bytes) -> None:
    while data:
        data = data[output.write(data) :]


def _refused(output: FileIO, error: OSError) -> ResourceError:
    return ResourceError(
        f"{output.name}: cannot be written: {error.strerror or error}; make room, then go on"
        " with --resume"
    )
