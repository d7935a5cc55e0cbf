"""The cache alone; what the decoder makes of it is in `test_native.py`."""

import numpy as np
import pytest

from engine.config import ModelConfig
from engine.generate.decoder import BLOCK
from engine.generate.native_cache import KINDS, NativeCache

CONFIG = ModelConfig(
    vocab_size=64, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=96, max_seq_len=512
)


@pytest.mark.parametrize("kv, number, scales", [("fp32", 4, 0), ("fp16", 2, 0), ("int8", 1, 4)])
def test_bytes_by_hand(kv, number, scales):
    """Three layers, keys and values, five rows, two heads of 8 numbers, two blocks of 64."""
    cache = NativeCache(CONFIG, 65, 5, kv)
    assert set(KINDS) == {"fp32", "fp16", "int8"}
    assert cache.bytes == 3 * 2 * 5 * 2 * 128 * (8 * number + scales)


def test_a_saved_block_is_what_another_row_loads():
    cache = NativeCache(CONFIG, 200, 2, "fp32")
    for kept in cache._kept:
        for array in kept:
            array[0] = np.random.default_rng(0).standard_normal(array[0].shape)
    cache.grow(0, 2 * BLOCK)
    saved = [cache.save_block(0, index) for index in range(2)]
    for block in saved:
        cache.load_block(1, block)
    assert cache.lengths == [128, 128]
    assert all(np.array_equal(cache.save_block(1, index), saved[index]) for index in range(2))
    assert not np.array_equal(saved[0], saved[1])


def test_what_does_not_fit_is_refused():
    cache = NativeCache(CONFIG, 130, 1, "fp16")
    with pytest.raises(ValueError, match="holds less than 64 tokens"):
        cache.save_block(0, 0)
    cache.grow(0, BLOCK)
    block = cache.save_block(0, 0)
    with pytest.raises(ValueError, match="of another model"):
        cache.load_block(0, block[:-1])
    cache.load_block(0, block)
    with pytest.raises(ValueError, match="no room for a block after 128 of 130"):
        cache.load_block(0, block)
    with pytest.raises(ValueError, match="cannot rewind to 129"):
        cache.rewind(0, 129)
