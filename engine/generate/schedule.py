"""Continuous batching: any number of jobs over one cache, whose rows never wait for each other.

A pass of the model reads every weight once, however many rows it serves. So each pass carries one
token of every row that is writing and a piece of the prompts that are next, and a row whose answer
has ended takes the next job at once. A prompt that begins as another did copies what that row has
read already. Which jobs share a pass changes no answer, on a decoder whose arithmetic does not
depend on it.

Source: Yu et al. 2022, OSDI (Orca: scheduling by passes, not by requests).
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from engine.config import SampleConfig
from engine.errors import CheckpointError, DataError, EngineError, LimitError, ResourceError
from engine.generate.decode import counted, scores
from engine.generate.decoder import Decoder, Run
from engine.generate.sampler import sample, seeded
from engine.generate.writer import Token, Writer
from engine.text.tokenizer import Tokenizer

PIECE = 256  # most prompt tokens of a pass; prompts are cut at multiples of it
SHARED = 16  # tokens in common that are worth a copy
AHEAD = 64  # jobs for each row that may be done before an earlier one is


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A prompt to continue, and how; `key` is the caller's own."""

    key: Any
    ids: Sequence[int]
    settings: SampleConfig
    seed: int
    stops: Sequence[str] = ()
    logprobs: int | None = None

    @property
    def room(self) -> int:
        """Return how many tokens a row must have room for."""
        return len(self.ids) + self.settings.max_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A job's answer, or why there is none."""

    key: Any
    prompt_tokens: int = 0
    tokens: Sequence[Token] = ()
    error: EngineError | None = None


@dataclass(slots=True)
class Totals:
    """What a batch has done so far."""

    prompt: int = 0  # tokens of prompts
    shared: int = 0  # of these, copied from another row or left from the job before
    made: int = 0  # tokens of answers
    passes: int = 0
    rows: int = 0  # most that were busy at once


def complete(
    decoder: Decoder,
    tokenizer: Tokenizer,
    jobs: Iterable[Job | Finished],
    rows: int,
    *,
    grid: int = 1,
    totals: Totals | None = None,
    watch: Callable[[Totals], None] = lambda _: None,
) -> Iterator[Finished]:
    """Continue every job in one of `rows` rows of a cache; yield them in the order they came.

    Jobs are read as they are needed. A `Finished` among them keeps its place and is passed on, so
    that a caller can say there what it could not make a job of. Prefixes are shared in multiples
    of `grid` tokens: PIECE, where arithmetic depends on how a prompt is cut. `watch` is called
    after every pass.
    """
    totals = totals or Totals()
    queue = enumerate(_checked(job, decoder.config.max_seq_len) for job in jobs)
    coming = deque(islice(queue, rows))
    batch: _Batch | None = None
    done: dict[int, Finished] = {}
    first = 0  # the place of the oldest job that is not done
    while True:
        while coming and coming[0][0] < first + AHEAD * rows:
            place, job = coming[0]
            if isinstance(job, Finished):
                done[place] = job
            else:
                if batch is None or (job.room > batch.room and not batch.busy):
                    room, batch = _room(coming, batch.room if batch else 0), None
                    room = min(room, decoder.config.max_seq_len)
                    batch = _Batch(decoder, tokenizer, room, len(coming), grid, totals)
                if not batch.take(place, job):
                    break
            coming.popleft()
            coming.extend(islice(queue, 1))
        while first in done:
            yield done.pop(first)
            first += 1
        if batch is not None and batch.busy:
            done.update(batch.run())
            watch(totals)
        elif not coming:
            return


def _checked(job: Job | Finished, context: int) -> Job | Finished:
    """End a job that cannot begin, or that wants no answer."""
    if isinstance(job, Finished):
        return job
    error = None
    if not job.ids:
        error = DataError("the prompt is empty: there is nothing to continue")
    elif job.room > context:
        error = LimitError(
            f"prompt of {counted(len(job.ids))} + max_tokens {job.settings.max_tokens:,} > context"
            f" {context:,}; shorten one"
        )
    elif job.settings.max_tokens:
        return job
    return Finished(key=job.key, prompt_tokens=len(job.ids), error=error)


def _room(coming: Iterable[tuple[int, Job | Finished]], before: int) -> int:
    """Return how long rows must be for the jobs that are known, and at least twice as before.

    A longer job waits until all rows are empty, which must not happen often.
    """
    return max(2 * before, *(job.room for _, job in coming if isinstance(job, Job)))


