"""`lm doctor`: one screen, one JSON object, exit code 7 as soon as one check does not hold."""

import json
import re

import pytest
import torch

from cli import diagnosis
from engine import machine
from engine.checkpoint import save
from engine.doctor.checks import Subject
from engine.machine import OPTIONAL
from tests.conftest import make_model
from tests.engine.test_adapter import write_tuned
from tests.engine.test_checkpoint import snapshot

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tokenizer):
    """Small things to measure and to check: what is tested here is how it is told."""
    monkeypatch.setattr(machine, "STREAM", 1 << 22)
    monkeypatch.setattr(machine, "SHAPES", ((64, 64, 64),))
    model = make_model(sliding_window=8, full_every=2)
    subject = Subject(model=model, tokenizer=tokenizer)
    monkeypatch.setattr(diagnosis, "random_subject", lambda device: subject)


def test_one_screen(run):
    result = run("doctor")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert 28 <= len(lines) <= 44 and max(map(len, lines)) <= 80
    for label in ("processor", "instructions", "reads", "multiplies", "torch", "compiler"):
        assert re.search(rf"^{label} +\S", result.out, re.MULTILINE), label
    assert "bf16" in result.out and "(it fits the cache" in result.out
    assert re.search(r"ok   cached = uncached +\d\.?\d*(e-\d+)? ≤ 5e-04 ", result.out)
    assert "-    compiled = eager      skipped: " in result.out and "FAIL" not in result.out
    assert re.search(r"^\d+ checks hold, \d skipped, 0 fail · \d+\.\d s$", result.err, re.M)
    assert run("doctor", "-q").err == ""


def test_json_says_it_all(run):
    result = run("doctor", "--json")
    told = json.loads(result.out)
    assert told["schema"] == "lm/doctor/1" and told["ok"] is True and told["seconds"] > 0
    assert told["machine"]["packages"].keys() == OPTIONAL.keys()
    assert (
        told["memory_bandwidth"]["bytes_per_second"] > 0 < told["matmul_flops_per_second"]["fp32"]
    )
    assert {path["name"] for path in told["fast_paths"]} >= {"bf16", "torch.compile", "tiktoken"}
    checks = {check["name"]: check for check in told["checks"]}
    assert checks["saved = loaded"] | {"meaning": ""} == {
        "name": "saved = loaded",
        "value": 0,
        "limit": 0,
        "ok": True,
        "meaning": "",
        "note": "",
    }
    assert checks["compiled = eager"]["ok"] is None is checks["compiled = eager"]["value"]


@pytest.mark.parametrize("words", [(), ("--json",), ("-q",)])
def test_a_check_that_fails_is_exit_code_7(run, monkeypatch, tokenizer, words):
    model = make_model()
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    monkeypatch.setattr(
        diagnosis, "random_subject", lambda device: Subject(model=model, tokenizer=tokenizer)
    )
    result = run("doctor", *words)
    assert result.code == 7
    assert re.search(r"^error: \d+ of 15 checks fail on cpu: cached = uncached, ", result.err, re.M)
    if words == ("--json",):
        told = json.loads(result.out)
        assert told["ok"] is False and told["checks"][0]["value"] is None
        assert "NaN" not in result.out
    else:
        assert re.search(r"^  FAIL cached = uncached +nan ≤ 5e-04 ", result.out, re.M)


def test_a_checkpoint_or_an_adapter_is_examined(run, tmp_path, tokenizer):
    save(tmp_path / "checkpoints" / "mine", snapshot(tokenizer), best=True)
    result = run("doctor", "-m", "mine")
    assert result.code == 0 and "checks on checkpoints/mine/best, " in result.out
    assert "ok   saved = loaded" in result.out
    write_tuned(tmp_path / "checkpoints", tokenizer)
    result = run("doctor", "-m", "tuned")
    assert result.code == 0, result.out
    assert "-    saved = loaded        skipped: of an adapter" in result.out
    result = run("doctor", "-m", "nobody")
    assert result.code == 3 and "no checkpoint nobody" in result.err


def test_the_compiler_is_the_one_that_the_environment_names(run, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = run("doctor")
    assert "compiler     none: no cc on PATH, and no CC set" in result.out
    assert "off  torch.compile  needs a C++ compiler" in result.out
    assert "skipped: needs a C++ compiler" in result.out


def test_missing_packages_name_their_extra(run, monkeypatch):
    monkeypatch.setattr(machine, "_version", lambda name: "")
    out = run("doctor").out
    flat = " ".join(out.split())
    assert "packages -" in flat and "tiktoken [fast], huggingface_hub [hub]" in flat
    assert "pip install 'lm-workbench[EXTRA]'" in flat


def test_a_quantized_checkpoint_is_called_what_it_is(run, tmp_path, tokenizer):
    save(tmp_path / "run", snapshot(tokenizer), best=True)
    assert run("quantize", tmp_path / "run", "--to", "int8", "-o", "small").code == 0
    assert "parameters in int8, computed in fp32" in run("doctor", "-m", "small").out
    assert "parameters in fp32" in run("doctor", "-m", tmp_path / "run").out
