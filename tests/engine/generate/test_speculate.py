"""Speculation: greedy ids are those of plain decoding, sampled ones have the same distribution."""

import itertools
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest

from engine.config import ModelConfig, SampleConfig, TokenizerConfig
from engine.errors import CheckpointError
from engine.generate import speculate as module
from engine.generate.decode import generate, prefill
from engine.generate.decoder import Run
from engine.generate.pace import Pace
from engine.generate.reference import TorchDecoder, first_layers
from engine.generate.sampler import probabilities, sample
from engine.generate.speculate import (
    Draft,
    Guess,
    PromptLookup,
    accept,
    check_vocabulary,
    speculate,
)
from engine.text.tokenizer import learn
from tests.conftest import TEXT, make_model

GREEDY = SampleConfig(temperature=0, max_tokens=40)


class Always(Pace):
    """Guesses as much as there is room for, from the first step on."""

    def length(self, room: int) -> int:
        """Whatever it wins."""
        return 0 if self._stopped else max(0, min(self.most, room))


@dataclass
class Rows:
    """The cache of a `Table`: the tokens themselves."""

    capacity: int
    rows: list[list[int]] = field(default_factory=lambda: [[]])
    bytes: int = 0
    back: int = 1 << 30  # tokens that it can go back, but for the beginning

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.rows]

    def rewind(self, row: int, length: int) -> None:
        assert 0 <= length <= len(self.rows[row])
        if length and len(self.rows[row]) - length > self.back:
            raise ValueError("cannot rewind")
        del self.rows[row][length:]


class Table:
    """A model without weights: what follows depends on the last two tokens of the row."""

    def __init__(self, vocab_size: int = 5, seed: int = 0, sharp: float = 1.5) -> None:
        self.config = ModelConfig(vocab_size=vocab_size, max_seq_len=1 << 20)
        self.name = self.identity = f"table {seed}"
        shape = (vocab_size, vocab_size, vocab_size)
        self.logits = sharp * np.random.default_rng(seed).normal(size=shape).astype(np.float32)
        self.back, self.forwards = 1 << 30, 0

    def cache(self, capacity: int, rows: int = 1) -> Rows:
        return Rows(capacity, [[] for _ in range(rows)], back=self.back)

    def forward(self, cache: Rows, runs: list[Run]) -> np.ndarray:
        self.forwards += 1
        found = []
        for run in runs:
            row = cache.rows[run.row]
            assert len(row) + len(run.tokens) <= cache.capacity
            after = []
            for token in run.tokens:
                before = row[-1] if row else 0
                row.append(token)
                after.append(self.logits[before, token])
            found += after[len(after) - run.wanted :]
        return np.array(found, np.float32).reshape(-1, self.config.vocab_size)


class Wrong:
    """Guesses, for certain, what is never said: the least likely token of a table."""

    name, draws = "wrong", False

    def __init__(self, table: Table, most: int = 3) -> None:
        self.table, self.pace = table, Always(most)

    def begin(self, config, random, capacity, vocab_size) -> None:
        pass

    def guess(self, tokens, most: int) -> Guess:
        said = list(tokens)
        for _ in range(most):
            said.append(int(self.table.logits[said[-2], said[-1]].argmin()))
        return Guess(said[len(tokens) :])


class Skewed:
    """Draws its guesses from a distribution that has nothing to do with the model."""

    likely_V = np.array([0.55, 0.25, 0.1, 0.06, 0.04])

    name, draws = "skewed", True

    def __init__(self, most: int = 3) -> None:
        self.pace = Always(most)

    def begin(self, config, random, capacity, vocab_size) -> None:
        self.random = random

    def guess(self, tokens, most: int) -> Guess:
        ids = [module.draw(self.likely_V, self.random) for _ in range(most)]
        return Guess(ids, np.tile(self.likely_V, (most, 1)))


def always(guesser, most: int = 3):
    guesser.pace = Always(most)
    return guesser


