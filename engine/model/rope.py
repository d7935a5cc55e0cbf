"""Rotary position embedding: positions as rotations of query and key pairs.

Source: Su et al. 2021, arXiv:2104.09864. The pairing is the half-split one (dimension i with
i + H/2) that Hugging Face checkpoints of the Llama and Qwen families use.
"""

import torch
from torch import Tensor

from engine.config import ModelConfig


def rope_table(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Compute the cosine and sine of every position's rotation angles.

    Shapes: returns cos_SH and sin_SH, fp32, for positions 0 … max_seq_len - 1; the H/2 angles
    appear twice, once for each half of a head.
    """
    # In fp64: at position 100,000 an fp32 angle has already lost five digits.
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    frequency = config.rope_theta**-exponent
    angle = torch.outer(torch.arange(config.max_seq_len, dtype=torch.float64), frequency)
    angle_SH = torch.cat((angle, angle), dim=-1)
    return angle_SH.cos().float(), angle_SH.sin().float()


class Rotation(torch.autograd.Function):
    """Rotate pairs by an angle; the gradient is rotated back by the same angle."""

    @staticmethod
    def forward(ctx, x_BNTH, cos_TH, sin_TH):
        """Shapes: x_BNTH → the same."""
        ctx.save_for_backward(cos_TH, sin_TH)
        return _turn(x_BNTH, cos_TH, sin_TH)

    @staticmethod
    def backward(ctx, *grad_outputs):
        """Rotate the gradient by minus the angle: a rotation's transpose is its inverse."""
        cos_TH, sin_TH = ctx.saved_tensors
        return _turn(grad_outputs[0], cos_TH, -sin_TH), None, None


def _turn(x_BNTH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Compute (a·cos - b·sin, b·cos + a·sin) for the halves a and b of every head."""
    half = x_BNTH.shape[-1] // 2
    a, b = x_BNTH[..., :half], x_BNTH[..., half:]
    y_BNTH = x_BNTH * cos_TH
    y_BNTH[..., :half].addcmul_(b, sin_TH[:, :half], value=-1)
    y_BNTH[..., half:].addcmul_(a, sin_TH[:, half:])
    return y_BNTH


def rotate(x_BNTH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Rotate each (i, i + H/2) pair of every head by its position's angle; keeps x's dtype."""
    return Rotation.apply(x_BNTH.float(), cos_TH, sin_TH).to(x_BNTH.dtype)
