"""Cached logits equal uncached logits, for every kind of cache and every split of the prompt."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import ModelConfig
from engine.cost import kv_bytes_per_token
from engine.errors import EngineError
from engine.model.cache import KVCache, WindowLayer
from engine.model.transformer import Transformer
from tests.conftest import make_model

# Longer than window + slack, so that windowed layers really drop keys.
LENGTH = 90
SLACK = WindowLayer.SLACK
KINDS = {
    "full": {},
    "grouped": {"n_kv_heads": 2},
    "one key/value head": {"n_kv_heads": 1, "qk_norm": "none"},
    "window": {"sliding_window": 5},
    "window of one": {"sliding_window": 1},
    "window longer than the prompt": {"sliding_window": 100},
    "mixed": {"sliding_window": 7, "full_every": 2, "n_layers": 4, "n_kv_heads": 2},
    "learned": {"position": "learned", "norm": "layernorm", "activation": "gelu"},
    "learned window": {"position": "learned", "sliding_window": 4},
    "none": {"position": "none"},
    "none window": {"position": "none", "sliding_window": 4},
}
MODELS = {kind: make_model(**changes) for kind, changes in KINDS.items()}
TOKENS = torch.randint(0, 400, (1, LENGTH), generator=torch.Generator().manual_seed(3))
with torch.inference_mode():
    UNCACHED = {kind: model(TOKENS) for kind, model in MODELS.items()}

every_kind = pytest.mark.parametrize("kind", KINDS)
dropping = pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if 0 < MODELS[kind].config.sliding_window < LENGTH - SLACK]
)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


def close(logits: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)


def feed(model: Transformer, cache: KVCache, sizes: list[int]) -> torch.Tensor:
    """Logits of the next sum(sizes) tokens of TOKENS, fed in pieces of those sizes."""
    parts = []
    for size in sizes:
        parts.append(model(TOKENS[:, cache.length : cache.length + size], cache))
    return torch.cat(parts, dim=1)


@every_kind
def test_every_split_in_two(kind):
    for split in range(1, LENGTH):
        cache = KVCache(MODELS[kind].config)
        close(feed(MODELS[kind], cache, [split, LENGTH - split]), UNCACHED[kind])
        assert cache.length == LENGTH


@every_kind
def test_token_by_token(kind):
    close(feed(MODELS[kind], KVCache(MODELS[kind].config), [1] * LENGTH), UNCACHED[kind])


@every_kind
@settings(max_examples=8)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=12))
def test_any_pieces(kind, sizes):
    cache = KVCache(MODELS[kind].config)
    for size in [*sizes, LENGTH]:
        start, size = cache.length, min(size, LENGTH - cache.length)
        if size:
            expected = UNCACHED[kind][:, start : start + size]
            close(feed(MODELS[kind], cache, [size]), expected)
    assert cache.length == LENGTH


@every_kind
def test_a_cache_just_large_enough(kind):
    """A window is cheaper than a buffer only in a long cache, so here the layers may differ."""
    for length in (1, 5, 6, 20):
        cache = KVCache(MODELS[kind].config, capacity=length)
        close(feed(MODELS[kind], cache, [1] * length), UNCACHED[kind][:, :length])


@every_kind
@pytest.mark.parametrize("extra", [1, 3])
def test_more_tokens_than_fit_are_refused(kind, extra):
    """Regression: a single token past the end was dropped and its logits were silently wrong."""
    model = MODELS[kind]
    cache = KVCache(model.config, capacity=8)
    feed(model, cache, [8])
    try:
        logits = feed(model, cache, [extra])
    except (EngineError, ValueError, RuntimeError, IndexError):
        return
    close(logits, UNCACHED[kind][:, 8 : 8 + extra])  # a window has no end to run past


@every_kind
def test_rows_do_not_mix(kind):
    model = MODELS[kind]
    rows = torch.stack([TOKENS[0], TOKENS[0].flip(0), TOKENS[0].roll(1)])
    cache = KVCache(model.config, rows=3)
    logits = torch.cat((model(rows[:, :50], cache), model(rows[:, 50:], cache)), dim=1)
    for row in range(3):
        close(logits[row : row + 1], model(rows[row : row + 1]))


@every_kind
def test_two_caches_over_one_model_do_not_disturb_each_other(kind):
    model = MODELS[kind]
    other = TOKENS.flip(1)
    expected = model(other)
    mine, theirs = KVCache(model.config), KVCache(model.config)
    for at in range(0, LENGTH, 9):
        close(model(TOKENS[:, at : at + 9], mine), UNCACHED[kind][:, at : at + 9])
        close(model(other[:, at : at + 9], theirs), expected[:, at : at + 9])


@every_kind
def test_rewind_and_feed_again(kind):
    """As if the rest had never come, even after other tokens came and went."""
    model, cache = MODELS[kind], KVCache(MODELS[kind].config)
    feed(model, cache, [LENGTH - 10])
    model(TOKENS[:, :7], cache)  # a wrong turn
    cache.rewind(LENGTH - 20)
    assert cache.length == LENGTH - 20
    close(feed(model, cache, [1, 12, 7]), UNCACHED[kind][:, LENGTH - 20 :])


@every_kind
def test_rewind_to_nothing(kind):
    model, cache = MODELS[kind], KVCache(MODELS[kind].config)
    for sizes in ([3, 20], [LENGTH]):  # of so many a window has let go of most
        feed(model, cache, sizes)
        cache.rewind(0)
        close(feed(model, cache, [40, 50]), UNCACHED[kind])
        cache.rewind(0)


@dropping
def test_a_window_rewinds_through_its_slack_and_no_further(kind):
    """Exactly SLACK tokens back is possible; one more raises and leaves the cache as it was."""
    model = MODELS[kind]
    cache = KVCache(model.config)
    feed(model, cache, [80, 5])
    with pytest.raises(ValueError, match="cannot rewind"):
        cache.rewind(85 - SLACK - 1)
    assert cache.length == 85
    cache.rewind(85 - SLACK)
    close(feed(model, cache, [1, SLACK + 4]), UNCACHED[kind][:, 85 - SLACK :])
    cache.rewind(LENGTH - SLACK)
    close(feed(model, cache, [SLACK]), UNCACHED[kind][:, LENGTH - SLACK :])


@pytest.mark.parametrize("length", [-1, 11])
def test_rewind_outside_what_is_held_raises(length):
    cache = KVCache(MODELS["full"].config)
    feed(MODELS["full"], cache, [10])
    with pytest.raises(ValueError, match="10 tokens"):
        cache.rewind(length)
    assert cache.length == 10


@every_kind
@settings(max_examples=8)
@given(moves=st.lists(st.integers(-25, 40).filter(bool), min_size=2, max_size=8))
def test_any_walk_forward_and_back(kind, moves):
    """A positive move feeds so many tokens, a negative one rewinds; logits never depend on it."""
    model, cache = MODELS[kind], KVCache(MODELS[kind].config)
    for move in moves:
        size = min(move, LENGTH - cache.length)
        if size > 0:
            start = cache.length
            close(feed(model, cache, [size]), UNCACHED[kind][:, start : start + size])
        elif move < 0:
            try:
                cache.rewind(max(0, cache.length + move))
            except ValueError:
                assert any(isinstance(layer, WindowLayer) for layer in cache.layers)


@every_kind
@pytest.mark.parametrize("read", [20, 80])
def test_fork_continues_every_row_and_leaves_the_original(kind, read):
    model, cache = MODELS[kind], KVCache(MODELS[kind].config)
    feed(model, cache, [read])
    before = [
        (layer.k_BKSH[:, :, :read].clone(), layer.v_BKSH[:, :, :read].clone())
        for layer in cache.layers
    ]
    fork = cache.fork(3)
    following = TOKENS[:, read : read + 8].expand(3, -1)
    logits = torch.cat((model(following[:, :5], fork), model(following[:, 5:], fork)), dim=1)
    close(logits, UNCACHED[kind][:, read : read + 8].expand(3, -1, -1))
    assert (cache.length, fork.length) == (read, read + 8)
    for layer, (k_BKSH, v_BKSH) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.k_BKSH[:, :, :read], k_BKSH)
        assert torch.equal(layer.v_BKSH[:, :, :read], v_BKSH)
    close(feed(model, cache, [10]), UNCACHED[kind][:, read : read + 10])


@every_kind
def test_forked_rows_go_their_own_ways(kind):
    model, cache = MODELS[kind], KVCache(MODELS[kind].config)
    feed(model, cache, [75])
    fork = cache.fork(2)
    ways = torch.stack([TOKENS[0, 75:85], TOKENS[0, 10:20]])
    logits = torch.cat([model(ways[:, at : at + 1], fork) for at in range(10)], dim=1)
    for row in range(2):
        whole = torch.cat((TOKENS[0, :75], ways[row]))[None]
        close(logits[row : row + 1], model(whole)[:, 75:])


@every_kind
def test_a_fork_rewinds_alone(kind):
    model, cache = MODELS[kind], KVCache(MODELS[kind].config)
    feed(model, cache, [80])
    fork = cache.fork(1)
    fork.rewind(60)
    way = torch.cat((TOKENS[:, :60], TOKENS[:, :8]), dim=1)  # another than the original's
    close(model(way[:, 60:], fork), model(way)[:, 60:])
    close(feed(model, cache, [10]), UNCACHED[kind][:, 80:])


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype, size", [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("rows", [1, 3])
def test_bytes_of_a_full_cache_are_what_cost_says(n_kv_heads, dtype, size, rows):
    config = ModelConfig(vocab_size=9, d_model=32, n_layers=3, n_kv_heads=n_kv_heads, head_dim=6)
    cache = KVCache(config, rows=rows, capacity=50, dtype=dtype)
    assert cache.bytes == rows * 50 * kv_bytes_per_token(config, size)
    assert KVCache(config).bytes == 1024 * kv_bytes_per_token(config)


def test_a_window_stops_growing():
    """Its bytes are those of window - 1 + SLACK tokens, however long the text."""
    model, cache = MODELS["window"], KVCache(MODELS["window"].config)
    per_token = 2 * 2 * 4 * 8 * 4  # keys and values, layers, heads, head_dim, fp32
    feed(model, cache, [60])
    assert cache.bytes == 60 * per_token
    feed(model, cache, [30])
    assert cache.bytes == (5 - 1 + SLACK) * per_token


def test_a_bf16_cache_is_close():
    """Keys and values rounded to 8 bits of mantissa move logits a little, not a lot."""
    model = MODELS["mixed"]
    cache = KVCache(model.config, dtype=torch.bfloat16)
    logits = feed(model, cache, [40, 1, 1, LENGTH - 42])
    error = (logits - UNCACHED["mixed"]).abs().max()
    assert 0 < error < 0.05 * UNCACHED["mixed"].abs().max()
