"""Sums of few numbers, worked by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.bench.stats import mad, quantile, spread

FLOATS = st.lists(st.floats(1, 1e6), min_size=1, max_size=30)


def test_by_hand():
    values = [10, 11, 12, 13, 100]
    assert quantile(values, 0.5) == 12
    assert quantile(values, 0.99) == pytest.approx(13 + 0.96 * 87)
    assert mad(values) == 1
    assert spread(values) == pytest.approx(2 / 12)  # 11 to 13; the outlier moves nothing
    assert spread([5, 5, 10, 10, 10]) == 0.5  # two modes are no calm machine, though the MAD is 0
    assert spread([7]) == mad([7]) == 0


@given(FLOATS, st.floats(0, 1))
def test_quantiles_are_numpys(values, share):
    assert quantile(values, share) == pytest.approx(np.quantile(values, share))
