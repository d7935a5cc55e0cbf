"""`lm quantize` as a person meets it, and what other commands make of its outcome."""

import json
import os
import re

import pytest

from cli.render import percent
from engine.checkpoint import Snapshot, save
from engine.config import SampleConfig
from tests.conftest import make_model
from tests.engine.test_adapter import write_tuned

GREEDY = ("--temperature", "0", "--max-tokens", "6", "--seed", "1")


@pytest.fixture
def place(tmp_path, tokenizer):
    """The folder that commands look in, with one model."""
    snapshot = Snapshot(
        step=3,
        model=make_model(),
        tokenizer=tokenizer,
        recipe_yaml="",
        sample=SampleConfig(),
        facts={},
        optimizer={},
        state={},
    )
    save(tmp_path / "checkpoints" / "small", snapshot, best=True)
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_quantized_model_is_made_shown_verified_and_used(format, run, place):
    made = run("quantize", "small", "--to", format)
    assert made.code == 0 and made.out == ""
    first, *gain, second, third, last = made.err.splitlines()[-5 if format == "int4" else -4 :]
    for line in gain:  # int4 is calibrated unless it is told not to be
        assert re.match(r"perplexity  [\d.]+ → [\d.]+ \([-+][\d.]+ ?%\) on [\d.]+ kB that ", line)
    assert first.startswith("weights  ") and " kB → " in first and "16 matrices" in first
    assert re.match(r"error    0?[.\d]+ % of a matrix in the mean, [.\d]+ % at most \(", second)
    assert third.startswith(f"made checkpoints/small-{format} (peak memory")
    assert last == f"next: lm generate 'Once' -m small-{format}"
    assert run("verify", f"small-{format}").code == 0
    shown = run("show", f"small-{format}").out
    assert f", {format}\n" in shown and f"quantized  to {format} from {place}/small" in shown
    facts = json.loads(run("show", f"small-{format}", "--fit", "--json").out)
    fit, original = facts["fit"], json.loads(run("show", "small", "--fit", "--json").out)["fit"]
    assert facts["stored"] == format
    if fit["by"] == "native":  # torch would widen it
        assert fit["weights"] == facts["weight_bytes"] < 0.4 * original["weights"]
        assert (fit["dtype"], fit["kv"], original["dtype"]) == (format, "fp16", "fp32")
        assert fit["scratch"] < 200_000_000 and facts["kv"] == "fp16"
        assert f" as {format}\n" in run("show", f"small-{format}", "--fit").out
    config = facts["config"]
    numbers = 2 * config["n_layers"] * config["n_kv_heads"] * config["head_dim"]
    width = {"fp16": 2, "bf16": 2, "fp32": 4}[fit["kv"]]
    assert fit["kv_per_token"] == facts["kv_bytes_per_token"] == numbers * width
    said = run("generate", "def ", "-m", f"small-{format}", *GREEDY)
    assert said.code == 0 and said.out


def test_it_says_as_json_what_it_says_in_words(run, place):
    result = run("quantize", "small", "--to", "int8", "-o", "x", "--json", "-q")
    facts = json.loads(result.out)
    assert facts["schema"] == "lm/quantize/1" and facts["folder"] == "x"
    assert facts["original"] == "checkpoints/small/best" and facts["format"] == "int8"
    assert facts["bytes"] < 0.4 * facts["bytes_before"]
    assert 0.001 < facts["mean_error"] <= facts["largest_error"] < 0.02
    assert facts["largest"].startswith(("blocks.", "embed", "lm_head"))
    assert result.err == ""


def test_int4_is_rougher_and_smaller_than_int8(run, place):
    eight, four = (
        json.loads(run("quantize", "small", "--to", format, "--json").out)
        for format in ("int8", "int4")
    )
    assert four["bytes"] < eight["bytes"] and four["mean_error"] > 3 * eight["mean_error"]


