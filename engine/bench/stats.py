"""Few and uneven numbers, summed up by what an outlier cannot move."""

import math
from collections.abc import Sequence
from statistics import median

NOISY = 0.05  # a spread above it means that the machine did something else meanwhile


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value that so much of them lies below, linearly between two of them."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low + (high - low) * (place - math.floor(place))


def mad(values: Sequence[float]) -> float:
    """Return the median distance from the median."""
    middle = median(values)
    return median(abs(value - middle) for value in values)


def spread(values: Sequence[float]) -> float:
    """Return how far apart the middle half of the values lies, as a share of the median."""
    middle = median(values)
    return (quantile(values, 0.75) - quantile(values, 0.25)) / middle if middle else 0.0
