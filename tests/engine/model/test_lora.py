"""LoRA: nothing at the start, a product of two factors after, and one matrix in the end."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.config import LoraConfig, OptimConfig
from engine.errors import RecipeError
from engine.model.int8 import Int8Linear, quantize_linears
from engine.model.lora import LoraLinear, add_lora, merge_lora, projections
from engine.train.optim import AdamW, Optimizers
from tests.conftest import make_model

TOKENS = torch.arange(20)[None]


def adapted(seed: int = 1, trained: bool = True, *, shape: dict | None = None, **settings):
    """A tiny model with LoRA, as if it had been trained unless told otherwise."""
    model = make_model(**(shape or {}))
    config = LoraConfig(**({"rank": 3, "alpha": 5.0} | settings))
    add_lora(model, config, torch.Generator().manual_seed(seed))
    if trained:
        random = torch.Generator().manual_seed(seed + 1)
        for module in model.modules():
            if isinstance(module, LoraLinear):
                nn.init.normal_(module.b, std=0.2, generator=random)
    return model


def test_published_value_of_a_layer():
    """torchtune's test of its own layer, in 64, out 128, rank 4, alpha 1, seed 16: mean 1.1252.

    Every parameter counts up evenly from 0 to below 1, bias included.
    """
    torch.manual_seed(16)
    x = torch.randn(2, 32, 64)
    layer = LoraLinear(nn.Linear(64, 128), rank=4, alpha=1.0)
    with torch.no_grad():
        for parameter in layer.parameters():
            steps = torch.arange(parameter.numel()) / parameter.numel()
            parameter.copy_(steps.view(parameter.shape))
    assert layer(x).shape == (2, 32, 128)
    assert layer(x).mean().item() == pytest.approx(1.1252, abs=1e-4)


def test_by_hand():
    """W = I, A = (1 2), B = (3, 0)ᵀ, alpha 4, rank 1: x = (1, 1) → (1, 1) + 4 · 3 · (3, 0)."""
    layer = LoraLinear(nn.Linear(2, 2, bias=False), rank=1, alpha=4.0)
    with torch.no_grad():
        layer.base.weight.copy_(torch.eye(2))
        layer.a.copy_(torch.tensor([[1.0, 2.0]]))
        layer.b.copy_(torch.tensor([[3.0], [0.0]]))
    assert layer(torch.tensor([[1.0, 1.0]])).tolist() == [[37.0, 1.0]]
    assert layer.merged().tolist() == [[13.0, 24.0], [0.0, 1.0]]


@pytest.mark.parametrize("precise", [True, False])
def test_the_start_is_the_base_bit_for_bit(precise):
    """In fp32 and under autocast; the control is one step away."""
    plain, model = make_model().train(), adapted(trained=False).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
        assert torch.equal(model(TOKENS), plain(TOKENS))
        model.blocks[0].mlp.up_proj.b.data[0, 0] = 0.1
        assert not torch.equal(model(TOKENS), plain(TOKENS))


def test_the_start_beside_8_bits_is_the_rounded_base():
    plain = make_model()
    quantize_linears(plain)
    assert torch.equal(adapted(trained=False, base="int8")(TOKENS), plain(TOKENS))


@pytest.mark.parametrize(("targets", "each"), [("attention", 4), ("mlp", 3), ("all", 7)])
def test_only_the_chosen_matrices_get_one(targets, each):
    model = adapted(targets=targets)
    chosen = [name for name, module in projections(model) if isinstance(module, LoraLinear)]
    assert len(chosen) == each * 2 and len(list(projections(model))) == 14
    part = {"attention": ".attention.", "mlp": ".mlp.", "all": "."}[targets]
    assert all(part in name for name in chosen)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.{side}" for name in chosen for side in "ab"}


@pytest.mark.parametrize("base", ["fp32", "int8"])
def test_gradients_reach_the_factors_and_nothing_else(base):
    model = adapted(base=base)
    model(TOKENS).square().mean().backward()
    for name, parameter in model.named_parameters():
        if name.endswith((".a", ".b")):
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


def test_gradients_are_those_of_the_formula():
    """Against the product written out, in double precision."""
    layer = LoraLinear(nn.Linear(6, 5), rank=2, alpha=3.0)
    nn.init.normal_(layer.a)
    nn.init.normal_(layer.b)
    layer.double()
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    y = F.linear(x, layer.base.weight, layer.base.bias) + 1.5 * ((x @ layer.a.T) @ layer.b.T)
    torch.testing.assert_close(layer(x), y)
    wanted = torch.autograd.grad(y.sin().sum(), [x, layer.a, layer.b])
    found = torch.autograd.grad(layer(x).sin().sum(), [x, layer.a, layer.b])
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_names_are_those_that_adapters_on_disk_rely_on():
    names = [n for n in adapted().state_dict() if n.startswith("blocks.0.mlp.up_proj")]
    assert names == [f"blocks.0.mlp.up_proj.{name}" for name in ("a", "b", "base.weight")]
    narrow = [n for n in adapted(base="int8").state_dict() if n.startswith("blocks.0.mlp.up_proj")]
    ends = ("a", "b", "base.weight", "base.scale")
    assert narrow == [f"blocks.0.mlp.up_proj.{name}" for name in ends]


def test_the_seed_decides_the_start():
    """And the entries of A are those of a new nn.Linear: uniform within 1 / √in."""
    first, again, other = adapted(1), adapted(1), adapted(2)
    name = "blocks.1.mlp.down_proj.a"
    a = first.state_dict()[name]
    assert torch.equal(a, again.state_dict()[name])
    assert not torch.equal(a, other.state_dict()[name])
    bound = a.shape[1] ** -0.5
    assert 0.9 * bound < a.abs().max() <= bound


def test_dropout_is_for_training_and_for_the_factors_only():
    model = adapted(dropout=0.5)
    assert torch.equal(model(TOKENS), adapted()(TOKENS))
    model.train()
    assert not torch.equal(model(TOKENS), model(TOKENS))
    start = adapted(trained=False, dropout=0.5).train()
    assert torch.equal(start(TOKENS), make_model()(TOKENS)), "the base's path has none"


@pytest.mark.parametrize("targets", ["all", "attention"])
@pytest.mark.parametrize("base", ["fp32", "int8"])
def test_merging_adds_the_product_once(base, targets):
    model = adapted(base=base, targets=targets, shape={"attention_bias": True})
    before = model(TOKENS)
    expected = {}
    for name, module in projections(model):
        inner = module.base if isinstance(module, LoraLinear) else module
        weight = inner.widened() if isinstance(inner, Int8Linear) else inner.weight.detach()
        if isinstance(module, LoraLinear):
            weight = weight + 5 / 3 * module.b.detach() @ module.a.detach()
        expected[name] = weight
    assert merge_lora(model) == {"all": 14, "attention": 8}[targets]
    for name, module in projections(model):
        assert type(module) is nn.Linear
        torch.testing.assert_close(module.weight.detach(), expected[name], msg=name)
    torch.testing.assert_close(model(TOKENS), before, atol=1e-5, rtol=1e-5)
    assert list(model.state_dict()) == list(make_model(attention_bias=True).state_dict())
    once = model(TOKENS)
    assert merge_lora(model) == 0 and torch.equal(model(TOKENS), once), "twice is once"


def test_a_model_that_has_one_gets_no_other():
    with pytest.raises(RecipeError, match="lm merge"):
        add_lora(adapted(), LoraConfig(rank=2), torch.Generator())


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_the_factors_are_stepped_by_adamw_at_the_rate_of_the_matrices(name):
    """Muon would give each factor singular values of one, whatever their product does."""
    model, twin = adapted(), adapted()
    config = OptimConfig(name=name, lr=0.01, weight_decay=0.1, head_lr=0.5)
    optimizer = Optimizers(model, config)
    peer = torch.optim.AdamW(
        [p for p in twin.parameters() if p.requires_grad],
        lr=0.01,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=0.1,
    )
    frozen = model.blocks[0].mlp.up_proj.base.weight.clone()
    for _ in range(3):
        for each, steps in ((model, lambda: optimizer.step(1.0)), (twin, peer.step)):
            each.zero_grad()
            each(TOKENS).square().mean().backward()
            steps()
    for (key, ours), (_, theirs) in zip(
        model.named_parameters(), twin.named_parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4, msg=key)
    assert torch.equal(frozen, model.blocks[0].mlp.up_proj.base.weight)
    kept = {key.split(".", 1)[1] for key in optimizer.state()}
    assert kept == {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(isinstance(part, AdamW) for part in optimizer.parts)