def said(decoder, prompt, config, guesser, seed=0) -> list[int]:
    """What comes out, all of it; the seed may be a generator."""
    cache = decoder.cache(len(prompt) + config.max_tokens)
    logits_V = decoder.forward(cache, [Run(0, prompt)])[0]
    random = np.random.default_rng(seed)
    stream = speculate(decoder, cache, 0, prompt, logits_V, config, random, guesser)
    ids = [token_id for token_id, _ in itertools.islice(stream, config.max_tokens)]
    stream.close()
    assert cache.lengths[0] == len(prompt) + len(ids) - 1
    return ids


def plain(decoder, prompt, config, seed=0) -> list[int]:
    """The same without guesses, cache or anything else."""
    random, tokens = np.random.default_rng(seed), list(prompt)
    for _ in range(config.max_tokens):
        logits_V = decoder.forward(decoder.cache(len(tokens)), [Run(0, tokens)])[0]
        tokens.append(sample(logits_V, tokens, config, random))
    return tokens[len(prompt) :]


def exact(table: Table, prompt, config) -> dict[tuple[int, ...], float]:
    """How likely each answer is, by multiplying."""
    answers = {(): 1.0}
    for _ in range(config.max_tokens):
        longer = {}
        for answer, likely in answers.items():
            tokens = [*prompt, *answer]
            p_V = probabilities(table.logits[tokens[-2], tokens[-1]], tokens, config)
            longer |= {(*answer, i): likely * p for i, p in enumerate(p_V) if p}
        answers = longer
    return answers


def chi_square(found: list[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """χ² in units of its upper 0.1 % point (Wilson, Hilferty 1931); rare answers make one cell."""
    assert set(found) <= set(expected)
    counts, cells, rest = Counter(found), [], [0.0, 0.0]
    for answer, likely in expected.items():
        cell = [counts[answer], likely * len(found)]
        if cell[1] >= 5:
            cells.append(cell)
        else:
            rest = [rest[0] + cell[0], rest[1] + cell[1]]
    cells += [rest] if rest[1] >= 1 else []
    value = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    k = len(cells) - 1
    return value / (k * (1 - 2 / (9 * k) + 3.0902 * (2 / (9 * k)) ** 0.5) ** 3)


TARGET, PROMPT, DRAWN = Table(seed=1), [3, 3], 1500
SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.0, "top_p": 0.9, "top_k": 4},
    {"temperature": 1.3, "min_p": 0.2},
    {"temperature": 1.0, "repetition_penalty": 3.0},
]
GUESSERS = {
    "another model": lambda: always(Draft(Table(seed=2))),
    "the model": lambda: always(Draft(TARGET)),
    "lookup": lambda: always(PromptLookup(2)),
    "always wrong": lambda: Wrong(TARGET),
    "skewed": Skewed,
}


def drawn(settings, guesser) -> float:
    """Return χ² of many answers of three tokens."""
    config = SampleConfig(max_tokens=3, **settings)
    random = np.random.default_rng(0)
    found = [tuple(said(TARGET, PROMPT, config, guesser, random)) for _ in range(DRAWN)]
    return chi_square(found, exact(TARGET, PROMPT, config))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("guesser", ["another model", "skewed"])
def test_what_is_sampled_has_the_distribution_of_the_model(guesser, settings):
    assert drawn(settings, GUESSERS[guesser]()) < 1


@pytest.mark.parametrize("guesser", ["the model", "lookup", "always wrong"])
@pytest.mark.parametrize("settings", [SETTINGS[3], SETTINGS[6]], ids=str)
def test_so_it_has_with_every_guesser(guesser, settings):
    assert drawn(settings, GUESSERS[guesser]()) < 1


def no_residual(guess, guessed_V, wanted_V, random):
    if random.random() * guessed_V[guess] < wanted_V[guess]:
        return guess
    return module.draw(wanted_V, random)


def any_possible(guess, guessed_V, wanted_V, random):
    return guess if wanted_V[guess] else module.draw(wanted_V, random)


