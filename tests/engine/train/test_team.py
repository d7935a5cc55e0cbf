"""Several processes: the curve of one, to the bit when resumed, and no one left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from engine.errors import RecipeError, ResourceError
from engine.recipe import load
from engine.train.gradient import Share
from engine.train.loss import next_token_loss
from engine.train.run import Prepared
from engine.train.team import Team, check_processes
from tests.conftest import TEXT, command_environment, make_model
from tests.engine.finetune.bases import rows, write_base, write_rows
from tests.engine.train.test_gradient import loss
from tests.engine.train.test_loop import ragged, split
from tests.engine.train.test_run import DATA, RECIPE, outcome, train

TUNE = """
data: {{train: {data}, seq_len: 96, holdout: 10, replay: {replay}}}
train:
  {{base: {base}, steps: 6, batch_size: 4, accumulate: 4, dropout: 0.1, schedule: {{warmup: 4}},
  replay: 0.5,
  optim: {{name: adamw, lr: 0.001, embed_lr: 0.001, head_lr: 0.001, eps: 1.0e-8}}}}
eval: {{every: 7, bytes: 300, final_bytes: 300}}
run: {{threads: 1}}
"""
LORA8 = ("train.lora.rank=4", "train.lora.dropout=0.1", "train.lora.base=int8")


@pytest.mark.parametrize("kind", ["full", "lora8"])
def test_two_processes_draw_the_curve_of_one(run, tmp_path, tokenizer, kind):
    """Through the command: ragged masks, packs, mapped text, dropout in blocks and adapters."""
    base = write_base(tmp_path / "base", tokenizer, tie_embeddings=True)
    data = write_rows(tmp_path / "rows.jsonl", rows(60))
    (tmp_path / "kept.txt").write_text(TEXT)
    recipe = TUNE.format(data=data, base=base, replay=tmp_path / "kept.txt")
    (tmp_path / "recipe.yaml").write_text(recipe)

    def curve(name: str, *more: str) -> torch.Tensor:
        words = (*(LORA8 if kind == "lora8" else ()), *more, "-o", name, "--json")
        result = run("finetune", "recipe.yaml", *words)
        assert result.code == 0, result.err
        said = [json.loads(line) for line in result.out.splitlines()]
        steps = [row for row in said if row["schema"] == "lm/finetune/step/1"]
        return torch.tensor([[row["loss"], row["grad_norm"]] for row in steps])

    alone, shared = curve("alone"), curve("shared", "train.processes=2")
    assert alone.shape == (6, 2)
    assert (shared - alone).abs().max() <= 1e-5
    other = curve("other", "train.dropout=0.11")  # the control: other masks show
    assert (other - alone)[:, 0].abs().max() > 1e-3


@pytest.mark.slow
def test_resume_with_two_processes_is_the_run_that_never_stopped(tmp_path):
    train(tmp_path, "whole", "train.processes=2")
    train(tmp_path, "stopped", "train.processes=2", until=13)
    train(tmp_path, "stopped", "train.processes=2", resume=True)
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_a_run_resumes_with_another_number_and_says_that_the_bits_may_differ(tmp_path):
    train(tmp_path, "run", until=6)
    events = train(tmp_path, "run", "train.processes=2", until=7, resume=True)
    (prepared,) = [event for event in events if isinstance(event, Prepared)]
    assert prepared.changed == ["processes was 1, is 2"]


def test_a_process_that_is_killed_ends_the_run_with_one_clear_line(run, tmp_path, monkeypatch):
    call = Team.__call__

    def killing(team: Team, step: int):
        if step == 3:
            os.kill(team.workers[0].process.pid, signal.SIGKILL)
        return call(team, step)

    monkeypatch.setattr(Team, "__call__", killing)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(data=DATA))
    result = run("train", "recipe.yaml", "train.processes=2", "-q")
    assert result.code == 4
    assert result.err.startswith("error: process 2 of 2 was ended by SIGKILL")
    assert result.err.count("\n") == 1


IN_LEADER = False  # in a worker, which imports this module anew, it stays so


def exhausted(step: int):
    """Batches in whose making memory runs out, though not in the leader's."""
    if step == 1 and not IN_LEADER:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] not enough memory: you tried\nmore")
    return split(ragged(step), 3)


def test_a_process_that_fails_says_why_and_the_first_step_adds_up(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "IN_LEADER", True)

    def share() -> Share:
        return Share(model=make_model(), batches=exhausted, loss=loss, seed=1, dtype=torch.float32)

    alone = share()
    expected = alone(0)
    shared = share()
    with Team(shared, processes=2, threads=1) as team:
        process = team.workers[0].process
        sums = team(0)
        assert sums.targets == expected.targets and abs(sums.nats - expected.nats) < 1e-3
        for a, b in zip(alone.model.parameters(), shared.model.parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad, atol=1e-4, rtol=0)
        with pytest.raises(ResourceError, match=r"2 of 2 failed: RuntimeError: .* you tried$"):
            team(1)
    assert process.returncode == -signal.SIGKILL
    with torch.inference_mode():  # what was trained stays when the others are gone
        assert next_token_loss(shared.model, ragged(0), 64)[0].isfinite()


def children(pid: int) -> list[int]:
    """Return the processes that a process started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks processes up in /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_leader_that_ends_leaves_no_process_behind(tmp_path, number):
    """Killed, or stopped by a Ctrl-C that the terminal sends to all: then it saves first."""
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(data=DATA))
    words = ["train", "recipe.yaml", "train.processes=3", "train.steps=5000", "-o", "run", "-q"]
    leader = subprocess.Popen(
        [sys.executable, "-m", "cli.main", *words],
        cwd=tmp_path,
        env=command_environment(tmp_path),
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    log = tmp_path / "run" / "metrics.jsonl"
    while not log.exists() or not log.read_text().count("\n"):
        assert leader.poll() is None, leader.communicate()
        time.sleep(0.05)
    workers = children(leader.pid)
    assert len(workers) == 2
    os.killpg(leader.pid, number)
    _, said = leader.communicate(timeout=30)
    stopped = number == signal.SIGINT
    assert leader.returncode == (130 if stopped else -number)
    assert (b"stopped at step" in said) == stopped and b"Traceback" not in said
    assert (tmp_path / "run" / "last").exists() or not stopped
    until = time.monotonic() + 2
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < until, "somebody works on"
        time.sleep(0.02)


def test_what_cannot_be_shared_is_refused():
    recipe = load("train: {batch_size: 4, accumulate: 4, processes: 2}", "test")
    check_processes(recipe, torch.device("cpu"))
    with pytest.raises(RecipeError, match="on cuda leave it at 1, or set run.device=cpu"):
        check_processes(recipe, torch.device("cuda"))
    check_processes(load("", "test"), torch.device("cuda"))
