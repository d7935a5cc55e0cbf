"""Rotary positions: rotations that keep lengths, whose products depend on distance alone."""

import math

import pytest
import torch

from engine.config import ModelConfig, RopeScaling
from engine.model.angles import attention_factor
from engine.model.rope import Rotation, frequencies, rotation
from engine.model.rope import rotate as rotate_BTNH


def table(head_dim: int, length: int = 1100, theta: float = 10000.0):
    config = ModelConfig(
        n_heads=2, d_model=2 * head_dim, max_seq_len=length, rope_theta=theta, head_dim=head_dim
    )
    return rotation(frequencies(config), torch.arange(length))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rotate(x_BNTH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Heads before tokens, as transformers has them."""
    return rotate_BTNH(x_BNTH.transpose(1, 2), cos, sin).transpose(1, 2)


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
    x = normal(2, 5, 3, 6).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: Rotation.apply(x, cos, sin, None), (x,))
    assert torch.autograd.gradgradcheck(lambda x: Rotation.apply(x, cos, sin, None), (x,))


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


# Published numbers: theta, head, our scaling, and the same in transformers' words.
SCALINGS = {
    "linear": (1e4, 128, {"kind": "linear", "factor": 4.0}, {}),
    "linear, Gemma 3": (1e6, 256, {"kind": "linear", "factor": 8.0}, {}),
    "llama3, Llama 3.1": (
        5e5,
        128,
        {"kind": "llama3", "factor": 8.0, "original_max_seq_len": 8192},
        {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
    "llama3, Llama 3.2": (
        5e5,
        64,
        {"kind": "llama3", "factor": 32.0, "original_max_seq_len": 8192},
        {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
    "yarn, Qwen 2.5": (
        1e6,
        128,
        {"kind": "yarn", "factor": 4.0, "original_max_seq_len": 32768},
        {},
    ),
    "yarn, other ramp": (
        1e4,
        64,
        {"kind": "yarn", "factor": 16.0, "original_max_seq_len": 2048}
        | {"beta_fast": 64.0, "beta_slow": 2.0, "attention_factor": 1.5},
        {"beta_fast": 64.0, "beta_slow": 2.0, "attention_factor": 1.5},
    ),
    "yarn, ramp cut off at both ends": (
        100.0,
        8,
        {"kind": "yarn", "factor": 2.0, "original_max_seq_len": 16},
        {},
    ),
    "longrope": (
        1e4,
        96,
        {"kind": "longrope", "factor": 32.0, "original_max_seq_len": 4096}
        | {"short_factors": tuple(1 + 0.01 * i for i in range(48))}
        | {"long_factors": tuple(1 + 1.2 * i for i in range(48))},
        {"short_factor": [1 + 0.01 * i for i in range(48)]}
        | {"long_factor": [1 + 1.2 * i for i in range(48)]},
    ),
}


def scaled(name: str) -> ModelConfig:
    theta, head_dim, ours, _ = SCALINGS[name]
    return ModelConfig(
        n_heads=2,
        d_model=2 * head_dim,
        head_dim=head_dim,
        max_seq_len=131_072,
        rope_theta=theta,
        rope_scaling=RopeScaling(**ours),
    )


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_frequencies_equal_transformers(name, long):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theta, head_dim, ours, words = SCALINGS[name]
    parameters = {"rope_type": ours["kind"], "rope_theta": theta, "factor": ours["factor"]} | words
    if original := ours.get("original_max_seq_len"):
        parameters["original_max_position_embeddings"] = original
    theirs = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=131_072,
        rope_parameters=parameters,
    )
    length = 131_072 if long else 10
    expected, factor = ROPE_INIT_FUNCTIONS[ours["kind"]](theirs, "cpu", seq_len=length)
    config = scaled(name)
    found = frequencies(config, long=long)
    assert found.dtype == torch.float64
    # Their frequencies are fp32.
    torch.testing.assert_close(found, expected.double(), rtol=2e-6, atol=0)
    assert attention_factor(config) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("name", SCALINGS)
def test_a_scaling_changes_something(name):
    config = scaled(name)
    plain = frequencies(ModelConfig(head_dim=config.head_dim, rope_theta=config.rope_theta))
    assert (frequencies(config) / plain).min() < 0.99


@pytest.mark.parametrize("name", ["llama3, Llama 3.1", "yarn, Qwen 2.5"])
def test_fast_pairs_are_kept_and_slow_ones_stretched_by_hand(name):
    """What turns often in the old context tells neighbours apart; slower pairs do not."""
    config = scaled(name)
    scaling = config.rope_scaling
    plain = frequencies(ModelConfig(head_dim=config.head_dim, rope_theta=config.rope_theta))
    share = frequencies(config) / plain
    turns = scaling.original_max_seq_len * plain / (2 * math.pi)
    assert torch.equal(share[turns > 64], torch.ones_like(share[turns > 64]))
    torch.testing.assert_close(
        share[turns < 0.5], torch.full_like(share[turns < 0.5], 1 / scaling.factor)
    )
    assert (share[1:] <= share[:-1]).all(), "monotone in between"


def test_attention_factors_by_hand():
    """YaRN: 0.1 ln 4 + 1. LongRoPE: √(1 + ln 32 / ln 4096) = √(1 + 5/12)."""
    assert attention_factor(scaled("yarn, Qwen 2.5")) == pytest.approx(1.1386294361)
    assert attention_factor(scaled("longrope")) == pytest.approx(math.sqrt(17 / 12))
    assert attention_factor(scaled("yarn, other ramp")) == 1.5
    assert attention_factor(scaled("linear")) == attention_factor(scaled("llama3, Llama 3.1")) == 1


def test_windowed_layers_with_a_base_of_their_own_are_not_scaled():
    config = ModelConfig(
        sliding_window=4,
        local_rope_theta=100.0,
        head_dim=8,
        rope_scaling=RopeScaling(kind="linear", factor=8.0),
    )
    expected = 100.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    torch.testing.assert_close(frequencies(config, local=True), expected)
    assert not torch.equal(frequencies(config, local=True), frequencies(config))


def test_numbers_beyond_the_rotated_part_stay_as_they_are():
    config = ModelConfig(head_dim=16, rotary_dim=6)
    x = normal(2, 3, 50, 16)
    y = rotate(x, *rotation(frequencies(config), torch.arange(50)))
    assert torch.equal(y[..., 6:], x[..., 6:])
    alone = rotate(x[..., :6], *rotation(frequencies(config), torch.arange(50)))
    assert torch.equal(y[..., :6], alone)
    assert not torch.equal(y[:, :, 1:, :6], x[:, :, 1:, :6])


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"kind": "yarn"}, "original_max_seq_len"),
        ({"kind": "yarn", "original_max_seq_len": 8, "beta_slow": 0.0}, "beta_slow"),
        ({"kind": "llama3", "original_max_seq_len": 8, "low_freq_factor": 4.0}, "low_freq_factor"),
        ({"kind": "longrope", "original_max_seq_len": 8, "long_factors": (0.0,)}, "above 0"),
        ({"kind": "longrope", "original_max_seq_len": 1}, "attention_factor"),
    ],
    ids=str,
)
def test_scalings_that_would_divide_by_zero_are_refused(changes, word):
    with pytest.raises(ValueError, match=word):
        RopeScaling(**changes)


def test_yarn_needs_pairs_that_differ():
    scaling = RopeScaling(kind="yarn", original_max_seq_len=8, factor=2.0)
    with pytest.raises(ValueError, match="rope_theta=1"):
        ModelConfig(rope_theta=1.0, rope_scaling=scaling)
