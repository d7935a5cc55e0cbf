"""Rotary position embedding: positions as rotations of query and key pairs.

Dimension i of a head is paired with i + H/2 (the half-split pairing of Hugging Face checkpoints)
and turned by position · frequency[i]. Context extension stretches the frequencies.

Sources: Su et al. 2021, arXiv:2104.09864 (RoPE); Chen et al. 2023, arXiv:2306.15595 (linear); Peng
et al. 2023, arXiv:2309.00071 (YaRN); Grattafiori et al. 2024, arXiv:2407.21783 (llama3); Ding et
al. 2024, arXiv:2402.13753 (LongRoPE).
"""

import math

import torch
from torch import Tensor

from engine.config import ModelConfig, RopeScaling
from engine.kernels.native import Kernels


def frequencies(config: ModelConfig, local: bool = False, long: bool = False) -> Tensor:
    """Return the angle, in radians per position, by which each pair of a head turns.

    Shapes: returns (rotary_dim / 2,), fp64: at position 100,000 an fp32 angle has already lost
    five digits. `local` is for windowed layers that have a base of their own; `long` takes the
    LongRoPE factors for sequences beyond the original context.
    """
    theta = config.local_rope_theta if local else config.rope_theta
    exponent = torch.arange(0, config.rotary_dim, 2, dtype=torch.float64) / config.rotary_dim
    frequency = theta**-exponent
    rope_scaling = config.rope_scaling
    if local or rope_scaling.kind == "none":
        return frequency
    if rope_scaling.kind == "linear":
        return frequency / rope_scaling.factor
    if rope_scaling.kind == "longrope":
        factors = rope_scaling.long_factors if long else rope_scaling.short_factors
        return frequency / torch.tensor(factors, dtype=torch.float64)
    kept = _llama3_kept if rope_scaling.kind == "llama3" else _yarn_kept
    share = kept(frequency, rope_scaling, theta)
    return frequency * share + frequency / rope_scaling.factor * (1 - share)


def _llama3_kept(frequency: Tensor, rope_scaling: RopeScaling, theta: float) -> Tensor:
    """Return how much of each frequency stays: all if it turns often in the original context."""
    turns = rope_scaling.original_max_seq_len * frequency / (2 * math.pi)
    low, high = rope_scaling.low_freq_factor, rope_scaling.high_freq_factor
    return ((turns - low) / (high - low)).clamp(0, 1)


def _yarn_kept(frequency: Tensor, rope_scaling: RopeScaling, theta: float) -> Tensor:
    """Return how much of each frequency stays, on a ramp over the dimensions. Source: YaRN, 3.2."""
    pairs = len(frequency)

    def dimension(turns: float) -> float:
        """Find the (fractional) pair that makes this many turns in the original context."""
        wavelength = rope_scaling.original_max_seq_len / (2 * math.pi * turns)
        return pairs * math.log(wavelength) / math.log(theta)

    low = max(math.floor(dimension(rope_scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(rope_scaling.beta_slow)), 2 * pairs - 1)
    ramp = (torch.arange(pairs, dtype=torch.float64) - low) / (high - low or 0.001)
    return 1 - ramp.clamp(0, 1)


def attention_factor(config: ModelConfig) -> float:
    """Return what cosine and sine are multiplied by, which sharpens attention over long texts."""
    rope_scaling = config.rope_scaling
    if rope_scaling.attention_factor or rope_scaling.factor <= 1:
        return rope_scaling.attention_factor or 1.0
    if rope_scaling.kind == "yarn":
        return 0.1 * math.log(rope_scaling.factor) + 1
    if rope_scaling.kind == "longrope":
        return math.sqrt(
            1 + math.log(rope_scaling.factor) / math.log(rope_scaling.original_max_seq_len)
        )
    return 1.0


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
