"""Rows continued together are those continued alone, with a cache and without."""

import torch

from engine.clock import Clock
from engine.config import SampleConfig
from engine.generate.batching import greedy
from engine.generate.decode import generate, prefill
from engine.generate.reference import TorchDecoder
from tests.conftest import make_model

PROMPTS = [[5, 6, 7, 8], [40, 3, 9, 1], [7, 7, 7, 7]]


def rows(model, **how):
    return torch.cat(list(greedy(model, PROMPTS, 12, 400, **how)), dim=1).tolist()


def test_a_batch_gives_each_row_what_it_would_get_alone(tokenizer):
    model = make_model(1)
    decoder, config = TorchDecoder(model), SampleConfig(temperature=0, max_tokens=12)
    unending = tokenizer.ends
    tokenizer.ends = frozenset()
    try:
        alone = [
            [
                token.id
                for token in generate(
                    decoder, tokenizer, prefill(decoder, p, decoder.cache(16)), config, seed=0
                )
            ]
            for p in PROMPTS
        ]
    finally:
        tokenizer.ends = unending
    assert rows(model) == alone
    assert len({tuple(row) for row in alone}) == 3  # the control: the rows differ


def test_without_a_cache_the_tokens_are_the_same_and_the_work_grows():
    model = make_model(1)
    seen = []
    hidden = model.hidden
    model.hidden = lambda tokens, cache=None: seen.append(tokens.shape[1]) or hidden(tokens, cache)
    assert rows(model, cached=False) == rows(model)
    assert seen == [*range(4, 16), 4, *[1] * 11]


def test_the_stages_of_a_batch():
    clock = Clock()
    rows(make_model(1), clock=clock)
    assert set(clock.seconds) == {"prefill", "sample", "decode"}
