"""Rotary position embedding: positions as rotations of query and key pairs.

Dimension i of a head is paired with i + H/2 (the half-split pairing of Hugging Face checkpoints)
and turned by position · frequency[i].

Source: Su et al. 2021, arXiv:2104.09864.
"""

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.kernels.native import Kernels
from engine.model import angles


def frequencies(config: ModelConfig, local: bool = False, long: bool = False) -> Tensor:
    """Return the angles of `engine/model/angles.py` as a tensor."""
    return torch.from_numpy(angles.frequencies(config, local, long))


def rotation(frequency: Tensor, position_T: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Compute the cosine and sine that turn what stands at these positions.

    Shapes: returns cos_TH and sin_TH, fp32, H = rotary_dim; each angle appears twice, once for
    each half of a head.
    """
    angle = torch.outer(position_T.double(), frequency)
    angle_TH = torch.cat((angle, angle), dim=-1)
    return (angle_TH.cos() * factor).float(), (angle_TH.sin() * factor).float()


class Rotation(torch.autograd.Function):
    """Rotate pairs by an angle; the gradient is rotated back by the same angle."""

    @staticmethod
    def forward(ctx, x_BTNH, cos_TH, sin_TH, kernels: Kernels | None):
        """Shapes: x_BTNH → the same."""
        ctx.save_for_backward(cos_TH, sin_TH)
        ctx.kernels = kernels
        return _turn(x_BTNH, cos_TH, sin_TH, 1, kernels)

    @staticmethod
    def backward(ctx, *grad_outputs):
        """Rotate the gradient by minus the angle: a rotation's transpose is its inverse."""
        cos_TH, sin_TH = ctx.saved_tensors
        return _turn(grad_outputs[0], cos_TH, sin_TH, -1, ctx.kernels), None, None, None


def _turn(
    x_BTNH: Tensor, cos_TH: Tensor, sin_TH: Tensor, sign: int, kernels: Kernels | None
) -> Tensor:
    """Compute (a·cos - b·sin, b·cos + a·sin) for the halves a and b of every head."""
    if kernels:
        return kernels.rotate(x_BTNH.contiguous(), cos_TH, sin_TH, float(sign))
    width = cos_TH.shape[-1]
    cos_T1H, sin_T1H = cos_TH[:, None, :], sign * sin_TH[:, None, : width // 2]
    a, b = x_BTNH[..., : width // 2], x_BTNH[..., width // 2 : width]
    y_BTNH = x_BTNH.clone()
    y_BTNH[..., :width] *= cos_T1H
    y_BTNH[..., : width // 2].addcmul_(b, sin_T1H, value=-1)
    y_BTNH[..., width // 2 : width].addcmul_(a, sin_T1H)
    return y_BTNH


def rotate(
    x_BTNH: Tensor, cos_TH: Tensor, sin_TH: Tensor, kernels: Kernels | None = None
) -> Tensor:
    """Rotate the pairs of every head by its position's angle; keeps x's dtype.

    Numbers of a head beyond the width of the angles stay as they are (partial rotary).
    """
    return Rotation.apply(x_BTNH.float(), cos_TH, sin_TH, kernels).to(x_BTNH.dtype)
