"""Matrices in 8 bits: near the ones they stand for, and narrow all the way."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.model.int8 import Int8Linear, quantize, quantize_linears
from tests.conftest import make_model


def linear(bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(48, 32, bias=bias)


def test_rounding_by_hand():
    """Largest 2.54 → s = 0.02; a row of zeros stays one; ties go to the even number."""
    weight = torch.tensor([[2.54, -1.27, 0.029], [0.0, 0.0, 0.0], [-127.0, 2.5, 0.4]])
    whole, scale = quantize(weight)
    assert whole.tolist() == [[127, -64, 1], [0, 0, 0], [-127, 2, 0]]
    torch.testing.assert_close(scale[[0, 2]], torch.tensor([0.02, 1.0]))
    assert whole.dtype == torch.int8 and (whole * scale[:, None]).isfinite().all()


@pytest.mark.parametrize("spread", [1.0, 1e-6, 1e6])
def test_no_output_is_further_off_than_half_a_step_of_each_entry(spread):
    """|y - y'| ≤ s / 2 · Σ|x|, row by row; a third of that would be broken."""
    exact = linear(bias=False)
    exact.weight.data *= spread * torch.logspace(-3, 3, 32)[:, None]
    rounded = Int8Linear(exact)
    x = torch.randn(200, 48)
    error = (rounded(x).double() - x.double() @ exact.weight.double().T).abs()
    slack = 1e-5 * F.linear(x.abs(), exact.weight.abs())  # of fp32 itself
    bound = rounded.scale / 2 * x.abs().sum(1, keepdim=True)
    assert (error <= bound + slack).all()
    assert (error > bound / 6).any(), "the bound is not idle: the error comes near it"


@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradient_are_those_of_the_widened_matrix(bias):
    rounded = Int8Linear(linear(bias))
    twin = nn.Linear(48, 32, bias=bias)
    twin.weight = nn.Parameter(rounded.widened())
    twin.bias = rounded.bias
    x = torch.randn(2, 7, 48)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = rounded(ours), twin(theirs)
    assert torch.equal(y, expected)
    toward = torch.randn_like(y)
    y.backward(toward)
    expected.backward(toward)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-5)
    assert all(not p.requires_grad for p in rounded.parameters())


def saved_bytes(function, x) -> int:
    """Bytes that a forward pass keeps for the backward pass, other than the model's own."""
    sizes = []

    def note(tensor):
        if tensor.dtype != torch.int8:
            sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        function(x).sum().backward()
    return sum(sizes)


def test_nothing_wide_is_kept_for_the_backward_pass():
    """The control widens the matrix in the open, and autograd keeps it."""
    rounded = Int8Linear(linear())
    x = torch.randn(1, 48, requires_grad=True)
    assert saved_bytes(rounded, x) <= 4 * 32, "the scales"
    wide = saved_bytes(lambda x: F.linear(x, rounded.widened(), rounded.bias), x)
    assert wide >= 4 * 48 * 32


def test_under_autocast_the_product_is_in_bf16():
    rounded = Int8Linear(linear())
    x = torch.randn(5, 48, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = rounded(x)
        expected = F.linear(x, rounded.widened(), rounded.bias)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad[0], rounded.widened().sum(0), atol=0.05, rtol=0.02)


def test_all_matrices_of_the_blocks_and_only_they():
    model = make_model(attention_bias=True)
    tokens = torch.arange(20)[None]
    before = model(tokens)
    held = sum(
        p.numel() * 4 for name, p in model.named_parameters() if name.endswith("proj.weight")
    )
    quantize_linears(model)
    narrow = [m for m in model.modules() if isinstance(m, Int8Linear)]
    assert len(narrow) == 7 * 2
    assert type(model.lm_head) is nn.Linear
    bytes_now = sum(b.numel() * b.element_size() for m in narrow for b in (m.weight, m.scale))
    rows = sum(m.out_features for m in narrow)
    assert bytes_now == held / 4 + 4 * rows, "a byte an entry, four a row"
    names = set(model.state_dict())
    assert {"blocks.0.mlp.up_proj.weight", "blocks.1.attention.q_proj.scale"} <= names
    after = model(tokens)
    assert 0 < (after - before).abs().max() < 0.1
    quantize_linears(model)
    assert torch.equal(model(tokens), after), "twice is once"
