"""Examples to samples: token ids with a mask of what is learned, none longer than the limit.

What is too long is refused, dropped, cut or split, and counted; an answer is never cut off. Ids and
mask are made by `engine/data/masks.py`. Next on the arrow: `engine/data/batches.py`.
"""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np

from engine.data.examples import Example
from engine.data.masks import Masked, Masker
from engine.errors import DataError, RecipeError
from engine.text.renderer import Renderer
from engine.text.settings import Settings
from engine.text.tokenizer import Tokenizer

START_OF_TURN, END_OF_TURN = "<|im_start|>", "<|im_end|>"
CHATML = """
{%- if tools %}{{ raise_exception('the built-in chat template knows no tools') }}{% endif %}
{%- for message in messages %}
    {%- if message.tool_calls %}
        {{- raise_exception('the built-in chat template knows no tool calls') }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
NAMED = 5  # rows that an error names; the others it counts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """One row, or a part of one, as the model learns it. Shapes: ids, learned (T)."""

    where: str
    ids: np.ndarray  # int32
    learned: np.ndarray  # bool: a target, predicted from all ids before it; never the first
    cut: int = 0  # tokens that were taken away
    part: str = ""  # "2/3" of a row that was split


@dataclass(slots=True, kw_only=True)
class Tally:
    """What became of the rows, counted as samples are made."""

    rows: int = 0
    samples: int = 0
    tokens: int = 0  # in samples
    learned: int = 0  # of these
    overlong: int = 0  # rows over the limit, whatever became of them
    dropped: int = 0  # rows
    split: int = 0  # rows
    cut: int = 0  # rows
    cut_tokens: int = 0
    answers: int = 0  # in samples
    stops: int = 0  # of these, the ones that end with a token at which generation stops
    lookalikes: int = 0  # rows with content that looks like control tokens, and stays text
    lengths: array = field(default_factory=lambda: array("I"))  # of every row, before any cut


def with_template(tokenizer: Tokenizer) -> Tokenizer:
    """Return a tokenizer that can write conversations, in ChatML if it has no template of its own.

    One that has neither a template nor the tokens of ChatML is returned as it is.
    """
    ids = {name: token_id for token_id, name in tokenizer.special.items()}
    if tokenizer.template or not {START_OF_TURN, END_OF_TURN} <= ids.keys():
        return tokenizer
    first = [tokenizer.end_of_text] if tokenizer.ends else []
    ends = (*first, *sorted(tokenizer.ends), ids[END_OF_TURN])
    settings = Settings(raw=tokenizer.settings, template=CHATML, ends=ends)
    return Tokenizer(tokenizer.inner, settings)


def make_samples(
    examples: Iterable[Example],
    tokenizer: Tokenizer,
    *,
    chat: str,
    learn: str,
    limit: int,
    overlong: str,
    renderer: Renderer | None = None,
    now: datetime | None = None,
    tally: Tally | None = None,
) -> Iterator[Sample]:
    """Yield the samples of all examples; what happens on the way is counted in `tally`.

    `chat`, `learn` and `overlong` are settings of `data`, `limit` is its `seq_len`; `now` is the
    clock of chat templates.

    Raises: DataError at the end if rows were too long, held nothing to learn, or answers that
    cannot be proved; it names the first of them.
    """
    if limit < 2:
        raise RecipeError(f"data.seq_len={limit} leaves nothing to predict; raise it")
    tally = Tally() if tally is None else tally
    wrong, too_long = [], []
    with Masker(tokenizer, chat, learn, renderer, now) as masker:
        for example in examples:
            tally.rows += 1
            try:
                row = masker.mask(example)
            except DataError as error:
                wrong.append(f"{example.where}: {error}")
                continue
            tally.lengths.append(len(row.ids))
            tally.lookalikes += row.lookalike
            parts = [np.arange(len(row.ids))]
            if len(row.ids) > limit:
                tally.overlong += 1
                if overlong == "error" or (overlong == "split" and example.kind != "text"):
                    too_long.append(f"{example.where} ({len(row.ids):,} tokens)")
                    continue
                parts = _shortened(row, limit, overlong, example.kind == "text")
            _count(tally, row, parts, tokenizer)
            for number, places in enumerate(parts, start=1):
                sample = Sample(
                    where=example.where,
                    ids=row.ids[places],
                    learned=row.learned[places],
                    cut=len(row.ids) - len(places) if len(parts) == 1 else 0,
                    part=f"{number}/{len(parts)}" if len(parts) > 1 else "",
                )
                sample.learned[0] = False
                tally.samples += 1
                tally.tokens += len(sample.ids)
                tally.learned += int(sample.learned.sum())
                yield sample
    _complain(wrong, too_long, limit, overlong)


def _shortened(row: Masked, limit: int, overlong: str, is_text: bool) -> list[np.ndarray]:
    """Return which places of a row that is too long are kept: none, one part, or several."""
    count = len(row.ids)
    places = np.arange(count)
    if overlong == "split":  # the last token of a window begins the next: each is learned once
        return [places[start : start + limit] for start in range(0, count - 1, limit - 1)]
    if overlong == "truncate" and is_text:
        return [places[:limit]]
    prompt = row.answers[0].start if row.answers else count
    if overlong == "truncate" and count - limit < prompt:  # one token stays before the answer
        return [np.delete(places, np.s_[row.bos : row.bos + count - limit])]
    return []


def _count(tally: Tally, row: Masked, parts: list[np.ndarray], tokenizer: Tokenizer) -> None:
    """Count what became of a row."""
    if not parts:
        tally.dropped += 1
        return
    tally.split += len(parts) > 1
    if len(parts) == 1 and len(parts[0]) < len(row.ids):
        tally.cut += 1
        tally.cut_tokens += len(row.ids) - len(parts[0])
    kept = [answer.stop - 1 for answer in row.answers if answer.stop <= parts[-1][-1] + 1]
    tally.answers += len(row.answers)
    tally.stops += sum(int(row.ids[end]) in tokenizer.ends for end in kept)


def _complain(wrong: list[str], too_long: list[str], limit: int, overlong: str) -> None:
    """Raise what is wrong with the rows, if anything: the first of them, and how many."""
    if wrong:
        raise DataError(_some(wrong))
    if too_long:
        choices = "drop or truncate" if overlong == "split" else "drop, truncate or split"
        only = "; split is for text" if overlong == "split" else ""
        raise DataError(
            f"{len(too_long):,} rows are longer than data.seq_len={limit}: {_some(too_long, ', ')};"
            f" raise it or set data.overlong={choices}{only}"
        )


def _some(items: list[str], separator: str = "\n") -> str:
    more = f"{separator}… and {len(items) - NAMED:,} more" if len(items) > NAMED else ""
    return separator.join(items[:NAMED]) + more
