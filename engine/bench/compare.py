"""Two records held against each other: how much faster, how sure, or only noise?

For each case, every repetition of one side is divided by every one of the other. The median of
these ratios is the effect. Its interval needs no assumption about how times are spread: how many
ratios to cut off at either end follows from counting the orders that chance makes. Five
repetitions a side leave the third ratio from either end, for 96.8 %; with three a side no
interval can be had, and the verdict stays noise.

Sources: Hodges & Lehmann 1963 (the median of ratios); Mann & Whitney 1947 (the counts).
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import median
from typing import Literal, get_args

from engine.bench.cases import Case, What
from engine.bench.record import Recorded
from engine.errors import DataError

CERTAINTY = 0.95
# What two records may be made to compare, and what stands for any value of it.
MAY_DIFFER = dict.fromkeys(("model", "dtype", "kernels", "kv", "settings"), "") | {"threads": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """One case on both sides; ratios of B to A, above 1 where B is faster."""

    case: Case  # of B
    a: float  # median rates
    b: float
    ratio: float
    low: float  # 0 and infinity if there are too few repetitions for an interval
    high: float
    n: tuple[int, int]  # repetitions

    @property
    def verdict(self) -> Literal["faster", "slower", "noise"]:
        """Say what the interval allows to say."""
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "noise"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All cases of two records."""

    effects: list[Effect]
    only_a: list[Case]
    only_b: list[Case]
    differs: dict[str, tuple[str, str]]  # what is one thing in all of A and another in all of B

    def slower(self, most: float) -> list[Effect]:
        """Return the cases that are surely slower, and by more than this share."""
        return [e for e in self.effects if e.verdict == "slower" and e.ratio < 1 - most]


def compare(a: Sequence[Recorded], b: Sequence[Recorded]) -> Comparison:
    """Pair the cases of two records by their configuration.

    Where all of a work in A has one model, precision, kernels, format of keys and values, settings
    or number of threads, and all of it in B another, that is what is compared, and named.

    Raises: DataError if no case has a partner.
    """
    found = {what: _differences(a, b, what) for what in get_args(What)}
    blank = {what: {name: MAY_DIFFER[name] for name in pairs} for what, pairs in found.items()}
    sides = [_by_case(side, blank) for side in (a, b)]
    both = [key for key in sides[1] if key in sides[0]]
    if not both:
        raise DataError(
            f"no case of the one record is in the other: one has {_names(sides[0])}, the other"
            f" {_names(sides[1])}; measure the same cases twice"
        )
    one, other = _machine(a), _machine(b)
    differs = _together(found.values())
    differs |= {name: (one[name], other[name]) for name in one if one[name] != other[name]}
    return Comparison(
        effects=[_effect(sides[0][key], sides[1][key]) for key in both],
        only_a=[found[0].case for key, found in sides[0].items() if key not in sides[1]],
        only_b=[found[0].case for key, found in sides[1].items() if key not in sides[0]],
        differs=differs,
    )


def ratio_interval(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Return the median ratio of b to a, and the interval that holds the true one."""
    ratios = sorted(y / x for x in a for y in b)
    cut = critical(len(a), len(b))
    if cut is None:
        return median(ratios), 0.0, math.inf
    return median(ratios), ratios[cut], ratios[-1 - cut]


def critical(n: int, m: int) -> int | None:
    """Return how many of the n · m sorted ratios may be cut off at either end; None for no answer.

    If both sides are alike, each order of the n + m numbers is as likely as any other. Orders in
    which at most u pairs are the wrong way round make up less than 2.5 %.
    """
    if max(n, m) > 20:  # by then the counts are as good as normally distributed
        cut = math.floor(n * m / 2 - 1.96 * math.sqrt(n * m * (n + m + 1) / 12))
        return cut if cut >= 0 and min(n, m) > 1 else None
    total, reached = math.comb(n + m, n), 0
    for u in range(n * m + 1):
        reached += _orders(n, m, u)
        if reached / total > (1 - CERTAINTY) / 2:
            return u - 1 if u else None
    return None


@cache
def _orders(n: int, m: int, u: int) -> int:
    """Count the orders of n and m numbers in which u pairs are the wrong way round."""
    if u < 0:
        return 0
    if not n or not m:
        return int(u == 0)
    return _orders(n - 1, m, u - m) + _orders(n, m - 1, u)


def _effect(a: Sequence[Recorded], b: Sequence[Recorded]) -> Effect:
    """Compare the repetitions of one case."""
    rates_a, rates_b = [each.rate for each in a], [each.rate for each in b]
    ratio, low, high = ratio_interval(rates_a, rates_b)
    return Effect(
        case=b[0].case,
        a=median(rates_a),
        b=median(rates_b),
        ratio=ratio,
        low=low,
        high=high,
        n=(len(a), len(b)),
    )


def _by_case(records: Iterable[Recorded], blank: dict[str, dict]) -> dict[Case, list[Recorded]]:
    found: defaultdict[Case, list[Recorded]] = defaultdict(list)
    for record in records:
        found[replace(record.case, **blank[record.case.what])].append(record)
    return found


def _differences(
    a: Sequence[Recorded], b: Sequence[Recorded], what: What
) -> dict[str, tuple[str, str]]:
    """Return the fields of a work that have one value in all of A and another in all of B."""
    pairs = {}
    for name in MAY_DIFFER:
        one, other = (
            {str(getattr(each.case, name)) for each in side if each.case.what == what}
            for side in (a, b)
        )
        if len(one) == len(other) == 1 and one != other:
            pairs[name] = (one.pop(), other.pop())
    return pairs


def _together(found: Iterable[dict[str, tuple[str, str]]]) -> dict[str, tuple[str, str]]:
    """Join what differs in several works; of settings, only those that do."""
    joined: dict[str, tuple[list[str], list[str]]] = {}
    for name, pair in (item for pairs in found for item in pairs.items()):
        sides = joined.setdefault(name, ([], []))
        for side, own, other in zip(sides, pair, reversed(pair), strict=True):
            words = [word for word in own.split() if word not in other.split()]
            side += words if name == "settings" else [own]
    return {name: (_listed(one), _listed(other)) for name, (one, other) in joined.items()}


def _listed(words: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(words)) or "as usual"


def _machine(records: Sequence[Recorded]) -> dict[str, str]:
    """Return what of the machine changes speeds."""
    named = {name: {str(each.machine.get(name)) for each in records} for name in ("cpu", "torch")}
    return {name: ", ".join(sorted(values)) for name, values in named.items()}


def _names(cases: Iterable[Case]) -> str:
    names = [f"{case.what} {case.name}" for case in cases]
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
