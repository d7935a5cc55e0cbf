"""Every command once for real, as a person or a script would use it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cli.commands import generate
from tests.conftest import Result, command_environment


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with two trained runs, `smoke` and `wide`, made by the real command."""
    folder = tmp_path_factory.mktemp("runs")
    for words in (["smoke"], ["smoke", "model.d_model=96", "-o", "checkpoints/wide"]):
        subprocess.run(
            [sys.executable, "-m", "cli.main", "train", *words, "-q"],
            cwd=folder,
            env=command_environment(folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            timeout=120,
            check=True,
        )
    return folder


@pytest.fixture
def lm(run):
    """Run `lm` in a folder; it must succeed."""

    def call(folder: Path, *words: object, stdin: bytes = b"") -> Result:
        result = run(*words, stdin=stdin, cwd=folder)
        assert result.code == 0, result
        return result

    return call


def test_training_ends_with_a_report_and_a_path(lm, tmp_path):
    result = lm(tmp_path, "train", "smoke")
    assert result.out == "checkpoints/smoke/best\n"
    assert (tmp_path / "checkpoints/smoke/best/model.safetensors").is_file()
    for part in ("bits per byte", "this model", "xz -9e", "PPMd", "unigram", "lm generate"):
        assert part in result.err
    assert "\x1b" not in result.err, "no colour and no animation off a terminal"
    # A finished run resumed has nothing to do but to score itself, to the same figure.
    again = lm(tmp_path, "train", "smoke", "--resume", "--json")
    final = [json.loads(line) for line in again.out.splitlines()][-1]
    assert final["schema"] == "lm/train/1" and final["step"] == 20
    assert f"{final['bits_per_byte']:.3f}  this model" in result.err


def test_training_as_json_lines(lm, tmp_path):
    rows = [json.loads(line) for line in lm(tmp_path, "train", "smoke", "--json").out.splitlines()]
    kinds = [row["schema"] for row in rows]
    assert kinds.count("lm/train/step/1") == 20 and kinds[-1] == "lm/train/1"
    assert set(rows[-1]["baselines"]) == {
        "unigram (bytes)",
        "xz -9e, primed",
        "PPMd order 8, primed",
    }
    assert [row["step"] for row in rows if row["schema"] == "lm/train/eval/1"] == [10, 20, 20]


def test_text_from_a_pipe_trains_and_resumes_without_the_pipe(lm, tmp_path):
    text = "".join(f"line {n} of a text that is piped in\n" for n in range(2000)).encode()
    words = ["smoke", "data.train=-", "-o", "piped", "-q"]
    lm(tmp_path, "train", *words, stdin=text)
    assert (tmp_path / "piped" / "stdin").read_bytes() == text
    lm(tmp_path, "train", *words, "--resume")


def test_same_seed_same_text_other_seed_other_text(lm, folder):
    def text(*words):
        return lm(folder, "generate", "The", "-m", "smoke", "--max-tokens", 30, *words).out

    assert text("--seed", 1) == text("--seed", 1) != text("--seed", 2)
    assert text("--seed", 1, "--temperature", 0) == text("--seed", 2, "--temperature", 0)


def test_generate_json_says_everything(lm, folder):
    words = ["generate", "The", "-m", "smoke", "-n", 2, "--seed", 5, "--json", "--logprobs", 3]
    rows = [json.loads(line) for line in lm(folder, *words, "--max-tokens", 6).out.splitlines()]
    assert [row["seed"] for row in rows] == [5, 6]
    for row in rows:
        assert row["schema"] == "lm/generate/1" and row["finish_reason"] in ("length", "end")
        assert len(row["tokens"]) == len(row["logprobs"]) <= 6
        assert all(len(entry["top"]) == 3 for entry in row["logprobs"])
    alone = json.loads(lm(folder, *words[:4], "--seed", 6, "--json", "--max-tokens", 6).out)
    assert alone["tokens"] == rows[1]["tokens"]


def test_every_option_of_generate_stands_in_one_group(run):
    text = run("generate", "--help").out
    groups = dict.fromkeys(["Arguments", *generate.PANELS], "")
    heading = ""
    for line in text.splitlines():
        if line.removesuffix(":") in groups:
            heading = line.removesuffix(":")
        elif heading:
            groups[heading] += line + "\n"
    assert groups["Arguments"].split()[0] == "prompt" and "--" not in groups["Arguments"]
    assert "--top-k" in groups["Sampling"] and "--draft" in groups["Speed"]
    options = re.findall(r"^  (?:-\w, )?(--?[\w-]+)", "".join(groups.values()), re.MULTILINE)
    names = " ".join(generate.PANELS.values()).split()
    assert len(options) == len(set(options)) == len(names) == len(set(names))


def test_statistics_fit_a_terminal(lm, folder):
    """Every fact is whole, and says which number is a count and which a speed."""
    said = lm(folder, "generate", "The", "-m", "smoke", "--seed", 2**62, "--max-tokens", 9).err
    lines = said.splitlines()
    assert all(len(line) <= 80 for line in lines[-2:])
    facts = [fact for line in lines for fact in line.split(" · ")]
    for fact, pattern in zip(
        facts[-7:],
        [
            r"prompt \d+ tok at [\d,]+ tok/s",
            r"first token [\d,]+ ms",
            r"\d tok at [\d,]+ tok/s",
            r"stop: (length|end)",
            r"peak [\d,]+ MB",
            r"(native|torch) \w+",
            r"seed 4611686018427387904",
        ],
        strict=True,
    ):
        assert re.fullmatch(pattern, fact), fact


def test_a_stop_string_never_leaks(lm, folder):
    words = ["generate", "The", "-m", "smoke", "--seed", 1, "--max-tokens", 60]
    whole = lm(folder, *words).out
    stop = whole[10:12]
    cut = lm(folder, *words, "--stop", stop)
    assert cut.out == whole[: whole.index(stop)] + "\n" and "stop: stop" in cut.err


def test_prompt_from_argument_file_and_pipe(lm, folder, tmp_path):
    (tmp_path / "prompt.txt").write_text("The quick")
    words = ["generate", "-m", "smoke", "--temperature", 0, "--max-tokens", 8]
    expected = lm(folder, *words, "The quick").out
    assert lm(folder, *words, "-f", tmp_path / "prompt.txt").out == expected
    assert lm(folder, *words, stdin=b"The quick").out == expected
    assert lm(folder, *words, "-", stdin=b"The quick").out == expected
    both = lm(folder, *words, "--json", "quick", stdin=b"The\n")
    joined = json.loads(lm(folder, *words, "--json", "The\n\nquick").out)
    assert json.loads(both.out)["tokens"] == joined["tokens"]


def test_tokenize_and_back(lm, folder, tmp_path):
    data = "def f(x):\n    return 'é 你 <|endoftext|>'\n".encode() + bytes(range(256))
    (tmp_path / "raw").write_bytes(data)
    ids = lm(folder, "tokenize", "-f", tmp_path / "raw", "-m", "smoke", "--ids").out
    process = subprocess.run(
        [sys.executable, "-m", "cli.main", "tokenize", "--decode", "-m", "smoke"],
        input=ids.encode(),
        capture_output=True,
        cwd=folder,
        env=command_environment(folder),
        check=True,
    )
    assert process.stdout == data
    shown = json.loads(lm(folder, "tokenize", "-f", tmp_path / "raw", "-m", "smoke", "--json").out)
    assert shown["bytes"] == len(data) and shown["tokens"] == len(ids.split())
    assert shown["pieces"][-1]["end"] == len(data)
    plain = lm(folder, "tokenize", "The end", "-m", "smoke")
    assert plain.out.splitlines()[0].startswith("0\t") and "bytes/token" in plain.err


def test_train_tokenizer_then_use_it(lm, tmp_path):
    lm(tmp_path, "train-tokenizer", "pydoc", "tokenizer.vocab_size=500", "-o", "tok")
    found = json.loads(lm(tmp_path, "tokenize", "hello", "-m", "tok/tokenizer.json", "--json").out)
    assert found["vocab_size"] == 500
    lm(tmp_path, "train", "smoke", "tokenizer.path=tok", "tokenizer.vocab_size=999", "-q")
    shown = json.loads(lm(tmp_path, "show", "smoke", "--json").out)
    assert shown["config"]["vocab_size"] == 500


def test_runs_show_and_plot(lm, folder, tmp_path):
    rows = json.loads(lm(folder, "runs", "--json").out)["runs"]
    assert {row["name"] for row in rows} == {"smoke", "wide"} and all(
        row["finished"] for row in rows
    )
    assert "smoke" in lm(folder, "runs").out
    shown = json.loads(lm(folder, "show", "wide", "--json").out)
    assert shown["parameters"]["total"] == sum(
        n for name, n in shown["parameters"].items() if name != "total"
    )
    assert "qwen3" in lm(folder, "show", "wide").out
    assert "━ smoke" in lm(folder, "plot", "smoke", "wide").out
    for ending in ("png", "svg"):
        picture = tmp_path / f"curves.{ending}"
        lm(folder, "plot", "smoke", "wide", "--metric", "valid_bpb", "--x", "tokens", "-o", picture)
        assert picture.stat().st_size > 5000


def test_recipes_list_show_check_explain(lm, tmp_path):
    assert "stdlib" in lm(tmp_path, "recipes").out
    shown = lm(tmp_path, "recipes", "show", "stdlib", "train.steps=7").out
    (tmp_path / "copy.yaml").write_text(shown)
    assert lm(tmp_path, "recipes", "show", "copy.yaml").out == shown
    assert (
        lm(tmp_path, "recipes", "check", "copy.yaml", "smoke").out == "copy.yaml: ok\nsmoke: ok\n"
    )
    assert "train.optim.lr = 0.0" in lm(tmp_path, "recipes", "explain", "train.optim").out
    fields = json.loads(lm(tmp_path, "recipes", "explain", "--json").out)["fields"]
    assert all(field["meaning"] and field["accepts"] for field in fields)


def test_force_replaces_a_run(lm, tmp_path):
    lm(tmp_path, "train", "smoke", "-q")
    lm(tmp_path, "train", "smoke", "run.seed=2", "--force", "-q")
    assert "seed: 2" in (tmp_path / "checkpoints/smoke/recipe.yaml").read_text()


def test_version(lm, tmp_path):
    assert lm(tmp_path, "--version").out.startswith("lm 0.")
