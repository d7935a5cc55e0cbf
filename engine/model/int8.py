"""Frozen matrices in 8 bits: a quarter of the memory, for a LoRA to be trained beside them.

Each row of W has its own scale s = largest |w| / 127 and holds round(w / s), so no entry moves by
more than s / 2, and no output by more than s / 2 · Σ|x|. The matrix is widened again for each
product and dropped after it: neither the forward nor the backward pass keeps a wide copy.

Source: row-wise absolute maximum, Dettmers et al. 2022, arXiv:2208.07339 (section 2.1).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.model.transformer import Transformer

LARGEST = 127  # symmetric: -128 is not used
ROWS = 64  # rounded at once


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to 8 bits.

    Shapes: (out, in) → int8 (out, in), fp32 scale (out).
    """
    weight = weight.float()
    tiny = torch.finfo(torch.float32).tiny  # a row of zeros needs some scale
    largest = torch.linalg.vector_norm(weight, float("inf"), dim=1)
    scale = (largest / LARGEST).clamp_min_(tiny)
    whole = torch.empty_like(weight, dtype=torch.int8)
    # A few rows at a time: wide intermediates between what stays would leave holes in the heap.
    for rows, narrow, s in zip(*(x.split(ROWS) for x in (weight, whole, scale)), strict=True):
        narrow.copy_((rows / s[:, None]).round_())
    return whole, scale


def widen(weight: Tensor, scale: Tensor) -> Tensor:
    """Return the fp32 matrix that rounded rows and their scales stand for."""
    return weight.float().mul_(scale[:, None])


class _Product(torch.autograd.Function):
    """x Wᵀ + bias, where only the narrow W is remembered for the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Widen, multiply, and remember the narrow form."""
        ctx.save_for_backward(weight, scale)
        bias = bias if bias is None else bias.to(x.dtype)
        return F.linear(x, widen(weight, scale).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """Widen once more: only x has a gradient."""
        weight, scale = ctx.saved_tensors
        wide = widen(weight, scale)
        return gradients[0] @ wide.to(gradients[0].dtype), None, None, None


class Int8Linear(nn.Module):
    """A frozen linear map, held in 8 bits; its weight and bias get no gradient."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = quantize(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = linear.bias
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (…, in) → (…, out), in the dtype of x or of autocast."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _Product.apply(x, self.weight, self.scale, self.bias)  # type: ignore[return-value]

    def widened(self) -> Tensor:
        """Return the matrix that this one stands for, in fp32."""
        return widen(self.weight, self.scale)


def quantize_linears(model: Transformer) -> None:
    """Hold the matrices of all blocks in 8 bits; those that are already stay as they are."""
    for name, module in list(model.blocks.named_modules()):
        if isinstance(module, nn.Linear):
            model.blocks.set_submodule(name, Int8Linear(module))
