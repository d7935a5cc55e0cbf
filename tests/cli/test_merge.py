"""Adapters on the command line: used, shown, verified, merged, and refused where they cannot go."""

import json
import re
import shutil

import pytest

from engine.finetune import merge as merging
from tests.engine.test_adapter import write_base, write_theirs, write_tuned

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
GREEDY = ("--temperature", "0", "--max-tokens", "8", "--seed", "1", "--json")


@pytest.fixture
def place(tmp_path):
    """The folder that commands look in."""
    return tmp_path / "checkpoints"


def text(run, name: str) -> str:
    result = run("generate", "def main", "-m", name, *GREEDY)
    assert result.code == 0, result.err
    return json.loads(result.out)["text"]


def test_an_adapter_is_used_like_any_model(run, place, tokenizer):
    write_tuned(place, tokenizer)
    assert text(run, "tuned") != text(run, "base")
    shown = run("show", "tuned").out
    assert "LoRA of rank 3, alpha 5, beside down_proj, gate_proj, k_proj" in shown
    adapter = json.loads(run("show", "tuned", "--json").out)["adapter"]
    assert f"{adapter['parameters']:,} parameters, beside matrices in fp32" in shown
    assert "its weights are those it was trained beside" in shown
    assert adapter["base_known"] and adapter["base"] == str((place / "base/best").resolve())
    result = run("verify", "tuned")
    assert (
        result.code == 0 and "every one matches" in result.out and "base/step-000001" in result.out
    )


def test_one_of_peft_is_too_and_is_not_called_proved(run, place, tokenizer):
    write_theirs(place, tokenizer)
    assert text(run, "peft") != text(run, "base")
    assert "unproved: nothing says which weights" in run("show", "peft").out
    assert not json.loads(run("show", "peft", "--json").out)["adapter"]["base_known"]
    prompt = run("generate", "def main", "-m", "peft", "--show-prompt")
    assert prompt.code == 0 and "def main" in prompt.out
    result = run("verify", "peft")
    assert result.code == 3 and "no manifest.json" in result.err
    assert run("merge", "peft", "-o", "checkpoints/merged").code == 0
    assert text(run, "merged") == text(run, "peft")


def test_merging_says_what_it_compared(run, place, tokenizer):
    write_tuned(place, tokenizer, base="int8")
    result = run("merge", "tuned", "-o", "checkpoints/merged", "-p", "import os")
    assert result.code == 0 and result.out == ""
    assert "compared on 6 prompts: largest logit difference" in result.err
    assert re.search(r" (\d+) of \1 tokens agree", result.err)
    assert "tuned beside 8-bit matrices" in result.err
    assert run("verify", "merged").code == 0
    again = json.loads(run("merge", "tuned", "-o", "checkpoints/other", "--json").out)
    assert again["schema"] == "lm/merge/1" and again["difference"] <= again["limit"]
    assert run("export", "merged", "--to", "hf").code == 0


def test_a_model_that_is_none_ends_in_exit_code_7(run, place, tokenizer, monkeypatch):
    write_tuned(place, tokenizer)
    monkeypatch.setattr(merging, "TOLERANCE", -1.0)
    result = run("merge", "tuned", "-o", "checkpoints/merged")
    assert result.code == 7 and "the merged model differs" in result.err
    assert not (place / "merged").exists()


def test_what_an_adapter_cannot_do_is_said(run, place, tokenizer):
    folder = write_tuned(place, tokenizer)
    for to in ("gguf", "hf"):
        result = run("export", "tuned", "--to", to)
        assert result.code == 3 and "merge it first: lm merge" in result.err
    result = run("merge", "base", "-o", "checkpoints/merged")
    assert result.code == 3 and "no adapter to merge" in result.err
    result = run("chat", "-m", "tuned", stdin=b"hi\n")
    assert result.code == 3 and "no chat template" in result.err
    shutil.rmtree(place / "base")
    assert "is not there; bring it back" in run("show", "tuned").out
    for words in (["generate", "x", "-m", "tuned"], ["verify", "tuned"]):
        result = run(*words)
        assert result.code == 3 and "ln -s NEW_PLACE" in result.err
    write_base(place, tokenizer, "qwen2")
    result = run("generate", "x", "-m", "tuned")
    assert result.code == 3 and "other weights than those it was trained beside" in result.err
    (folder / "adapter_model.safetensors").write_bytes(b"short")
    assert "adapter_model.safetensors: 5 bytes instead" in run("verify", "tuned").err
