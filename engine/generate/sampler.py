"""From logits to the next token: penalty, temperature, top-k, top-p, min-p, then one draw.

Each filter says which of the tokens it keeps and the next one sees only those, so the order is that
of the loop in `candidates`. top-p and min-p look at the tempered distribution.

Sources: Holtzman et al. 2020, arXiv:1904.09751 (top-p); Fan et al. 2018, arXiv:1805.04833 (top-k);
Nguyen et al. 2024, arXiv:2407.01082 (min-p); Keskar et al. 2019, arXiv:1909.05858 (penalty).
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from engine.config import SampleConfig
from engine.errors import CheckpointError

Ids = Sequence[int] | np.ndarray
Kept = np.ndarray | slice  # which of some logits stay, by ascending index
ALL = slice(None)
BLOCK = 256  # weights that are added up before one of them is looked for
FAR = float(np.finfo(np.float32).max)  # what no penalty goes beyond
TINY = 1e-30  # temperatures below would be 0 in fp32


def seeded(seed: int) -> "np.random.Generator":
    """Return the random numbers that a seed stands for, the same on every machine."""
    return np.random.Generator(np.random.PCG64(seed))


def sample(
    logits_V: np.ndarray, seen: Ids, config: SampleConfig, random: "np.random.Generator | None"
) -> int:
    """Choose the next token.

    Shapes: logits_V fp32, seen: ids of all tokens so far. Temperature 0 takes the likeliest token,
    the lowest id on a tie, and needs no random numbers.

    Raises: CheckpointError if the model gave no numbers to choose by.
    """
    if config.temperature == 0:
        return _likeliest(penalize(logits_V, seen, config.repetition_penalty))
    assert random is not None
    ids, weights = candidates(logits_V, seen, config)
    return int(ids[draw(weights, random)])


def probabilities(logits_V: np.ndarray, seen: Ids, config: SampleConfig) -> np.ndarray:
    """Return how likely `sample` is to choose each token. Shapes: → fp64 (V,)."""
    probability_V = np.zeros(len(logits_V))
    if config.temperature == 0:
        probability_V[_likeliest(penalize(logits_V, seen, config.repetition_penalty))] = 1
    else:
        ids, weights = candidates(logits_V, seen, config)
        probability_V[ids] = weights / weights.sum(dtype=np.float64)
    return probability_V


def draw(weights: np.ndarray, random: "np.random.Generator") -> int:
    """Choose an index, each as often as its weight says; they may add up to anything above 0.

    By inverting the cumulative sum, first of blocks, then within one: one uniform number per token,
    whatever the filters keep.
    """
    sums = np.add.reduceat(weights, np.arange(0, len(weights), BLOCK))
    block, rest = _invert(sums, random.random() * float(sums.sum(dtype=np.float64)))
    return BLOCK * block + _invert(weights[BLOCK * block :][:BLOCK], rest)[0]


def _invert(weights: np.ndarray, at: float) -> tuple[int, float]:
    """Return the first index where the cumulative sum is above `at`, and how far in `at` is."""
    cumulative = np.append(0, weights.cumsum(dtype=np.float64))
    # Below the real total, so that rounding can never choose beyond the last weight above 0.
    at = min(at, np.nextafter(cumulative[-1], 0))
    index = int(cumulative.searchsorted(at, side="right")) - 1
    return index, at - cumulative[index]


def candidates(
    logits_V: np.ndarray, seen: Ids, config: SampleConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids that every filter keeps, in their order, and weights: 1 for the likeliest."""
    logits = penalize(logits_V, seen, config.repetition_penalty)
    # Shifted to a maximum of 0 first: the smallest temperature then overflows to -inf, not to inf.
    logits = logits - logits[_likeliest(logits)]
    with np.errstate(over="ignore"):
        logits /= max(config.temperature, TINY)
    ids = np.arange(len(logits))
    keep: Callable[..., Kept]
    for keep, bound in ((top_k, config.top_k), (top_p, config.top_p), (min_p, config.min_p)):
        kept = keep(logits, bound)
        ids, logits = ids[kept], logits[kept]
    return ids, np.exp(logits)


def _likeliest(logits_V: np.ndarray) -> int:
    """Return the id of the highest logit, which is one of those that are NaN, if any is."""
    best = int(logits_V.argmax())
    if not math.isfinite(logits_V[best]):
        raise CheckpointError(
            f"the model's logits are no numbers ({logits_V[best]} for token {best}): its weights"
            " are damaged, which lm verify finds, or too large for this precision; the checkpoint"
            " it was made of may do, or one that is not quantized with --dtype fp32"
        )
    return best


def penalize(logits_V: np.ndarray, seen: Ids, penalty: float) -> np.ndarray:
    """Make tokens seen before less likely: divide positive logits by `penalty`, multiply others."""
    if penalty == 1 or not len(seen):
        return logits_V
    ids, penalized_V = np.asarray(seen), logits_V.copy()
    old = logits_V[ids]
    penalty = min(penalty, FAR)  # infinity times 0 would be no number
    with np.errstate(over="ignore"):
        penalized_V[ids] = np.where(old > 0, old / penalty, np.maximum(old * penalty, -FAR))
    return penalized_V


def top_k(logits: np.ndarray, k: int) -> Kept:
    """Keep the k highest, the lower id first on a tie; 0 keeps all."""
    if not 0 < k < len(logits):
        return ALL
    return _highest(logits, k, np.partition(logits, -k)[-k])


def top_p(logits: np.ndarray, p: float) -> Kept:
    """Keep the smallest set whose probability reaches p; the one that crosses stays.

    Of equals the lower id comes first.
    """
    if p >= 1:
        return ALL
    best = logits.max()
    total = np.exp(logits - best).sum()
    # A few reach p together as a rule, so only those this near to the likeliest are sorted.
    for near in (8, math.inf):
        some = logits[logits >= best - near]
        if np.exp(some - best).sum() >= p * total:
            break
    some = np.sort(some)[::-1]
    weights = np.exp(some - best)
    before = weights.cumsum(dtype=np.float64) - weights
    # A hair of tolerance, above the noise of fp32 logits: 0.4 + 0.3 must count as reaching 0.7.
    k = max(1, int(np.count_nonzero(before < (p - 1e-5) * total)))
    return _highest(logits, k, some[k - 1])


def min_p(logits: np.ndarray, p: float) -> Kept:
    """Keep tokens with at least p times the probability of the likeliest."""
    return ALL if p == 0 else np.flatnonzero(logits >= logits.max() + math.log(p) - 1e-5)


def _highest(logits: np.ndarray, k: int, last: float) -> np.ndarray:
    """Return where the k highest are, of which `last` is the lowest; of its equals the first."""
    kept = np.flatnonzero(logits >= last)
    if surplus := len(kept) - k:
        ties = np.flatnonzero(logits[kept] == last)
        kept = np.delete(kept, ties[-surplus:])
    return kept