def if_equal(guess, guessed_V, wanted_V, random):
    """Accepts only what another draw equals: too seldom for its residual."""
    if module.draw(wanted_V, random) == guess:
        return guess
    return module.draw(np.maximum(wanted_V - guessed_V, 0), random)


@pytest.mark.parametrize("broken", [no_residual, any_possible, if_equal])
def test_a_wrong_rule_is_seen(broken, monkeypatch):
    """The control of the two tests above."""
    monkeypatch.setattr(module, "accept", broken)
    for name in ("skewed", "another model"):
        assert drawn(SETTINGS[3], GUESSERS[name]()) > 1.5


def test_guesses_that_do_not_count_as_seen_are_seen(monkeypatch):
    """The control of the repetition penalty: here only the prompt counts."""
    real = module.probabilities
    monkeypatch.setattr(module, "probabilities", lambda logits, _, c: real(logits, PROMPT, c))
    assert drawn(SETTINGS[6], Skewed()) > 1.2


def test_the_rule_by_hand():
    """p = (.5, .5, 0), q = (.25, .5, .25): 0 is always kept, 2 never, and its share goes to 0."""
    p, q, random = np.array([0.5, 0.5, 0]), np.array([0.25, 0.5, 0.25]), np.random.default_rng(0)
    assert {accept(0, q, p, random) for _ in range(99)} == {0}
    assert {accept(1, q, p, random) for _ in range(99)} == {1}
    assert {accept(2, q, p, random) for _ in range(99)} == {0}
    certain = np.array([0, 1.0, 0])
    kept = [accept(1, certain, p, random) for _ in range(4000)]
    assert set(kept) == {0, 1}
    assert np.mean(kept) == pytest.approx(0.5, abs=0.03)


def test_rounding_leaves_no_residual_without_a_token():
    """Regression: p and q the same but for rounding, and a uniform number that is just below 1."""

    class Highest:
        def random(self):
            return np.nextafter(1.0, 0)

    q = np.array([0.5, 0.5])
    assert accept(0, q, q * (1 - 1e-15), Highest()) in (0, 1)


CHANGES = [{}, {"sliding_window": 4}, {"position": "learned", "norm": "layernorm"}]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_greedy_ids_are_those_of_plain_decoding(changes):
    """For every guesser, with the pace that it chooses and with guesses at every step."""
    decoder = TorchDecoder(make_model(3, **changes))
    small = TorchDecoder(make_model(4, n_layers=1, d_model=16, vocab_size=448))
    random, accepted = np.random.default_rng(0), {}
    for number in range(8):
        prompt = random.integers(0, 400, random.integers(1, 9)).tolist() * random.integers(1, 4)
        penalty = (1.0, 1.3)[number % 2]
        config = SampleConfig(temperature=0, max_tokens=30, repetition_penalty=penalty)
        expected = plain(decoder, prompt, config)
        guessers = {
            "lookup": PromptLookup(2),
            "itself": Draft(decoder),
            "half": Draft(TorchDecoder(first_layers(decoder.model, 1))),
            "small": Draft(small),
        }
        for name, guesser in guessers.items():
            assert said(decoder, prompt, config, guesser) == expected
            assert said(decoder, prompt, config, always(guesser, 5)) == expected
            accepted[name] = accepted.get(name, 0) + guesser.pace.report(name).accepted
    assert accepted["itself"] > accepted["half"] > 0
    assert changes or accepted["lookup"] > 10


@pytest.mark.parametrize("name", GUESSERS)
def test_greedy_ids_of_tables(name):
    for seed in range(20):
        prompt = np.random.default_rng(seed).integers(0, 5, 2 + seed).tolist()
        expected = plain(TARGET, prompt, GREEDY)
        assert said(TARGET, prompt, GREEDY, GUESSERS[name]()) == expected


