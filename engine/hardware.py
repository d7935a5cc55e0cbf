"""Using the machine: which device, precision and threads, and how much memory there is.

Decisions are made by functions that are called with the recipe's wish and return the answer;
nothing is decided at import. What the machine is, and how fast, is in `engine/machine.py`.
"""

import ctypes
import sys
from contextlib import AbstractContextManager, nullcontext

import torch

from engine.errors import ResourceError
from engine.pages import free_memory


def pick_device(wish: str) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda` or `mps`.

    Raises: ResourceError if the named device is not there.
    """
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if wish == "auto":
        wish = next(name for name, present in there.items() if present)
    if not there[wish]:
        raise ResourceError(f"this machine has no {wish} device; use run.device=auto")
    return torch.device(wish)


def synchronize(device: torch.device) -> None:
    """Wait for queued work, so that a clock read afterwards means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def has_fast_bf16(device: torch.device) -> bool:
    """Tell whether the device multiplies bf16 natively; elsewhere it is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    features = torch.cpu.get_capabilities()
    return any(features.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def pick_dtype(wish: str, device: torch.device, otherwise: str = "fp32") -> torch.dtype:
    """Return the matmul precision for `fp32`, `bf16`, `int8` or `auto`.

    That is bf16 where the device multiplies it natively, and `otherwise` elsewhere.
    """
    if wish == "auto":
        wish = "bf16" if has_fast_bf16(device) else otherwise
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}[wish]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Run matmuls in bf16 while weights stay fp32; does nothing for another dtype."""
    if dtype != torch.bfloat16:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def use_threads(wish: int) -> int:
    """Set and return the number of CPU threads; 0 keeps torch's choice, one per core."""
    if wish:
        torch.set_num_threads(wish)
    return torch.get_num_threads()


def keep_heap() -> None:
    """Let glibc keep freed memory, so that large tensors are not mapped and zeroed anew each step.

    By default blocks over 32 MB go back to the kernel on free, and every page of the next one
    faults again. Elsewhere than on glibc this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
        # Older ones accept at most 32 MB; and raising only the trim threshold would make it worse.
        if libc.mallopt(mmap_threshold, 1 << 30) or libc.mallopt(mmap_threshold, 1 << 25):
            libc.mallopt(trim_threshold, (1 << 31) - 1)


def check_memory(
    needed: int,
    device: torch.device,
    what: str,
    smaller: str = "model.d_model, model.n_layers or train.batch_size / train.accumulate",
) -> None:
    """Refuse work that cannot fit, before the machine starts to swap.

    Raises: ResourceError naming what is needed and what there is.
    """
    there = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    if needed > there:
        raise ResourceError(
            f"{what} needs about {needed / 1e9:,.1f} GB and {there / 1e9:,.1f} GB are free; make"
            f" {smaller} smaller"
        )
