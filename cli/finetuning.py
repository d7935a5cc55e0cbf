"""What `lm finetune` tells: the rows, what of them is learned, answers, and what was forgotten."""

import dataclasses
import sys
from typing import Any

from cli.render import clock, count, emit, emit_json, say, size
from cli.training import Progress, machine_lines, written
from engine.data.samples import Sample
from engine.finetune.answers import TaskScore
from engine.finetune.forgetting import Forgetting
from engine.finetune.objective import Finetuning
from engine.finetune.run import Compared, Probed
from engine.train.run import Evaluated, Finished, Prepared

FEW = 0.05  # so small a share of learned tokens is rarely meant
SHOWN = 60  # characters of a sample
SIDES = {"valid": "rows held out", "test": "kinds of question that were never trained"}


class FinetuningStory:
    """The story of one run of `lm finetune`."""

    name = "finetune"

    def __init__(self) -> None:
        self.probed: Probed | None = None
        self.compared: Compared | None = None
        self.scores: list[Evaluated] = []
        self.first_sample = ""  # by the base, before the first step

    def take(self, event: Any) -> bool:
        """Keep what only finetuning finds out."""
        if isinstance(event, Evaluated):
            self.scores.append(event)
        if isinstance(event, Probed):
            self.probed = event
        elif isinstance(event, Compared):
            self.compared = event
        else:
            return False
        return True

    def header(self, prepared: Prepared) -> list[str]:
        """Say which rows are learned, how much of them, beside what."""
        objective, recipe = _objective(prepared), prepared.recipe
        lines = [f"base   {recipe.train.base}", *_row_lines(objective)]
        if objective.replayed:
            source = recipe.data.replay or "what the base learned"
            share = objective.replayed * recipe.data.seq_len
            share /= share + recipe.train.batch_size * objective.mean_pack
            lines.append(
                f"replay {objective.replayed} windows of {source} in each batch, {share:.0%} of it"
            )
        trained = sum(p.numel() for p in prepared.model.parameters() if p.requires_grad)
        lora = recipe.train.lora
        if lora.rank:
            held = " over an 8-bit base" if lora.base == "int8" else ""
            lines.append(f"lora   rank {lora.rank}, {count(trained)} parameters{held}")
        if self.probed:
            peak = size(self.probed.peak_memory)
            lines.append(f"memory {peak} at the longest batch, {self.probed.tokens:,} tokens")
        return lines + machine_lines(prepared)

    def figure(self, event: Evaluated) -> str:
        """Say the loss of an evaluation."""
        return f"loss {event.score.loss:.4f} over {event.score.tokens:,} tokens of answers"

    def sample(self, progress: Progress) -> str:
        """Answer the first held-out row, as the base did and as the model does now."""
        prepared = progress.prepared
        assert prepared
        if prompt := prepared.recipe.eval.prompt:
            return prompt + _short(written(prepared, prompt))
        asked = next(filter(_is_asked, _objective(prepared).tuning.valid.samples), None)
        if asked is None:
            return ""
        ids = asked.ids[: int(asked.learned.argmax())].tolist()
        said = written(prepared, ids)
        if len(self.scores) == 1 and not self.scores[0].step:
            self.first_sample = said
        special = prepared.tokenizer.special
        question = prepared.tokenizer.decode([token for token in ids if token not in special])
        before = f" · base: {_short(self.first_sample)}" if self.first_sample else ""
        return f"{_short(question, end=True)} → {_short(said)}{before}"

    def report(self, finished: Finished, progress: Progress, as_json: bool, quiet: bool) -> None:
        """Say what was learned and what was forgotten, and what to do next."""
        assert progress.prepared and self.compared
        prepared, compared = progress.prepared, self.compared
        first = next((each.score for each in self.scores if not each.step), None)
        best = finished.folder / "best"
        if as_json:
            facts = {
                "folder": str(best),
                "step": finished.step,
                "best_step": finished.best_step,
                "tokens": finished.tokens,
                "seconds": finished.seconds,
                "loss": finished.score.loss,
                "base_loss": first.loss if first else None,
                "answers": [
                    {"side": asked.side, **_task(before, after)}
                    for asked in compared.answers
                    for before, after in zip(asked.before, asked.after, strict=True)
                ],
                "texts": [dataclasses.asdict(text) for text in compared.texts],
                "peak_memory": finished.peak_memory,
            }
            emit_json("finetune", facts)
        elif not sys.stdout.isatty():
            emit(str(best))
        if quiet:
            return
        packs = len(_objective(prepared).packs.bins)
        epochs = finished.step * prepared.recipe.train.batch_size / packs
        say("")
        say(
            f"finetuned for {finished.step} steps, {epochs:.1f} epochs, on {finished.tokens:,}"
            f" tokens in {clock(finished.seconds)}, peak memory {size(finished.peak_memory)}"
        )
        which = "" if finished.best_step == finished.step else f" (best step {finished.best_step})"
        before = f"{first.loss:.4f} before, " if first else ""
        say(f"held-out answers: loss {before}{finished.score.loss:.4f} after{which}")
        if first and finished.score.loss >= first.loss:
            say("no better than the base: a lower train.optim.lr, or more rows, may help")
        for line in (*_answer_lines(compared), *_text_lines(compared.texts)):
            say(line)
        folder = finished.folder
        name = folder.name if folder.parent.name == "checkpoints" else folder
        adapter = bool(prepared.recipe.train.lora.rank)
        talks = prepared.tokenizer.template and prepared.recipe.data.chat != "plain"
        say(
            f"saved {best} · try: lm {'chat' if talks else 'generate …'} -m {name}"
            + f" · whole: lm merge {name} -o …" * adapter
        )


