"""Writing to disk so that a crash leaves the old content or the new, never half of it."""

import contextlib
import glob
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from engine.errors import ResourceError


def beside(path: Path) -> Path:
    """Name what is to become `path`, in the same folder and for this process alone.

    What a killed process left there under such a name is cleared.
    """
    for old in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        number = old.name.split(".")[-2]
        if number.isdigit() and not _runs(int(number)):
            if old.is_dir():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.unlink(missing_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _runs(process: int) -> bool:
    """Tell whether there is a process of this number."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def write_whole(path: Path, text: str) -> None:
    """Replace a small file in one step: write beside it, flush to disk, rename.

    Raises: ResourceError if the disk refuses; the old content stays.
    """
    temporary = beside(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        flush(temporary)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ResourceError(f"{path}: cannot be written: {error.strerror or error}") from None


@contextlib.contextmanager
def whole_folder(out: Path, replace: bool = False) -> Iterator[Path]:
    """Give an empty folder to fill; it appears as `out` if the block ends well, else not at all.

    With `replace`, what was `out` before stays until then. What a killed process left is cleared
    by the next one that makes the same folder.

    Raises: ResourceError if the disk refuses.
    """
    temporary = beside(out)
    old = temporary.with_name(f".{out.name}.old.{os.getpid()}.tmp")
    absent = [parent for parent in out.parents if not os.path.lexists(parent)]
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        if replace and os.path.lexists(out):
            os.replace(out, old)
        os.replace(temporary, out)
        flush(out.parent)
    except OSError as error:
        raise ResourceError(
            f"{out}: cannot be written: {error.strerror or error}; make room, or choose another"
            " place with -o"
        ) from None
    finally:
        if os.path.lexists(old) and not os.path.lexists(out):
            os.replace(old, out)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in absent:  # those that hold something by now stay
            with contextlib.suppress(OSError):
                parent.rmdir()


def point(link: Path, target: str) -> None:
    """Make `link` a symbolic link to `target` in one step, replacing what it pointed to."""
    temporary = beside(link)
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)
    flush(link.parent)


def flush(path: Path) -> None:
    """Make sure a file, or a folder's list of names, is on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the sha256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
