"""Compiling C once per machine: by its own compiler, for its own processor, without torch.

A library lies in the cache under a name made of everything it depends on: sources, compiler, flags,
processor. It appears whole or not at all, and is checked against its digest before it is loaded,
because mapping a damaged one would end the process.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ResourceError
from engine.files import write_whole

BUILDING = "building-"
SECONDS = 120  # that a compiler is waited for
OPENMP = "-fopenmp"
NATIVE = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
# Sums may be fused and square roots taken in line, but nothing that would lose a NaN.
FLAGS = [NATIVE, "-fno-math-errno", "-fno-trapping-math", "-fPIC"]


@dataclass(frozen=True, slots=True)
class Unavailable:
    """There is no library on this machine, for a reason."""

    reason: str
    wanted: bool = False  # by whoever asked, rather than by the machine

    def __bool__(self) -> bool:
        return False


def build(
    sources: Sequence[Path], included: Sequence[Path], flags: Sequence[str], cache: Path
) -> Path | Unavailable:
    """Return the library made of C sources, building it first if this machine never did.

    Where the compiler knows no OpenMP, it is built for one thread.
    """
    compiler = _find_compiler()
    if compiler is None:
        return Unavailable("no C compiler (cc) was found")
    try:
        library = _library(compiler, [*sources, *included], flags, cache)
        if not _is_whole(library):
            _compile([compiler, *FLAGS, *flags], sources, library)
        return library
    except (OSError, subprocess.SubprocessError, ResourceError) as error:
        return Unavailable(f"{compiler} made no library that loads: {reason(error)}")


def compiler_for(
    sources: Sequence[Path], included: Sequence[Path], flags: Sequence[str], cache: Path
) -> str:
    """Name the compiler that `build` would start; nothing if it would not."""
    if compiler := _find_compiler():
        with suppress(OSError):
            if not _is_whole(_library(compiler, [*sources, *included], flags, cache)):
                return Path(compiler).name
    return ""


def _find_compiler() -> str | None:
    return next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


def _library(compiler: str, files: Sequence[Path], flags: Sequence[str], cache: Path) -> Path:
    """Return where the library lies once it is built."""
    parts = [_facts(compiler), _processor(), *FLAGS, *flags]
    parts += [path.read_text(encoding="utf-8") for path in files]
    return place(cache) / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"


def place(cache: Path) -> Path:
    """Return the folder that libraries are kept in."""
    return cache / "kernels"


def _facts(compiler: str) -> str:
    """Tell one compiler from another without starting it, which would take longer than loading."""
    real = Path(compiler).resolve()
    facts = real.stat()
    return f"{real} {facts.st_size} {facts.st_mtime_ns}"


def _processor() -> str:
    """Say what the processor can do: a home folder may be shared by machines that differ."""
    machine, info = platform.machine(), Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                return f"{machine} {line}"
    return f"{machine} {platform.processor()}"  # which starts a program to ask


def _is_whole(library: Path) -> bool:
    """Tell whether the library is as it was built."""
    digest = library.with_suffix(".sha256")
    if not library.is_file() or not digest.is_file():
        return False
    return hashlib.sha256(library.read_bytes()).hexdigest().encode() == digest.read_bytes()


def _compile(command: list[str], sources: Sequence[Path], library: Path) -> None:
    """Compile the sources into `library`, which appears whole or not at all; note its digest."""
    library.parent.mkdir(parents=True, exist_ok=True)
    for left in library.parent.glob(f"{BUILDING}*"):  # by a process that was killed
        with suppress(FileNotFoundError):  # swept by another process
            if time.time() - left.stat().st_mtime > 3600:
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=BUILDING) as folder:
        made = Path(folder) / library.name
        try:
            _make([*command, OPENMP], sources, made)
        except subprocess.CalledProcessError:
            _make(command, sources, made)
        write_whole(library.with_suffix(".sha256"), hashlib.sha256(made.read_bytes()).hexdigest())
        os.replace(made, library)


def _make(command: list[str], sources: Sequence[Path], library: Path) -> None:
    """Compile all sources at the same time, then link. Raises: OSError, SubprocessError."""
    objects = [str(library.with_name(f"{source.stem}.o")) for source in sources]
    pairs = zip(map(str, sources), objects, strict=True)
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor() as pool:  # of threads that wait for the compiler's processes
        list(pool.map(lambda pair: _run([*command, "-c", pair[0], "-o", pair[1]]), pairs))
    _run([*command, "-shared", *objects, "-o", str(library), "-lm"])


def _run(command: list[str]) -> None:
    """Run a compiler. Raises: OSError, SubprocessError."""
    subprocess.run(command, capture_output=True, timeout=SECONDS, check=True)


def reason(error: Exception) -> str:
    """Say in a line what went wrong."""
    if isinstance(error, subprocess.CalledProcessError):
        said = error.stderr.decode("utf-8", "replace").splitlines()
        return next((line.strip() for line in said if "error" in line), f"exit {error.returncode}")
    if isinstance(error, subprocess.TimeoutExpired):
        return f"it was still running after {error.timeout:.0f} s"
    return str(error)
