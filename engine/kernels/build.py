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
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.kernels.native import Kernels

SOURCES = [Path(__file__).with_name(name) for name in ("products.c", "fused.c")]
# Sums may be fused and square roots taken in line, but nothing that would lose a NaN.
FLAGS = ["-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-fPIC", "-shared"]
FLAGS += ["-fno-trapping-math", "-fopenmp"]
NEEDED = ("avx512_f", "avx512_vnni")  # as torch names them


@dataclass(frozen=True, slots=True)
class Unavailable:
    """There are no kernels on this machine, for a reason."""

    reason: str

    def __bool__(self) -> bool:
        return False


def load_kernels(cache: Path) -> Kernels | Unavailable:
    """Load the kernels from below `cache`, building them first if this machine never did."""
    has = torch.cpu.get_capabilities()
    if missing := [name for name in NEEDED if not has.get(name)]:
        return Unavailable(f"this processor has no {' and no '.join(missing)}")
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return Unavailable("no C compiler (cc) was found")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    parts = [version, platform.processor(), repr(sorted(has.items())), *FLAGS]
    parts += [source.read_text(encoding="utf-8") for source in SOURCES]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    library = cache / "kernels" / f"{key}.so"
    if not library.is_file() and (problem := build(compiler, library)):
        return Unavailable(problem)
    try:
        return Kernels(library)
    except OSError as error:
        return Unavailable(f"{library} cannot be loaded: {error}")


def build(compiler: str, library: Path) -> str:
    """Compile the sources into `library`, which appears whole or not at all; say what failed."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            command = [compiler, *FLAGS, *map(str, SOURCES), "-o", str(made), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                first = next((x for x in done.stderr.splitlines() if "error" in x), "no message")
                return f"{compiler} failed: {first.strip()}"
            os.replace(made, library)
    except OSError as error:
        return f"nothing can be built in {library.parent}: {error.strerror}"
    return ""
