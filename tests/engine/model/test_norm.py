"""RMSNorm equals torch's own, forward and backward, and survives zeros, bf16 and any shape."""

import pytest
import torch
from torch import nn

from engine.config import ModelConfig
from engine.model.norm import RMSNorm, ScaledByRMS, make_norm


def doubles(*shape: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random, dtype=torch.float64).requires_grad_()


def twins(width: int, eps: float) -> tuple[RMSNorm, nn.RMSNorm]:
    """Our norm and torch's, with the same random weight."""
    ours, theirs = RMSNorm(width, eps), nn.RMSNorm(width, eps)
    weight = torch.randn(width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours.weight.copy_(weight)
        theirs.weight.copy_(weight)
    return ours, theirs


def test_three_four_by_hand():
    """The root mean square of (3, 4) is √12.5."""
    y = RMSNorm(2, eps=0.0)(torch.tensor([[3.0, 4.0]]))
    torch.testing.assert_close(y, torch.tensor([[0.848528, 1.131371]]))


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 1, 3, 5)])
def test_the_written_out_gradient_is_the_gradient(shape):
    """Finite differences in fp64; a large eps so that its place in the formula shows."""
    assert torch.autograd.gradcheck(
        lambda x, weight: ScaledByRMS.apply(x, weight, 0.3), (doubles(*shape), doubles(5, seed=1))
    )


def test_a_second_derivative_is_refused_rather_than_wrong():
    """The backward pass treats 1/rms as a constant, so differentiating it again would lie."""
    x, weight = doubles(3, 5), doubles(5, seed=1)
    plain = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight
    second = []
    for y in (plain, ScaledByRMS.apply(x, weight, 1e-6)):
        (first,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        try:
            second.append(torch.autograd.grad(first.pow(2).sum(), x)[0])
        except RuntimeError:
            return
    torch.testing.assert_close(second[1], second[0])


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 3, 8), (2, 4, 3, 8)])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_equals_torch(shape, eps, size):
    ours, theirs = twins(shape[-1], eps)
    random = torch.Generator().manual_seed(0)
    x = size * torch.randn(shape, generator=random)
    dy = torch.randn(shape, generator=random)
    results = []
    for norm in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        y.backward(dy)
        results.append((y, leaf.grad * size, norm.weight.grad))
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6)


def test_a_broadcast_gradient_is_not_written_to():
    """`sum` hands back one number seen many times; working in place on it would corrupt it."""
    ours, theirs = twins(8, 1e-6)
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    grads = []
    for norm in (ours, theirs):
        leaf = x.clone().requires_grad_()
        norm(leaf).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)


def test_the_input_and_the_weight_stay_as_they_were():
    norm, _ = twins(8, 1e-6)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    before, weight = x.detach().clone(), norm.weight.detach().clone()
    y = norm(x)
    y.sum().backward()
    assert torch.equal(x, before)
    assert torch.equal(norm.weight, weight)


def test_bf16_in_bf16_out_computed_in_fp32():
    norm, _ = twins(64, 1e-6)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = norm(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, norm(x.float()).bfloat16())


def test_zeros_stay_finite():
    """A row of zeros, as padding makes, must not divide by zero on the way there or back."""
    norm = RMSNorm(4, eps=1e-6)
    x = torch.zeros(2, 4, requires_grad=True)
    y = norm(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(2, 4))
    assert x.grad.isfinite().all()


def test_size_does_not_matter():
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    norm = RMSNorm(16, eps=1e-12)
    torch.testing.assert_close(norm(1000 * x), norm(x))


@pytest.mark.parametrize("name, kind", [("rmsnorm", RMSNorm), ("layernorm", nn.LayerNorm)])
def test_make_norm_obeys_the_config(name, kind):
    norm = make_norm(ModelConfig(norm=name, norm_eps=0.25), 8)
    assert type(norm) is kind
    assert norm.eps == 0.25
    assert norm.weight.shape == (8,)
