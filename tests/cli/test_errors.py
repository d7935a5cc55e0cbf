"""Bad input of every kind: one clear line on stderr, the right exit code, nothing on stdout."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import command_environment

TINY = ["model.d_model=16", "model.n_layers=1", "model.n_heads=2", "train.steps=3"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder in which checkpoints/smoke was trained by the real command."""
    folder = tmp_path_factory.mktemp("trained")
    subprocess.run(
        [sys.executable, "-m", "cli.main", "train", "smoke", *TINY, "-q"],
        cwd=folder,
        env=command_environment(folder),
        check=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    return folder


def failed(result, code: int, *expected: str) -> None:
    """Check the contract of an error: code, one line, what · where · fix, no traceback."""
    assert result.code == code, result
    assert result.out == ""
    assert "Traceback" not in result.err
    for part in expected:
        assert part in result.err, result.err
    if code != 2 or "Usage:" not in result.err:
        lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, result.err


def test_unknown_recipe(run):
    failed(run("train", "stdlb"), 2, "did you mean stdlib?")


def test_unknown_command_and_option(run):
    failed(run("trian"), 2, "trian")
    failed(run("train", "smoke", "--resme"), 2, "--resme")


def test_unknown_key(run):
    failed(run("train", "smoke", "train.lrr=1"), 2, "did you mean train.optim.lr?")


def test_recipe_file_with_a_typo_names_the_line(run, tmp_path):
    (tmp_path / "mine.yaml").write_text("run: {name: x}\ntrain:\n  step: 4\n")
    failed(run("train", "mine.yaml"), 2, "train.step", "mine.yaml:3", "train.steps")


def test_recipe_that_is_no_text(run, tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    failed(run("train", "mine.yaml"), 2, "mine.yaml")


def test_missing_data(run):
    failed(run("train", "smoke", "data.train=nowhere.txt"), 3, "nowhere.txt", "no such file")


def test_empty_data(run, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    failed(run("train", "smoke", "data.train=empty.txt"), 3, "empty.txt", "no text")


def test_binary_data(run, tmp_path):
    (tmp_path / "picture.txt").write_bytes(b"GIF89a\0\0\0")
    failed(run("train", "smoke", "data.train=picture.txt"), 3, "picture.txt", "binary")


def test_data_in_another_encoding(run, tmp_path):
    (tmp_path / "old.txt").write_bytes("Größe".encode("latin-1"))
    failed(run("train", "smoke", "data.train=old.txt"), 3, "not UTF-8 at byte 2", "iconv")


def test_wrong_json_on_line_217(run, tmp_path):
    rows = ['{"text": "hello"}\n'] * 216 + ['{"text": "oops\n']
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    failed(run("train", "smoke", "data.train=rows.jsonl"), 3, "rows.jsonl:217", "not valid JSON")


def test_too_little_text(run, tmp_path):
    (tmp_path / "short.txt").write_text("a few words\n" * 3)
    failed(run("train", "smoke", "data.train=short.txt"), 3, "too few")


def test_a_device_that_is_not_there(run):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    failed(run("train", "smoke", "run.device=cuda"), 4, "no cuda device")


def test_a_model_that_cannot_fit_is_refused_before_it_is_made(run):
    result = run("train", "smoke", "model.d_model=200000", "model.n_heads=8")
    failed(result, 4, "GB are free", "model.d_model")


def test_a_place_where_nothing_can_be_written(run, tmp_path):
    (tmp_path / "file").write_text("")
    failed(run("train", "smoke", "-o", "file/run"), 4, "file/run", "-o")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_for_stdout_and_pictures(run, trained):
    """/dev/full refuses every write, as a full disk does."""
    with Path("/dev/full").open("wb") as full:
        process = subprocess.run(
            [sys.executable, "-m", "cli.main", "recipes", "show", "stdlib"],
            stdout=full,
            stderr=subprocess.PIPE,
            env=command_environment(trained),
            timeout=60,
            check=False,
        )
    assert process.returncode == 4 and b"Traceback" not in process.stderr
    assert b"No space left" in process.stderr


def test_divergence(run):
    result = run("train", "smoke", *TINY, "train.optim.lr=1e30", "train.optim.head_lr=1e30", "-q")
    failed(result, 5, "gradient norm inf", "before the update", "train.optim.lr")


def test_a_run_in_the_way(run, trained):
    failed(run("train", "smoke", cwd=trained), 2, "--resume", "--force", "-o")


def test_resume_without_a_run(run):
    failed(run("train", "smoke", "--resume"), 2, "no run to resume")


def test_resume_with_another_recipe(run, trained):
    result = run("train", "smoke", *TINY, "run.seed=5", "--resume", cwd=trained)
    failed(result, 2, "run.seed was 1337, is 5")


def test_unknown_checkpoint(run, trained):
    failed(run("generate", "x", "-m", "smok", cwd=trained), 3, "no checkpoint smok", "smoke")


def test_no_model_named_and_none_there(run):
    failed(run("generate", "x"), 2, "which model?", "lm train stdlib")


def test_context_overflow(run, trained):
    result = run("generate", "word " * 600, "-m", "smoke", "--max-tokens", 20, cwd=trained)
    failed(result, 6, "> context 256", "--on-overflow")


def test_overflow_cut_is_said(run, trained):
    words = ["generate", "word " * 600, "-m", "smoke", "--max-tokens", 20, "--on-overflow", "left"]
    result = run(*words, cwd=trained)
    assert result.code == 0 and "cut " in result.err and "prompt tokens (left)" in result.err


def test_empty_prompt(run, trained):
    failed(run("generate", "-m", "smoke", cwd=trained), 3, "the prompt is empty")


def test_bad_sampling_values(run, trained):
    for words in (["--top-p", "2"], ["--temperature", "-1"], ["-n", "0"], ["--on-overflow", "up"]):
        failed(run("generate", "x", "-m", "smoke", *words, cwd=trained), 2, words[0])
    failed(run("generate", "x", "-m", "smoke", "--logprobs", 3, cwd=trained), 2, "--json")


def test_corrupt_checkpoint(run, trained, tmp_path):
    import shutil

    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints", symlinks=True)
    file = tmp_path / "checkpoints" / "smoke" / "best" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    failed(run("generate", "x", "-m", "smoke"), 3, "model.safetensors", "1000 bytes instead of")


def test_decode_of_nonsense(run, trained):
    failed(run("tokenize", "abc", "--decode", "-m", "smoke", cwd=trained), 3, "whole numbers")
    failed(run("tokenize", "999999", "--decode", "-m", "smoke", cwd=trained), 3, "999999")


def test_a_picture_of_another_kind(run, trained):
    failed(run("plot", "smoke", "-o", "x.gif", cwd=trained), 2, ".png or .svg")
    failed(run("plot", "nothing", cwd=trained), 3, "no metrics.jsonl in nothing")
    failed(run("plot", "smoke", "--metric", "beauty", cwd=trained), 2, "beauty")


def test_a_closed_pipe_is_quiet(trained):
    """As in `lm recipes explain | head -1`."""
    command = f"{sys.executable} -m cli.main recipes explain | head -1; echo ${{PIPESTATUS[0]}}"
    process = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        env=command_environment(trained),
        timeout=60,
        check=True,
    )
    assert process.stderr == ""
    assert process.stdout.splitlines()[-1] in ("0", "141")


def test_ctrl_c_saves_says_how_to_go_on_and_exits_130(tmp_path):
    words = ["train", "smoke", "train.steps=100000", "train.batch_size=4", "-o", "my run"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", *words],
        cwd=tmp_path,
        env=command_environment(tmp_path),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "my run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == "" and "Traceback" not in err
    hint = "lm train smoke train.steps=100000 train.batch_size=4 -o 'my run' --resume"
    assert f"continue with: {hint}" in err
    assert (tmp_path / "my run" / "last" / "manifest.json").is_file()


def test_debug_shows_where_an_error_came_from(tmp_path):
    process = subprocess.run(
        [sys.executable, "-m", "cli.main", "--debug", "train", "stdlb"],
        capture_output=True,
        text=True,
        env=command_environment(tmp_path),
        timeout=60,
        check=False,
    )
    assert "Traceback" in process.stderr and "RecipeError" in process.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes to read-only folders too")
def test_read_only_folder(run, tmp_path):
    tmp_path.chmod(0o500)
    try:
        failed(run("train", "smoke", "--cache", "/tmp"), 4, "Permission denied")
    finally:
        tmp_path.chmod(0o700)
