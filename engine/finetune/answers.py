"""Does the model answer? Greedy answers held against exact ones, task by task, with intervals.

A figure alone says little: beside it stand what always giving the most frequent training answer
would reach, and how far chance may have moved it.

Source: Wilson 1927 (score interval of a proportion).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from engine.generate.batching import greedy
from engine.generate.decode import fit_prompt
from engine.model.transformer import Transformer
from engine.text.tokenizer import Tokenizer

MOST = 48  # tokens of an answer
ROWS = 32  # prompts answered at a time
Z = 1.959964  # standard deviations on either side that hold 95 % of a normal distribution


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt as the model reads it, chat template and all, and the one right answer."""

    task: str
    ids: Sequence[int]
    expected: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the model said."""

    question: Question
    text: str
    ended: bool  # by an end token rather than by running out of room

    @property
    def right(self) -> bool:
        """Whether it is the expected text and nothing else; spaces around it do not count."""
        return self.ended and self.text.strip() == self.question.expected.strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """How many answers to one task, or to all, were right."""

    task: str
    n: int
    right: int
    usual: int  # that the most frequent training answer of each task would have got right
    ended: int

    @property
    def share(self) -> float:
        """Return the share of right answers."""
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of the share."""
        return wilson(self.right, self.n)


def wilson(right: int, n: int) -> tuple[float, float]:
    """Return the interval that holds the true share in 95 of 100 samples like this one."""
    share, spread = right / n, Z * Z / n
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def usual_answers(rows: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Return the most frequent completion of each task; of equals, the first in the alphabet."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        counts[row["task"]][row["completion"].strip()] += 1
    return {task: min(c, key=lambda text: (-c[text], text)) for task, c in counts.items()}


def answer(
    model: Transformer, tokenizer: Tokenizer, questions: Sequence[Question], most: int = MOST
) -> Iterator[Answer]:
    """Answer each question greedily, in order of length: equal lengths share a batch unpadded.

    Raises: LimitError if a prompt leaves no room for an answer.
    """
    context = model.config.max_seq_len
    by_length: defaultdict[int, list[Question]] = defaultdict(list)
    for question in questions:
        by_length[len(fit_prompt(list(question.ids), most, context, "error"))].append(question)
    for _, alike in sorted(by_length.items()):
        for first in range(0, len(alike), ROWS):
            group = alike[first : first + ROWS]
            for question, ids in zip(group, _continue(model, tokenizer, group, most), strict=True):
                size = next((k for k, i in enumerate(ids) if i in tokenizer.ends), len(ids))
                text = tokenizer.decode(ids[:size])
                yield Answer(question=question, text=text, ended=size < len(ids))


def _continue(
    model: Transformer, tokenizer: Tokenizer, group: Sequence[Question], most: int
) -> list[list[int]]:
    """Return the likeliest next tokens of prompts of one length, until all have ended."""
    model.eval()
    ends, ended = torch.tensor(sorted(tokenizer.ends)), torch.zeros(len(group), dtype=torch.bool)
    prompts, made = [question.ids for question in group], []
    for next_B1 in greedy(model, prompts, most, tokenizer.vocab_size):
        made.append(next_B1.cpu())
        ended |= torch.isin(made[-1][:, 0], ends)
        if ended.all():
            break
    return torch.cat(made, dim=1).tolist()


def tally(answers: Iterable[Answer], usual: Mapping[str, str]) -> list[TaskScore]:
    """Count per task, in alphabetical order, and last of all in all, under the task "all"."""
    by_task: defaultdict[str, list[Answer]] = defaultdict(list)
    for given in answers:
        by_task[given.question.task].append(given)
    every = [given for task in sorted(by_task) for given in by_task[task]]
    parts = [(task, by_task[task]) for task in sorted(by_task)] + [("all", every)]
    return [
        TaskScore(
            task=task,
            n=len(part),
            right=sum(given.right for given in part),
            usual=sum(
                usual.get(given.question.task) == given.question.expected.strip() for given in part
            ),
            ended=sum(given.ended for given in part),
        )
        for task, part in parts
        if part
    ]
