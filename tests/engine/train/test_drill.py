"""A drill is the run itself on other tokens: same loss, same gradient, with a clock or without."""

import pytest
import torch

from engine.clock import IDLE, Clock
from engine.config import DataConfig, ModelConfig, Recipe, RunConfig, TrainConfig
from engine.kernels.build import Unavailable
from engine.recipe import override
from engine.train.drill import drill, random_windows
from engine.train.loss import next_token_loss
from engine.train.precision import Precision
from tests.conftest import make_model

RECIPE = Recipe(
    run=RunConfig(kernels="torch"),
    model=ModelConfig(d_model=32, n_layers=2, n_heads=4, vocab_size=400, max_seq_len=128),
    data=DataConfig(seq_len=16),
    train=TrainConfig(batch_size=6, accumulate=2, loss_chunk=7),
)
FP32 = Precision(dtype=torch.float32, kernels=Unavailable("off"))


def gradient(recipe=RECIPE, step=3, clock=IDLE) -> tuple[float, torch.Tensor]:
    model = make_model()
    with drill(model, random_windows(recipe, 6), recipe, FP32, 1, clock) as worked_out:
        sums = worked_out(step)
    return sums.nats, torch.cat([p.grad.flatten() for p in model.parameters()])


def test_windows_are_those_of_the_recipe_and_the_same_each_time():
    parts = random_windows(RECIPE, 6)(5)
    assert [tuple(part.tokens_BT.shape) for part in parts] == [(3, 16)] * 2
    again = random_windows(RECIPE, 6)(5)
    assert all(torch.equal(a.tokens_BT, b.tokens_BT) for a, b in zip(parts, again, strict=True))
    assert max(part.tokens_BT.max() for part in parts) < 400
    other = random_windows(override(RECIPE, run={"seed": 2}), 6)(5)
    assert not torch.equal(other[0].tokens_BT, parts[0].tokens_BT)


def test_its_gradient_is_that_of_the_loss():
    model, nats = make_model().train(), 0.0
    for part in random_windows(RECIPE, 6)(3):
        loss, _ = next_token_loss(model, part, 7)
        loss.backward()
        nats += loss.item()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    found = gradient()
    assert found[0] == pytest.approx(nats) and torch.equal(found[1], expected)
    assert not torch.equal(gradient(step=4)[1], expected)  # the control: another batch


@pytest.mark.parametrize("changed", [{"recompute": True}, {"processes": 2}, {"dropout": 0.0}])
def test_settings_that_change_no_figure(changed):
    clock = Clock()
    nats, found = gradient(override(RECIPE, train=changed), clock=clock)
    expected = gradient()
    assert nats == pytest.approx(expected[0], rel=1e-6)
    torch.testing.assert_close(found, expected[1], atol=1e-5, rtol=1e-4)
    assert {"data", "forward", "loss", "backward"} <= set(clock.seconds)
    assert ("other processes" in clock.seconds) == ("processes" in changed)
