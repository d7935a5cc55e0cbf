"""Verdicts: right as often as promised, on pairs that belong together."""

import math

import numpy as np
import pytest

from engine.bench.cases import Case
from engine.bench.compare import compare, critical, ratio_interval
from engine.bench.record import Recorded
from engine.errors import DataError

MACHINE = {"cpu": "abacus", "torch": "2.0"}


def records(rates, machine=MACHINE, **changes):
    case = Case(**({"what": "decode", "model": "m", "dtype": "fp32", "threads": 1} | changes))
    return [Recorded(case=case, rate=float(rate), machine=machine) for rate in rates]


def test_critical_values_are_those_of_the_tables():
    """Two-sided 5 % of the Mann–Whitney U, from any textbook."""
    table = {(4, 4): 0, (5, 5): 2, (5, 8): 6, (6, 6): 5, (8, 8): 13, (10, 10): 23, (20, 20): 127}
    assert {sizes: critical(*sizes) for sizes in table} == table
    assert critical(3, 3) is None and critical(2, 7) is None
    assert critical(21, 20) == pytest.approx(134, abs=2)  # where the approximation takes over


def test_the_interval_by_hand():
    ratio, low, high = ratio_interval([1, 1, 1, 1], [2, 3, 4, 5])
    assert (ratio, low, high) == (3.5, 2, 5)
    assert ratio_interval([1, 1, 1], [2, 2, 2]) == (2, 0, math.inf)


@pytest.mark.parametrize("draw", ["lognormal", "pareto"])
@pytest.mark.parametrize("n", [4, 5, 12])
def test_the_interval_holds_the_truth_as_often_as_it_says(draw, n):
    """Also where times have a long tail, as those of a busy machine do."""
    random = np.random.default_rng(0)
    size = {"lognormal": {"sigma": 0.2}, "pareto": {"a": 2.0}}[draw]
    missed = 0
    for _ in range(1000):
        a, b = (1 + getattr(random, draw)(size=n, **size) for _ in range(2))
        _, low, high = ratio_interval(a.tolist(), (1.3 * b).tolist())
        missed += not low <= 1.3 <= high
    assert missed / 1000 < 0.07
    assert missed / 1000 > 0.005 * (n > 4)  # nor so wide that it says nothing


def test_verdicts():
    calm = [100, 101, 102, 103, 104]
    slow, fast = [90, 91, 92, 93, 94], [110, 111, 112, 113, 114]
    for b, verdict in ((slow, "slower"), (fast, "faster"), (calm, "noise"), (fast[:2], "noise")):
        (effect,) = compare(records(calm), records(b)).effects
        assert effect.verdict == verdict
    found = compare(records(calm), records(slow))
    assert found.slower(0.03) == found.effects and found.slower(0.15) == []


def test_cases_are_paired_by_configuration_and_the_others_named():
    a = records([1, 2], depth=0) + records([3, 4], depth=64)
    b = records([5, 6], depth=64) + records([7, 8], depth=99)
    found = compare(a, b)
    assert [(e.case.depth, e.a, e.b) for e in found.effects] == [(64, 3.5, 5.5)]
    assert [case.depth for case in found.only_a] == [0]
    assert [case.depth for case in found.only_b] == [99]
    assert found.differs == {}


def test_a_thing_that_differs_throughout_is_what_is_compared():
    a, b = records([1, 2], threads=1), records([2, 3], {"cpu": "loom", "torch": "2.0"}, threads=2)
    found = compare(a, b)
    assert len(found.effects) == 1
    assert found.differs == {"threads": ("1", "2"), "cpu": ("abacus", "loom")}
    # The control: with both in A, they stay apart.
    assert len(compare(a + records([1], threads=2), b).effects) == 1
    assert compare(a + records([1], threads=2), b).only_a == [a[0].case]


def test_settings_and_kernels_are_told_apart_and_named():
    """Two optimizers, or torch's kernels beside ours, were compared as one case under one name."""
    step = {"what": "train", "kernels": "ours"}
    a = records([1, 2], **step, settings="model.d_model=64") + records([5, 6])
    b = records(
        [2, 3], what="train", kernels="torch", settings="model.d_model=64 train.optim.name=adamw"
    )
    found = compare(a, b + records([5, 6]))
    assert [effect.case.what for effect in found.effects] == ["train", "decode"]
    assert found.differs == {
        "kernels": ("ours", "torch"),
        "settings": ("as usual", "train.optim.name=adamw"),
    }
    # The control: where one side has both, what is alike is paired and the rest stays alone.
    found = compare(a, b + records([4, 5], **step, settings="model.d_model=64"))
    assert found.differs == {} and len(found.effects) == 1
    assert [case.settings for case in found.only_b] == [b[0].case.settings]


def test_without_a_pair_there_is_nothing_to_say():
    with pytest.raises(DataError, match="one has decode at 0, the other prefill 5 tokens"):
        compare(records([1]), records([1], what="prefill", prompt=5))
