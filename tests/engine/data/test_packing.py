"""Packing: every sample once, no bin too full, the bins that others get too."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data.packing import best_fit

LENGTHS = st.lists(st.integers(0, 40), max_size=60)


def packed(rows, capacity):
    """The rows of each bin, end to end, and their lengths."""
    bins = best_fit([len(row) for row in rows], capacity)
    ids = [[token for index in chosen for token in rows[index]] for chosen in bins]
    return ids, [[len(rows[index]) for index in chosen] for chosen in bins]


@pytest.mark.parametrize(
    ("rows", "ids", "lengths"),
    [
        ([[1, 2, 3], [4, 5, 6, 7], [8]], [[4, 5, 6, 7], [1, 2, 3, 8]], [[4], [3, 1]]),
        (
            [[1, 2, 3, 4], [5], [6, 7], [8, 9, 10, 11], [12]],
            [[1, 2, 3, 4], [8, 9, 10, 11], [6, 7, 5, 12]],
            [[4], [4], [2, 1, 1]],
        ),
        (
            [[1, 2, 3, 4], [6, 7], [8, 9, 10, 11], [12]],
            [[1, 2, 3, 4], [8, 9, 10, 11], [6, 7, 12]],
            [[4], [4], [2, 1]],
        ),
        ([[1, 2], [], [3, 4, 5], [], [6]], [[3, 4, 5, 6], [1, 2]], [[3, 1], [2]]),
        ([], [], []),
        ([[], []], [], []),
    ],
)
def test_the_bins_of_trl(rows, ids, lengths):
    """The numbers of its `TestPackDatasetBfd`, capacity 4.

    Its rows that overflow come here already split or cut: that is `data.overlong`, in samples. Its
    `wrapped` strategy, which cuts samples wherever a sequence ends, is not offered: [1, 2, 3, 4],
    [5, 6], [7, 8] at 3 would be [1, 2, 3], [4, 5, 6], [7, 8] and learn 4 from nothing.
    """
    assert packed(rows, 4) == (ids, lengths)


@pytest.mark.parametrize(("lengths", "longest"), [([5], 5), ([1, 9, 2], 9)])
def test_a_sample_longer_than_a_bin_is_refused(lengths, longest):
    with pytest.raises(ValueError, match=f"of {longest} tokens is too long for a pack of 4"):
        best_fit(lengths, 4)


@given(lengths=LENGTHS, room=st.integers(0, 100))
def test_every_sample_is_in_one_bin_and_no_bin_over_capacity(lengths, room):
    capacity = max(lengths, default=0) + room
    bins = best_fit(lengths, capacity)
    assert sorted(i for chosen in bins for i in chosen) == [i for i, n in enumerate(lengths) if n]
    assert all(0 < sum(lengths[i] for i in chosen) <= capacity for chosen in bins)


@given(lengths=LENGTHS, capacity=st.integers(40, 90))
def test_it_fits_as_well_as_looking_through_all_bins(lengths, capacity):
    """A plain scan for the fullest bin with room, kept to as the meaning of the name."""
    room = []
    for length in sorted(lengths, reverse=True):
        open_bins = [at for at, free in enumerate(room) if free >= length]
        if length and open_bins:
            room[min(open_bins, key=lambda at: room[at])] -= length
        elif length:
            room.append(capacity - length)
    filled = [sum(lengths[i] for i in chosen) for chosen in best_fit(lengths, capacity)]
    assert sorted(filled) == sorted(capacity - free for free in room)


def test_it_is_deterministic_and_does_not_look_through_all_bins():
    """A scan of the open bins would be minutes here; no clock is needed to notice."""
    lengths = [(7919 * i) % 2039 + 1 for i in range(100_000)]
    first = best_fit(lengths, 2048)
    assert first == best_fit(list(lengths), 2048)
    assert sum(lengths) / (2048 * len(first)) > 0.99
