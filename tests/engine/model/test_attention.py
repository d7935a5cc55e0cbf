"""Attention equals its formula written out, whatever the heads, masks, norms and biases."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.config import ModelConfig
from engine.model.attention import Attention, attend_reference, visible
from engine.model.rope import frequencies, rotate, rotation

T = 7


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_attention(**changes) -> tuple[Attention, ModelConfig]:
    config = ModelConfig(**({"d_model": 16, "n_heads": 4, "max_seq_len": 16} | changes))
    attention = Attention(config)
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) / 2)
    return attention, config


def by_formula(attention: Attention, config: ModelConfig, x, rope, mask_TS):
    """Attention from the module's weights alone, head by head and query by query."""

    def heads(proj, norm, turn):
        y = x @ proj.weight.T + (proj.bias if config.attention_bias else 0)
        if config.qk_norm != "width":
            y = y.unflatten(-1, (-1, config.head_dim))
        if norm is not None and config.qk_norm != "none":
            y = y * (y.square().mean(-1, keepdim=True) + config.norm_eps).rsqrt() * norm.weight
        if config.qk_norm == "width":
            y = y.unflatten(-1, (-1, config.head_dim))
        y = rotate(y, *rope) if turn and rope else y
        return y.transpose(1, 2)

    q = heads(attention.q_proj, attention.q_norm, True)
    k = heads(attention.k_proj, attention.k_norm, True)
    v = heads(attention.v_proj, None, False)
    out = torch.zeros(x.shape[0], T, config.n_heads, config.head_dim)
    for b in range(x.shape[0]):
        for head in range(config.n_heads):
            shared = head // (config.n_heads // config.n_kv_heads)
            for t in range(T):
                seen = [s for s in range(T) if mask_TS[t, s]]
                score = k[b, shared, seen] @ q[b, head, t] / math.sqrt(config.head_dim)
                out[b, t, head] = score.softmax(0) @ v[b, shared, seen]
    y = out.flatten(2) @ attention.o_proj.weight.T
    return y + attention.o_proj.bias if config.output_bias else y


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("qk_norm", ["none", "head", "width"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("look", ["causal", "window", "all"])
def test_equals_its_formula(n_kv_heads, qk_norm, bias, look):
    attention, config = make_attention(
        n_kv_heads=n_kv_heads, qk_norm=qk_norm, attention_bias=bias, output_bias=bias, head_dim=6
    )
    x = normal(2, T, 16)
    rope = rotation(frequencies(config), torch.arange(3, 3 + T)) if look != "all" else None
    position = torch.arange(T)
    window = 3 if look == "window" else 0
    mask = (
        torch.ones(T, T, dtype=torch.bool) if look == "all" else visible(position, position, window)
    )
    with torch.no_grad():
        y = attention(x, rope, mask if window else None, look == "causal", None, 0)
        torch.testing.assert_close(
            y, by_formula(attention, config, x, rope, mask), atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [0, 2])
def test_reference_equals_sdpa(n_kv_heads, window):
    q, k, v = (
        normal(2, 4, 5, 8),
        normal(2, n_kv_heads, 9, 8, seed=1),
        normal(2, n_kv_heads, 9, 8, seed=2),
    )
    mask = visible(torch.arange(4, 9), torch.arange(9), window)
    fast = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, enable_gqa=True
    )
    torch.testing.assert_close(attend_reference(q, k, v, mask), fast, atol=1e-6, rtol=1e-5)


def test_reference_two_tokens_by_hand():
    """One head of width 1: scores (0, ln 3) weigh the values 1 and 5 as 1:3."""
    q = torch.tensor([[[[1.0], [1.0]]]])
    k = torch.tensor([[[[0.0], [math.log(3)]]]])
    v = torch.tensor([[[[1.0], [5.0]]]])
    position = torch.arange(2)
    y = attend_reference(q, k, v, visible(position, position, 0))
    torch.testing.assert_close(y.flatten(), torch.tensor([1.0, 4.0]))
    torch.testing.assert_close(attend_reference(q, k, v, None).flatten(), torch.tensor([4.0, 4.0]))


def test_rows_are_a_distribution_over_what_is_visible():
    """With the identity as values, attention returns its own weights."""
    q, k = normal(1, 2, T, T), normal(1, 2, T, T, seed=1)
    v = torch.eye(T).expand(1, 2, T, T)
    mask = visible(torch.arange(T), torch.arange(T), 3)
    weights = attend_reference(q, k, v, mask)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, T))
    assert torch.equal(weights > 0, mask.expand(1, 2, T, T))


def test_grouped_heads_equal_full_heads_with_copied_keys_and_values():
    """Two key/value heads behave as four of which neighbours are copies."""
    few, _ = make_attention(n_kv_heads=2, attention_bias=True)
    many, _ = make_attention(n_kv_heads=4, attention_bias=True)
    state = few.state_dict()
    for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
        state[name] = state[name].unflatten(0, (2, 4)).repeat_interleave(2, dim=0).flatten(0, 1)
    many.load_state_dict(state)
    x = normal(2, T, 16)
    args = (None, None, True, None, 0)
    torch.testing.assert_close(few(x, *args), many(x, *args), atol=1e-6, rtol=1e-5)


def test_as_many_key_value_heads_as_query_heads_is_plain_multi_head_attention():
    """Against torch's own nn.MultiheadAttention with the same weights."""
    attention, config = make_attention(qk_norm="none", attention_bias=True, output_bias=True)
    theirs = torch.nn.MultiheadAttention(config.d_model, config.n_heads, batch_first=True)
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        theirs.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        theirs.out_proj.load_state_dict(attention.o_proj.state_dict())
        x = normal(2, T, 16)
        mask = torch.ones(T, T, dtype=torch.bool).triu(1)
        expected, _ = theirs(x, x, x, attn_mask=mask, need_weights=False)
        y = attention(x, None, None, True, None, 0)
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-5)


def test_visible_by_hand():
    """Queries at 2, 3, 4 over keys 0 … 4, each seeing itself and one token back."""
    mask = visible(torch.arange(2, 5), torch.arange(5), window=2)
    assert mask.int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    triangle = visible(torch.arange(3), torch.arange(3), window=0)
    assert triangle.int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


@given(
    start=st.integers(0, 20),
    new=st.integers(1, 6),
    first=st.integers(0, 20),
    window=st.integers(0, 8),
)
def test_visible_is_its_definition(start, new, first, window):
    queries, keys = range(start, start + new), range(min(first, start), start + new)
    expected = [[k <= q and (not window or k > q - window) for k in keys] for q in queries]
    assert visible(torch.tensor(queries), torch.tensor(keys), window).tolist() == expected
