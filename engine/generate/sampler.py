"""From logits to the next token: penalty, temperature, top-k, top-p, min-p, then one draw.

Each filter is a pure function from logits to logits, with -inf for what it removes, so the order is
the order of the calls in `filtered`. top-p and min-p look at the tempered distribution.

Sources: Holtzman et al. 2020, arXiv:1904.09751 (top-p); Fan et al. 2018, arXiv:1805.04833 (top-k);
Nguyen et al. 2024, arXiv:2407.01082 (min-p); Keskar et al. 2019, arXiv:1909.05858 (penalty).
"""

import math

import torch
from torch import Tensor

from engine.config import SampleConfig


def sample(logits_V: Tensor, seen: Tensor, config: SampleConfig, random: torch.Generator) -> Tensor:
    """Choose the next token.

    Shapes: logits_V fp32, seen: ids of all tokens so far → a scalar id. Temperature 0 takes the
    likeliest token, the lowest id on a tie.
    """
    if config.temperature == 0:
        return penalize(logits_V, seen, config.repetition_penalty).argmax()
    probability_V = filtered(logits_V, seen, config).softmax(-1)
    # By inverting the cumulative sum: one uniform number per token, whatever the filters keep.
    uniform = torch.rand((), generator=random, dtype=torch.float64)
    cumulative_V = probability_V.double().cumsum(-1)
    # Scaled by the real total, so that rounding can never choose beyond the last kept token.
    chosen = torch.searchsorted(cumulative_V, uniform * cumulative_V[-1], right=True)
    return chosen.clamp(max=int(probability_V.nonzero()[-1]))


def filtered(logits_V: Tensor, seen: Tensor, config: SampleConfig) -> Tensor:
    """Apply every filter that the config turns on, in the documented order."""
    logits_V = penalize(logits_V, seen, config.repetition_penalty).double()
    # Shifted to a maximum of 0 first: the smallest temperature then overflows to -inf, not to inf.
    logits_V = (logits_V - logits_V.max()) / config.temperature
    logits_V = top_k(logits_V, config.top_k)
    logits_V = top_p(logits_V, config.top_p)
    return min_p(logits_V, config.min_p)


def penalize(logits_V: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens seen before less likely: divide positive logits by `penalty`, multiply others."""
    if penalty == 1 or not len(seen):
        return logits_V
    old = logits_V[seen]
    return logits_V.index_copy(0, seen, torch.where(old > 0, old / penalty, old * penalty))


def top_k(logits_V: Tensor, k: int) -> Tensor:
    """Keep the k highest logits, the lower id first on a tie; 0 keeps all."""
    if not 0 < k < len(logits_V):
        return logits_V
    kept = logits_V.argsort(descending=True, stable=True)[:k]
    return _only(logits_V, kept)


def top_p(logits_V: Tensor, p: float) -> Tensor:
    """Keep the smallest set of tokens whose probability reaches p; the one that crosses stays."""
    if p >= 1:
        return logits_V
    order = logits_V.argsort(descending=True, stable=True)
    before = logits_V[order].double().softmax(-1).cumsum(-1).roll(1)
    before[0] = -math.inf  # the likeliest token always stays
    # A hair of tolerance, above the noise of fp32 logits: 0.4 + 0.3 must count as reaching 0.7.
    return _only(logits_V, order[before < p - 1e-5])


def min_p(logits_V: Tensor, p: float) -> Tensor:
    """Keep tokens with at least p times the probability of the likeliest."""
    if p == 0:
        return logits_V
    return logits_V.masked_fill(logits_V < logits_V.max() + math.log(p) - 1e-5, -math.inf)


def _only(logits_V: Tensor, kept: Tensor) -> Tensor:
    return torch.full_like(logits_V, -math.inf).index_copy(0, kept, logits_V[kept])