@pytest.mark.parametrize("name", GUESSERS)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_any_length_ends_where_it_is_asked_to(name, count):
    """The cache has no room for a guess too many, and holds all but the last token afterwards."""
    config = SampleConfig(temperature=0, max_tokens=count)
    assert said(TARGET, PROMPT, config, GUESSERS[name]()) == plain(TARGET, PROMPT, config)


def test_an_answer_given_up_leaves_its_tokens_in_the_cache():
    for stop in range(1, 9):
        cache = TARGET.cache(60)
        logits_V = TARGET.forward(cache, [Run(0, PROMPT)])[0]
        random = np.random.default_rng(0)
        guesser = always(Draft(TARGET), 4)
        stream = speculate(TARGET, cache, 0, PROMPT, logits_V, GREEDY, random, guesser)
        ids = [token_id for token_id, _ in itertools.islice(stream, stop)]
        stream.close()
        assert cache.rows[0] == [*PROMPT, *ids[:-1]]


def test_each_token_comes_with_the_logits_it_was_chosen_by():
    cache = TARGET.cache(60)
    logits_V = TARGET.forward(cache, [Run(0, PROMPT)])[0]
    tokens, guesser = list(PROMPT), always(Draft(Table(seed=2)), 4)
    random = np.random.default_rng(0)
    stream = speculate(TARGET, cache, 0, PROMPT, logits_V, GREEDY, random, guesser)
    for token_id, found_V in itertools.islice(stream, 30):
        assert np.array_equal(found_V, TARGET.logits[tokens[-2], tokens[-1]])
        tokens.append(token_id)


@pytest.mark.parametrize("back", [0, 1, 2])
def test_a_cache_that_cannot_go_back_is_filled_again_and_guessing_ends(back):
    target = Table(seed=1)
    target.back = back
    guesser = Wrong(target)
    assert said(target, PROMPT, GREEDY, guesser) == plain(TARGET, PROMPT, GREEDY)
    report = guesser.pace.report("wrong")
    assert "window" in report.off
    assert report.guessing == 1
    draft = Table(seed=2)
    draft.back = back
    assert said(TARGET, PROMPT, GREEDY, always(Draft(draft))) == plain(TARGET, PROMPT, GREEDY)


@pytest.mark.parametrize("name", GUESSERS)
def test_the_same_seed_says_the_same(name):
    config = SampleConfig(temperature=1.0, max_tokens=60)
    guesser = GUESSERS[name]()
    first = said(TARGET, PROMPT, config, guesser, seed=5)
    said(TARGET, PROMPT, config, guesser, seed=6)  # what a guesser saw before does not matter
    assert said(TARGET, PROMPT, config, guesser, seed=5) == first
    assert said(TARGET, PROMPT, config, GUESSERS[name](), seed=5) == first
    certain = not guesser.draws
    assert (first == plain(TARGET, PROMPT, config, seed=5)) == certain


def test_the_clock_does_not_change_what_a_draft_leads_to(monkeypatch):
    config, seconds = SampleConfig(temperature=1.0, max_tokens=120), itertools.count()
    expected = said(TARGET, PROMPT, config, Draft(Table(seed=2)))
    random = np.random.default_rng(0)
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(seconds) + 0.9 * random.random())
    assert said(TARGET, PROMPT, config, Draft(Table(seed=2))) == expected


def test_one_pass_checks_many_guesses():
    table = Table(seed=1)
    guesser = always(Draft(Table(seed=1)), 4)
    assert len(said(table, PROMPT, SampleConfig(temperature=0, max_tokens=41), guesser)) == 41
    assert table.forwards == 1 + 40 / 5
    report = guesser.pace.report(guesser.name)
    assert (report.tokens, report.forwards, report.guessing) == (40, 8, 8)
    assert (report.guessed, report.accepted, report.accepted_per_forward) == (32, 32, 4)


def lookup(text: str, most: int, ngram: int = 3) -> str:
    guesser = PromptLookup(ngram)
    return "".join(map(chr, guesser.guess([ord(letter) for letter in text], most).ids))


