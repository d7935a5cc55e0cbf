"""Records: whole lines, appended; what is damaged is named by its line."""

import json
import os

import pytest

from engine.bench.record import Recorder, read_records
from engine.errors import DataError, ResourceError
from engine.machine import describe
from tests.engine.bench.test_measure import repetition


def record(path, *rates):
    recorder = Recorder(path, describe())
    for rate in rates:
        recorder.write(repetition(rate))
    recorder.close()


def test_what_is_written_is_read_and_runs_share_a_file(tmp_path):
    file = tmp_path / "r.jsonl"
    record(file, 1.0, 2.0)
    record(file, 3.0)
    read = read_records(file)
    assert [each.rate for each in read] == [1.0, 2.0, 3.0]
    assert {each.case for each in read} == {repetition().case}
    row = json.loads(file.read_text().splitlines()[0])
    assert row["schema"] == "lm/bench/repetition/1" and row["times"] == [0.5, 0.6, 0.8]
    assert row["machine"]["torch"] and row["stages"] == {"decode": 0.75, "sample": 0.25}


def good():
    row = {"schema": "lm/bench/repetition/1", "rate": 1.0, "machine": {}}
    return row | {"case": {"what": "decode", "model": "m", "dtype": "fp32", "threads": 1}}


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "lm/bench/1"},
        {"rate": "fast"},
        {"rate": 0},
        {"rate": float("nan")},
        {"case": []},
        {"case": {"what": "decode"}},
        {"case": {"what": "fly", "model": "m", "dtype": "fp32", "threads": 1}},
        {"case": {"what": "decode", "model": ["m"], "dtype": "fp32", "threads": 1}},
        {"case": {"what": "decode", "model": "m", "dtype": "fp32", "threads": 1, "x": 1}},
        {"machine": None},
    ],
    ids=str,
)
def test_a_damaged_line_is_named(tmp_path, change):
    file = tmp_path / "r.jsonl"
    file.write_text(f"{json.dumps(good())}\n{json.dumps(good() | change)}\n")
    with pytest.raises(DataError, match=r"r\.jsonl:2: not a record"):
        read_records(file)


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"[[[[", b"12", b"{}"])
def test_other_files_are_refused(tmp_path, data):
    file = tmp_path / "r.jsonl"
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"r\.jsonl"):
        read_records(file)
    with pytest.raises(DataError, match="cannot be read"):
        read_records(tmp_path / "missing")


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(ResourceError, match="choose another --record"):
        Recorder(tmp_path / "no" / "r.jsonl", describe())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_said():
    from pathlib import Path

    with pytest.raises(ResourceError, match="No space left"):
        record(Path("/dev/full"), 1.0)
