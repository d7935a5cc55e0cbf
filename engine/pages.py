"""Memory in large pages, for what every token reads from one end to the other.

A processor looks up in a table where each page lies. In pages of 4 KB those look-ups cost reading
weights a third of the memory's speed; in pages of 2 MB they vanish. Linux has them for memory that
asks (madvise), not for mapped files. So weights are mapped, for a first token at once, and moved.
"""

import math
import mmap
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import ResourceError

LARGE = 2 << 20
PIECE = 16 * LARGE  # bytes taken from the system at once
ALIGNMENT = 64  # bytes: a line of the cache, and the widest load
MEMORY, LIMIT = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")  # of a container
SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def worth_copying(size: int) -> bool:
    """Tell whether there are large pages, and room for `size` bytes twice over."""
    try:
        there = hasattr(mmap, "MADV_HUGEPAGE") and "[never]" not in SWITCH.read_text("ascii")
    except OSError:
        return False
    return there and free_memory() > 2 * size


def large_memory(size: int) -> np.ndarray:
    """Return zeros in large pages where there are any. Shapes: → uint8 (size,).

    Raises: ResourceError if there is no memory.
    """
    try:
        memory = mmap.mmap(-1, size + LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError):
        raise ResourceError(
            f"no memory for {size / 1e6:,.0f} MB; end other programs, raise the limit (ulimit -v),"
            " or take a smaller model or context"
        ) from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    begin = -whole.ctypes.data % LARGE
    return whole[begin : begin + size]


class Arena:
    """Large memory for many arrays, most of them smaller than a large page."""

    def __init__(self) -> None:
        self._left = np.empty(0, np.uint8)

    def empty(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """Return a new array, like `numpy.empty`; memory is given back with the last of a piece."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        taken = -(-size // ALIGNMENT) * ALIGNMENT
        if taken > len(self._left):
            self._left = large_memory(max(taken, PIECE))
        array = self._left[:size].view(dtype).reshape(shape)
        self._left = self._left[taken:]
        return array


class Mapping(mmap.mmap):
    """A file in memory, from which arrays can be moved."""

    def give_back(self, begin: int, end: int) -> None:
        """Give back the pages that lie whole between two places; touched, they are read again."""
        page = mmap.PAGESIZE
        first, last = -(-begin // page) * page, end // page * page
        if last > first and hasattr(mmap, "MADV_DONTNEED"):
            self.madvise(mmap.MADV_DONTNEED, first, last - first)


def move(array: np.ndarray, arena: Arena) -> np.ndarray:
    """Return a copy in large pages of an array in a mapped file, whose own pages are given back.

    Any other array comes back as it is.
    """
    mapping = mapping_of(array)
    if not isinstance(mapping, Mapping):
        return array
    copy = arena.empty(array.shape, array.dtype.type)
    old, new = (x.reshape(-1).view(np.uint8) for x in (array, copy))
    offset = array.ctypes.data - np.frombuffer(mapping, np.uint8).ctypes.data
    for first in range(0, len(old), LARGE):  # in parts, so that little is in memory twice
        last = min(first + LARGE, len(old))
        new[first:last] = old[first:last]
        mapping.give_back(offset + first, offset + last)
    return copy


def is_mapped(array: np.ndarray) -> bool:
    """Tell whether an array lies in a mapped file."""
    return isinstance(mapping_of(array), Mapping)


def mapping_of(array: np.ndarray) -> Any:
    """Return what an array lies in."""
    base: Any = array
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    return base.obj if isinstance(base, memoryview) else base


def free_memory() -> int:
    """Return the bytes of main memory that can be had without swapping."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError):
        for line in MEMORY.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    with suppress(OSError, ValueError):  # "max" is no number, and no limit
        free = min(free, int(LIMIT.read_text(encoding="ascii")))
    return free