@pytest.mark.parametrize(
    "text, most, expected",
    [
        ("the cat. the c", 3, "at."),
        ("the cat. the c", 9, "at. the ca"[:9]),  # past the end it repeats itself
        ("axb1 cxb2 xb", 2, "2 "),  # the latest place
        ("abcx bcy abc", 1, "x"),  # but the longest n-gram before that
        ("aaaa", 5, "aaaaa"),
        ("abcdef", 4, ""),
        ("ab", 4, ""),
        ("a", 4, ""),
    ],
)
def test_lookup_by_hand(text, most, expected):
    assert lookup(text, most) == expected


def test_lookup_reads_each_token_once():
    """Also of a text that it is shown piece by piece, and of another one afterwards."""
    text, guesser = [1, 2, 3, 4, 1, 2, 3, 9, 7, 1, 2], PromptLookup(3)
    for end in range(len(text)):
        guesser.guess(text[:end], 2)
    assert guesser.guess(text, 2).ids == PromptLookup(3).guess(text, 2).ids == [3, 9]
    assert guesser.guess([5, 6, 5, 6], 2).ids == [5, 6]

    class Counted(list):
        reads = 0

        def __getitem__(self, key):
            Counted.reads += 1
            return super().__getitem__(key)

    guesser, tokens = PromptLookup(3), Counted(np.arange(2000).tolist())
    guesser.guess(tokens, 2)
    Counted.reads = 0
    tokens.append(3000)
    guesser.guess(tokens, 2)
    assert Counted.reads < 10


def test_a_draft_reads_each_token_once():
    draft = Table(seed=1)
    guesser = always(Draft(draft), 4)
    ran = []
    forward = draft.forward
    draft.forward = lambda cache, runs: ran.append(len(runs[0].tokens)) or forward(cache, runs)
    said(TARGET, PROMPT, SampleConfig(temperature=0, max_tokens=41), guesser)
    assert sum(ran) == len(PROMPT) + 40 - 1  # all but the last guess and the token after it
    said(TARGET, [*PROMPT, 2], SampleConfig(temperature=0, max_tokens=2), guesser)
    assert sum(ran) <= len(PROMPT) + 42


def test_a_draft_with_a_shorter_context_guesses_as_far_as_it_reads():
    draft = TorchDecoder(make_model(4, max_seq_len=20))
    decoder = TorchDecoder(make_model(3))
    guesser = always(Draft(draft))
    assert said(decoder, [1, 2, 3], GREEDY, guesser) == plain(decoder, [1, 2, 3], GREEDY)
    assert 0 < guesser.pace.report("x").guessed < 3 * 18


def test_a_draft_of_too_few_tokens_is_refused():
    with pytest.raises(CheckpointError, match=r"knows 4 tokens of 5.*vocabulary"):
        said(TARGET, PROMPT, GREEDY, Draft(Table(vocab_size=4)))


def test_first_layers_share_weights_and_are_those_of_a_smaller_model():
    model = make_model(3, n_layers=3, tie_embeddings=True)
    two = first_layers(model, 2)
    assert two.config.n_layers == len(two.blocks) == 2
    assert len(model.blocks) == model.config.n_layers == 3
    assert two.blocks[1].mlp.up_proj.weight is model.blocks[1].mlp.up_proj.weight
    fresh = make_model(9, n_layers=2, tie_embeddings=True)
    fresh.load_state_dict({k: v for k, v in model.state_dict().items() if "blocks.2" not in k})
    logits = [
        TorchDecoder(m).forward(TorchDecoder(m).cache(9), [Run(0, [1, 5, 7])]) for m in (two, fresh)
    ]
    assert np.array_equal(*logits)
    for count in (0, 4):
        with pytest.raises(ValueError, match="3 layers"):
            first_layers(model, count)


