"""Continuous batching: every answer is the one that a job gets alone, however jobs are mixed."""

import itertools
import random
from dataclasses import replace

import pytest

from engine.config import SampleConfig
from engine.errors import CheckpointError, DataError, ResourceError
from engine.generate import schedule
from engine.generate.decode import generate, prefill
from engine.generate.decoder import Run
from engine.generate.reference import TorchDecoder
from engine.generate.schedule import PIECE, Finished, Job, Totals, complete
from engine.generate.writer import Token
from tests.conftest import TEXT, make_model


class Watched(TorchDecoder):
    """A decoder that remembers what each pass carried."""

    passes: list

    def forward(self, cache, runs):
        self.passes.append([(run.row, len(run.tokens), run.wanted) for run in runs])
        return super().forward(cache, runs)


@pytest.fixture
def decoder():
    made = Watched(make_model(max_seq_len=1024))
    made.passes = []
    return made


def alone(decoder, tokenizer, job: Job) -> list[Token]:
    """What a job gets by itself."""
    start = prefill(decoder, list(job.ids), decoder.cache(job.room))
    how = {"seed": job.seed, "stops": job.stops, "logprobs": job.logprobs}
    return list(generate(decoder, tokenizer, start, job.settings, **how))


def mixed_jobs(tokenizer, greedy: bool, n: int = 20) -> list[Job]:
    """Jobs of many lengths; some begin alike, some stop early, some end at once."""
    chance = random.Random(3)
    text = tokenizer.encode(TEXT)
    jobs = []
    for key in range(n):
        start = 0 if key % 3 else chance.randrange(500)
        settings = SampleConfig(
            temperature=0 if greedy else chance.choice([0.7, 1.0, 1.5]),
            top_k=chance.choice([0, 5, 40]),
            top_p=chance.choice([1.0, 0.9]),
            min_p=chance.choice([0.0, 0.05]),
            repetition_penalty=chance.choice([1.0, 1.3]),
            max_tokens=chance.choice([1, 3, 20, 60]),
        )
        jobs.append(
            Job(
                key=f"job {key}",
                ids=text[start : start + chance.choice([1, 40, 200, 300, 600])],
                settings=settings,
                seed=chance.randrange(100),
                stops=chance.choice([(), ("e",), ("self", "\n")]),
                logprobs=chance.choice([None, 0, 3]),
            )
        )
    return jobs


def said(tokens) -> list:
    """All of an answer but when it was given."""
    return [replace(token, time=0.0) for token in tokens]


@pytest.fixture(scope="module", params=[True, False], ids=["greedy", "sampled"])
def mixed(request, tokenizer):
    """Jobs, and what each says alone."""
    decoder = TorchDecoder(make_model(max_seq_len=1024))
    jobs = mixed_jobs(tokenizer, greedy=request.param)
    return jobs, [said(alone(decoder, tokenizer, job)) for job in jobs]


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_every_answer_is_the_one_that_a_job_gets_alone(decoder, tokenizer, rows, mixed):
    jobs, wanted = mixed
    totals = Totals()
    answers = list(complete(decoder, tokenizer, jobs, rows, grid=PIECE, totals=totals))
    assert [answer.key for answer in answers] == [job.key for job in jobs]
    for job, answer, words in zip(jobs, answers, wanted, strict=True):
        assert said(answer.tokens) == words, job.key
        assert answer.prompt_tokens == len(job.ids) and answer.error is None
        shown = [(token.logprob is not None, len(token.top)) for token in answer.tokens]
        assert set(shown) == {(job.logprobs is not None, job.logprobs or 0)}
    reasons = {answer.tokens[-1].finish_reason for answer in answers}
    assert {"stop", "length"} <= reasons
    assert totals.rows == rows and totals.shared >= PIECE
    assert totals.made == sum(len(answer.tokens) for answer in answers)


def plain(key, ids, most=4, **more) -> Job:
    """A greedy job."""
    settings = SampleConfig(temperature=0, max_tokens=most)
    return Job(key=key, ids=ids, settings=settings, seed=0, **more)


def keys(answers) -> list:
    return [answer.key for answer in answers]


def test_a_pass_carries_all_that_write_and_a_bounded_piece(decoder, tokenizer):
    jobs = [plain("a", [5] * 3, most=30), plain("b", [7] * 700), plain("c", [9] * 10)]
    assert keys(complete(decoder, tokenizer, jobs, 3)) == ["a", "b", "c"]
    first, second, third, fourth, *_ = decoder.passes
    a, b, c = 2, 1, 0  # the last row is taken first
    assert first == [(a, 3, 1)]  # a whole piece of b would be too much beside it
    assert second == [(a, 1, 1), (b, PIECE, 0)]
    assert third == [(a, 1, 1), (b, PIECE, 0)]
    assert fourth == [(a, 1, 1), (b, 700 - 2 * PIECE, 1), (c, 10, 1)]
    for one in decoder.passes:
        assert sum(size for _, size, _ in one if size > 1) <= PIECE


def test_a_row_is_refilled_at_once(decoder, tokenizer):
    """Two rows, answers of 8 tokens and of 2: nobody waits for the long ones."""
    jobs = [plain(n, [n + 1] * 5, most=2 if n else 8) for n in range(4)]
    list(complete(decoder, tokenizer, jobs, 2))
    assert len(decoder.passes) == 8
    assert all(len(runs) == 2 for runs in decoder.passes[:6])


