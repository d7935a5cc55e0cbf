"""A tiny base and rows to tune it on, made in a moment."""

import json
from pathlib import Path

import torch

from engine.checkpoint import Snapshot, save
from engine.config import SampleConfig
from engine.recipe import dump, load
from engine.text.tokenizer import Tokenizer
from tests.conftest import make_model

WORDS = ("apple", "pear", "plum", "fig", "lime", "date", "kiwi", "nut", "pea", "bean")


def write_base(folder: Path, tokenizer: Tokenizer, **changes) -> Path:
    """Save a random model as a run would; returns its checkpoint."""
    model = make_model(vocab_size=tokenizer.vocab_size, **changes)
    snapshot = Snapshot(
        step=1,
        model=model,
        tokenizer=tokenizer,
        recipe_yaml=dump(load("data: {train: pydoc}", "test")),
        sample=SampleConfig(),
        facts={},
        optimizer={"none": torch.zeros(1)},
        state={},
    )
    save(folder, snapshot, best=True)
    return folder / "best"


def rows(count: int) -> list[dict[str, str]]:
    """Return questions whose answers are as long as the question, so that lengths are ragged."""
    made = []
    for number in range(count):
        words = [WORDS[(number + k * k) % len(WORDS)] for k in range(1 + number % 4)]
        made.append({"prompt": " ".join(words) + " =", "completion": " " + "".join(words)})
    return made


def write_rows(file: Path, made: list[dict[str, str]]) -> Path:
    """Write rows as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return file
