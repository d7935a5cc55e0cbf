"""What rows about answering measure: surprise, agreement, a first byte, seconds beside seconds."""

import copy
import json
import math
import sys

import numpy as np
import pytest
import torch

from engine.generate.reference import TorchDecoder
from tests.bench import lm_side
from tests.bench.limits import first_byte, waits
from tests.bench.report import Missing, line
from tests.conftest import make_model


@pytest.fixture
def model(monkeypatch, tokenizer):
    model = make_model()
    own = copy.copy(tokenizer)  # whose ends are taken away
    monkeypatch.setattr(lm_side, "load", lambda folder, dtype: (TorchDecoder(model), own))
    monkeypatch.setattr(
        lm_side, "prompt_of", lambda depth, row=0: [(7 * i + row) % 399 for i in range(depth)]
    )
    return model


def test_perplexity_is_that_of_torch(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(lm_side, "WINDOW", 50)
    text = "def add(a, b):\n    return a + b\n" * 30
    task = tmp_path / "task.json"
    task.write_text(json.dumps({"text": text}))
    found = lm_side.scored("", "fp32", str(task))
    ids = torch.tensor(tokenizer.encode(text))
    nats = 0.0
    for window in (ids[i : i + 51] for i in range(0, len(ids) - 1, 50)):
        logits = model(window[None, :-1])[0].detach()
        nats += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    assert math.isclose(found["perplexity"], math.exp(nats / (len(ids) - 1)), rel_tol=1e-4)
    assert len(found["answers"]) == lm_side.ASKED and len(found["answers"][0]) == lm_side.ANSWER

    answers = found["answers"]
    answers[3][10] ^= 1  # the control: one token that the model would not say
    task.write_text(json.dumps({"text": text, "answers": answers}))
    again = lm_side.scored("", "fp32", str(task))
    assert again["agreed"] == [64, 64, 64, 10] + [64] * 16


def test_one_row_and_several_are_timed(model):
    for rows in (1, 3):
        found = lm_side.timed("", "auto", 8, 5, 2, rows)
        assert len(found["prefill"]) == len(found["decode"]) == 2
        assert min(found["prefill"] + found["decode"]) > 0 and found["name"] == "torch fp32"


def test_a_command_is_timed_to_its_first_byte():
    wait = "import sys, time; sys.stdout.write('a'); sys.stdout.flush(); time.sleep(1)"
    assert first_byte([sys.executable, "-c", wait]) < 0.9
    for wrong in ("pass", "print('a'); raise SystemExit('broken')"):
        with pytest.raises(Missing, match="ended with"):
            first_byte([sys.executable, "-c", wrong])
    with pytest.raises(Missing, match="No such file"):
        first_byte(["/nowhere/python"])


def test_seconds_are_shown_as_seconds_and_fewer_are_better():
    found = waits({"lm": [0.5] * 3, "peer": [1.0] * 3}, "lm", "peer", "")
    assert (found.value, found.other, found.unit) == (0.5, 1.0, "s")
    assert found.ratio and found.ratio.value == 2
    assert "0.5 / 1 s" in line("cold", found, "1×")
    assert "peer did not run" in waits({"lm": [0.5]}, "lm", "peer", "no such file").note


def test_nats_are_those_of_a_softmax():
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], np.float32)) + 7
    assert math.isclose(lm_side._nats(logits, [1, 2]), math.log(4) + math.log(1.25), rel_tol=1e-6)
