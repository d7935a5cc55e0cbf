"""Building the C kernels, once per machine: by its own compiler, for its own processor.

The library lies in the cache under a name made of everything it depends on: sources, compiler,
flags, processor. Where there is no compiler, or none of the instructions that the kernels are
written for, torch does the work alone; `Kernels | Unavailable` says which, and why.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.files import write_whole
from engine.kernels.native import Kernels

SOURCES = [Path(__file__).with_name(name) for name in ("products.c", "fused.c")]
# Sums may be fused and square roots taken in line, but nothing that would lose a NaN.
FLAGS = ["-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-fPIC", "-shared"]
FLAGS += ["-fno-trapping-math", "-fopenmp"]
BUILDING = "building-"
NEEDED = ("avx512_f", "avx512_vnni")  # as torch names them


@dataclass(frozen=True, slots=True)
class Unavailable:
    """There are no kernels on this machine, for a reason."""

    reason: str

    def __bool__(self) -> bool:
        return False


def load_kernels(cache: Path) -> Kernels | Unavailable:
    """Load the kernels from below `cache`, building them first if this machine never did."""
    compiler = _find_compiler()
    if isinstance(compiler, Unavailable):
        return compiler
    try:
        library = _library(compiler, cache)
        if not _is_whole(library):
            _build(compiler, library)
        return Kernels(library)
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        return Unavailable(f"{compiler} made no library that loads: {_reason(error)}")


def unbuilt(cache: Path) -> str:
    """Name the compiler that loading the kernels would start; nothing if it would not."""
    compiler = _find_compiler()
    if isinstance(compiler, str):
        with suppress(OSError, subprocess.SubprocessError):
            if not _is_whole(_library(compiler, cache)):
                return Path(compiler).name
    return ""


def _find_compiler() -> str | Unavailable:
    """Find a compiler on a machine that has the instructions."""
    has = torch.cpu.get_capabilities()
    if missing := [name for name in NEEDED if not has.get(name)]:
        return Unavailable(f"this processor has no {' and no '.join(missing)}")
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    return compiler or Unavailable("no C compiler (cc) was found")


def _library(compiler: str, cache: Path) -> Path:
    """Return where the library lies once it is built. Raises: OSError, SubprocessError."""
    has = sorted(torch.cpu.get_capabilities().items())
    parts = [_run([compiler, "--version"], 10), platform.processor(), repr(has)]
    parts += FLAGS + [source.read_text(encoding="utf-8") for source in SOURCES]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return place(cache) / f"{key}.so"


def place(cache: Path) -> Path:
    """Return the folder that libraries are kept in."""
    return cache / "kernels"


def _is_whole(library: Path) -> bool:
    """Tell whether the library is as it was built: mapping a damaged one would end the process."""
    digest = library.with_suffix(".sha256")
    if not library.is_file() or not digest.is_file():
        return False
    return hashlib.sha256(library.read_bytes()).hexdigest() == digest.read_text(encoding="ascii")


def _build(compiler: str, library: Path) -> None:
    """Compile the sources into `library`, which appears whole or not at all; note its digest."""
    library.parent.mkdir(parents=True, exist_ok=True)
    for left in library.parent.glob(f"{BUILDING}*"):  # by a process that was killed
        if time.time() - left.stat().st_mtime > 3600:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=BUILDING) as folder:
        made = Path(folder) / library.name
        _run([compiler, *FLAGS, *map(str, SOURCES), "-o", str(made), "-lm"], 300)
        write_whole(library.with_suffix(".sha256"), hashlib.sha256(made.read_bytes()).hexdigest())
        os.replace(made, library)


def _run(command: list[str], seconds: float) -> str:
    """Return what a program prints. Raises: OSError, SubprocessError."""
    done = subprocess.run(command, capture_output=True, timeout=seconds, check=True)
    return done.stdout.decode("utf-8", "replace")


def _reason(error: Exception) -> str:
    """Say in a line what went wrong."""
    if isinstance(error, subprocess.CalledProcessError):
        said = error.stderr.decode("utf-8", "replace").splitlines()
        return next((line.strip() for line in said if "error" in line), f"exit {error.returncode}")
    if isinstance(error, subprocess.TimeoutExpired):
        return f"it was still running after {error.timeout:.0f} s"
    return str(error)
