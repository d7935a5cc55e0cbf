"""Folders of runs: what is theirs, what is the user's, and who may write."""

import subprocess
import sys

import pytest

from engine.errors import CheckpointError, RecipeError
from engine.runs import TOKENIZER, create_run, delete_run, find, has_begun, hold, tidy


def test_deleting_a_run_leaves_what_is_not_its_own(tmp_path):
    for name in ("notes.txt", "metrics.jsonl", "stdin", *TOKENIZER, "step-by-step.md"):
        (tmp_path / name).write_text("x")
    (tmp_path / "step-000001").mkdir()
    (tmp_path / ".step-000002.tmp").mkdir()
    (tmp_path / "best").symlink_to("step-000001")
    delete_run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "step-by-step.md"]


def test_a_failed_start_is_not_a_run(tmp_path):
    create_run(tmp_path, "run: {seed: 1}\n")
    assert not has_begun(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    assert has_begun(tmp_path)


def test_tidying_keeps_what_the_links_name(tmp_path):
    for step in (1, 2, 3):
        (tmp_path / f"step-00000{step}").mkdir()
    (tmp_path / ".step-000004.tmp").mkdir()
    (tmp_path / "best").symlink_to("step-000001")
    (tmp_path / "last").symlink_to("step-000003")
    tidy(tmp_path)
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {"best", "last", "step-000001", "step-000003"}


def test_a_folder_is_held_by_one_process(tmp_path):
    code = "import sys, pathlib\nfrom engine.runs import hold\n"
    code += "with hold(pathlib.Path(sys.argv[1])): print('mine')"

    def other() -> subprocess.CompletedProcess:
        words = [sys.executable, "-c", code, str(tmp_path)]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    with hold(tmp_path):
        assert "another process is training here" in other().stderr
    assert other().stdout == "mine\n"
    with hold(tmp_path), pytest.raises(RecipeError, match="another process"), hold(tmp_path):
        pass


def test_names_are_looked_up_here_then_below_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("here", "root/there/last", "root/two/best", "root/two/last"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
    root = tmp_path / "root"
    assert find("here", root).name == "here"
    assert find("there", root) == root / "there" / "last"
    assert find("two", root) == root / "two" / "best"
    with pytest.raises(CheckpointError, match="there are: there, two"):
        find("three", root)
