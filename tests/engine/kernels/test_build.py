"""The library is built once, whole or not at all, and what is missing is said."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from engine.files import sha256
from engine.kernels import build as building
from engine.kernels import compile as compiling
from engine.kernels.build import FLAGS, SOURCES, load_kernels, unbuilt
from engine.kernels.compile import FLAGS as COMMON
from engine.kernels.compile import Unavailable


def test_built_once_and_found_again(kernels, tmp_path):
    place = tmp_path / "elsewhere"
    first = load_kernels(place)
    [made] = (place / "kernels").glob("*.so")
    stamp = made.stat().st_mtime_ns
    assert first and load_kernels(place).path == made and made.stat().st_mtime_ns == stamp
    again = pickle.loads(pickle.dumps(first))
    assert again.norm(torch.ones(2, 4), torch.ones(4), 0.0)[0].tolist() == [[1.0] * 4] * 2


def test_a_build_is_known_before_it_begins(kernels, tmp_path, monkeypatch):
    place = tmp_path / "elsewhere"
    assert unbuilt(place) in ("cc", "gcc", "clang") and not place.exists()
    library = load_kernels(place).path
    assert unbuilt(place) == ""
    library.write_bytes(b"damaged")
    assert unbuilt(place) != ""
    monkeypatch.setattr(compiling.shutil, "which", lambda name: "/nowhere/cc")
    assert unbuilt(place) == ""
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    assert unbuilt(place) == ""


def test_another_source_is_another_library(kernels, tmp_path, monkeypatch):
    changed = tmp_path / "fused.c"
    shutil.copy(SOURCES[1], changed)
    changed.write_text(changed.read_text() + "\nlong changed(void) { return 42; }\n")
    before = load_kernels(tmp_path / "elsewhere").path
    monkeypatch.setattr(building, "SOURCES", [SOURCES[0], changed])
    assert load_kernels(tmp_path / "elsewhere").path != before


def test_no_compiler_no_instructions_no_folder(kernels, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(compiling.shutil, "which", lambda name: None)
        found = load_kernels(tmp_path)
        assert not found and found == Unavailable("no C compiler (cc) was found")
    with monkeypatch.context() as patch:
        patch.setattr(building.torch.cpu, "get_capabilities", lambda: {"avx512_f": True})
        assert "avx512_vnni" in load_kernels(tmp_path).reason
    with monkeypatch.context() as patch:
        broken = tmp_path / "products.c"
        broken.write_text("int f(void) { return nothing; }")
        patch.setattr(building, "SOURCES", [broken])
        assert "nothing" in load_kernels(tmp_path / "elsewhere").reason
        assert not list((tmp_path / "elsewhere" / "kernels").iterdir())
    (tmp_path / "file").write_text("")
    assert "made no library" in load_kernels(tmp_path / "file").reason


@pytest.mark.parametrize("size", [0, 100, 4096, 20000])
def test_a_damaged_library_is_built_again(kernels, tmp_path, size):
    """Mapping half a library ended the process with SIGBUS, in every run until it was removed."""
    damaged = tmp_path / "elsewhere" / "kernels" / kernels.path.name
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(kernels.path.read_bytes()[:size])
    mended = load_kernels(tmp_path / "elsewhere")
    assert mended and damaged.stat().st_size > 20000


PROGRAMS = {
    "nonsense": ("\x7f\x00 no program", "made no library"),
    "silent": ("#!/bin/sh\nexit 0\n", "No such file"),
    "hollow": (
        '#!/bin/sh\n[ "$1" = --version ] && exit\nwhile [ $# -gt 2 ]; do shift; done\n: > "$1"\n',
        "too short",
    ),
    "not text": ("#!/bin/sh\nprintf '\\377 error \\376' >&2\nexit 1\n", "error"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_compiler_that_is_none_is_told(kernels, tmp_path, monkeypatch, name):
    text, expected = PROGRAMS[name]
    program = tmp_path / "cc"
    program.write_text(text)
    program.chmod(0o755)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: str(program))
    found = load_kernels(tmp_path / "elsewhere")
    assert not found and expected in found.reason


def test_a_library_of_other_functions_is_none(kernels, tmp_path, monkeypatch):
    other = tmp_path / "other.c"
    other.write_text("int weave(void) { return 0; }")
    monkeypatch.setattr(building, "SOURCES", [other])
    assert "multiply" in load_kernels(tmp_path / "elsewhere").reason


def test_what_a_killed_build_left_is_swept(kernels, tmp_path):
    left = tmp_path / "elsewhere" / "kernels" / "building-old"
    left.mkdir(parents=True)
    os.utime(left, (0, 0))
    assert load_kernels(tmp_path / "elsewhere") and not left.exists()


def test_builds_that_are_killed_or_at_once_leave_a_whole_library(kernels, tmp_path):
    """One process is killed in the middle of its build; then two find an empty cache together."""
    slow = tmp_path / "bin" / "cc"
    slow.parent.mkdir()
    slow.write_text(
        '#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\n'
        f'head -c 20000 {kernels.path} > "$2"; sleep 1; cp {kernels.path} "$2"\n'
    )
    slow.chmod(0o755)
    program = (
        "from pathlib import Path; from engine.kernels.build import load_kernels; import torch;"
        f"k = load_kernels(Path({str(tmp_path)!r}));"
        "print(k.norm(torch.ones(1, 4), torch.ones(4), 0.0)[0].sum().item())"
    )

    def start() -> subprocess.Popen:
        path = f"{slow.parent}{os.pathsep}{os.environ['PATH']}"
        return subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parents[3],
            env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )

    place, killed = tmp_path / "kernels", start()
    while killed.poll() is None and not list(place.glob("building-*/*.so")):
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL and not list(place.glob("*.so"))
    for process in [start(), start()]:
        assert process.communicate(timeout=200)[0] == "4.0\n"
    [library] = place.glob("*.so")
    assert library.read_bytes() == kernels.path.read_bytes()
    assert library.with_suffix(".sha256").read_text() == sha256(library)


@pytest.mark.slow
def test_the_sanitizers_find_nothing(kernels, tmp_path):
    """Address and undefined-behaviour checks, over every kernel at sizes that divide nothing."""
    compiler = shutil.which("gcc")
    if not compiler:
        pytest.skip("needs gcc and its sanitizers")
    library = tmp_path / "checked.so"
    flags = [
        *COMMON,
        *FLAGS,
        "-fopenmp",
        "-g",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
    ]
    flags[flags.index("-O3")] = "-O1"
    subprocess.run(
        [compiler, *flags, "-shared", *map(str, SOURCES), "-o", str(library), "-lm"], check=True
    )
    asan = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    program = (
        "from pathlib import Path; import sys; from engine.kernels.native import Kernels;"
        "from tests.engine.kernels import test_native as t; k = Kernels(Path(sys.argv[1]));"
        "[t.test_attention(k, *s, 2) for s in [(1, 1, 1, 1, 16), (2, 63, 4, 2, 32)]];"
        "t.test_norm(k, 7, 33, 2); t.test_swiglu(k, 17); t.test_softmax_loss(k, 3, 50, 5.0);"
        "t.test_rotation_both_ways(k, 6, 16); t.test_a_second_digit_takes_what_the_first_left(k);"
        "t.test_products_are_those_of_the_rounded_factors.hypothesis.inner_test(k, 257, 49, 17, 0);"
        "print('clean')"
    )
    environment = os.environ | {"LD_PRELOAD": asan, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [os.sys.executable, "-c", program, str(library)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[3],
    )
    assert done.stdout.endswith("clean\n"), done.stderr[-2000:]
