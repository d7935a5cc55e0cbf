"""Batches: pure functions of (seed, number) that visit every window once an epoch."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.data.batches import WindowBatches
from engine.errors import DataError

TOKENS = np.arange(1000, dtype=np.uint16)  # a token is its own position
SEQ_LEN = 7
WINDOWS = 141  # (1000 - 1) // 7 = 142, less one to leave room for the offset


def batches(tokens=TOKENS, seq_len=SEQ_LEN, batch_size=4, seed=0):
    """Serve batches in one part."""
    parts = WindowBatches(tokens, seq_len, batch_size, seed)
    return lambda number: parts(number)[0]


def starts(first, count, **changes):
    """The first tokens of `count` consecutive windows of the run, read one at a time."""
    serve = batches(batch_size=1, **changes)
    return [int(serve(number).tokens_BT[0, 0]) for number in range(first, first + count)]


def equal(one, other):
    return torch.equal(one.tokens_BT, other.tokens_BT) and torch.equal(
        one.targets_BT, other.targets_BT
    )


def test_targets_are_the_tokens_shifted_by_one():
    """Tokens that count up make it plain: each target is its token plus one."""
    for number in (0, 5, 1000):
        batch = batches()(number)
        assert batch.tokens_BT.shape == batch.targets_BT.shape == (4, SEQ_LEN)
        assert batch.tokens_BT.dtype == batch.targets_BT.dtype == torch.int64
        assert torch.equal(batch.targets_BT, batch.tokens_BT + 1)
        assert torch.equal(batch.tokens_BT, batch.tokens_BT[:, :1] + torch.arange(SEQ_LEN))


def test_a_batch_depends_on_seed_and_number_alone():
    """Whatever was asked for before: numbers here cross epochs back and forth."""
    numbers = [0, 1, 34, 35, 36, 37, 70, 71, 500]
    fresh = {number: batches()(number) for number in numbers}
    forward, backward = batches(), batches()
    assert all(equal(forward(number), fresh[number]) for number in numbers)
    assert all(equal(backward(number), fresh[number]) for number in reversed(numbers))
    assert not equal(fresh[0], fresh[1])


def test_another_seed_gives_another_order():
    orders = [starts(0, WINDOWS, seed=seed) for seed in range(5)]
    assert len({tuple(order) for order in orders}) == 5
    assert len({min(order) for order in orders}) > 1


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_epoch_visits_every_window_once(epoch):
    """Windows lie end to end from an offset below seq_len, so every token is predicted once."""
    visited = sorted(starts(epoch * WINDOWS, WINDOWS))
    offset = visited[0]
    assert 0 <= offset < SEQ_LEN
    assert visited == list(range(offset, offset + WINDOWS * SEQ_LEN, SEQ_LEN))


def test_epochs_differ_in_order_and_offset():
    epochs = [starts(epoch * WINDOWS, WINDOWS) for epoch in range(10)]
    assert len({tuple(order) for order in epochs}) == 10
    assert len({min(order) for order in epochs}) > 1
    relative = [[start - min(order) for start in order] for order in epochs]
    assert all(order != relative[0] for order in relative[1:])
    assert relative[0] != sorted(relative[0])


@pytest.mark.parametrize("batch_size", [2, 4, 10, 200])
def test_batches_cut_one_stream_of_windows(batch_size):
    """141 windows divide by none of these: batches straddle an epoch's border, losing nothing."""
    serve = batches(batch_size=batch_size)
    count = -(-3 * WINDOWS // batch_size)
    stream = torch.cat([serve(number).tokens_BT[:, 0] for number in range(count)]).tolist()
    assert stream == starts(0, count * batch_size)


@given(seq_len=st.integers(1, 9), extra=st.integers(1, 30), seed=st.integers(0, 1 << 40))
def test_windows_fit_whatever_the_sizes(seq_len, extra, seed):
    """The last window of the largest offset still has its last target."""
    tokens = np.arange(2 * seq_len + extra, dtype=np.uint32)
    serve = batches(tokens, seq_len, 1, seed)
    windows = (len(tokens) - 1) // seq_len - 1
    for epoch in range(4):
        seen = [serve(epoch * windows + i).targets_BT.flatten().tolist() for i in range(windows)]
        targets = sorted(target for window in seen for target in window)
        assert targets == list(range(targets[0], targets[0] + windows * seq_len))
        assert 1 <= targets[0] <= seq_len


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_parts_of_a_batch_are_the_batch(parts):
    whole = WindowBatches(TOKENS, SEQ_LEN, 4, 0)(3)[0]
    found = WindowBatches(TOKENS, SEQ_LEN, 4, 0, parts)(3)
    assert len(found) == parts
    assert torch.equal(torch.cat([part.tokens_BT for part in found]), whole.tokens_BT)
    assert torch.equal(torch.cat([part.targets_BT for part in found]), whole.targets_BT)


def test_every_offset_occurs_and_every_target_is_reached():
    """Over many epochs nothing at either end of a short text is left unlearned."""
    tokens = np.arange(3 * SEQ_LEN)
    serve = batches(tokens, SEQ_LEN, 1, 0)
    reached = {int(t) for number in range(200) for t in serve(number).targets_BT.flatten()}
    assert reached == set(range(1, 2 * SEQ_LEN))


@pytest.mark.parametrize("length", [0, 1, SEQ_LEN + 1, 2 * SEQ_LEN])
def test_too_few_tokens_are_an_error(length):
    with pytest.raises(DataError, match=rf"has {length} tokens, too few for data\.seq_len=7"):
        batches(np.zeros(length, dtype=np.uint16))


def test_the_fewest_tokens_that_do():
    """Any offset must leave the one window whole."""
    serve = batches(np.arange(2 * SEQ_LEN + 1), batch_size=1)
    assert {serve(number).tokens_BT.shape for number in range(50)} == {(1, SEQ_LEN)}


@pytest.mark.parametrize("dtype, highest", [(np.uint16, 65535), (np.uint32, 100_000)])
def test_high_token_ids_keep_their_value_from_a_file(tmp_path, dtype, highest):
    """Read as signed, uint16 would wrap round to negative ids."""
    np.full(50, highest, dtype=dtype).tofile(tmp_path / "train.bin")
    mapped = np.memmap(tmp_path / "train.bin", dtype=dtype, mode="r")
    batch = batches(mapped)(0)
    assert (batch.tokens_BT == highest).all() and (batch.targets_BT == highest).all()