def test_int4_is_calibrated_by_the_text_that_is_named(run, place):
    text = place.parent / "letters.txt"
    text.write_text("Dear reader, this is a letter about nothing at all.\n" * 400)
    words = ("quantize", "small", "--to", "int4", "--json", "-o")
    built_in, own, plain = (
        json.loads(run(*words, *more).out)
        for more in (("a",), ("b", "--calibrate", str(text)), ("c", "--calibrate", "none"))
    )
    assert built_in["calibration"]["text"] == ["stdlib", "pydoc"]
    assert own["calibration"]["text"] == [str(text)] and plain["calibration"] is None
    assert own["calibration"]["digest"] != built_in["calibration"]["digest"]
    assert own["calibration"]["perplexity_before"] > 1 and own["calibration"]["perplexity"] > 1
    assert own["mean_error"] > plain["mean_error"]  # which is what it is paid with
    assert own["bytes"] == plain["bytes"] and 4 < own["bits_per_weight"] < 9
    shown = json.loads((place.parent / "b" / "manifest.json").read_text())["quantized"]
    assert shown["calibration"] == own["calibration"]
    assert f"by {text}" in run("show", str(place.parent / "b")).out
    assert "without calibration" in run("show", str(place.parent / "c")).out


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (("--to", "int8", "--calibrate", "stdlib"), 2, "--calibrate is for int4"),
        (("--to", "int4", "--calibrate", "nowhere"), 3, "nowhere: no such file"),
        (("--to", "int4", "--keep", "dwon"), 2, "'dwon': no matrix of"),
        (("--to", "int4", "--keep", ""), 2, "'': no matrix of"),
        (("--to", "int8", "--keep", "q_proj"), 2, "--keep is for int4"),
        (("--to", "int4", "--calibrate", "short.txt"), 3, "too little text to calibrate by"),
    ],
    ids=["int8", "missing", "keep", "keep-nothing", "keep-int8", "short"],
)
def test_what_cannot_be_calibrated_by_is_said(more, code, said, run, place):
    (place.parent / "short.txt").write_text("Brief.")
    result = run("quantize", "small", *more)
    assert result.code == code and said in result.err.splitlines()[-1]
    assert [path.name for path in place.iterdir()] == ["small"]


def test_what_is_in_the_way_is_said(run, place):
    assert run("quantize", "small", "--to", "int8").code == 0
    again = run("quantize", "small", "--to", "int8")
    assert again.code == 2 and "checkpoints/small-int8 exists; replace it with --force" in again.err
    other = run("quantize", "small", "--to", "int8", "-o", "checkpoints")
    assert other.code == 2 and "--force" not in other.err
    assert run("quantize", "small", "--to", "int8", "--force").code == 0
    itself = run("quantize", "small", "--to", "int8", "-o", "checkpoints/small", "--force")
    assert itself.code == 2 and "holds the model itself" in itself.err
    assert run("verify", "small").code == 0


@pytest.mark.parametrize("stray", ["notes.txt", "deep/er/notes.txt", "link", "pipe"])
def test_force_removes_nothing_but_what_the_manifest_names(stray, run, place):
    words = ("quantize", "small", "--to", "int8", "-o", "x", "--force")
    assert run(*words).code == 0
    path = place.parent / "x" / stray
    path.parent.mkdir(parents=True, exist_ok=True)
    if stray == "link":
        path.symlink_to("/nowhere")
    elif stray == "pipe":
        os.mkfifo(path)
    else:
        path.write_text("mine")
    refused = run(*words)
    assert refused.code == 2 and f"x/{stray} is no part of" in refused.err
    assert len(refused.err.splitlines()) == 1 and os.path.lexists(path)
    path.unlink()
    assert run(*words).code == 0


def test_an_error_is_said_to_two_digits():
    said = [percent(share) for share in (0, 4.71e-7, 0.00099999, 0.00533, 0.0676, 0.123, 1)]
    assert said == ["0 %", "0.000047 %", "0.100 %", "0.53 %", "6.8 %", "12 %", "100 %"]


def test_what_cannot_be_quantized_is_said(run, place, tokenizer):
    write_tuned(place, tokenizer)
    adapter = run("quantize", "tuned", "--to", "int8")
    assert adapter.code == 3 and "merge it first: lm merge" in adapter.err
    run("quantize", "small", "--to", "int8")
    twice = run("quantize", "small-int8", "--to", "int4")
    assert twice.code == 3 and "is quantized already, to int8" in twice.err
    assert run("quantize", "nothing", "--to", "int8").code == 3
    assert run("quantize", "small", "--to", "int3").code == 2
    assert sorted(path.name for path in place.iterdir()) == ["base", "small", "small-int8", "tuned"]


@pytest.mark.parametrize(
    "words",
    [
        ("export", "small-int8", "--to", "gguf"),
        ("export", "small-int8", "--to", "hf"),
        ("finetune", "sft", "-m", "small-int8", "data.train=rows.jsonl", "-o", "tuned"),
        ("import", "checkpoints/small-int8", "-o", "checkpoints/more"),
    ],
    ids=lambda words: words[0] + words[-1],
)
def test_what_a_quantized_model_cannot_do_is_one_line(words, run, place, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 50)
    run("quantize", "small", "--to", "int8")
    result = run(*words)
    assert result.code == 3
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "quantized" in errors[0]
    assert "Traceback" not in result.err
