"""metrics.jsonl: what a crash leaves, what a resumed run keeps."""

import pytest

from engine.errors import DataError
from engine.train.log import MetricsLog, read_metrics


def test_a_resumed_log_drops_what_will_be_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    for step in range(1, 6):
        log.write({"step": step, "loss": 1 / step})
    log.write({"step": 5, "valid_bpb": 2.0, "final": True})
    log.close()
    MetricsLog(path, 3).close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.123456789}\n{"step": 2, "lo')
    assert list(read_metrics(path)) == [{"step": 1, "loss": 0.123456789}]


def test_damage_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nrubbish\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        list(read_metrics(path))


def test_no_file_is_an_empty_log(tmp_path):
    assert list(read_metrics(tmp_path / "none.jsonl")) == []
