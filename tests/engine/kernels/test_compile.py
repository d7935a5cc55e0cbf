"""Libraries appear whole or not at all, under names that say what they depend on.

What a compiler may do wrong is held in test_build.py, through the kernels of training.
"""

import ctypes
import shutil

import pytest

from engine.kernels.compile import OPENMP, build


def test_a_library_is_named_by_all_that_it_is_made_of(kernels, tmp_path):
    source, header = tmp_path / "a.c", tmp_path / "a.h"
    source.write_text('#include "a.h"\nint answer(void) { return ANSWER; }\n')
    header.write_text("#define ANSWER 41\n")
    first = build([source], [header], ["-O1"], tmp_path)
    header.write_text("#define ANSWER 42\n")
    second = build([source], [header], ["-O1"], tmp_path)
    other = build([source], [header], ["-O2"], tmp_path)
    assert len({first, second, other}) == 3
    assert [ctypes.CDLL(str(path)).answer() for path in (first, second)] == [41, 42]


def test_without_openmp_it_is_built_for_one_thread(kernels, tmp_path, monkeypatch):
    source = tmp_path / "a.c"
    source.write_text("#ifdef _OPENMP\n#error none here\n#endif\nint one(void) { return 1; }\n")
    assert OPENMP == "-fopenmp"
    library = build([source], [], ["-O1"], tmp_path)
    assert ctypes.CDLL(str(library)).one() == 1


@pytest.mark.parametrize("digest", [b"\xff\xfe", b"", b"0" * 64, None], ids=str)
def test_a_library_with_another_digest_is_built_again(kernels, tmp_path, digest):
    """Also with one that is no text."""
    source = tmp_path / "a.c"
    source.write_text("int one(void) { return 1; }\n")
    library = build([source], [], ["-O1"], tmp_path)
    digests = library.with_suffix(".sha256")
    right = digests.read_bytes()
    library.write_bytes(b"no library")
    digests.unlink() if digest is None else digests.write_bytes(digest)
    assert build([source], [], ["-O1"], tmp_path) == library
    assert ctypes.CDLL(str(shutil.copy(library, tmp_path / "copy.so"))).one() == 1
    assert digests.read_bytes() == right
