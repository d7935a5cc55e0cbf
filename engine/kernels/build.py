"""The kernels of training: where they run, and how they are built.

Where there is no compiler, or none of the instructions that they are written for, torch does the
work alone; `Kernels | Unavailable` says which, and why.
"""

from pathlib import Path

import torch

from engine.kernels.compile import Unavailable, build, compiler_for
from engine.kernels.native import Kernels

SOURCES = [Path(__file__).with_name(name) for name in ("products.c", "fused.c")]
FLAGS = ["-O3", "-mprefer-vector-width=512"]
NEEDED = ("avx512_f", "avx512_vnni")  # as torch names them


def load_kernels(cache: Path) -> Kernels | Unavailable:
    """Load the kernels from below `cache`, building them first if this machine never did."""
    if reason := _lacking():
        return Unavailable(reason)
    library = build(SOURCES, [], FLAGS, cache)
    if isinstance(library, Unavailable):
        return library
    try:
        return Kernels(library)
    except (OSError, AttributeError) as error:
        library.unlink(missing_ok=True)  # whatever made it, the next one may be better
        return Unavailable(f"{library} does not load: {error}")


def unbuilt(cache: Path) -> str:
    """Name the compiler that loading the kernels would start; nothing if it would not."""
    return "" if _lacking() else compiler_for(SOURCES, [], FLAGS, cache)


def _lacking() -> str:
    """Say which instructions this processor has not."""
    has = torch.cpu.get_capabilities()
    missing = [name for name in NEEDED if not has.get(name)]
    return f"this processor has no {' and no '.join(missing)}" if missing else ""