def _objective(prepared: Prepared) -> Finetuning:
    assert isinstance(prepared.objective, Finetuning)
    return prepared.objective


def _row_lines(objective: Finetuning) -> list[str]:
    """Say how many rows there are, what of them is learned, and what became of long ones."""
    recipe, tuning = objective.recipe, objective.tuning
    tally, limit = tuning.train.tally, recipe.data.seq_len
    share = tally.learned / max(1, tally.tokens)
    lines = [
        f"data   {recipe.data.train}: {tally.rows:,} rows of {tuning.format}, {tally.tokens:,}"
        f" tokens; trained {tally.learned:,} of them ({share:.0%})",
        f"held   {tuning.valid.tally.rows:,} rows: {tuning.rule}",
    ]
    if share < FEW:
        lines.append("note   under 5 % of the tokens are learned; is that what you want?")
    if tally.answers:
        rest = "" if tally.stops == tally.answers else "; the others do not teach it to stop"
        lines.append(f"stop   learned in {tally.stops:,} of {tally.answers:,} answers{rest}")
    fates = {"dropped": tally.dropped, "cut": tally.cut, "split": tally.split}
    if gone := [f"{number:,} {what}" for what, number in fates.items() if number]:
        lines.append(f"long   {tally.overlong:,} rows over {limit} tokens: {', '.join(gone)}")
    if tally.lookalikes:
        lines.append(f"text   {tally.lookalikes:,} rows spell control tokens; they stay text")
    if recipe.data.packing:
        lines.append(f"packs  {len(objective.packs.bins):,} of up to {limit} tokens")
    return lines


def _is_asked(sample: Sample) -> bool:
    """Tell whether a sample has a prompt before its first answer."""
    return bool(sample.learned.argmax() > 1)


def _short(text: str, end: bool = False) -> str:
    """Return the beginning of a text, or its end, on one line."""
    line = text.strip().replace("\n", "⏎ ")
    return line[-SHOWN:] if end else line[:SHOWN]


def _task(before: TaskScore, after: TaskScore) -> dict[str, Any]:
    """Return one line of the answers as JSON."""
    low, high = after.interval
    return {
        "task": after.task,
        "n": after.n,
        "before": before.share,
        "after": after.share,
        "low": low,
        "high": high,
        "most_frequent_answer": after.usual / after.n,
    }


def _answer_lines(compared: Compared) -> list[str]:
    """Lay out how many held-out questions were answered word for word."""
    if not compared.answers:
        return []
    width = max(len(score.task) for asked in compared.answers for score in asked.after)
    lines = ["answered word for word (95 % interval; usual: the answer most frequent in training)"]
    for asked in compared.answers:
        lines.append(f"  {SIDES[asked.side]}")
        lines.append(f"    {'':{width}}     n  before   after               usual")
        for before, after in zip(asked.before, asked.after, strict=True):
            low, high = after.interval
            lines.append(
                f"    {after.task:{width}} {after.n:5}  {before.share:6.1%}  {after.share:6.1%}"
                f"  {low:5.1%}–{high:6.1%}  {after.usual / after.n:6.1%}"
            )
    return lines


def _text_lines(texts: list[Forgetting]) -> list[str]:
    """Lay out what the tuning cost on other texts."""
    if not texts:
        return ["forgetting: no text to score it on; name some: eval.texts=pydoc,notes.txt"]
    width = max(len(text.text) for text in texts)
    lines = ["bits per byte of other texts (above 0: forgotten; 95 % interval)"]
    lines.append(f"  {'':{width}}  before   after  difference")
    for text in texts:
        spread = (
            f"({text.low:+.3f} to {text.high:+.3f})" if text.n > 1 else "(one text: no interval)"
        )
        lines.append(
            f"  {text.text:{width}}  {text.before:6.3f}  {text.after:6.3f}"
            f"  {text.difference:+.3f} {spread}"
        )
    return lines
