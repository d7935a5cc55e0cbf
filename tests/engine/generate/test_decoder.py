"""What generating asks of a model is what the decoder by torch answers."""

import numpy as np

from engine.generate.decoder import BLOCK, Cache, Decoder, Run
from engine.generate.reference import TorchDecoder
from tests.conftest import make_model


def test_a_run_wants_the_logits_after_its_last_token():
    assert Run(0, [1, 2, 3]).wanted == 1
    decoder: Decoder = TorchDecoder(make_model())
    cache: Cache = decoder.cache(BLOCK, rows=2)
    three = decoder.forward(cache, [Run(0, [1, 2, 3], wanted=3)])
    one = decoder.forward(cache, [Run(1, [1, 2, 3])])
    assert three.shape == (3, 400) and three.dtype == np.float32
    np.testing.assert_allclose(one, three[2:], atol=1e-5)
    assert list(cache.lengths) == [3, 3]
    assert cache.bytes == 2 * 2 * 2 * 32 * BLOCK * 4  # rows, layers, k and v, width, tokens, fp32
