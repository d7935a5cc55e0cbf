"""The folder of a prefix cache: what it holds, what may go, what is damaged.

FOLDER/MODEL/KEY.kv   a block (engine/generate/blocks.py); its time is that of its last use
FOLDER/MODEL/name     the checkpoint that the model came from, for people
"""

import contextlib
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.files import write_whole
from engine.generate.blocks import SUFFIX, TEMPORARY, read
from engine.generate.decoder import BLOCK

ABANDONED = 3600.0  # seconds after which an unfinished file is nobody's any more
LONGEST = 200  # bytes of a name that are shown


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the cache."""

    path: Path
    bytes: int
    used: float  # when it was last written or read, seconds since 1970


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept of one model."""

    model: str  # the name of its folder
    name: str
    blocks: int
    bytes: int
    used: float

    @property
    def tokens(self) -> int:
        """Return how many tokens need not be run again."""
        return self.blocks * BLOCK


@dataclass(frozen=True, slots=True)
class Freed:
    """What was removed, and what is left."""

    blocks: int
    bytes: int
    left_blocks: int
    left_bytes: int


def place(cache: Path) -> Path:
    """Return the folder that prefixes are kept in."""
    return cache / "prefixes"


def entries(folder: Path, suffix: str = SUFFIX) -> Iterator[Entry]:
    """Yield every block below a folder, but those that go while this looks."""
    for model in _names(folder):
        for path in _names(model):
            if path.name.endswith(suffix):
                with contextlib.suppress(OSError):
                    about = os.lstat(path)
                    yield Entry(path, about.st_size, about.st_mtime)


def models(folder: Path) -> list[Kept]:
    """Return what is kept of each model, the last used first."""
    found: dict[Path, list[Entry]] = {}
    for entry in entries(folder):
        found.setdefault(entry.path.parent, []).append(entry)
    kept = []
    for model, files in found.items():
        name = _name(model / "name")
        used = max(entry.used for entry in files)
        kept.append(Kept(model.name, name, len(files), sum(e.bytes for e in files), used))
    return sorted(kept, key=lambda model: -model.used)


def _name(path: Path) -> str:
    """Read what a model is called; nothing of what is no file, such as a pipe, or has no end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for a writer
    except OSError:
        return ""
    try:
        regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        text = os.read(descriptor, LONGEST).decode("utf-8", "replace") if regular else ""
    except OSError:
        return ""
    finally:
        os.close(descriptor)
    return "".join(filter(str.isprintable, text))


def note(model: Path, name: str) -> None:
    """Write down what a model is called, unless it was. Raises: ResourceError."""
    if name and not (model / "name").exists():
        write_whole(model / "name", name)


def collect(
    folder: Path, *, most: float | None = None, age: float | None = None, dry: bool = False
) -> Freed:
    """Remove blocks unused for `age` seconds, then the longest unused until `most` bytes are left.

    Unfinished files of processes that were killed go with them. `dry` only says what would go.
    """
    now = time.time()
    for entry in entries(folder, TEMPORARY):
        if not dry and now - entry.used > ABANDONED:
            _remove(entry.path)
    found = sorted(entries(folder), key=lambda entry: entry.used)
    left, left_blocks, freed = sum(entry.bytes for entry in found), len(found), 0
    for entry in found:
        too_old = age is not None and now - entry.used > age
        too_much = most is not None and left > most
        if not (too_old or too_much):
            break
        if dry or _remove(entry.path):
            left, left_blocks, freed = left - entry.bytes, left_blocks - 1, freed + entry.bytes
    return Freed(len(found) - left_blocks, freed, left_blocks, left)


def check(folder: Path) -> Iterator[tuple[Entry, str | None]]:
    """Yield every block with what is wrong with it, or None."""
    for entry in sorted(entries(folder), key=lambda entry: entry.path):
        try:
            read(entry.path)
        except FileNotFoundError:
            continue  # another process made room
        except OSError as error:
            yield entry, f"cannot be read: {error.strerror or error}"
        except ValueError as error:
            yield entry, str(error)
        else:
            yield entry, None


def _names(folder: Path) -> list[Path]:
    """Return what lies in a folder; nothing if it is none."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _remove(path: Path) -> bool:
    """Remove a file and tell whether it is gone."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True
