"""The promises of the whole, through the command: kill, resume, verify, load elsewhere."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from engine.checkpoint import load_model
from tests.conftest import ROOT, command_environment
from tests.engine.finetune.bases import rows, write_base, write_rows
from tests.engine.train.test_run import DATA, RECIPE, outcome


def train(folder: Path, name: str, killed_after: float | None = None) -> None:
    """Start or resume a run in a process of its own; let it end, or kill it after some seconds."""
    words = ["train", str(folder / "recipe.yaml"), "-o", str(folder / name), "-q"]
    words += ["--resume"] * (folder / name / "recipe.yaml").is_file()
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", *words],
        cwd=folder,
        env=command_environment(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        assert process.wait(killed_after or 120) == 0
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert killed_after, "the run hangs"


def killed_and_resumed(folder: Path, kills: int) -> None:
    """Train once undisturbed and once killed at random moments; both must end the same."""
    (folder / "recipe.yaml").write_text(RECIPE.format(data=DATA))
    began = time.monotonic()
    train(folder, "whole")
    length = time.monotonic() - began
    moments = [random.uniform(0.2, length) for _ in range(kills)]
    for moment in moments:
        train(folder, "killed", killed_after=moment)
    train(folder, "killed")
    assert outcome(folder / "killed") == outcome(folder / "whole"), moments


def test_killed_at_random_and_resumed_is_bit_identical(tmp_path):
    killed_and_resumed(tmp_path, kills=3)


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(10))
def test_ten_kills_at_any_moment(tmp_path, attempt):
    """SIGKILL during imports, tokenising, steps, evaluations and saves alike."""
    killed_and_resumed(tmp_path, kills=4)


def test_verify_resume_proves_it_on_the_users_recipe(run, tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(data=DATA))
    result = run("train", "recipe.yaml", "train.batch_size=96", "--verify-resume", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["identical"] and len(found["kills"]) == 2
    assert "bit-identical: weights equal, optimizer equal" in result.err


def test_what_we_train_loads_in_transformers_and_gives_our_logits(run, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert run("train", "smoke", "-q").code == 0
    folder = tmp_path / "checkpoints" / "smoke" / "best"
    ours, tokenizer = load_model(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    text = "The import statement binds names: é 你 <|endoftext|>"
    ids = tokenizer.encode(text)
    their_tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert their_tokenizer(text, split_special_tokens=True)["input_ids"] == ids
    tokens = torch.tensor([ids])
    with torch.inference_mode():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)
        expected = theirs.generate(tokens, max_new_tokens=20, do_sample=False)[0, len(ids) :]
    command = ["generate", "-m", "smoke", "--temperature", "0", "--max-tokens", "20", "--json"]
    result = run(*command, text)
    found = json.loads(result.out)["tokens"]
    assert found and found == expected.tolist()[: len(found)]


def test_what_we_train_goes_out_as_gguf_and_as_a_folder_and_comes_back(run, tmp_path):
    """Trained here, exported, imported again: the same text, and transformers' logits between."""
    from transformers import AutoModelForCausalLM

    assert run("train", "smoke", "-q").code == 0
    assert run("export", "smoke", "--to", "gguf", "--dtype", "f32", "-o", "smoke.gguf").code == 0
    assert run("export", "smoke", "--to", "hf", "-o", "plain").code == 0
    assert run("import", "smoke.gguf", "-o", "checkpoints/from-gguf").code == 0
    assert run("import", "plain", "-o", "checkpoints/from-folder").code == 0

    def said(name: str) -> dict:
        words = ["generate", "def main(", "-m", name, "--temperature", "0", "--max-tokens", "30"]
        found = json.loads(run(*words, "--seed", "1", "--json").out)
        return {key: found[key] for key in ("text", "tokens", "finish_reason", "prompt_tokens")}

    expected = said("smoke")
    assert expected["text"] and said("from-gguf") == said("from-folder") == expected
    ours, tokenizer = load_model(tmp_path / "checkpoints" / "from-gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", local_files_only=True).eval()
    tokens = torch.tensor([tokenizer.encode("import os\nprint('é')\n")])
    with torch.inference_mode():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)
    for name in ("from-gguf", "from-folder"):
        assert run("verify", name).code == 0


RECIPES = {
    path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "recipes").glob("*.yaml")
}
TUNING = sorted(name for name, text in RECIPES.items() if f"lm finetune {name}" in text)


@pytest.mark.parametrize("name", TUNING)
def test_every_recipe_of_finetuning_runs_a_step(run, tmp_path, tokenizer, name):
    """As it is shipped, but for its length and on a tiny base; those of one's own rows get some."""
    base = write_base(tmp_path / "base", tokenizer, max_seq_len=1024)
    short = ["train.steps=1", "train.batch_size=2", "eval.final_bytes=2000", "eval.bytes=1000"]
    short += ["data.seq_len=1024", "eval.answers=2", "eval.texts=", f"train.base={base}"]
    if name.startswith("sft"):
        short += [f"data.train={write_rows(tmp_path / 'rows.jsonl', rows(12))}"]
    result = run("finetune", name, *short, "--json")
    assert result.code == 0, result.err
    made = [json.loads(line) for line in result.out.splitlines()]
    assert made[-1]["step"] == 1 and made[-1]["loss"] > 0
    assert bool(made[-1]["answers"]) == (name != "domain")


@pytest.mark.parametrize("name", sorted(RECIPES.keys() - TUNING))
def test_every_recipe_runs_a_step(run, name):
    """As it is shipped, but for its length; `text` is given some."""
    short = ["train.steps=1", "eval.final_bytes=2000", "eval.bytes=1000", "eval.overlap=1"]
    if name == "text":
        short += [f"data.train={ROOT / 'engine'}"]
    result = run("train", name, *short, "--json")
    assert result.code == 0, result.err
    made = [json.loads(line) for line in result.out.splitlines()]
    assert made[-1]["step"] == 1 and made[-1]["bits_per_byte"] > 0
    first = next(row for row in made if row["schema"] == "lm/train/step/1")
    vocabulary = json.loads(run("show", name, "--json").out)["config"]["vocab_size"]
    assert first["loss"] == pytest.approx(math.log(vocabulary), abs=0.05)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads peak memory from Linux")
def test_a_big_file_is_tokenised_in_flat_memory(tmp_path):
    """400 MB of text must not need much more memory than 40 MB."""

    def peak(megabytes: int) -> int:
        text = tmp_path / f"{megabytes}.txt"
        with text.open("w") as file:
            for number in range(megabytes * 8):
                file.write(f"line {number} " + "some words of text " * 6900 + "\n")
        words = ["train", "smoke", f"data.train={text}", "-o", str(tmp_path / str(megabytes)), "-q"]
        words += ["train.steps=1", "tokenizer.sample_bytes=1000000", "eval.final_bytes=1000"]
        process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", *words],
            env=command_environment(tmp_path),
            stdout=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        text.unlink()
        return usage.ru_maxrss * 1024

    assert peak(400) < peak(40) + 300_000_000
