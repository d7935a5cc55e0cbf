"""Normalisation layers: keep every token's vector at a size the next matrix expects."""

import torch
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.kernels.native import Kernels


class ScaledByRMS(torch.autograd.Function):
    """x / rms(x) · weight with its gradient worked out by hand.

    Autograd's own trail for this formula reads and writes x a dozen times; this one half as often,
    which is what a normalisation costs on a CPU. Source: Zhang & Sennrich 2019, arXiv:1910.07467,
    eq. 4; with r = 1/rms and g = weight · dy, dx = r·g - x·r³·mean(g·x).
    """

    @staticmethod
    def forward(ctx, x, weight, eps, kernels: Kernels | None = None):
        """Shapes: x (..., D), weight (D,) → like x."""
        ctx.kernels = kernels
        if kernels:
            x = x.contiguous()
            y, r = kernels.norm(x, weight, eps)
            ctx.save_for_backward(x, weight, r)
            return y
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        r = r.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grad_outputs):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of x and weight."""
        (dy,) = grad_outputs
        x, weight, r = ctx.saved_tensors
        if ctx.kernels:
            return *ctx.kernels.norm_gradient(x, weight, r, dy.contiguous()), None, None
        product = dy * x
        dweight = (product * r).reshape(-1, x.shape[-1]).sum(0)
        inner = (product @ weight).unsqueeze(-1).mul_(r**3).div_(x.shape[-1])
        dx = (dy * weight).mul_(r).addcmul_(x, inner, value=-1)
        return dx, dweight, None, None


class RMSNorm(nn.Module):
    """Divide by the root mean square and scale, by `weight` or, with an offset, by 1 + `weight`."""

    kernels: Kernels | None = None

    def __init__(self, width: int, eps: float, offset: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width) if offset else torch.ones(width))
        self.eps = eps
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis in fp32, whatever the input's dtype; keeps that dtype."""
        weight = self.weight.float() + 1 if self.offset else self.weight.float()
        return ScaledByRMS.apply(x.float(), weight, self.eps, self.kernels).to(x.dtype)


def make_norm(config: ModelConfig, width: int) -> nn.Module:
    """Build the normalisation that the config names, over the last `width` numbers."""
    if config.norm == "layernorm":
        return nn.LayerNorm(width, eps=config.norm_eps)
    return RMSNorm(width, config.norm_eps, config.norm_offset)
