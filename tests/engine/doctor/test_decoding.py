"""Our own decoder is examined, and each break of it is seen by the check that is there for it."""

import numpy as np
import pytest

from engine.doctor import checks, decoding
from engine.doctor.checks import ROUNDING, Subject
from engine.generate.native import NativeDecoder
from tests.conftest import make_model

ROWS = [list(range(40, 72)), list(range(60, 92)), list(range(7, 39))]
MEASURES = {"cached": decoding.cached, "batched": decoding.batched}


@pytest.fixture
def model():
    return make_model(sliding_window=8, full_every=2, n_kv_heads=2)


def test_a_sound_decoder_keeps_its_promise(model, library):
    assert [measure(model, library, ROWS) for measure in MEASURES.values()] == [0, 0]
    assert 0 < decoding.beside_torch(model, library, ROWS) < ROUNDING / 5


BREAKS = {
    "cached": lambda cache, runs: cache.lengths[0] > 0,
    "batched": lambda cache, runs: len(runs) > 1,
}


@pytest.mark.parametrize("name", MEASURES)
def test_the_last_bit_of_one_logit_is_seen(model, library, monkeypatch, name):
    right = NativeDecoder.forward

    def wrong(self, cache, runs):
        broken = BREAKS[name](cache, runs)
        logits = right(self, cache, runs)
        if broken:
            logits[0, 3] = np.nextafter(logits[0, 3], np.float32(9))
        return logits

    monkeypatch.setattr(NativeDecoder, "forward", wrong)
    found = {key: measure(model, library, ROWS) for key, measure in MEASURES.items()}
    assert found.pop(name) > 0 and set(found.values()) == {0}


def test_a_wrong_weight_is_seen_beside_torch(model, library, monkeypatch, tokenizer):
    right = decoding.native

    def wrong(model, library):
        decoder = right(model, library)
        decoder._model.eps = 0.01
        return decoder

    monkeypatch.setattr(decoding, "native", wrong)
    assert decoding.beside_torch(model, library, ROWS) > ROUNDING
    assert decoding.cached(model, library, ROWS) == 0, "wrong, but the same each time"
    subject = Subject(model=model, tokenizer=tokenizer, library=library)
    found = {check.name: check.ok for check in checks.examine(subject)}
    assert found["C = torch"] is False and found["C cached = uncached"]
