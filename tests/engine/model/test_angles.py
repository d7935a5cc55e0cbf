"""Angles of full and windowed layers; the frequencies themselves are held in test_rope.py."""

import numpy as np

from engine.config import ModelConfig, RopeScaling
from engine.model.angles import angles


def test_windowed_layers_may_turn_at_a_base_of_their_own():
    config = ModelConfig(
        vocab_size=9, head_dim=4, rope_theta=100.0, local_rope_theta=4.0, sliding_window=8
    )
    full, local = angles(config, np.array([0, 3]), longest=10)
    np.testing.assert_allclose(full, [[0, 0], [3, 0.3]])
    np.testing.assert_allclose(local, [[0, 0], [3, 1.5]])


def test_the_longest_sequence_decides_between_short_and_long_factors():
    scaling = RopeScaling(
        kind="longrope", factor=2.0, original_max_seq_len=16, short_factors=(1.0, 1.0),
        long_factors=(2.0, 4.0),
    )  # fmt: skip
    config = ModelConfig(vocab_size=9, head_dim=4, rope_theta=100.0, rope_scaling=scaling)
    short, long = (angles(config, np.array([1]), longest)[0] for longest in (16, 17))
    np.testing.assert_allclose(short, [[1, 0.1]])
    np.testing.assert_allclose(long, [[0.5, 0.025]])
