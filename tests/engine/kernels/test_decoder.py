"""The C decoder needs no torch to be built, and touches no memory that is not its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine.kernels.compile import FLAGS as COMMON
from engine.kernels.compile import Unavailable
from engine.kernels.decoder import SOURCES, load_library
from tests.conftest import ROOT


def test_it_loads_without_torch(library, tmp_path):
    program = (
        "import sys; from pathlib import Path; from engine.kernels.decoder import load_library;"
        "import engine.generate.native; found = load_library(Path(sys.argv[1]));"
        "assert found and 'torch' not in sys.modules; print(found.path)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.strip().endswith(".so"), done.stderr


def test_another_library_is_none(monkeypatch, tmp_path, library):
    other = tmp_path / "other.c"
    other.write_text("int nothing(void) { return 0; }")
    monkeypatch.setattr("engine.kernels.decoder.SOURCES", [other])
    found = load_library(tmp_path)
    assert isinstance(found, Unavailable) and "workspace_bytes" in found.reason
    assert not list(tmp_path.glob("**/*.so"))  # so that the next time it is built again


def can_multiply(compiler: str, folder: Path) -> bool:
    """Tell by trying whether the processor has AVX-VNNI, which a virtual one may not admit to."""
    source, program = folder / "try.c", folder / "try"
    source.write_text('int main(void) { __asm__("{vex} vpdpbusd %ymm0, %ymm0, %ymm0"); }')
    made = subprocess.run([compiler, str(source), "-o", str(program)], capture_output=True)
    return made.returncode == 0 and subprocess.run([program]).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("march", ["native", "haswell", "haswell+avxvnni", "x86-64"])
def test_the_sanitizers_find_nothing(library, march, tmp_path):
    """Address and undefined-behaviour checks, also of the paths for lesser processors."""
    compiler = shutil.which("gcc")
    if not compiler or os.uname().machine != "x86_64":
        pytest.skip("needs gcc and its sanitizers")
    march, *more = march.split("+")
    if more and not can_multiply(compiler, tmp_path):
        pytest.skip("this processor has no AVX-VNNI")
    made = tmp_path / "checked.so"
    flags = [f"-march={march}" if flag == "-march=native" else flag for flag in COMMON]
    flags += [f"-m{extension}" for extension in more]
    flags += ["-O1", "-g", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    flags += ["-fno-sanitize=alignment"]  # numbers are loaded from where files put them
    subprocess.run(
        [compiler, *flags, "-shared", *map(str, SOURCES), "-o", str(made), "-lm"], check=True
    )
    asan = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    program = (
        "import sys; from pathlib import Path; from engine.kernels.decoder import Library;"
        "from tests.engine.generate import test_native as t; library = Library(Path(sys.argv[1]));"
        "[t.test_logits_are_those_of_torch(n, f, library) for n in t.SHAPES for f in t.FORMATS];"
        "t.test_shapes_that_divide_nothing.hypothesis.inner_test("
        "    library, 2, 3, 10, 37, 51, 67, 9, 'bf16');"
        "[t.test_rows_and_blocks_can_be_copied(kv, library) for kv in ('fp32', 'fp16', 'int8')];"
        "[t.test_rewinding_forgets(n, library) for n in ('plain', 'gemma')];"
        "t.test_both_decoders_keep_to_one_contract(library); print('clean')"
    )
    environment = os.environ | {"LD_PRELOAD": asan, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(made)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert done.stdout.endswith("clean\n"), done.stderr[-3000:]
