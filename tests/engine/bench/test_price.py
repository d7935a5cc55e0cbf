"""Money, by hand."""

import pytest

from engine.bench.price import offer, per_million


def test_electricity_by_hand():
    """100 tokens/s take 10,000 s for a million; at 36 W that is a tenth of a kWh."""
    assert per_million(100, 36, 0.30) == pytest.approx(0.03)


def test_offers_come_from_a_price_list(tmp_path):
    file = tmp_path / "prices.yaml"
    file.write_text("currency: USD\nas_of: 2026-11-01\nmodels: {big: {input: 2.5, output: 10}}\n")
    found = offer("big", file)
    assert (found.input, found.output) == (2.5, 10)
