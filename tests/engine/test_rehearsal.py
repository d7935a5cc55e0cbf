"""A rehearsal takes the real steps, in a process of its own that leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from engine import rehearsal
from engine.errors import ResourceError
from engine.manifest import read_config
from engine.peak import peak_memory
from engine.recipe import load
from engine.rehearsal import Tuned, _counted, _until, rehearse, resident_memory
from tests.conftest import ROOT
from tests.engine.finetune.bases import write_base

TINY = ["model.d_model=32", "model.n_layers=1", "model.n_heads=2", "model.vocab_size=300"]
TINY += ["data.seq_len=16", "train.batch_size=4", "run.threads=1"]


def test_steps_of_the_recipes_shape_are_timed_and_their_memory_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    found = rehearse(load("", "test", [*TINY, "train.accumulate=2"]), tmp_path / "cache")
    assert found.tokens == 4 * 16
    assert len(found.seconds) >= rehearsal.FEWEST and min(found.seconds) > 0
    assert min(found.seconds) <= found.seconds_per_step <= max(found.seconds)
    assert 0 < found.before < found.peak_memory
    wide = ["model.d_model=256", "data.seq_len=256", "train.batch_size=16"]
    assert (
        rehearse(load("", "test", [*TINY, *wide]), tmp_path / "cache").peak_memory
        > found.peak_memory + 40_000_000
    )


def test_finetuning_takes_rows_of_the_given_lengths_and_replayed_windows(tmp_path, tokenizer):
    base = write_base(tmp_path, tokenizer)
    given = ["data.seq_len=20", "train.batch_size=2", "train.lora.rank=2", "run.threads=1"]
    recipe = replace(load("", "test", [*given, "train.base=x"]), model=read_config(base))
    tuned = Tuned(base=str(base), rows=[(20, 5), (20, 3), (20, 1)])
    assert rehearse(recipe, tmp_path / "cache", tuned).tokens == 40
    replaying = Tuned(base=str(base), rows=[(20, 5), (20, 3)], replayed=3)
    assert rehearse(recipe, tmp_path / "cache", replaying).tokens == 40 + 60


def test_several_processes_rehearse_together(tmp_path):
    recipe = load("", "test", [*TINY, "train.accumulate=2", "train.processes=2"])
    one = rehearse(load("", "test", [*TINY, "train.accumulate=2"]), tmp_path / "cache")
    assert rehearse(recipe, tmp_path / "cache").peak_memory > 1.5 * one.peak_memory


def test_an_error_of_the_run_arrives_as_it_was_raised(monkeypatch, tmp_path):
    with pytest.raises(ResourceError, match="needs about"):
        rehearse(
            load("", "test", [*TINY, "model.d_model=1048576", "model.head_dim=2"]),
            tmp_path / "cache",
        )
    monkeypatch.setattr(rehearsal, "PROGRAM", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(ResourceError, match="ended from outside"):
        rehearse(load("", "test", TINY), tmp_path / "cache")
    monkeypatch.setattr(rehearsal, "PROGRAM", "raise ValueError('a bug')")
    with pytest.raises(RuntimeError, match="a bug"):
        rehearse(load("", "test", TINY), tmp_path / "cache")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds children by /proc")
def test_it_ends_with_the_process_that_started_it(tmp_path):
    given = [*TINY, "data.seq_len=512", "train.batch_size=256"]
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from engine import rehearsal\nfrom engine.recipe import load\nfrom pathlib import Path\n"
        f"rehearsal.rehearse(load('', 'test', {given!r}), Path({str(tmp_path)!r}))"
    )
    starter = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    deadline = time.monotonic() + 60
    while not (children := _children(starter.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children
    time.sleep(0.5)
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    while any(map(_alive, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_alive, children))


def _children(process: int) -> list[int]:
    file = Path(f"/proc/{process}/task/{process}/children")
    return [int(word) for word in file.read_text(encoding="ascii").split()]


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process}/stat").read_text(encoding="ascii")
    return stat.rpartition(")")[2].split()[0] != "Z"  # one that ended and was not waited for


def test_enough_is_some_steps_and_some_seconds_but_few_of_very_long_ones():
    assert _counted([9.0, 9.0, 1.0, 2.0]) == [1.0, 2.0]
    assert _until([9.0, 9.0, 1.0, 2.0], 4) == 5
    assert _until([0.1] * 10, 10) == 11
    assert _until([3.0] * 5, 5) == 5
    assert _until([0.01] * rehearsal.MOST, 40) == 40
    assert _until([70.0], 1) == 2
    assert _until([70.0, 65.0], 2) == 2 and _counted([70.0, 65.0]) == [65.0]


def test_resident_memory_is_below_the_peak():
    assert 0 < resident_memory() <= peak_memory() * 1.01
