"""The peer is what nanoGPT's README describes, and the text is what prose.py says."""

import math

import pytest
import torch

from tests.bench import nanogpt
from tests.bench.prose import docstrings


def test_the_model_has_nanogpts_size():
    model = nanogpt.Model(65)  # Shakespeare's characters
    total = sum(parameter.numel() for parameter in model.parameters())
    # 4 × (12 × 128² + 2 × 128) + 128 + 65 × 128 + 64 × 128; its log says 0.80M without positions
    assert total == 4 * (12 * 16_384 + 256) + 128 + 8_320 + 8_192
    assert round((total - 8_192) / 1e6, 2) == 0.80


def test_a_new_model_knows_nothing():
    torch.manual_seed(0)
    model, tokens = nanogpt.Model(65), torch.randint(0, 65, (500,))
    bits = nanogpt.bits_per_character(model, tokens)
    assert bits == pytest.approx(math.log2(65), abs=0.1)


def test_the_rate_rises_and_falls_to_a_tenth():
    rates = [nanogpt.rate(step) for step in range(nanogpt.STEPS)]
    assert rates[0] == pytest.approx(1e-3 / 101)
    assert max(rates) == rates[100] == 1e-3
    assert rates[1050] == pytest.approx((1e-3 + 1e-4) / 2)
    assert rates[-1] == pytest.approx(1e-4, rel=1e-3)


def test_it_learns_what_can_be_predicted():
    torch.manual_seed(0)
    text = torch.arange(10).repeat(200)
    model = nanogpt.Model(10)
    before = nanogpt.bits_per_character(model, text[:200])
    nanogpt.train(model, (text, text), 60)
    assert nanogpt.bits_per_character(model, text[:200]) < before / 3


def test_only_long_ascii_docstrings_are_prose():
    long, other = "words " * 40 + "end", "ünïcode " * 40
    source = f'"""{long}"""\ndef f():\n    """short"""\n\n\nclass C:\n    """{other}"""\n'
    assert list(docstrings(source)) == [long]
