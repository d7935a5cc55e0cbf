"""Faster ways: which of them this machine takes, and what keeps it off the others.

The slow way always works and gives the same result, so what is off costs nothing but time.
"""

import platform
import shlex
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.hardware import has_fast_bf16
from engine.kernels.compile import Unavailable
from engine.kernels.decoder import Library
from engine.kernels.native import Kernels
from engine.machine import OPTIONAL, Machine

PRODUCTS = ("avx512_vnni", "avx2", "dotprod")  # of 8 bits, in engine/kernels/vector.h, best first
SOURCE = "#include <omp.h>\nint threads(void) { return omp_get_max_threads(); }\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class FastPath:
    """A faster way: whether it is taken, and why, or why not."""

    name: str
    on: bool
    why: str


def fast_paths(
    machine: Machine,
    device: torch.device,
    cxx: str = "",
    kernels: Kernels | Unavailable = Unavailable("they were not asked for"),
    library: Library | Unavailable = Unavailable("it was not asked for"),
) -> list[FastPath]:
    """List the faster ways; `cxx` is command and version of the C++ compiler, or empty.

    A new one is one row here: its name, whether it is on, why or why not.
    """
    rows = {
        "bf16": _bf16(machine, device),
        "our kernels": _kernels(kernels, device),
        "our decoder": _decoder(library, device, machine),
        "all cores": _threads(machine),
        "accelerator": _accelerator(machine, device),
        "torch.compile": (bool(cxx), f"can build with {cxx}" if cxx else "needs a C++ compiler"),
        "tiktoken": _package(machine, "tiktoken"),
        "kept heap": _heap(platform.libc_ver()[0]),
    }
    return [FastPath(name=name, on=on, why=why) for name, (on, why) in rows.items()]


def builds_openmp(cc: str) -> bool:
    """Tell whether a C compiler builds a shared library whose work OpenMP shares out."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "threads.c"
        source.write_text(SOURCE, encoding="ascii")
        flags = ["-shared", "-fPIC", "-fopenmp", str(source), "-o", f"{source}.so"]
        try:
            done = subprocess.run([*shlex.split(cc), *flags], capture_output=True, timeout=30)
        except (OSError, subprocess.SubprocessError):
            return False
    return done.returncode == 0


def _bf16(machine: Machine, device: torch.device) -> tuple[bool, str]:
    """Numbers of half the size, where there are circuits that multiply them."""
    if has_fast_bf16(device):
        return True, "run.dtype=auto trains in it"
    if device.type != "cpu":
        return False, f"{device.type} does not multiply it; fp32 is faster"
    circuits = "bf16" if "neon" in machine.isa else "amx_bf16 or avx512_bf16"
    return False, f"needs {circuits}; fp32 is faster here"


def _kernels(kernels: Kernels | Unavailable, device: torch.device) -> tuple[bool, str]:
    """The C code of engine/kernels."""
    if not kernels:
        return False, kernels.reason
    if has_fast_bf16(device):
        return False, "training takes bf16 here; run.dtype=int8 would use them"
    return True, "training takes them, and lm train multiplies in 8 bits"


def _decoder(
    library: Library | Unavailable, device: torch.device, machine: Machine
) -> tuple[bool, str]:
    """The C code that answers without torch."""
    if not library:
        return False, library.reason
    if device.type != "cpu":
        return False, f"{device.type} answers by torch; --device cpu would use it"
    found = next((name for name in PRODUCTS if name in machine.isa), "plain C")
    return True, f"lm generate takes it; 8-bit products by {found}"


def _threads(machine: Machine) -> tuple[bool, str]:
    """Every core at work, and none twice."""
    why = f"threads {machine.threads}, cores {machine.cores}"
    if machine.threads != machine.cores:
        why += f"; OMP_NUM_THREADS={machine.cores} would set it right"
    return machine.threads == machine.cores, why


def _accelerator(machine: Machine, device: torch.device) -> tuple[bool, str]:
    """A device made for it."""
    if device.type != "cpu":
        return True, f"run.device=auto takes {device.type}"
    if machine.accelerators:
        return False, "there is one; --device cpu was asked for"
    built = torch.backends.cuda.is_built() or torch.backends.mps.is_built()
    return False, "torch sees none" if built else "torch is built without"


def _package(machine: Machine, name: str) -> tuple[bool, str]:
    """A package that is not required."""
    extra, purpose = OPTIONAL[name]
    if version := machine.packages[name]:
        return True, f"{version} {purpose}"
    return False, f"{purpose}: pip install 'lm-workbench[{extra}]'"


def _heap(libc: str) -> tuple[bool, str]:
    """Memory that is kept between steps, in place of being mapped and zeroed anew."""
    return libc == "glibc", "training keeps freed memory" if libc == "glibc" else "only glibc can"
