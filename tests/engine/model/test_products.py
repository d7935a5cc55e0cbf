"""Products in 8 bits: near those in fp32 both ways, and never used where they should not be."""

import pytest
import torch
from torch import nn

from engine.data.batches import Batch
from engine.kernels.compile import Unavailable
from engine.kernels.native import Kernels
from engine.model.products import Products, project
from engine.train.loss import next_token_loss
from tests.conftest import make_model


def layers(*sizes: tuple[int, int], bias: bool = False) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(inside, outside, bias=bias) for inside, outside in sizes]


@pytest.mark.parametrize("bias", [True, False])
def test_several_maps_of_one_input_and_their_gradients(kernels: Kernels, bias):
    maps = layers((48, 33), (48, 16), bias=bias)
    x = torch.randn(3, 70, 48, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found = {}
    for name, used in (("ours", kernels), ("exact", None)):
        sum(y.square().sum() for y in project(x, maps, used)).backward()
        found[name] = [x.grad, *(p.grad for m in maps for p in m.parameters())]
        x.grad = None
        for layer in maps:
            layer.zero_grad(set_to_none=True)
    for ours, exact in zip(found["ours"], found["exact"], strict=True):
        assert 0 < (ours - exact).norm() < 0.03 * exact.norm()


def test_what_does_not_learn_is_multiplied_exactly(kernels: Kernels):
    """A frozen base of LoRA, and maps that are no nn.Linear, stay as they are."""
    [frozen] = layers((16, 16))
    x = torch.randn(5, 16)
    frozen.requires_grad_(False)
    assert torch.equal(project(x, [frozen], kernels)[0], frozen(x))
    assert torch.equal(project(x, [nn.Identity()], kernels)[0], x)


def test_only_a_model_in_training_multiplies_in_8_bits(kernels: Kernels, monkeypatch):
    model = make_model(head_dim=16)
    tokens = torch.randint(0, 400, (2, 20), generator=torch.Generator().manual_seed(0))
    exact = model(tokens)
    model.accelerate(kernels, eight_bits=True)
    torch.testing.assert_close(model.eval()(tokens), exact, atol=1e-4, rtol=1e-4)
    assert (model.train()(tokens) - exact).abs().max() > 1e-3
    used = []
    monkeypatch.setattr(Products, "apply", lambda *a: used.append(a) or Products.forward(None, *a))
    model.accelerate(Unavailable("off"))
    assert torch.equal(model(tokens), exact) and not used


FAMILIES = [
    {},
    {"n_kv_heads": 2, "qk_norm": "none"},
    {"qk_norm": "width", "norm_placement": "sandwich", "norm_offset": True},
    {"activation": "gelu", "norm": "layernorm", "position": "learned", "mlp_bias": True},
    {"sliding_window": 8, "full_every": 2},
    {"rotary_dim": 8, "tie_embeddings": True, "logit_softcap": 20.0},
    {"attention_softcap": 30.0},
]
# What rounding to 8 bits may change: found are at most 0.0054 nats, 5.9 % of all, 9.7 % of one.
NATS, WHOLE, EACH = 0.01, 0.07, 0.13


def learn(changes: dict, lengths: tuple, kernels: Kernels | Unavailable, eight_bits: bool):
    """Loss, and the gradient of each parameter, of one batch."""
    model = make_model(head_dim=16, vocab_size=300, **changes).train()
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 300, (1 if lengths else 3, 24), generator=random)
    batch = Batch(tokens_BT=tokens, targets_BT=tokens.roll(-1, 1), lengths=lengths)
    model.accelerate(kernels, eight_bits)
    total, count = next_token_loss(model, batch, 16)
    (total / count).backward()
    return total.item() / int(count), [p.grad.flatten() for p in model.parameters()]


def apart(found, exact) -> tuple[float, float, float]:
    """How far two are apart: in nats, as a share of the whole gradient, of one parameter's.

    A parameter whose gradient should be zero counts as if it were a thousandth of the whole.
    """
    least = 1e-3 * torch.cat(exact[1]).norm()
    shares = [
        ((ours - theirs).norm() / theirs.norm().clamp(least)).item()
        for ours, theirs in zip(
            [torch.cat(found[1]), *found[1]], [torch.cat(exact[1]), *exact[1]], strict=True
        )
    ]
    return abs(found[0] - exact[0]), shares[0], max(shares[1:])


@pytest.mark.parametrize("changes", FAMILIES, ids=str)
@pytest.mark.parametrize("lengths", [(), (9, 1, 14)])
def test_every_family_learns_the_same_by_our_kernels(kernels: Kernels, changes, lengths):
    """Loss and every gradient; exact in fp32, near in 8 bits."""
    exact = learn(changes, lengths, Unavailable("off"), False)
    nats, whole, each = apart(learn(changes, lengths, kernels, False), exact)
    assert nats < 1e-5 and whole < 1e-4 and each < 1e-3
    nats, whole, each = apart(learn(changes, lengths, kernels, True), exact)
    assert 0 < nats < NATS and whole < WHOLE and each < EACH


@pytest.mark.parametrize("changes", FAMILIES[:3], ids=str)
@pytest.mark.parametrize("broken", ["the head's second digit", "gradients of weights"])
def test_the_tolerance_sees_what_breaks_learning(kernels: Kernels, monkeypatch, changes, broken):
    """Controls that a bound of 15 % of the whole let pass; with one digit no run learns at all."""
    weave, multiply = Kernels.weave, Kernels.multiply

    def one_digit(self, x, rows, columns, digit=1):
        woven = weave(self, x, rows, columns, digit)
        for each in woven if digit == 2 else ():
            each.scale.zero_()
        return woven

    def smaller(self, left, right, onto=None):
        product = multiply(self, left, right, onto)
        return product if left.by_row or right.by_row else 0.9 * product

    if broken == "gradients of weights":
        monkeypatch.setattr(Kernels, "multiply", smaller)
    else:
        monkeypatch.setattr(Kernels, "weave", one_digit)
    exact = learn(changes, (), Unavailable("off"), False)
    _, whole, each = apart(learn(changes, (), kernels, True), exact)
    assert whole < 0.15 and (whole > WHOLE or each > EACH)
