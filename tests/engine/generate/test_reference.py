"""The decoder by torch: runs of several rows, blocks in and out, and what it refuses."""

import numpy as np
import pytest
import torch

from engine.config import ModelConfig
from engine.generate.decoder import BLOCK, Run
from engine.generate.reference import CHUNK, TorchDecoder
from engine.model.transformer import Transformer, initialise


@pytest.fixture(scope="module")
def decoder():
    config = ModelConfig(
        vocab_size=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=1024
    )
    model = Transformer(config)
    initialise(model, torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(1))
    return TorchDecoder(model.eval())


def test_runs_of_several_rows_give_what_each_gives_alone(decoder):
    ids = np.random.default_rng(0).integers(0, 61, 2 * CHUNK + 7).tolist()
    whole = decoder.model(torch.tensor([ids]))[0].detach().numpy()
    cache = decoder.cache(len(ids), rows=3)
    first = decoder.forward(cache, [Run(2, ids[:5]), Run(0, ids[:-3], wanted=2)])
    np.testing.assert_allclose(first, whole[[4, len(ids) - 5, len(ids) - 4]], atol=1e-4)
    second = decoder.forward(cache, [Run(0, ids[-3:], wanted=3), Run(2, ids[5:6], wanted=0)])
    np.testing.assert_allclose(second, whole[-3:], atol=1e-4)
    assert cache.lengths == [len(ids), 0, 6]
    with pytest.raises(ValueError, match="do not fit"):
        decoder.forward(cache, [Run(0, [1])])


def test_a_prompt_on_the_grid_is_the_same_to_the_bit(decoder):
    ids = np.random.default_rng(1).integers(0, 61, 2 * CHUNK).tolist()
    whole, cut = decoder.cache(len(ids)), decoder.cache(len(ids))
    decoder.forward(cut, [Run(0, ids[:CHUNK], wanted=0)])
    a = decoder.forward(whole, [Run(0, ids)])
    b = decoder.forward(cut, [Run(0, ids[CHUNK:])])
    assert np.array_equal(a, b)


def test_blocks_move_between_caches(decoder):
    ids = np.random.default_rng(2).integers(0, 61, 2 * BLOCK).tolist()
    one, two = decoder.cache(200, rows=2), decoder.cache(300)
    decoder.forward(one, [Run(1, ids)])
    for index in range(2):
        two.load_block(0, one.save_block(1, index))
    assert two.lengths == [2 * BLOCK]
    one.copy(1, 0)
    a, b = decoder.forward(one, [Run(0, [3])]), decoder.forward(two, [Run(0, [3])])
    assert np.array_equal(a, b)
    with pytest.raises(ValueError, match="holds less"):
        one.save_block(1, 2)
    with pytest.raises(ValueError, match="not one of"):
        decoder.cache(300).load_block(0, np.zeros(5, np.uint8))
    with pytest.raises(ValueError, match="no room"):
        two.load_block(0, np.zeros(5, np.uint8))
