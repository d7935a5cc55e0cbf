"""Every kernel equals its formula in torch, at sizes that divide nothing, and loses no NaN."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from engine.kernels.native import BLOCK, Kernels
from engine.model.norm import ScaledByRMS
from engine.model.rope import Rotation


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(y: torch.Tensor, dy: torch.Tensor, *inputs: torch.Tensor) -> tuple:
    return torch.autograd.grad(y, inputs, dy)


def per_row(matrix: torch.Tensor) -> torch.Tensor:
    """What a matrix is after rounding by rows."""
    most = matrix.abs().amax(1, keepdim=True)
    return (matrix * (torch.tensor(127.0) / most)).round() * (most / 127)


SIZES = st.sampled_from([1, 2, 5, 15, 16, 17, 48, 49, 64, 100, 257, 600])


@given(rows=SIZES, depth=SIZES, columns=SIZES, seed=st.integers(0, 9))
def test_products_are_those_of_the_rounded_factors(kernels: Kernels, rows, depth, columns, seed):
    """Integers are added exactly, so all that differs from fp32 is the rounding of the factors."""
    x, w = normal(rows, depth, seed=seed), normal(columns, depth, seed=seed + 1)
    g = normal(rows, columns, seed=seed + 2)

    def per_block(m):
        return torch.cat([per_row(part.reshape(1, -1)).view_as(part) for part in m.split(BLOCK)])

    x_row, x_column = kernels.weave(x, rows="left", columns="right")
    w_row, w_column = kernels.weave(w, rows="right", columns="right")
    g_row, g_column = kernels.weave(g, rows="left", columns="left")
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(kernels.multiply(x_row, w_row), per_row(x) @ per_row(w).T, **close)
    torch.testing.assert_close(
        kernels.multiply(g_row, w_column), per_row(g) @ per_block(w), **close
    )
    dw = kernels.multiply(g_column, x_column)
    torch.testing.assert_close(dw, per_block(g).T @ per_block(x), **close)
    twice = kernels.multiply(g_column, x_column, onto=dw.clone())
    torch.testing.assert_close(twice, 2 * dw)


def test_a_second_digit_takes_what_the_first_left(kernels: Kernels):
    """One large number a row hides the others from the first digit; with both they are there."""
    x, w = normal(40, 300) * 1e-3, normal(20, 300, seed=1)
    x[:, 7] = 1.0
    right, _ = kernels.weave(w, rows="right", columns="left")
    first, second = (
        kernels.multiply(kernels.weave(x, rows="left", columns="left", digit=digit)[0], right)
        for digit in (1, 2)
    )
    exact = x @ per_row(w).T
    assert (first - exact).abs().max() > 20 * (first + second - exact).abs().max()
    assert (first + second - exact).abs().max() < 2e-3


def test_zeros_and_numbers_that_are_none(kernels: Kernels):
    x, w = torch.zeros(20, 30), normal(10, 30)
    right, _ = kernels.weave(w, rows="right", columns="left")
    assert not kernels.multiply(kernels.weave(x, rows="left", columns="left")[0], right).any()
    for odd in (math.nan, math.inf, -math.inf):
        x[3, 4] = odd
        y = kernels.multiply(kernels.weave(x, rows="left", columns="left")[0], right)
        assert not y[3].isfinite().any() and not y[:3].any() and not y[4:].any()
        column = kernels.weave(x, rows="left", columns="left")[1]
        dw = kernels.multiply(column, kernels.weave(normal(20, 8), rows="left", columns="right")[1])
        assert not dw.isfinite().all()


@pytest.mark.parametrize("rows, width", [(1, 16), (7, 64), (33, 5), (100, 384)])
@pytest.mark.parametrize("threads", [1, 2])
def test_norm(kernels: Kernels, rows, width, threads):
    torch.set_num_threads(threads)
    x, weight = normal(rows, width).requires_grad_(), normal(width, seed=1).requires_grad_()
    dy = normal(rows, width, seed=2)
    y = ScaledByRMS.apply(x, weight, 1e-5)
    ours, r = kernels.norm(x.detach(), weight.detach(), 1e-5)
    torch.testing.assert_close(ours, y.detach())
    dx, dweight = kernels.norm_gradient(x.detach(), weight.detach(), r, dy)
    for mine, theirs in zip((dx, dweight), gradients(y, dy, x, weight), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rotary, head_dim", [(64, 64), (6, 16), (2, 2)])
def test_rotation_both_ways(kernels: Kernels, rotary, head_dim):
    x, cos, sin = normal(2, 5, 3, head_dim), normal(5, rotary, seed=1), normal(5, rotary, seed=2)
    cos, sin = (torch.cat([t[:, : rotary // 2]] * 2, dim=1) for t in (cos, sin))
    there = kernels.rotate(x, cos, sin, 1.0)
    torch.testing.assert_close(there, Rotation.apply(x, cos, sin, None))
    torch.testing.assert_close(
        kernels.rotate(x, cos, sin, -1.0), Rotation.apply(x, cos, -sin, None)
    )


@pytest.mark.parametrize("count", [1, 15, 1000])
def test_swiglu(kernels: Kernels, count):
    gate, up = (10 * normal(count)).requires_grad_(), normal(count, seed=1).requires_grad_()
    dy = normal(count, seed=2)
    y = F.silu(gate) * up
    torch.testing.assert_close(kernels.swiglu(gate.detach(), up.detach()), y.detach())
    ours = kernels.swiglu_gradient(gate.detach(), up.detach(), dy)
    for mine, theirs in zip(ours, gradients(y, dy, gate, up), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cap", [0.0, 5.0])
@pytest.mark.parametrize("rows, vocabulary", [(1, 2), (9, 400), (3, 5000)])
def test_softmax_loss(kernels: Kernels, rows, vocabulary, cap):
    logits = (20 * normal(rows, vocabulary)).requires_grad_()
    targets = torch.arange(rows) % vocabulary
    shown = cap * torch.tanh(logits / cap) if cap else logits
    nats = F.cross_entropy(shown, targets, reduction="none")
    ours = logits.detach().clone()
    torch.testing.assert_close(kernels.softmax_loss(ours, targets, cap), nats.detach())
    expected = gradients(nats, torch.ones(rows), logits)[0]
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "B, T, N, K, H", [(1, 1, 1, 1, 16), (2, 63, 4, 2, 32), (1, 64, 3, 3, 64), (2, 130, 2, 1, 48)]
)
@pytest.mark.parametrize("threads", [1, 2])
def test_attention(kernels: Kernels, B, T, N, K, H, threads):
    torch.set_num_threads(threads)
    q, dy = normal(B, T, N, H), normal(B, T, N, H, seed=3)
    k, v = normal(B, T, K, H, seed=1), normal(B, T, K, H, seed=2)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    y = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in inputs), is_causal=True, scale=0.2, enable_gqa=True
    ).transpose(1, 2)
    mine = [torch.empty_like(x) for x in (q, q, k, v)]
    plain = [x.detach() for x in inputs]
    lse = kernels.attention(*plain, 0.2, onto=mine[0])
    kernels.attention_gradient(*plain, mine[0], lse, dy, 0.2, onto=mine[1:])
    for ours, theirs in zip(mine, (y.detach(), *gradients(y, dy, *inputs)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_what_does_not_fit_is_refused_before_the_call(kernels: Kernels):
    """A wrong shape would read beyond the tensor's end."""
    q = normal(1, 4, 2, 16)
    with pytest.raises(AssertionError):
        kernels.attention(q, q[:, :3].contiguous(), q, 1.0, onto=torch.empty_like(q))
    with pytest.raises(AssertionError):
        kernels.norm(normal(4, 8), normal(7), 1e-5)
    with pytest.raises(AssertionError):
        kernels.weave(normal(4, 8).T, rows="left", columns="left")
    with pytest.raises(AssertionError):
        kernels.softmax_loss(normal(2, 4), torch.tensor([1, 4]), 0.0)
    left, _ = kernels.weave(normal(4, 8), rows="left", columns="left")
    right, _ = kernels.weave(normal(4, 9), rows="right", columns="left")
    with pytest.raises(AssertionError):
        kernels.multiply(left, right)
