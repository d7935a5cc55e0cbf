"""How a run multiplies: in which precision, and by whose kernels."""

from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config import RunConfig
from engine.errors import ResourceError
from engine.hardware import pick_dtype
from engine.kernels.build import load_kernels, unbuilt
from engine.kernels.compile import Unavailable
from engine.kernels.native import Kernels
from engine.model.transformer import Transformer


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """The precision of matrix products, and our kernels if they work in it."""

    dtype: torch.dtype
    kernels: Kernels | Unavailable

    @property
    def name(self) -> str:
        """The precision as torch names it: float32, bfloat16, int8."""
        return str(self.dtype).removeprefix("torch.")

    def prepare(self, model: Transformer) -> None:
        """Let a model compute this way; bf16 comes from autocast, step by step."""
        model.accelerate(self.kernels, eight_bits=self.dtype == torch.int8)


def choose_precision(
    config: RunConfig, device: torch.device, cache: Path, *, finetune: bool
) -> Precision:
    """Choose what the recipe asks for, or the fastest here; kernels are kept below `cache`.

    Where bf16 is not native and there are kernels, `auto` takes 8 bits for training from nothing,
    which costs nothing in quality there (docs/speedrun.md), and fp32 for finetuning.

    Raises: ResourceError if 8 bits are asked for and cannot be had.
    """
    reason = _without(config, device)
    kernels = Unavailable(reason) if reason else load_kernels(cache)
    dtype = pick_dtype(config.dtype, device, "int8" if kernels and not finetune else "fp32")
    if dtype == torch.int8 and not kernels:
        raise ResourceError(
            f"run.dtype=int8 needs our C kernels, and {kernels.reason}; use run.dtype=auto"
        )
    return Precision(dtype=dtype, kernels=kernels)


def first_build(config: RunConfig, device: torch.device, cache: Path) -> str:
    """Say that choosing will build our kernels first, which takes some seconds; else nothing."""
    compiler = "" if _without(config, device) else unbuilt(cache)
    return compiler and f"building kernels with {compiler}, once"


def _without(config: RunConfig, device: torch.device) -> str:
    """Say why our kernels are not even looked for; nothing if they are."""
    if device.type != "cpu":
        return "they are for a CPU"
    if config.kernels == "torch":
        return "run.kernels=torch was asked for"
    if pick_dtype(config.dtype, device) == torch.bfloat16:
        return "they multiply fp32 and int8"
    return ""
