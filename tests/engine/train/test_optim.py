"""Muon and AdamW: against references, and on what they claim to do."""

import pytest
import torch

from engine.config import OptimConfig
from engine.errors import CheckpointError
from engine.train.optim import OPTIMIZERS, Optimizers, orthogonalize
from tests.conftest import make_model


def gradients(model, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=random)


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 16, 40), (2, 40, 16)])
def test_newton_schulz_brings_singular_values_near_one(shape):
    """Five steps of these coefficients settle between about 0.68 and 1.13 (modded-nanogpt)."""
    found = orthogonalize(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    values = torch.linalg.svdvals(found)
    # A square random matrix has a few values near zero, which five steps do not lift all the way.
    assert (values > 0.5).float().mean() > 0.9 and values.max() < 1.25
    assert found.shape == shape


def test_newton_schulz_keeps_the_directions():
    """The update is near U·Vᵀ of the gradient, not just any orthogonal matrix."""
    g = torch.randn(20, 30, generator=torch.Generator().manual_seed(1))
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    nearest = u @ v
    found = orthogonalize(g[None])[0]
    cosine = (found * nearest).sum() / (found.norm() * nearest.norm())
    assert cosine > 0.95


def test_muon_step_by_hand():
    """One step from zero momentum: w ← w - lr·√(rows/columns)·orth(nesterov momentum)."""
    model = make_model()
    optimizer = Optimizers(model, OptimConfig(name="muon", lr=0.1, momentum=0.9))
    gradients(model, 2)
    up = model.blocks[0].mlp.up_proj.weight
    before, g = up.detach().clone(), up.grad.clone()
    optimizer.step(0.5)
    momentum = 0.1 * g
    ahead = g + 0.9 * (momentum - g)
    scale = (up.shape[0] / up.shape[1]) ** 0.5
    expected = before - 0.05 * scale * orthogonalize(ahead[None])[0]
    torch.testing.assert_close(up.detach(), expected, atol=1e-5, rtol=1e-5)


def test_adamw_equals_torch():
    model, twin = make_model(), make_model()
    config = OptimConfig(name="adamw", lr=0.01, embed_lr=0.01, head_lr=0.01)
    optimizer = Optimizers(model, config)
    betas = (config.beta1, config.beta2)
    reference = torch.optim.AdamW(
        twin.parameters(), lr=0.01, betas=betas, eps=config.eps, weight_decay=0, foreach=False
    )
    for seed in range(5):
        gradients(model, seed)
        gradients(twin, seed)
        optimizer.step(1.0)
        reference.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_every_parameter_moves_and_only_once(name):
    model = make_model(tie_embeddings=True)
    optimizer = Optimizers(model, OptimConfig(name=name))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    gradients(model, 3)
    optimizer.step(1.0)
    for parameter_name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[parameter_name]), parameter_name


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_state_restores_the_very_same_next_step(name):
    """With the state lost, the next step differs: this is the test that would notice."""

    def after_three(restore: bool):
        model = make_model()
        optimizer = Optimizers(model, OptimConfig(name=name))
        for seed in range(2):
            gradients(model, seed)
            optimizer.step(1.0)
        saved = {key: value.clone() for key, value in optimizer.state().items()}
        fresh = Optimizers(model, OptimConfig(name=name))
        if restore:
            fresh.load_state(saved)
        gradients(model, 2)
        fresh.step(1.0)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    def unbroken():
        model = make_model()
        optimizer = Optimizers(model, OptimConfig(name=name))
        for seed in range(3):
            gradients(model, seed)
            optimizer.step(1.0)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(after_three(restore=True), unbroken())
    assert not torch.equal(after_three(restore=False), unbroken())


def test_state_of_another_model_is_refused():
    optimizer = Optimizers(make_model(), OptimConfig())
    other = Optimizers(make_model(n_layers=3), OptimConfig())
    with pytest.raises(CheckpointError, match="does not fit"):
        optimizer.load_state(other.state())


def test_weight_decay_pulls_matrices_only():
    """With zero gradients only decay moves weights: matrices shrink, embedding and norms do not."""
    for name in ("muon", "adamw"):
        model = make_model()
        optimizer = Optimizers(model, OptimConfig(name=name, lr=0.1, weight_decay=0.5))
        up, embed = model.blocks[0].mlp.up_proj.weight, model.embed_tokens.weight
        before_up, before_embed = up.detach().clone(), embed.detach().clone()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step(1.0)
        torch.testing.assert_close(up.detach(), before_up * 0.95)
        assert torch.equal(embed.detach(), before_embed)


def test_every_named_optimizer_exists():
    assert set(OPTIMIZERS) == set(OptimConfig.__dataclass_fields__["name"].type.__args__)