class _Answer:
    """What is written for a job so far, and all that choosing the next token takes."""

    def __init__(self, place: int, job: Job, tokenizer: Tokenizer) -> None:
        self.place, self.job = place, job
        self.began = False  # its row still holds the job before
        self.tokens: list[Token] = []
        self._vocab_size = tokenizer.vocab_size
        self._seen = list(job.ids)
        self._random = seeded(job.seed)
        self._writer = Writer(tokenizer, job.stops, job.settings.max_tokens, tokenizer.ends)

    def choose(self, logits_V: np.ndarray) -> Token:
        """Add the next token."""
        logits_V = logits_V[: self._vocab_size]
        token_id = sample(logits_V, self._seen, self.job.settings, self._random)
        self._seen.append(token_id)
        now, most = time.perf_counter(), self.job.logprobs
        known = {} if most is None else scores(logits_V, token_id, most)
        token = self._writer.write(token_id, time=now, **known)
        self.tokens.append(token)
        return token


class _Batch:
    """A cache, and the answers that its rows are busy with."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        room: int,
        rows: int,
        grid: int,
        totals: Totals,
    ) -> None:
        self.decoder, self.tokenizer, self.grid, self.totals = decoder, tokenizer, grid, totals
        self.room = room
        try:
            self.cache = decoder.cache(room, rows)
        except (MemoryError, RuntimeError):  # torch has an error of its own
            raise ResourceError(
                f"no memory for {rows} rows of {room:,} tokens; choose fewer --rows or --max-tokens"
            ) from None
        self.prompts: list[Sequence[int]] = [()] * rows  # what each row of the cache begins with
        self.free = list(range(rows))
        self.busy: dict[int, _Answer] = {}  # by row, in the order of their jobs

    def take(self, place: int, job: Job) -> bool:
        """Give a job to a row; say no if none is free, or they are too short."""
        if not self.free or job.room > self.room:
            return False
        self.busy[self.free.pop()] = _Answer(place, job, self.tokenizer)
        self.totals.rows = max(self.totals.rows, len(self.busy))
        return True

    def run(self) -> dict[int, Finished]:
        """Make one pass: a token more for rows that write, a piece more for those that read.

        Returns: the answers that ended, by the place of their jobs.
        """
        runs = [Run(row, [a.tokens[-1].id]) for row, a in self.busy.items() if a.tokens]
        runs += self._pieces()
        logits = iter(self.decoder.forward(self.cache, runs))
        self.totals.passes += 1
        ended = {}
        for run in runs:
            if not run.wanted:
                continue
            answer = self.busy[run.row]
            self.totals.made += 1
            error = None
            try:
                going = not answer.choose(next(logits)).finish_reason
            except CheckpointError as found:  # no numbers: of this row, maybe not of the others
                going, error = False, found
            if not going:
                job = answer.job
                ended[answer.place] = Finished(
                    key=job.key, prompt_tokens=len(job.ids), tokens=answer.tokens, error=error
                )
                del self.busy[run.row]
                self.free.append(run.row)
        return ended

    def _pieces(self) -> Iterator[Run]:
        """Cut the next pieces of prompts, which together are no longer than one."""
        left = PIECE
        for row, answer in self.busy.items():
            if answer.tokens:
                continue
            if not answer.began and not (left and self._begin(row, answer)):
                return
            held, ids = self.cache.lengths[row], answer.job.ids
            piece = ids[held : held + PIECE - held % PIECE]
            if len(piece) > left:
                return
            left -= len(piece)
            yield Run(row, piece, wanted=int(held + len(piece) == len(ids)))

    def _begin(self, row: int, answer: _Answer) -> bool:
        """Let a row take over what the cache holds of its prompt.

        Says no if another row will soon hold more of it than any does now.
        """
        ids = answer.job.ids
        most = len(ids) - 1  # the last token has to be run: its logits are wanted
        common = [
            min(_common(ids, prompt), most) // self.grid * self.grid for prompt in self.prompts
        ]
        there = [min(pair) for pair in zip(common, self.cache.lengths, strict=True)]
        source = there.index(max(there))
        if max(common) >= there[source] + SHARED:
            return False
        shared = there[source] if there[source] >= SHARED else 0
        if shared and source != row:
            self.cache.copy(source, row)
        try:
            self.cache.rewind(row, shared)
        except ValueError:  # a sliding window has let go of what lies that far back
            shared = 0
            self.cache.rewind(row, 0)
        self.prompts[row], answer.began = ids, True
        self.totals.prompt += len(ids)
        self.totals.shared += shared
        return True


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two prompts have in common at the beginning."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n
