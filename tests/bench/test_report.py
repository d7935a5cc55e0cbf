"""A result as a line of text and of JSON; what cannot run says why."""

import json

import pytest

from tests.bench.apart import medians, turn, turns
from tests.bench.learning import beside_compressors
from tests.bench.report import Missing, line, machine, record, versus
from tests.bench.rows import ROWS


def test_a_rate_is_work_over_the_median_and_ours_is_better_above_one():
    found = versus({"lm": [2.0, 2.0, 2.0], "peer": [8.0, 8.0, 8.0]}, "lm", "peer", 4096)
    assert (found.value, found.other) == (2048, 512)
    assert found.ratio and found.ratio.value == 4
    text = line("train-13m", found, "3.5× / 6×")
    assert "2,048 / 512 tok/s" in text and "4.00× [4.00 … 4.00]" in text and "asked 3.5×" in text
    assert "noisy" not in text


def test_noise_is_marked():
    found = versus({"lm": [1.0, 2.0, 3.0], "peer": [1.0, 1.0, 1.0]}, "lm", "peer", 1)
    assert "±50% noisy" in line("row", found, "")


def test_a_side_that_did_not_run_is_no_figure():
    found = versus({"lm": [1.0]}, "lm", "llama.cpp", 1)
    assert found.ratio is None and "llama.cpp did not run" in found.note
    assert "asked" not in line("row", found, "2×")


def test_json_holds_every_repetition_and_the_machine():
    found = versus({"lm": [1.0, 2.0, 4.0], "peer": [3.0, 3.0, 3.0]}, "lm", "peer", 1)
    row = json.loads(record("decode", found, "2×"))
    assert row["row"] == "decode" and row["raw"]["lm"] == [1.0, 2.0, 4.0]
    about = machine()
    assert about["schema"] == "lm/make-bench/1" and about["machine"]["cores"] >= 1
    json.dumps(about)


def test_sides_in_processes_are_timed_and_one_that_fails_is_named():
    import sys

    good = [sys.executable, "-c", "print('hello'); print('{\"seconds\": [3, 1, 2]}')"]
    bad = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    said, failed = turns({"good": good, "bad": bad, "gone": ["/nowhere/python"]}, rounds=2)
    assert medians(said, "seconds") == {"good": [2, 2]}
    assert "no such model" in failed["bad"] and "No such file" in failed["gone"]
    with pytest.raises(Missing, match="ended with 1: no such model"):
        turn(bad)


def test_compressors_are_compared_by_their_bits_and_the_best_comes_first():
    said = {"bits_per_byte": 1.25, "step": 1, "tokens": 1, "seconds": 300.0}
    said["baselines"] = {"unigram": 5.0, "xz": 1.5, "PPMd": None}
    rows = list(beside_compressors(said))
    assert [row.peer for row in rows] == ["xz", "unigram", "PPMd"]
    assert rows[0].ratio and rows[0].ratio.value == 1.2
    assert rows[2].ratio is None and "could not run" in rows[2].note


def test_every_row_says_what_it_is():
    assert all(row.about and callable(row.measure) for row in ROWS.values())