def answers(decoder, tokenizer, prompt, config, guesser, **options) -> list[tuple]:
    """What `generate` yields, but for the time."""
    start = prefill(decoder, prompt, decoder.cache(len(prompt) + config.max_tokens))
    stream = generate(decoder, tokenizer, start, config, seed=1, guesser=guesser, **options)
    tokens = list(stream)
    assert start.cache.lengths[0] == len(prompt) + len(tokens) - 1
    return [(t.id, t.text, t.finish_reason, t.logprob, t.top) for t in tokens]


def guessers_of(decoder) -> list:
    half = Draft(TorchDecoder(first_layers(decoder.model, 1)))
    return [always(PromptLookup(1), 7), always(Draft(decoder), 7), always(half, 4), Draft(decoder)]


def test_generating_with_guesses_yields_the_same_tokens(tokenizer):
    """Ended by length, by stop strings and by the end token, inside of guesses and between them."""
    reasons = set()
    for seed in range(5):
        decoder = TorchDecoder(make_model(seed))
        prompt, config = [5, 17, 300, 17, 300], SampleConfig(temperature=0, max_tokens=25)
        whole = answers(decoder, tokenizer, prompt, config, None)
        text = "".join(token[1] for token in whole)
        for stops in ([], [text[4:6]], [text[9:11], text[13:14]]):
            expected = answers(decoder, tokenizer, prompt, config, None, stops=stops, logprobs=2)
            reasons.add(expected[-1][2])
            for guesser in guessers_of(decoder):
                found = answers(
                    decoder, tokenizer, prompt, config, guesser, stops=stops, logprobs=2
                )
                assert [token[:3] for token in found] == [token[:3] for token in expected]
                logprobs = [token[3] for token in found]
                assert logprobs == pytest.approx([token[3] for token in expected], abs=1e-4)
    assert {"stop", "length"} <= reasons


@pytest.mark.parametrize("place", range(1, 12))
def test_an_end_token_inside_right_guesses_ends_the_answer(place, tokenizer, monkeypatch):
    decoder = TorchDecoder(make_model(0))
    prompt, config = [5, 17, 300, 17, 300], SampleConfig(temperature=0, max_tokens=25)
    end = answers(decoder, tokenizer, prompt, config, None)[place][0]
    monkeypatch.setattr(tokenizer, "ends", frozenset([end]))
    expected = answers(decoder, tokenizer, prompt, config, None)
    assert expected[-1][2] == "end"
    for guesser in guessers_of(decoder):
        assert answers(decoder, tokenizer, prompt, config, guesser) == expected


def test_nothing_asked_nothing_guessed(tokenizer):
    decoder = TorchDecoder(make_model(0))
    start = prefill(decoder, [1, 2], decoder.cache(2))
    config = SampleConfig(max_tokens=0)
    assert not list(generate(decoder, tokenizer, start, config, seed=0, guesser=PromptLookup()))


def test_two_answers_at_once_by_one_guesser_are_right(tokenizer):
    """It then guesses badly, but what is said does not change."""
    decoder = TorchDecoder(make_model(3))
    prompts = [[5, 17, 300, 17, 300], [9, 9, 9]]
    for guesser in guessers_of(decoder):
        streams = []
        for prompt in prompts:
            start = prefill(decoder, prompt, decoder.cache(60))
            streams.append(generate(decoder, tokenizer, start, GREEDY, seed=0, guesser=guesser))
        both = list(itertools.zip_longest(*streams))
        for prompt, tokens in zip(prompts, zip(*both, strict=True), strict=True):
            ids = [token.id for token in tokens if token]
            assert ids == plain(decoder, prompt, GREEDY)[: len(ids)]


def test_a_vocabulary_of_the_same_size_may_be_another(tokenizer):
    other = learn([TEXT[::-1]], TokenizerConfig(vocab_size=400))
    check_vocabulary(tokenizer, tokenizer, "small")
    with pytest.raises(CheckpointError, match=r"--draft small: .*vocabulary.*400 tokens.*lookup"):
        check_vocabulary(tokenizer, other, "small")
