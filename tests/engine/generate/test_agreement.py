"""All ways of continuing agree on a sound decoder, and each is caught when just it is broken."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from engine.generate import agreement, decode
from engine.generate.agreement import WAYS, Way, agree, distance, long_enough
from engine.generate.decoder import BLOCK, Cache, Run
from engine.generate.reference import TorchCache, TorchDecoder
from tests.conftest import make_model
from tests.engine.generate.test_native import native

PROMPT = [int(i) for i in np.random.default_rng(0).integers(1, 399, 75)]


def sharp(**changes) -> TorchDecoder:
    """A decoder whose choice depends on all that it read, not on the newest token alone."""
    model = make_model(**changes)
    random = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3, generator=random)
    return TorchDecoder(model)


def ways(decoder, tokenizer, prompt: Sequence[int] = PROMPT, most: int = 12) -> dict[str, Way]:
    return {way.name: way for way in agree(decoder, tokenizer, prompt, most)}


@pytest.mark.parametrize("seed", range(3))
def test_a_sound_decoder_agrees_in_every_way(tokenizer, seed):
    decoder = TorchDecoder(make_model(seed, n_kv_heads=2))
    found = ways(decoder, tokenizer)
    assert list(found) == list(WAYS) and len(found["uncached"].ids) == 12
    for way in found.values():
        assert way.same and way.first_difference is None and way.ids == found["uncached"].ids
        assert way.largest < 1e-4, "sums in another order"
    assert found["uncached"].exact and found["uncached"].largest == 0


@pytest.mark.parametrize("format", ["f32", "bf16", "int8", "int4"])
def test_our_own_decoder_agrees_to_the_bit(tokenizer, library, format):
    found = ways(native(sharp().model, library, format), tokenizer)
    assert all(way.same and way.exact and way.largest == 0 for way in found.values())
    assert len(set(found["uncached"].ids)) > 3, "or a stale cache could not show"


class Broken:
    """A decoder that computes wrong where `fault` says so."""

    def __init__(self, decoder: TorchDecoder, fault) -> None:
        self.decoder, self.fault = decoder, fault
        self.config, self.name, self.identity = decoder.config, decoder.name, ""

    def cache(self, capacity: int, rows: int = 1) -> Cache:
        cache = self.decoder.cache(capacity, rows)
        if self.fault == "block":
            cache.__class__ = StaleBlocks
        return cache

    def forward(self, cache: TorchCache, runs: Sequence[Run]) -> np.ndarray:
        fault, run, held = self.fault, runs[0], cache.lengths[runs[0].row]
        if fault == "forgets" and held and len(run.tokens) == 1:
            cache.rewind(run.row, held - 1)  # the token before it is lost
            self.decoder.forward(cache, [Run(run.row, run.tokens, wanted=0)])
        if fault == "cuts" and 1 < len(run.tokens) == agreement.PIECES[2]:
            runs = [Run(run.row, [run.tokens[0], *run.tokens[:-1]], run.wanted)]
        if fault == "mixes" and len(runs) == 3:
            return np.roll(self.decoder.forward(cache, runs), 1, axis=0)
        if fault == "guesses" and run.wanted > 1:
            return np.roll(self.decoder.forward(cache, runs), 1, axis=0)
        return self.decoder.forward(cache, runs)


class StaleBlocks(TorchCache):
    """Gives back the first block in place of any."""

    def save_block(self, row: int, index: int) -> np.ndarray:
        return np.roll(super().save_block(row, index), 4)


BREAKS = {
    "forgets": {"cached"},
    "cuts": {"chunked"},
    "mixes": {"batched"},
    "guesses": {"corrected"},
    "block": {"restored"},
}


@pytest.mark.parametrize("fault", BREAKS)
def test_a_broken_way_is_caught(tokenizer, fault):
    found = ways(Broken(sharp(), fault), tokenizer)
    differ = {name for name, way in found.items() if way.same is False}
    assert BREAKS[fault] <= differ
    if fault not in ("forgets", "guesses"):
        assert differ == BREAKS[fault], "and no other"
    for name in differ:
        way, first = found[name], found[name].first_difference
        assert first is not None and way.ids[:first] == found["uncached"].ids[:first]
        assert way.ids[first : first + 1] != found["uncached"].ids[first : first + 1]
        assert way.largest > 1e-3 and not way.exact


def test_a_stream_of_its_own_mind_is_caught(tokenizer, monkeypatch):
    monkeypatch.setattr(decode, "sample", lambda logits_V, *rest: int(np.argsort(logits_V)[-2]))
    found = ways(sharp(), tokenizer)
    assert found["streamed"].same is False and found["streamed"].first_difference == 0
    assert found["streamed"].largest < 1e-4, "the logits were right, the choice was not"
    assert found["cached"].same


def test_an_end_ends_every_way(tokenizer, monkeypatch):
    decoder = sharp()
    long = ways(decoder, tokenizer)["uncached"].ids
    end = next(i for i, token in enumerate(long) if i > 2 and token not in long[:i])
    monkeypatch.setattr(tokenizer, "ends", frozenset([long[end]]))
    found = ways(decoder, tokenizer)
    assert all(way.same and way.ids == long[: end + 1] for way in found.values())


def test_what_cannot_be_tried_says_why(tokenizer):
    short = ways(sharp(), tokenizer, PROMPT[:5])
    assert short["restored"].same is None and f"more than {BLOCK}" in short["restored"].note
    # A prompt below one block reaches it while it is continued.
    assert ways(sharp(), tokenizer, PROMPT[:60])["restored"].same
    windowed = ways(sharp(sliding_window=8), tokenizer)
    assert windowed["restored"].same is None and "window" in windowed["restored"].note
    assert all(way.same for name, way in windowed.items() if name != "restored")


def test_a_short_prompt_is_repeated_where_there_is_room():
    assert long_enough([1, 2, 3], 200) == ([1, 2, 3] * 22)[: BLOCK + 1]
    assert long_enough([1, 2, 3], BLOCK) == [1, 2, 3]
    assert long_enough(PROMPT, 200) == PROMPT
    assert long_enough([7], BLOCK + 1) == [7] * (BLOCK + 1)


def test_the_distance_of_two_decoders_by_hand():
    class Says:
        def __init__(self, *rows):
            self.rows = np.array(rows, np.float32)

        def cache(self, capacity):
            return None

        def forward(self, cache, runs):
            return self.rows[-runs[0].wanted :]

    one, other = Says([9, 9], [1, 2], [3, -4]), Says([0, 0], [1, 3], [5, -8])
    assert distance(one, other, [5, 6, 7], 2) == 0.5  # 4 of 8
    assert distance(one, other, [5, 6, 7], 3) == 9 / 8
    assert distance(one, one, [5, 6, 7], 3) == 0


def test_one_token_is_enough_to_begin_with(tokenizer):
    found = ways(sharp(), tokenizer, PROMPT[:1], most=5)
    assert all(way.same for name, way in found.items() if name != "restored")
