"""The objective: what it scores is what the formula says, and what a resumed run must find."""

import math

import numpy as np
import pytest
import torch

from engine.config import Recipe
from engine.data.samples import Sample, Tally
from engine.finetune.objective import Finetuning
from engine.finetune.prepare import Side, Tuning
from engine.recipe import override
from tests.conftest import make_model


def sample(seed: int, length: int, prompt: int) -> Sample:
    ids = np.random.default_rng(seed).integers(3, 390, length).astype(np.int32)
    learned = np.arange(length) >= prompt
    return Sample(where=f"rows:{seed}", ids=ids, learned=learned)


def make(tmp_path, tokenizer, train, valid, **changes) -> Finetuning:
    recipe = override(Recipe(), train={"batch_size": 2}, data={"seq_len": 64})
    recipe = override(recipe, **changes)
    sides = [Side(samples=side, tally=Tally(), tasks={}) for side in (train, valid)]
    tuning = Tuning(
        format="tokens", rule="given", train=sides[0], valid=sides[1], test=None, own_text=None
    )
    return Finetuning(recipe, tuning, tokenizer, tmp_path, "weights")


SAMPLES = [sample(seed, 9 + seed, 3 + seed % 4) for seed in range(12)]


def test_the_score_is_the_surprise_at_the_answers(tmp_path, tokenizer):
    model = make_model(vocab_size=tokenizer.vocab_size)
    objective = make(tmp_path, tokenizer, SAMPLES, SAMPLES)
    nats = count = 0.0
    with torch.no_grad():
        for each in SAMPLES:
            log_probs = model(torch.from_numpy(each.ids)[None].long()).log_softmax(-1)[0]
            for place in np.flatnonzero(each.learned):
                nats -= log_probs[place - 1, each.ids[place]].item()
                count += 1
    score = objective.judge(model)
    assert score.tokens == count
    assert score.nats == pytest.approx(nats, rel=1e-5)
    spelled = sum(
        len(tokenizer.piece(int(token)))
        for each in SAMPLES
        for token in each.ids[each.learned]
        if int(token) not in tokenizer.special
    )
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / spelled, rel=1e-5)


def test_a_quick_look_takes_rows_evenly(tmp_path, tokenizer):
    objective = make(tmp_path, tokenizer, SAMPLES, SAMPLES, eval={"bytes": 40})
    model = make_model(vocab_size=tokenizer.vocab_size)
    quick, whole = objective.evaluate(model), objective.judge(model)
    assert 0 < quick.tokens < whole.tokens / 2


@pytest.mark.parametrize("what", ["ids", "mask", "valid", "base"])
def test_the_digest_knows_everything_that_is_learned(tmp_path, tokenizer, what):
    before = make(tmp_path, tokenizer, SAMPLES, SAMPLES[:3])
    assert before.digest == make(tmp_path, tokenizer, list(SAMPLES), SAMPLES[:3]).digest
    changed = [sample(seed, 9 + seed, 3 + seed % 4) for seed in range(12)]
    if what == "ids":
        changed[4].ids[5] += 1
    elif what == "mask":
        changed[4].learned[5] = False
    after = make(tmp_path, tokenizer, changed, SAMPLES[: 4 if what == "valid" else 3])
    if what == "base":
        after.weights = "others"
    assert after.digest != before.digest


def test_the_longest_batch_is_the_longest(tmp_path, tokenizer):
    objective = make(tmp_path, tokenizer, SAMPLES, SAMPLES, data={"seq_len": 24})
    longest = sum(part.tokens_BT.numel() for part in objective.mixture.longest())
    steps = range(len(objective.packs.bins) // 2)  # of one epoch: at its border a pack may repeat
    sizes = [sum(part.tokens_BT.numel() for part in objective.batches(step)) for step in steps]
    assert len(sizes) > 1 and longest >= max(sizes)
