"""What `lm train` tells: which text, bits per byte, and dumb predictors of the same bytes."""

import sys
from collections.abc import Iterator
from typing import Any

from cli.render import clock, count, emit, emit_json, say, size
from cli.training import Progress, machine_lines, written
from engine.train.baselines import Baseline, baselines
from engine.train.prepare import Data
from engine.train.pretrain import Pretraining
from engine.train.run import Evaluated, Finished, Prepared


class PretrainingStory:
    """The story of one run of `lm train`."""

    name = "train"

    def take(self, event: Any) -> bool:
        """Take nothing: such a run has only events that every run has."""
        return False

    def header(self, prepared: Prepared) -> list[str]:
        """Say what is about to be trained, on what."""
        data, source = _data(prepared), prepared.recipe.data.train
        shards = data.shards
        per_token = shards.train.bytes / max(1, shards.train.tokens)
        lines = [
            f"data   {source}: {shards.train.documents:,} documents, {size(shards.train.bytes)},"
            f" {shards.train.tokens:,} tokens, {per_token:.2f} bytes/token"
            + (" (cached)" if shards.cached else ""),
            f"held   {shards.valid.documents:,} documents, {size(shards.valid.bytes)}:"
            f" {shards.rule}",
        ]
        if data.dropped:
            reasons = ", ".join(f"{n} {reason}" for reason, n in data.dropped.items())
            lines.append(f"left   out: {reasons}")
        return lines + machine_lines(prepared)

    def figure(self, event: Evaluated) -> str:
        """Say the bits per byte of an evaluation."""
        return f"{event.score.bits_per_byte:.4f} bits per byte of {size(event.score.bytes)}"

    def sample(self, progress: Progress) -> str:
        """Continue the recipe's prompt."""
        assert progress.prepared
        prompt = progress.prepared.recipe.eval.prompt
        return prompt + written(progress.prepared, prompt) if prompt else ""

    def report(self, finished: Finished, progress: Progress, as_json: bool, quiet: bool) -> None:
        """Say how good the model is, beside dumb predictors, and what to do next."""
        assert progress.prepared
        data = _data(progress.prepared)
        seen = not quiet or as_json  # the compressors take a while
        if seen:
            say("comparing with compressors …", quiet)
        rows = list(baselines(data.shards, data.tokenizer, finished.score.bytes)) if seen else []
        score = finished.score
        if as_json:
            emit_json(
                "train",
                {
                    "folder": str(finished.folder / "best"),
                    "step": finished.step,
                    "best_step": finished.best_step,
                    "tokens": finished.tokens,
                    "seconds": finished.seconds,
                    "bits_per_byte": score.bits_per_byte,
                    "loss": score.loss,
                    "held_out_bytes": score.bytes,
                    "left_out": data.dropped,
                    "parameters": progress.prepared.parameters,
                    "peak_memory": finished.peak_memory,
                    "baselines": {row.name: row.bits_per_byte for row in rows},
                },
            )
        elif not sys.stdout.isatty():
            emit(str(finished.folder / "best"))
        if quiet:
            return
        for line in _report_lines(finished, progress, data, rows):
            say(line)
        name = finished.folder.name
        name = name if finished.folder.parent.name == "checkpoints" else finished.folder
        say(f'saved {finished.folder}/best · try: lm generate "def " -m {name}')


def _report_lines(
    finished: Finished, progress: Progress, data: Data, rows: list[Baseline]
) -> Iterator[str]:
    """Lay out what was trained, and its score among those of dumb predictors."""
    assert progress.prepared
    score, whole = finished.score, data.shards.valid.bytes
    epochs = finished.tokens / max(1, data.shards.train.tokens)
    yield ""
    yield (
        f"trained {count(progress.prepared.parameters)} parameters for {finished.step} steps on"
        f" {finished.tokens:,} tokens ({epochs:.2f} epochs) in {clock(finished.seconds)},"
        f" peak memory {size(finished.peak_memory)}"
    )
    part = size(score.bytes) + ("" if score.bytes == whole else f" of {size(whole)}")
    early = finished.best_step != finished.step
    which = f", of the best step {finished.best_step}" if early else ""
    yield f"bits per byte on held-out text, {part}{which} (lower is better):"
    table = [("this model", score.bits_per_byte, "")]
    table += [(row.name, row.bits_per_byte, row.note) for row in rows]
    for name, figure, note in sorted(table, key=lambda row: row[1] if row[1] is not None else 99):
        shown = f"{figure:.3f}" if figure is not None else "  –  "
        mark = " ◀" if name == "this model" else ""
        yield f"  {shown}  {name}{mark}{'  ' + note if note else ''}"


def _data(prepared: Prepared) -> Data:
    """Return the text that is learned."""
    assert isinstance(prepared.objective, Pretraining)
    return prepared.objective.data