def test_a_shared_beginning_is_read_once(decoder, tokenizer):
    system = tokenizer.encode(TEXT)[:300]
    jobs = [plain(n, [*system, n + 1, n + 2]) for n in range(6)]
    totals = Totals()
    shared = list(complete(decoder, tokenizer, jobs, 3, totals=totals))
    assert totals.prompt == 6 * 302 and totals.shared == 5 * 300
    read = sum(size for runs in decoder.passes for _, size, _ in runs if size > 1)
    assert read == 300 + 6 * 2
    for job, answer in zip(jobs, shared, strict=True):
        assert said(answer.tokens) == said(alone(decoder, tokenizer, job))


def test_what_was_copied_is_what_is_used(tokenizer):
    """The control of sharing: a copy of another row's content is seen in the answers."""
    decoder = TorchDecoder(make_model(max_seq_len=1024))
    system = tokenizer.encode(TEXT)[:300]
    jobs = [plain(n, [*system, n + 1, n + 2], most=12) for n in range(2)]
    right = [said(answer.tokens) for answer in complete(decoder, tokenizer, jobs, 2)]

    class Wrong(TorchDecoder):
        def cache(self, capacity, rows=1):
            cache = super().cache(capacity, rows)
            other = super().cache(capacity)
            self.forward(other, [Run(0, system[::-1])])
            cache.copy = lambda source, target: cache.rows.__setitem__(target, other.rows[0])
            return cache

    wrong = complete(Wrong(decoder.model), tokenizer, jobs, 2)
    assert [said(answer.tokens) for answer in wrong] != right


def test_rows_are_reused_under_a_sliding_window(tokenizer):
    """What a window has let go of cannot be shared: those prompts are read again."""
    decoder = TorchDecoder(make_model(max_seq_len=1024, sliding_window=16, full_every=2))
    text = tokenizer.encode(TEXT)
    jobs = [plain(n, [*text[:100], *text[n : n + 150 * n]], most=6) for n in range(5)]
    for job, answer in zip(jobs, complete(decoder, tokenizer, jobs, 2, grid=PIECE), strict=True):
        assert said(answer.tokens) == said(alone(decoder, tokenizer, job)), job.key


def test_jobs_that_cannot_be_done_keep_their_place(decoder, tokenizer):
    jobs = [
        plain("empty", []),
        plain("fits", [1] * 1020),
        plain("long", [1] * 1021),
        plain("nothing", [1] * 3, most=0),
        Finished(key="before", error=DataError("no JSON")),
        plain("good", [1, 2]),
    ]
    answers = list(complete(decoder, tokenizer, jobs, 2))
    assert keys(answers) == ["empty", "fits", "long", "nothing", "before", "good"]
    errors = {answer.key: str(answer.error) for answer in answers if answer.error}
    assert errors.keys() == {"empty", "long", "before"}
    assert "1,021 tokens + max_tokens 4 > context 1,024" in errors["long"]
    assert [len(answer.tokens) for answer in answers] == [0, 4, 0, 0, 0, 4]
    assert list(complete(decoder, tokenizer, [], 2)) == []
    assert keys(complete(decoder, tokenizer, jobs[:1], 2)) == ["empty"]


def test_rows_grow_with_the_jobs(decoder, tokenizer, monkeypatch):
    """A cache is made for what is known; a longer job gets a new one, of the old room twice."""
    made = []
    original = decoder.cache
    monkeypatch.setattr(decoder, "cache", lambda *size: made.append(size) or original(*size))
    jobs = [plain(n, [n + 1] * size) for n, size in enumerate([6, 16, 8, 21, 9, 60, 900])]
    answers = list(complete(decoder, tokenizer, jobs, 2))
    assert keys(answers) == list(range(7)) and not any(answer.error for answer in answers)
    assert made == [(20, 2), (40, 2), (904, 2)]
    made.clear()
    list(complete(decoder, tokenizer, jobs[:1], 8))
    assert made == [(10, 1)]  # no rows for jobs that do not come


def test_no_memory_is_an_error_of_one_line(decoder, tokenizer, monkeypatch):
    def refuse(*_):
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(decoder, "cache", refuse)
    with pytest.raises(ResourceError, match="no memory for 1 rows of 7 tokens"):
        list(complete(decoder, tokenizer, [plain(0, [1, 2, 3])], 2))


def test_jobs_are_read_as_they_are_needed(decoder, tokenizer, monkeypatch):
    """A long answer at the head holds back the others, of which there are not ever more."""
    monkeypatch.setattr(schedule, "AHEAD", 4)
    read = []

    def endless():
        yield plain("long", [1, 2], most=60)
        for n in itertools.count():
            read.append(n)
            yield plain(n, [3, 4], most=1)

    answers = complete(decoder, tokenizer, endless(), 2)
    assert next(answers).key == "long"
    assert len(read) <= 4 * 2 + 2
    assert [answer.key for answer in itertools.islice(answers, 100)] == list(range(100))
    assert len(read) <= 100 + 4 * 2 + 2


def test_logits_that_are_no_numbers_are_an_error_of_their_row(tokenizer):
    class Broken(TorchDecoder):
        def forward(self, cache, runs):
            logits = super().forward(cache, runs)
            wanted = [run for run in runs if run.wanted]
            for run, logits_V in zip(wanted, logits, strict=True):
                if run.tokens[-1] == 7:
                    logits_V[:] = float("nan")
            return logits

    settings = SampleConfig(temperature=0, max_tokens=1)
    jobs = [Job(key=id_, ids=[5, id_], settings=settings, seed=0) for id_ in (6, 7, 8)]
    found = list(complete(Broken(make_model()), tokenizer, jobs, 2))
    assert [len(f.tokens) for f in found] == [1, 0, 1]
    assert [f.key for f in found if isinstance(f.error, CheckpointError)] == [7]
