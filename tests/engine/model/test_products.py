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


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": 2, "qk_norm": "none"},
        {"qk_norm": "width", "norm_placement": "sandwich", "norm_offset": True},
        {"activation": "gelu", "norm": "layernorm", "position": "learned", "mlp_bias": True},
        {"sliding_window": 8, "full_every": 2},
        {"rotary_dim": 8, "tie_embeddings": True, "logit_softcap": 20.0},
        {"attention_softcap": 30.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("lengths", [(), (9, 1, 14)])
def test_every_family_learns_the_same_by_our_kernels(kernels: Kernels, changes, lengths):
    """Loss and every gradient; exact in fp32, near in 8 bits."""
    model = make_model(head_dim=16, vocab_size=300, **changes).train()
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 300, (1 if lengths else 3, 24), generator=random)
    batch = Batch(tokens_BT=tokens, targets_BT=tokens.roll(-1, 1), lengths=lengths)
    found = []
    for ours, eight_bits in ((Unavailable("off"), False), (kernels, False), (kernels, True)):
        model.accelerate(ours, eight_bits)
        total, count = next_token_loss(model, batch, 16)
        (total / count).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        found.append((total.item() / int(count), gradient))
        model.zero_grad(set_to_none=True)
    (loss, gradient), (ours, near), (eight, rough) = found
    assert abs(ours - loss) < 1e-5 and (near - gradient).norm() < 1e-4 * gradient.norm()
    assert abs(eight - loss) < 0.05 and (rough - gradient).norm() < 0.15 * gradient.norm()
    assert eight != loss
