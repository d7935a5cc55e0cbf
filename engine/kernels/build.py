"""The kernels of training: where they run, and how they are built.

Where there is no compiler, or none of the instructions that they are written for, torch does the
work alone; `Kernels | Unavailable` says which, and why.
"""

from pathlib import Path

import torch

from engine.kernels.compile import Unavailable, build
from engine.kernels.native import Kernels

SOURCES = [Path(__file__).with_name(name) for name in ("products.c", "fused.c")]
FLAGS = ["-O3", "-mprefer-vector-width=512"]
NEEDED = ("avx512_f", "avx512_vnni")  # as torch names them


def load_kernels(cache: Path) -> Kernels | Unavailable:
    """Load the kernels from below `cache`, building them first if this machine never did."""
    has = torch.cpu.get_capabilities()
    if missing := [name for name in NEEDED if not has.get(name)]:
        return Unavailable(f"this processor has no {' and no '.join(missing)}")
    library = build(SOURCES, [], FLAGS, cache)
    if isinstance(library, Unavailable):
        return library
    try:
        return Kernels(library)
    except (OSError, AttributeError) as error:
        return Unavailable(f"{library} does not load: {error}")
