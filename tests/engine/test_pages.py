import mmap

import numpy as np
import pytest

from engine import pages
from engine.errors import ResourceError
from engine.pages import (
    ALIGNMENT,
    LARGE,
    PIECE,
    Arena,
    Mapping,
    free_memory,
    is_mapped,
    large_memory,
    move,
    worth_copying,
)


def test_large_memory_begins_where_a_large_page_does_and_holds_zeros():
    memory = large_memory(LARGE + 5)
    assert memory.shape == (LARGE + 5,) and memory.ctypes.data % LARGE == 0
    assert not memory.any()
    memory[-1] = 7  # it may be written


def test_arrays_of_an_arena_do_not_overlap_and_are_aligned():
    arena = Arena()
    shapes = [((3, 5), np.float32), ((7,), np.uint8), ((PIECE + 1,), np.uint8), ((2, 2), np.int64)]
    arrays = [arena.empty(shape, dtype) for shape, dtype in shapes]
    for number, array in enumerate(arrays):
        array[...] = number
    for number, (array, (shape, dtype)) in enumerate(zip(arrays, shapes, strict=True)):
        assert array.shape == shape and array.dtype == dtype and (array == number).all()
        assert array.ctypes.data % ALIGNMENT == 0 and array.flags.c_contiguous


def test_small_arrays_share_a_large_page():
    arena = Arena()
    a, b = (arena.empty((1000,), np.uint8) for _ in range(2))
    assert b.ctypes.data - a.ctypes.data == 1024


@pytest.mark.parametrize(
    "switch, free, copied",
    [
        ("always [madvise] never", 250, True),
        ("[always] madvise never", 250, True),
        ("always madvise [never]", 250, False),
        ("always [madvise] never", 150, False),
        (None, 250, False),
    ],
)
def test_copying_needs_large_pages_and_room_for_two(switch, free, copied, monkeypatch, tmp_path):
    path = tmp_path / "enabled"
    if switch:
        path.write_text(switch)
    monkeypatch.setattr(pages, "SWITCH", path)
    monkeypatch.setattr(pages, "free_memory", lambda: free)
    assert worth_copying(100) is copied


@pytest.mark.parametrize(
    "limit, free", [("max\n", 5 << 20), ("4000000\n", 4_000_000), (None, 5 << 20)]
)
def test_a_container_has_no_more_memory_than_its_limit(limit, free, monkeypatch, tmp_path):
    memory, file = tmp_path / "meminfo", tmp_path / "memory.max"
    memory.write_text("MemTotal: 9999 kB\nMemAvailable:    5120 kB\n")
    if limit:
        file.write_text(limit)
    monkeypatch.setattr(pages, "MEMORY", memory)
    monkeypatch.setattr(pages, "LIMIT", file)
    assert free_memory() == free


def test_no_memory_is_one_clear_line():
    with pytest.raises(ResourceError, match="no memory for"):
        large_memory(1 << 60)


def test_an_array_in_a_file_is_moved_and_its_pages_given_back(tmp_path):
    size = 64 * mmap.PAGESIZE
    (tmp_path / "numbers").write_bytes(bytes(range(256)) * (size // 256))
    with (tmp_path / "numbers").open("rb") as file:
        mapping = Mapping(file.fileno(), 0, access=mmap.ACCESS_COPY)
    array = np.frombuffer(mapping, np.uint8)[100:-100].reshape(2, -1)
    array[0, mmap.PAGESIZE * 2] = 77  # of this process: gone with the pages that are given back
    moved = move(array, Arena())
    assert is_mapped(array) and not is_mapped(moved)
    assert moved[0, mmap.PAGESIZE * 2] == 77 and moved.shape == array.shape
    assert np.array_equal(moved[1], array[1]) and moved.ctypes.data != array.ctypes.data
    if hasattr(mmap, "MADV_DONTNEED"):
        assert array[0, mmap.PAGESIZE * 2] == 100


def test_an_array_that_is_in_no_file_is_not_moved():
    arena = Arena()
    for array in (np.arange(5), arena.empty((3, 4), np.uint8)):
        assert move(array, arena) is array
