"""Ours in the rows is the loop that `lm train` runs, with the settings that it has by default."""

import pytest
import torch

from engine.config import ModelConfig, OptimConfig, Recipe
from engine.data.batches import Batch
from engine.recipe import override
from engine.train.optim import Optimizers
from tests.bench import training
from tests.bench.plain import SHAPE
from tests.conftest import make_model


def test_the_rows_settings_are_the_defaults_but_for_sizes():
    settings, usual = training.recipe(device="cpu"), Recipe()
    assert settings.model == SHAPE
    assert settings.train.optim == usual.train.optim == OptimConfig()
    assert settings.train == override(usual, train={"batch_size": 16}).train
    assert "auto" not in training.dtypes() and {"fp32", "bf16"} <= set(training.dtypes())


@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_is_an_update_of_the_real_loop(parts):
    model = make_model()
    assert isinstance(model.config, ModelConfig)
    before = model.norm.weight.detach().clone()
    rows = torch.randint(0, 400, (4, 17), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens_BT=rows[:, :-1], targets_BT=rows[:, 1:])
    settings = override(Recipe(), train={"accumulate": parts}, run={"dtype": "fp32"})
    optimizer = Optimizers(model, settings.train.optim)
    precision = training.chosen(settings, finetune=True)
    precision.prepare(model)
    with training.steps_of(model, optimizer, precision, settings, batch, 1) as step:
        events = [step() for _ in range(30)]
    assert [event.step for event in events[:2]] == [1, 2]
    assert events[0].tokens == 4 * 16 and not torch.equal(before, model.norm.weight)
    assert events[-1].loss < events[0].loss - 1
