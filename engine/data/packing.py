"""Samples of ragged lengths into sequences of one length, with little room left over."""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put every length into a bin of `capacity`, the longest first, each where it leaves least.

    Returns: bins of indices into `lengths`, in the order they were opened; empty ones are left out.
    Raises: ValueError if a length exceeds the capacity.
    Source: Johnson 1974 (best-fit decreasing); Ding et al. 2024, arXiv:2404.10830 (for samples).
    """
    longest = max(lengths, default=0)
    if longest > capacity:
        raise ValueError(f"a sample of {longest} tokens is too long for a pack of {capacity}")
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = defaultdict(list)  # free space → bins that have it
    rooms: list[int] = []  # the free spaces there are, ascending; few, however many bins
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if not length:
            break
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            number = with_room[room].pop()
            if not with_room[room]:
                del rooms[at]
        else:
            room, number = capacity, len(bins)
            bins.append([])
        bins[number].append(index)
        if left := room - length:
            if not with_room[left]:
                insort(rooms, left)
            with_room[left].append(number)
    return bins
