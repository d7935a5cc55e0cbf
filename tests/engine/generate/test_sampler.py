"""Sampling: each filter by hand and by brute force, the draws by their frequencies."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from engine.config import SampleConfig
from engine.errors import CheckpointError
from engine.generate.sampler import (
    draw,
    min_p,
    penalize,
    probabilities,
    sample,
    seeded,
    top_k,
    top_p,
)

FOUR = (0.1, 0.2, 0.3, 0.4)
NONE_SEEN = np.array([], dtype=np.int64)
PLAIN = {"temperature": 1.0}
# Upper 0.1 % points of χ² by degrees of freedom; any table has them.
CRITICAL = {1: 10.828, 2: 13.816, 3: 16.266, 4: 18.467, 5: 20.515, 6: 22.458, 7: 24.322}

weights = st.lists(st.integers(1, 1000), min_size=1, max_size=6)
# The first uniform numbers of seed 7.
SEVEN = [0.625095466604667, 0.8972138009695755, 0.7756856902451935]

logit_lists = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=12)


def fp32(values) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def logits_of(probabilities, shift: float = 0.0) -> np.ndarray:
    return np.log(fp32(probabilities)) + np.float32(shift)


def distribution(logits: np.ndarray, seen=NONE_SEEN, **settings) -> list[float]:
    return probabilities(logits, seen, SampleConfig(**(PLAIN | settings))).tolist()


def kept(keep, logits: np.ndarray, bound: float) -> list[int]:
    return np.arange(len(logits))[keep(logits, bound)].tolist()


def draws(logits: np.ndarray, config: SampleConfig, n: int, seed: int = 0) -> list[int]:
    random = seeded(seed)
    return [sample(logits, NONE_SEEN, config, random) for _ in range(n)]


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, FOUR),
        ({"top_k": 3}, (0, 0.2222, 0.3333, 0.4444)),
        ({"top_k": 1}, (0, 0, 0, 1)),
        ({"top_k": 4}, FOUR),
        ({"top_k": 9}, FOUR),
        ({"top_p": 0.7}, (0, 0, 0.4286, 0.5714)),
        ({"top_p": 0.71}, (0, 0.2222, 0.3333, 0.4444)),
        ({"top_p": 0.4}, (0, 0, 0, 1)),
        ({"top_p": 0.0}, (0, 0, 0, 1)),
        ({"min_p": 0.26}, (0, 0.2222, 0.3333, 0.4444)),
        ({"min_p": 0.24}, FOUR),
        ({"min_p": 1.0}, (0, 0, 0, 1)),
        ({"temperature": 0.5}, (0.0333, 0.1333, 0.3, 0.5333)),  # squares / 0.3
        ({"temperature": 2.0}, (0.1627, 0.2301, 0.2818, 0.3254)),  # roots
    ],
    ids=str,
)
def test_filters_by_hand(settings, expected):
    assert distribution(logits_of(FOUR), **settings) == pytest.approx(expected, abs=1e-4)


def test_filters_apply_in_the_documented_order_by_hand():
    """Each case tells its order from the other one."""
    logits = logits_of(FOUR)
    # top-k first: 0.4 of 0.7 already reaches 0.55; top-p first would have kept both.
    assert distribution(logits, top_k=2, top_p=0.55) == pytest.approx([0, 0, 0, 1])
    # Temperature first: squared, 0.5333 + 0.3 reaches 0.8; untempered it takes three.
    expected = [0, 0, 0.36, 0.64]
    assert distribution(logits, temperature=0.5, top_p=0.8) == pytest.approx(expected)
    # Temperature before min-p: 0.2/0.4 squared is below 0.3, untempered it is above.
    assert distribution(logits, temperature=0.5, min_p=0.3) == pytest.approx(expected)
    # Penalty before top-k: what it pushes to second place is removed.
    logits, settings = fp32([3, 2]), {"temperature": 0.5, "top_k": 1}
    assert distribution(logits, [0], repetition_penalty=2.0, **settings) == [0, 1]


@pytest.mark.parametrize("shift", [0.0, 1.0, -3.3, 0.123, 7.7, 13.7, 20.0])
@pytest.mark.parametrize(
    "keep, bounds",
    [(top_p, {0.4: 1, 0.7: 2, 0.9: 3}), (min_p, {0.75: 2, 0.5: 3, 0.25: 4})],
    ids=["top-p", "min-p"],
)
def test_a_bound_exactly_reached_counts_whatever_the_rounding(keep, bounds, shift):
    """Logits mean the same when all move together, so fp32 noise must not decide who stays."""
    for order in itertools.permutations(FOUR):
        for bound, count in bounds.items():
            assert len(kept(keep, logits_of(order, shift), bound)) == count, (order, bound)


@given(weights, st.floats(0, 1))
def test_top_p_keeps_exactly_the_smallest_set(weights, p):
    """By brute force: no smaller set reaches p, and none of its size weighs more."""
    total = sum(weights)
    sums = [
        (len(some), sum(weights[i] for i in some) / total)
        for size in range(1, len(weights) + 1)
        for some in itertools.combinations(range(len(weights)), size)
    ]
    assume(all(abs(weight - p) > 1e-4 for _, weight in sums) or p == 1)
    chosen = kept(top_p, logits_of([weight / total for weight in weights]), p)
    if p == 1:
        assert chosen == list(range(len(weights)))
        return
    fewest = min(size for size, weight in sums if weight > p)
    most = max(weight for size, weight in sums if size == fewest)
    assert len(chosen) == fewest
    assert sum(weights[i] for i in chosen) / total == pytest.approx(most)


@given(weights)
def test_top_p_at_its_ends(weights):
    """Towards 0 one token stays, the lowest id of the likeliest; at 1 all stay."""
    logits = logits_of([float(weight) for weight in weights])
    for p in (0.0, 1e-30, 1e-6):
        assert kept(top_p, logits, p) == [weights.index(max(weights))]
    assert kept(top_p, logits, 1.0) == list(range(len(weights)))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.integers(0, 9))
def test_top_k_takes_the_lower_id_on_a_tie(values, k):
    best = sorted(range(len(values)), key=lambda i: (-values[i], i))[: k or None]
    assert kept(top_k, fp32(values), k) == sorted(best)


@given(weights, st.floats(0, 1))
def test_min_p_is_its_definition(weights, p):
    bound = p * max(weights)
    assume(all(abs(weight - bound) > 1e-4 * weight or weight == bound for weight in weights))
    expected = [i for i, weight in enumerate(weights) if weight >= bound]
    assert kept(min_p, logits_of([float(weight) for weight in weights]), p) == expected


@given(logit_lists, st.integers(0, 5), st.floats(0, 1), st.floats(0, 1))
def test_filters_keep_something_in_order_and_leave_their_input_alone(values, k, p, share):
    logits = fp32(values)
    for keep, bound in ((top_k, k), (top_p, p), (min_p, share)):
        some = kept(keep, logits, bound)
        assert some and some == sorted(set(some))
        assert logits.tolist() == values
    sample(
        logits, [0], SampleConfig(top_k=k, top_p=p, min_p=share, repetition_penalty=2), seeded(0)
    )
    assert logits.tolist() == values


def test_penalty_by_hand():
    """Positive logits are divided, negative multiplied, once however often a token was seen."""
    logits = fp32([2, -2, 1, 0, -1])
    seen = [0, 1, 0, 3, 0]
    assert penalize(logits, seen, 2.0).tolist() == [1.0, -4.0, 1.0, 0.0, -1.0]
    assert penalize(logits, seen, 0.5).tolist() == [4.0, -1.0, 1.0, 0.0, -1.0]
    assert logits.tolist() == [2.0, -2.0, 1.0, 0.0, -1.0]
    assert penalize(logits, NONE_SEEN, 2.0).tolist() == logits.tolist()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("penalty", [1e30, 1e39, 1e308])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_no_penalty_is_too_large(penalty, temperature):
    """What is seen is chosen last, but some token is, though all were seen."""
    config = SampleConfig(temperature=temperature, repetition_penalty=penalty)
    logits = np.array([-1e9, 0, 3e-9, -2], np.float32)
    assert np.isfinite(penalize(logits, [0, 1, 2, 3], penalty)).all()
    assert sample(logits, [0, 3], config, seeded(1)) in (1, 2)
    assert sample(logits, [0, 1, 2, 3], config, seeded(1)) in (1, 2)


def test_penalty_turns_the_greedy_choice():
    config = SampleConfig(temperature=0, repetition_penalty=2.0)
    logits = fp32([3, 2, 1])
    assert sample(logits, NONE_SEEN, config, seeded(0)) == 0
    assert sample(logits, np.array([0]), config, seeded(0)) == 1
    assert probabilities(logits, [0], config).tolist() == [0, 1, 0]


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=300))
def test_temperature_zero_takes_the_lowest_id_of_the_likeliest(values):
    config = SampleConfig(temperature=0, top_k=2, top_p=0.5)
    choice = sample(fp32(values), NONE_SEEN, config, seeded(0))
    assert choice == values.index(max(values))


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-38, 1e-39, 1e-45, 1e-300])
def test_a_tiny_temperature_is_nearly_zero(temperature):
    """Dividing by it must not overflow into nonsense."""
    logits = fp32([1, 60, 2, 59])
    assert draws(logits, SampleConfig(temperature=temperature), 5) == [1] * 5


def chi_squared(observed: list[int], probabilities: list[float]) -> float:
    """Σ (observed - expected)² / expected over the outcomes that can happen."""
    n = sum(observed)
    return sum(
        (count - n * p) ** 2 / (n * p)
        for count, p in zip(observed, probabilities, strict=True)
        if p > 0
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.5},
        {"temperature": 1.0},
        {"temperature": 1.5},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 5, "min_p": 0.3},
    ],
    ids=str,
)
def test_frequencies(settings):
    """20,000 draws fit the distribution worked out from the definition, and not another one."""
    probabilities = (0.02, 0.25, 0.05, 0.3, 0.1, 0.15, 0.08, 0.05)
    tempered = [p ** (1 / settings["temperature"]) for p in probabilities]
    order = sorted(range(8), key=lambda i: (-tempered[i], i))[: settings.get("top_k")]
    share = [tempered[i] / sum(tempered[i] for i in order) for i in order]
    some = sum(1 for i in range(len(order)) if sum(share[:i]) < settings.get("top_p", 1))
    likely = [i for i in order[:some] if tempered[i] >= settings.get("min_p", 0) * max(tempered)]
    mass = sum(tempered[i] for i in likely)
    expected = [tempered[i] / mass if i in likely else 0.0 for i in range(8)]

    chosen = draws(logits_of(probabilities), SampleConfig(**settings), 20_000)
    observed = [chosen.count(i) for i in range(8)]
    assert all(count == 0 for count, p in zip(observed, expected, strict=True) if p == 0)
    assert 1 < len(likely) <= 8
    critical = CRITICAL[len(likely) - 1]
    assert chi_squared(observed, expected) < critical
    # The control: the test must be able to tell a temperature a quarter off.
    warmer = [p ** (1 / 1.25) for p in expected]
    assert chi_squared(observed, [p / sum(warmer) for p in warmer]) > critical


@given(
    values=logit_lists,
    temperature=st.floats(0.1, 3),
    k=st.integers(0, 5),
    p=st.floats(0, 1),
    share=st.floats(0, 1),
    penalty=st.floats(0.5, 2),
    seed=st.integers(0, 1 << 32),
)
def test_a_removed_token_is_never_drawn(values, temperature, k, p, share, penalty, seed):
    config = SampleConfig(
        temperature=temperature, top_k=k, top_p=p, min_p=share, repetition_penalty=penalty
    )
    logits, seen, random = fp32(values), np.array([0, 1]), seeded(seed)
    likely = probabilities(logits, seen, config)
    assert likely.sum() == pytest.approx(1) and likely.min() >= 0
    assert all(likely[sample(logits, seen, config, random)] > 0 for _ in range(20))


def test_the_same_seed_draws_the_same():
    """Whatever the global generator does; another seed draws something else."""
    logits, config = logits_of(FOUR), SampleConfig(temperature=1.0)
    np.random.seed(1)
    first = draws(logits, config, 50, seed=7)
    np.random.seed(2)
    assert draws(logits, config, 50, seed=7) == first
    assert draws(logits, config, 50, seed=8) != first


def test_a_draw_takes_one_number_whatever_the_filters():
    """So that turning a filter on does not shift the randomness of all later tokens."""
    states = []
    for settings in ({}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5, "temperature": 2.0}):
        random = seeded(0)
        sample(logits_of(FOUR), NONE_SEEN, SampleConfig(**(PLAIN | settings)), random)
        states.append(random.random())
    assert len(set(states)) == 1
    assert states[0] == seeded(0).random(2)[1] != seeded(0).random()


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {}, {"top_p": 0.9}, {"top_k": 2}], ids=str
)
def test_logits_that_are_no_numbers_are_one_clear_error(broken, settings):
    config = SampleConfig(**(PLAIN | settings))
    for ask in (lambda x: sample(x, [], config, seeded(0)), lambda x: probabilities(x, [], config)):
        with pytest.raises(CheckpointError, match="no numbers .* for token 2"):
            ask(fp32([1, 2, broken, 3]))
        ask(fp32([1, 2, -math.inf, 3]))  # a token that can never come is none of it


def test_a_seed_means_the_same_everywhere():
    """Oracle: the numbers of PCG64, and the ids they choose."""
    assert seeded(7).random(3).tolist() == pytest.approx(SEVEN, abs=1e-15)
    expected = [np.searchsorted(np.cumsum(FOUR), number) for number in SEVEN]
    assert draws(logits_of(FOUR), SampleConfig(temperature=1.0), 3, seed=7) == expected


@given(
    values=st.lists(st.floats(-12, 8, width=32), min_size=1, max_size=700),
    k=st.integers(0, 700),
    p=st.floats(0, 1),
    repeats=st.integers(1, 3),
)
def test_filters_that_sort_little_keep_what_sorting_all_would(values, k, p, repeats):
    """By definition: the first k, and the first to reach p, ordered by logit and then by id."""
    values = values * repeats  # ties
    logits = fp32(values)
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    assert kept(top_k, logits, k) == sorted(order[: k or None])
    weights = [math.exp(values[i] - max(values)) for i in order]
    share = np.cumsum(weights) / math.fsum(weights)
    assume(p == 1 or np.abs(share - p).min() > 1e-4)
    fewest = len(order) if p == 1 else int(np.searchsorted(share, p)) + 1
    assert kept(top_p, logits, p) == sorted(order[:fewest])


@given(st.lists(st.integers(0, 3), min_size=1, max_size=1100), st.integers(0, 1 << 32))
def test_a_draw_inverts_the_cumulative_sum(weights, seed):
    """By its definition, over all of the blocks at once."""
    assume(sum(weights))
    at = seeded(seed).random() * sum(weights)
    expected = next(i for i, total in enumerate(itertools.accumulate(weights)) if total > at)
    assert draw(fp32(weights), seeded(seed)) == expected


class _Highest:
    """Draws the greatest number below 1, or 1 itself, which rounding may make of it."""

    def __init__(self, number: float) -> None:
        self.random = lambda: number


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53, 1.0])
@pytest.mark.parametrize("size", [3, 256, 257, 1000])
def test_a_weight_of_nothing_is_never_drawn_at_either_end(number, size):
    weights = fp32([0, 0.1, *[0.3] * (size - 2), 0.7, 0, *[0] * size])
    index = draw(weights, _Highest(number))  # pyright: ignore[reportArgumentType]
    assert index == (1 if number == 0 else size)
