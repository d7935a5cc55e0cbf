"""Rotary positions: rotations that keep lengths, whose products depend on distance alone."""

import math

import pytest
import torch

from engine.config import ModelConfig
from engine.model.rope import Rotation, frequencies, rotate, rotation


def table(head_dim: int, length: int = 1100, theta: float = 10000.0):
    config = ModelConfig(
        n_heads=2, d_model=2 * head_dim, max_seq_len=length, rope_theta=theta, head_dim=head_dim
    )
    return rotation(frequencies(config), 0, length)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_pair_turns_by_its_position_by_hand():
    """(1, 0) at position p is (cos p, sin p), the first pair turning one radian a token."""
    cos, sin = table(2, 4)
    turned = rotate(torch.tensor([1.0, 0.0]).expand(1, 1, 4, 2), cos, sin)[0, 0]
    expected = [[math.cos(p), math.sin(p)] for p in range(4)]
    torch.testing.assert_close(turned, torch.tensor(expected))


def test_pairs_are_halves_apart_by_hand():
    """With four dimensions, (0, 2) turns at frequency 1 and (1, 3) at 1/√theta = 0.01."""
    cos, sin = table(4, 8)
    turned = rotate(torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(1, 1, 8, 4), cos, sin)[0, 0, 7]
    expected = [math.cos(7), math.cos(0.07), math.sin(7), math.sin(0.07)]
    torch.testing.assert_close(turned, torch.tensor(expected))


@pytest.mark.parametrize("head_dim, theta", [(8, 10000.0), (64, 10000.0), (128, 1e6)])
def test_equals_transformers(head_dim, theta):
    from transformers.models.qwen3.modeling_qwen3 import (
        Qwen3Config,
        Qwen3RotaryEmbedding,
        apply_rotary_pos_emb,
    )

    length = 300
    config = Qwen3Config(
        head_dim=head_dim,
        max_position_embeddings=length,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    q, k = normal(2, 4, length, head_dim), normal(2, 2, length, head_dim, seed=1)
    their_cos, their_sin = Qwen3RotaryEmbedding(config)(q, torch.arange(length)[None])
    their_q, their_k = apply_rotary_pos_emb(q, k, their_cos, their_sin)
    cos, sin = table(head_dim, length, theta)
    # Their angles are fp32, good to about 300 · 6e-8.
    torch.testing.assert_close(rotate(q, cos, sin), their_q, atol=1e-4, rtol=0)
    torch.testing.assert_close(rotate(k, cos, sin), their_k, atol=1e-4, rtol=0)


def test_products_depend_on_distance_alone():
    """⟨R_m q, R_n k⟩ is unchanged when both positions move by 1000, and changes when one does."""
    cos, sin = table(64)
    q, k = normal(1, 1, 1, 64), normal(1, 1, 1, 64, seed=1)

    def product(m: int, n: int) -> float:
        turned = [rotate(x, cos[p : p + 1], sin[p : p + 1]) for x, p in ((q, m), (k, n))]
        return float((turned[0] * turned[1]).sum())

    for m, n in [(0, 0), (5, 2), (2, 5), (90, 1), (99, 98)]:
        assert abs(product(m + 1000, n + 1000) - product(m, n)) < 1e-4
    assert abs(product(6, 2) - product(5, 2)) > 0.1


def test_lengths_are_kept():
    cos, sin = table(16)
    x = normal(2, 3, 1100, 16)
    torch.testing.assert_close(rotate(x, cos, sin).norm(dim=-1), x.norm(dim=-1))


def test_position_zero_is_the_identity():
    cos, sin = table(16)
    x = normal(2, 3, 1, 16)
    assert torch.equal(rotate(x, cos[:1], sin[:1]), x)


def test_the_gradient_turns_back():
    cos, sin = (t[:5].double() for t in table(6))
    x = normal(2, 3, 5, 6).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: Rotation.apply(x, cos, sin), (x,))
    assert torch.autograd.gradgradcheck(lambda x: Rotation.apply(x, cos, sin), (x,))


def test_bf16_in_bf16_out_computed_in_fp32_and_the_input_stays():
    cos, sin = table(16)
    x = normal(2, 3, 1100, 16).bfloat16()
    before = x.clone()
    y = rotate(x, cos, sin)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, rotate(x.float(), cos, sin).bfloat16())
    assert torch.equal(x, before)


def test_far_positions_keep_their_digits():
    """An angle of 100,000 radians in fp32 is off by 0.004; the table's is not."""
    cos, sin = table(8, 100_001)
    for pair in range(4):
        angle = 100_000 * 10000.0 ** (-pair / 4)
        assert abs(cos[-1, pair] - math.cos(angle)) < 1e-6
        assert abs(sin[-1, pair + 4] - math.sin(angle)) < 1e-6


def test_a_larger_theta_turns_the_slow_pairs_slower():
    slow, fast = table(8, 100, 1e6)[1], table(8, 100, 1e4)[1]
    assert torch.equal(slow[:, 0], fast[:, 0])
    assert slow[99, 3] < fast[99, 3] / 10
