"""The loop: what a step is, what it divides by, when it refuses to go on."""

import math
from functools import partial

import pytest
import torch

from engine.config import OptimConfig, TrainConfig
from engine.data.batches import IGNORE, Batch
from engine.errors import DivergenceError
from engine.train.gradient import Share
from engine.train.loop import train
from engine.train.loss import next_token_loss
from engine.train.optim import Optimizers
from engine.train.schedule import lr_factor
from tests.conftest import make_model


def ragged(number: int) -> Batch:
    """A batch whose rows have 1 to 16 targets, so that a mean of means is far off."""
    random = torch.Generator().manual_seed(number)
    rows = torch.randint(0, 400, (8, 17), generator=random)
    targets = rows[:, 1:].clone()
    for row in range(8):
        targets[row, 1 + 2 * row :] = IGNORE
    return Batch(tokens_BT=rows[:, :-1], targets_BT=targets)


def go(steps: int = 3, start: int = 0, model=None, batches=ragged, seed: int = 1, **settings):
    model = model or make_model()
    config = TrainConfig(**({"optim": OptimConfig(name="adamw", lr=0.01)} | settings))
    optimizer = Optimizers(model, config.optim)
    gradient = Share(
        model=model,
        batches=lambda number: split(batches(number), config.accumulate),
        loss=lambda m, batch: next_token_loss(m, batch, 64),
        seed=seed,
        dtype=torch.float32,
    )
    stream = train(
        model,
        optimizer,
        gradient,
        config,
        start=start,
        steps=lambda step: steps,
        factor=partial(lr_factor, steps=steps, config=config.schedule),
    )
    return model, list(stream)


def split(batch: Batch, parts: int) -> list[Batch]:
    """Cut a batch by rows."""
    pairs = zip(batch.tokens_BT.chunk(parts), batch.targets_BT.chunk(parts), strict=True)
    return [Batch(tokens_BT=tokens, targets_BT=targets) for tokens, targets in pairs]


def weights(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulation_changes_memory_not_the_update(parts):
    """Weighted by tokens: 1 × 8 and 8 × 1 agree although the rows have 1 to 15 targets."""
    whole, whole_steps = go(accumulate=1)
    split, split_steps = go(accumulate=parts)
    for a, b in zip(whole_steps, split_steps, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5) and a.tokens == b.tokens == 64
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)
    torch.testing.assert_close(weights(split), weights(whole), atol=2e-4, rtol=0)


def test_the_logged_loss_is_the_mean_over_targets():
    model = make_model()
    batch = ragged(0)
    with torch.inference_mode():
        log_probs = model(batch.tokens_BT).log_softmax(-1)
    kept = batch.targets_BT != IGNORE
    picked = log_probs.gather(-1, batch.targets_BT.where(kept, 0)[..., None])[..., 0][kept]
    _, steps = go(steps=1)
    assert steps[0].loss == pytest.approx(-picked.mean().item(), rel=1e-5)


def test_it_learns_a_batch_by_heart():
    """64 sequences below 0.05 nats: gradients reach everything they must."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 400, (64, 9), generator=random)
    batch = Batch(tokens_BT=rows[:, :-1], targets_BT=rows[:, 1:])
    optim = OptimConfig(lr=0.02, embed_lr=0.05, head_lr=0.02)
    model = make_model(d_model=64)
    _, steps = go(steps=150, model=model, batches=lambda k: batch, optim=optim)
    # The first token of a row follows nothing, so its row cannot be told apart at position 0.
    assert steps[0].loss > 5.5 and steps[-1].loss < 0.05


def test_clipping_bounds_what_the_optimizer_sees():
    """Adam's first mean is (1 - beta1) · gradient, so its norm tells the gradient's."""
    model = make_model()
    config = TrainConfig(optim=OptimConfig(name="adamw", clip=0.25, beta1=0.9))
    optimizer = Optimizers(model, config.optim)
    gradient = Share(
        model=model,
        batches=lambda number: [ragged(number)],
        loss=lambda m, batch: next_token_loss(m, batch, 64),
        seed=1,
        dtype=torch.float32,
    )
    (step,) = train(
        model, optimizer, gradient, config, start=0, steps=lambda k: 1, factor=lambda k: 1.0
    )
    means = [t.flatten() for name, t in optimizer.state().items() if name.startswith("exp_avg.")]
    assert step.grad_norm > 0.25
    assert torch.cat(means).norm().item() == pytest.approx(0.1 * 0.25, rel=1e-4)


def test_dropout_follows_from_seed_and_step_alone():
    """Step k draws the same masks in a run that began at k; another seed draws others."""
    from engine.config import ModelConfig
    from engine.model.transformer import Transformer, initialise

    def model():
        sizes = {"vocab_size": 400, "d_model": 32, "n_layers": 2, "max_seq_len": 64}
        made = Transformer(ModelConfig(**sizes), dropout=0.3)
        initialise(made, torch.Generator().manual_seed(0))
        return made

    still = {"optim": OptimConfig(name="adamw", lr=0.01, head_lr=0.5)}
    _, whole = go(steps=2, model=model(), batches=lambda k: ragged(0), **still)
    first, _ = go(steps=1, model=model(), batches=lambda k: ragged(0), **still)
    _, second = go(steps=2, start=1, model=first, batches=lambda k: ragged(0), **still)
    _, other = go(steps=2, start=1, model=first, batches=lambda k: ragged(0), seed=2, **still)
    assert second[0].step == 2
    assert second[0].grad_norm != other[0].grad_norm
    assert whole[1].loss == second[0].loss


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nothing_is_updated_after_a_number_that_is_not_finite(where):
    model = make_model()
    if where == "loss":
        model.lm_head.weight.data[3] = math.nan
    else:  # a finite loss whose gradient overflows
        model.lm_head.weight.register_hook(lambda g: g * math.inf)
    before = weights(model).clone()
    with pytest.raises(DivergenceError, match="step 1, before the update"):
        go(model=model)
    assert torch.equal(weights(model).nan_to_num(7), before.nan_to_num(7))
