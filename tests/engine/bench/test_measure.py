"""Measuring: stages add up to the wall, times are in order, shares are of what was measured."""

import time

import pytest

from engine.bench import measure as measuring
from engine.bench.cases import Case, Grid, expand
from engine.bench.measure import measure
from engine.bench.result import Limits, Measured, Repetition, Result
from engine.bench.subject import from_recipe
from tests.engine.bench.test_subject import CACHE, RECIPE

WORKS = ("prefill", "decode", "batch", "kv")
STAGES = {
    "prefill": {"tokenize", "prefill", "decode", "sample", "detokenize", "write"},
    "decode": {"decode", "sample", "detokenize", "write"},
    "batch": {"prefill", "decode", "sample"},
    "kv": {"prefill", "decode", "sample"},
    "train": {"data", "forward", "loss", "backward", "optimizer", "log"},
}


@pytest.fixture(autouse=True)
def _known_limits(monkeypatch):
    monkeypatch.setattr(measuring, "memory_bandwidth", lambda *_: 1e10)
    monkeypatch.setattr(measuring, "matmul_peaks", lambda *_: {"fp32": 1e11, "bf16": 2e11})


def training(**changes):
    shape = {"what": "train", "model": "", "dtype": "auto", "threads": 1}
    return Case(**(shape | {"batch": 8, "prompt": 64} | changes))


def measured(what, repeats=2, subject=None):
    """Measure all cases of a work on the tiny model."""
    subject = subject or from_recipe(RECIPE, CACHE)
    grid = Grid(prompt=(60,), depth=(40,), batch=(3,), tokens=20)
    cases = [training()] if what == "train" else expand(what, grid, "m", 128)[0]
    return list(measure(subject, cases, repeats=repeats))


@pytest.mark.parametrize("what", [*WORKS, "train"])
def test_stages_add_up_to_an_outer_clock(what):
    """Of the breakdown no more than 2 % of the wall time may be missing."""
    for attempt in range(3):
        events = [event for event in measured(what) if isinstance(event, Repetition)]
        assert all(set(event.stages) == STAGES[what] for event in events)
        stages = sum(sum(event.stages.values()) for event in events)
        wall = sum(event.seconds for event in events)
        assert stages <= wall
        if stages > 0.98 * wall:
            break
        assert attempt < 2, f"{1 - stages / wall:.1%} of {what} belongs to no stage"


def test_a_stage_that_nobody_laps_is_seen_missing(monkeypatch):
    """The control: time spent after the last lap is in the wall and in no stage."""
    from engine.bench import work

    slow = work._write

    def write(stream, clock):
        times = slow(stream, clock)
        time.sleep(0.1)
        return times

    monkeypatch.setattr(work, "_write", write)
    event = measured("decode", repeats=1)[-1]
    assert sum(event.stages.values()) < 0.98 * event.seconds


def test_limits_come_first_and_repetitions_are_numbered():
    limits, *events = measured("decode", repeats=3)
    assert isinstance(limits, Limits) and limits.bandwidth == 1e10
    assert [event.number for event in events] == [1, 2, 3]
    assert {event.case.dtype for event in events} == {"fp32"}  # what auto turned out to be
    for event in events:
        assert len(event.times) == 20 and event.times == sorted(event.times)
        assert event.times[0] > 0 and event.times[-1] <= event.seconds
        assert event.rate == pytest.approx(19 / (event.times[-1] - event.times[0]))


def test_auto_beside_what_it_takes_is_one_case():
    """They were measured twice, and shown as ten repetitions of one case."""
    subject = from_recipe(RECIPE, CACHE)
    cases = expand("decode", Grid(depth=(8,), dtype=("auto", "bf16", "fp32"), tokens=3), "m", 128)
    _, *events = measure(subject, cases[0], repeats=2)
    measured = [event for event in events if isinstance(event, Repetition)]
    assert [event.case.dtype for event in measured] == ["fp32"] * 2 + ["bf16"] * 2
    (left,) = [event for event in events if isinstance(event, Measured)]
    assert left.wish == "fp32" and left.case == measured[0].case


def test_a_batch_counts_the_tokens_of_all_rows():
    event = measured("batch", repeats=1)[-1]
    assert event.rate == pytest.approx(3 * 19 / (event.times[-1] - event.times[0]))


def test_training_is_real_steps():
    """The weights move, and the rate is what the loop itself counts."""
    event = measured("train", repeats=1)[-1]
    assert event.rate == pytest.approx(8 * 64 / sum(event.stages.values()), rel=0.05)
    assert event.case.dtype in ("fp32", "bf16") and event.peak_flops


def test_without_a_cache_a_token_costs_the_whole_text_again():
    kept, anew = measured("kv", repeats=1)[-2:]
    assert kept.case.cache and not anew.case.cache
    head = 2 * 700 * 32  # worked out once a pass in both
    assert 35 < (anew.flops - head) / (kept.flops - head) < 45  # 42 tokens instead of one


def repetition(rate=10.0, what="decode", times=(0.5, 0.6, 0.8), flops=2e9, bytes=5e8):
    return Repetition(
        case=Case(what=what, model="m", dtype="fp32", threads=1),
        number=1,
        at="",
        seconds=1.0,
        stages={"decode": 0.75, "sample": 0.25},
        times=list(times),
        rate=rate,
        peak_memory=7,
        flops=flops,
        bytes=bytes,
        bandwidth=1e10,
        peak_flops=1e11,
    )


def test_results_by_hand():
    result = Result([repetition(rate) for rate in (8.0, 10.0, 12.0)])
    assert result.rate == 10 and result.spread == pytest.approx(0.2) and result.noisy
    assert sorted(result.gaps) == pytest.approx([0.1] * 3 + [0.2] * 3)
    assert result.gap(0.5) == pytest.approx(0.15)
    assert result.of_bandwidth == pytest.approx(0.5) and result.of_peak == pytest.approx(0.2)
    assert result.stages == {"decode": 0.75, "sample": 0.25} and result.first is None
    assert Result([repetition(what="prefill", times=(0.3,))]).first == 0.3
    assert not Result([repetition(r) for r in (10.0, 10.1, 10.2)]).noisy
    unknown = Result([repetition(flops=None, bytes=None)])
    assert unknown.of_bandwidth is None and unknown.of_peak is None
