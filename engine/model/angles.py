"""The angles of rotary positions: how far each pair of a head turns, and how fast, as NumPy arrays.

Context extension stretches the frequencies. Kept apart from the rotating itself
(`engine/model/rope.py`, and C), because whoever rotates needs these angles, with torch or without.

Sources: Su et al. 2021, arXiv:2104.09864 (RoPE); Chen et al. 2023, arXiv:2306.15595 (linear); Peng
et al. 2023, arXiv:2309.00071 (YaRN); Grattafiori et al. 2024, arXiv:2407.21783 (llama3); Ding et
al. 2024, arXiv:2402.13753 (LongRoPE).
"""

import math

import numpy as np

from engine.config import ModelConfig, RopeScaling


def frequencies(config: ModelConfig, local: bool = False, long: bool = False) -> np.ndarray:
    """Return the angle, in radians per position, by which each pair of a head turns.

    Shapes: returns (rotary_dim / 2,), fp64: at position 100,000 an fp32 angle has already lost
    five digits. `local` is for windowed layers that have a base of their own; `long` takes the
    LongRoPE factors for sequences beyond the original context.
    """
    theta = config.local_rope_theta if local else config.rope_theta
    exponent = np.arange(0, config.rotary_dim, 2, dtype=np.float64) / config.rotary_dim
    frequency = theta**-exponent
    rope_scaling = config.rope_scaling
    if local or rope_scaling.kind == "none":
        return frequency
    if rope_scaling.kind == "linear":
        return frequency / rope_scaling.factor
    if rope_scaling.kind == "longrope":
        factors = rope_scaling.long_factors if long else rope_scaling.short_factors
        return frequency / np.array(factors)
    kept = _llama3_kept if rope_scaling.kind == "llama3" else _yarn_kept
    share = kept(frequency, rope_scaling, theta)
    return frequency * share + frequency / rope_scaling.factor * (1 - share)


def _llama3_kept(frequency: np.ndarray, rope_scaling: RopeScaling, theta: float) -> np.ndarray:
    """Return how much of each frequency stays: all if it turns often in the original context."""
    turns = rope_scaling.original_max_seq_len * frequency / (2 * math.pi)
    low, high = rope_scaling.low_freq_factor, rope_scaling.high_freq_factor
    return ((turns - low) / (high - low)).clip(0, 1)


def _yarn_kept(frequency: np.ndarray, rope_scaling: RopeScaling, theta: float) -> np.ndarray:
    """Return how much of each frequency stays, on a ramp over the dimensions. Source: YaRN, 3.2."""
    pairs = len(frequency)

    def dimension(turns: float) -> float:
        """Find the (fractional) pair that makes this many turns in the original context."""
        wavelength = rope_scaling.original_max_seq_len / (2 * math.pi * turns)
        return pairs * math.log(wavelength) / math.log(theta)

    low = max(math.floor(dimension(rope_scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(rope_scaling.beta_slow)), 2 * pairs - 1)
    ramp = (np.arange(pairs) - low) / (high - low or 0.001)
    return 1 - ramp.clip(0, 1)


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


def angles(config: ModelConfig, position_T: np.ndarray, longest: int) -> list[np.ndarray]:
    """Return by how much each pair has turned at each position: in full layers, in windowed ones.

    Which LongRoPE factors count is settled by the `longest` the sequence may become, so that keys
    in a cache never need to be turned again.

    Shapes: → two (T, rotary_dim / 2), fp64.
    """
    long = longest > config.rope_scaling.original_max_seq_len
    full = frequencies(config, long=long)
    local = frequencies(config, local=True) if config.local_rope_theta else full
    return [np.outer(position_T, frequency) for frequency in (full, local)]
