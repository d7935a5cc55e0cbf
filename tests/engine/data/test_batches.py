"""Batches: pure functions of (seed, number) that visit every window, or sample, once an epoch."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.data.batches import IGNORE, SampleBatches, WindowBatches, digest
from engine.data.samples import Sample
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


def test_batches_travel_without_the_tokens_that_are_in_a_file(tmp_path):
    """To another process, which maps the file again; an array in memory has to be sent."""
    tokens = np.random.default_rng(0).integers(0, 60_000, 100_000).astype(np.uint16)
    tokens.tofile(tmp_path / "train.bin")
    mapped = np.memmap(tmp_path / "train.bin", dtype=np.uint16, mode="r")
    for source, most in ((mapped, 1000), (tokens, 201_000)):
        serve = WindowBatches(source, SEQ_LEN, 4, 0)
        expected = serve(7)[0].tokens_BT  # which leaves an epoch's order in memory
        sent = pickle.dumps(serve)
        assert len(sent) < most
        assert torch.equal(pickle.loads(sent)(7)[0].tokens_BT, expected)


def sample(ids, learned=None):
    """A sample that learns all it can, or what is said."""
    mask = np.ones(len(ids), bool) if learned is None else np.array(learned, bool)
    mask[0] = False
    return Sample(where="x:1", ids=np.array(ids, np.int32), learned=mask)


def counted(lengths):
    """Samples whose tokens are all different: a token says where it comes from."""
    starts = np.cumsum([0, *lengths])
    return [sample(range(a, a + n)) for a, n in zip(starts, lengths, strict=False)]


def packs(samples, capacity=8, packs=1, parts=1, seed=0, packing=True):
    return SampleBatches(
        samples, capacity=capacity, packs=packs, parts=parts, seed=seed, packing=packing
    )


def test_samples_lie_end_to_end_and_each_begins_anew():
    """TRL's packed lengths [3, 3] and [4, 1]: positions 0 1 2 0 1 2 and 0 1 2 3 0.

    It masks the label at each document's start; a target here is the next token, so that is the
    target at each document's end, its mirror image.
    """
    serve = packs([sample(range(n, n + 4)) for n in (10, 20)] + [sample([30, 31, 32])], 7)
    rows = [serve(0)[0], serve(1)[0]]
    by_size = sorted(rows, key=lambda batch: -batch.tokens_BT.numel())
    assert [batch.lengths for batch in by_size] == [(4, 3), (4,)]
    for batch in rows:
        ends = np.cumsum(batch.lengths) - 1
        targets = batch.targets_BT[0].tolist()
        assert [at for at, target in enumerate(targets) if target == IGNORE] == ends.tolist()
        follow = batch.tokens_BT[0, 1:].tolist()
        assert all(t in (IGNORE, token) for t, token in zip(targets, follow, strict=False))
        assert batch.tokens_BT.dtype == batch.targets_BT.dtype == torch.int64


def test_only_what_is_learned_is_a_target():
    """Labels [-100, -100, 3, 4] of TRL's mask [0, 0, 1, 1] are the targets 3 and 4, one earlier."""
    (batch,) = packs([sample([1, 2, 3, 4], [0, 0, 1, 1])])(0)
    assert batch.targets_BT.tolist() == [[IGNORE, 3, 4, IGNORE]]
    assert batch.lengths == (4,)


LENGTHS = [5, 3, 8, 2, 2, 7, 4, 6, 3, 8, 2, 5, 4]
SAMPLES = counted(LENGTHS)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_an_epoch_visits_every_sample_once(packing, count):
    """Also with batches that straddle epochs, or are larger than one."""
    serve = packs(SAMPLES, packs=count, packing=packing)
    bins = len(serve.bins)
    assert bins == (len(SAMPLES) if not packing else 8)
    visited = np.concatenate(
        [part.tokens_BT[0].numpy() for number in range(bins) for part in serve(number)]
    )  # this many batches are `count` epochs
    assert np.bincount(visited, minlength=sum(LENGTHS)).tolist() == [count] * sum(LENGTHS)
    assert sorted(i for chosen in serve.bins for i in chosen) == list(range(len(SAMPLES)))


def test_a_batch_of_samples_depends_on_seed_and_number_alone():
    numbers = [0, 1, 3, 4, 5, 9, 70]

    def asked(order):
        serve = packs(SAMPLES, packs=2)
        return {number: serve(number)[0] for number in order}

    forward, backward = asked(numbers), asked(numbers[::-1])
    assert all(equal(forward[number], backward[number]) for number in numbers)
    assert not equal(packs(SAMPLES, packs=2)(0)[0], packs(SAMPLES, packs=2, seed=1)(0)[0])
    assert packs(SAMPLES).epoch(0).tolist() != packs(SAMPLES).epoch(1).tolist()


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_the_parts_of_a_batch_of_samples_are_the_batch(parts, packing):
    (whole,) = packs(SAMPLES, packs=8, packing=packing)(3)
    found = packs(SAMPLES, packs=8, parts=parts, packing=packing)(3)
    assert len(found) == parts
    assert torch.equal(torch.cat([part.tokens_BT for part in found], 1), whole.tokens_BT)
    assert torch.equal(torch.cat([part.targets_BT for part in found], 1), whole.targets_BT)
    assert sum((part.lengths for part in found), ()) == whole.lengths


@given(
    lengths=st.lists(st.integers(2, 12), min_size=1, max_size=20),
    room=st.integers(0, 20),
    seed=st.integers(0, 1 << 40),
)
def test_no_pack_is_over_capacity_and_every_row_has_a_target(lengths, room, seed):
    """Elsewhere samples longer than a pack fill it with padding, and the loss is NaN."""
    capacity = max(lengths) + room
    serve = packs(counted(lengths), capacity, seed=seed)
    for number in range(len(serve.bins)):
        (batch,) = serve(number)
        assert batch.tokens_BT.numel() == sum(batch.lengths) <= capacity
        assert (batch.targets_BT != IGNORE).sum() == sum(n - 1 for n in batch.lengths)


def test_no_batch_is_longer_than_the_longest():
    for packing in (True, False):
        serve = packs(SAMPLES, packs=4, parts=2, packing=packing)
        sizes = [part.tokens_BT.numel() for part in serve.longest()]
        assert len(sizes) == 2
        for number in range(50):
            found = [part.tokens_BT.numel() for part in serve(number)]
            assert max(found) <= max(sizes) and sum(found) <= sum(sizes)


def test_where_a_sample_lies():
    serve = packs(SAMPLES, capacity=20)
    for index, own in enumerate(SAMPLES):
        place = serve.where(index)
        row = np.concatenate([SAMPLES[i].ids for i in place.samples])
        assert index in place.samples and serve.bins[place.pack] == list(place.samples)
        assert row[place.offset : place.offset + len(own.ids)].tolist() == own.ids.tolist()


def test_no_samples_are_an_error():
    with pytest.raises(DataError, match="no rows are left to train on"):
        packs([])


def test_the_digest_is_of_ids_masks_and_borders():
    base = [sample([1, 2, 3]), sample([4, 5])]
    assert digest(base) == digest([sample([1, 2, 3]), sample([4, 5])])
    others = [
        [sample([1, 2, 3]), sample([4, 6])],
        [sample([1, 2, 3], [0, 0, 1]), sample([4, 5])],
        [sample([1, 2]), sample([3, 4, 5])],
        base[::-1],
        base[:1],
        [*base, sample([4, 5])],
    ]
    assert len({digest(samples) for samples in [base, *others]}) == 7
