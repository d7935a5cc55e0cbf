"""Repetitions summed up by hand."""

from dataclasses import replace

import pytest

from engine.bench.cases import Case
from engine.bench.result import Repetition, Result


def repetition(**changes) -> Repetition:
    names = Case.__dataclass_fields__
    fields = {"what": "decode", "model": "m", "dtype": "fp32", "threads": 1}
    case = Case(**{name: value for name, value in fields.items() if name in names})
    row = Repetition(
        case=case,
        number=1,
        at="2026-01-01T00:00:00+00:00",
        seconds=1.0,
        stages={"decode": 0.75, "sample": 0.25},
        times=[0.1, 0.3, 0.6],
        rate=10.0,
        peak_memory=5,
        flops=2.0,
        bytes=4.0,
        bandwidth=80.0,
        peak_flops=40.0,
    )
    return replace(row, **changes)


def test_median_shares_gaps_and_stages():
    other = repetition(rate=30.0, peak_memory=9, stages={"decode": 1.0}, times=[0.0, 0.4])
    result = Result([repetition(), repetition(rate=20.0), other])
    assert result.rate == 20 and result.peak_memory == 9 and result.noisy
    assert result.of_bandwidth == pytest.approx(20 * 4 / 80)
    assert result.of_peak == pytest.approx(20 * 2 / 40)
    assert sorted(result.gaps) == pytest.approx([0.2, 0.2, 0.3, 0.3, 0.4])
    assert result.stages == pytest.approx({"decode": 2.5 / 3, "sample": 0.5 / 3})
    assert result.first is None


def test_what_has_no_limit_has_no_share():
    result = Result([repetition(bytes=None, peak_flops=None)])
    assert result.of_bandwidth is None and result.of_peak is None and not result.noisy
