"""--draft: what guesses tokens ahead of the model, and a line about how that went."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cli.options import the_model
from cli.render import size
from engine.errors import RecipeError
from engine.generate.decoder import Weighed
from engine.generate.pace import MOST, Speculated
from engine.generate.speculate import Draft, Guesser, PromptLookup, check_vocabulary
from engine.text.tokenizer import Tokenizer

Load = Callable[..., tuple[Weighed, Tokenizer]]


def make_guesser(
    draft: str, most: int | None, folder: Path, decoder: Weighed, tokenizer: Tokenizer, load: Load
) -> Guesser:
    """Return the guesser that --draft names, for the model loaded from a folder.

    Raises: RecipeError for layers that the model lacks or a draft that cannot win; CheckpointError
    for another vocabulary.
    """
    most = most or MOST
    if draft == "lookup":
        return PromptLookup(most=most)
    kind, colon, number = draft.partition(":")
    if colon and kind == "layers":
        layers = decoder.config.n_layers
        if not number.isdecimal() or not 0 < int(number) < layers:
            raise RecipeError(f"--draft {draft}: not layers:N with N from 1 to {layers - 1}")
        load = partial(load, folder, layers=int(number))
    else:
        load = partial(load, the_model(draft))
    cheaper, its_tokenizer = load()
    check_vocabulary(tokenizer, its_tokenizer, draft)
    its, ours = cheaper.bytes_read(0), decoder.bytes_read(0)
    if its >= ours:
        raise RecipeError(
            f"--draft {draft}: reads {size(its)} a token where the model reads {size(ours)}, so no"
            " guess could save time; take a smaller draft, or lookup"
        )
    guesser = Draft(cheaper, most, cost=its / ours)
    guesser.name = draft
    return guesser


def as_fields(report: Speculated) -> dict[str, Any]:
    """Return what --json says of it."""
    return dataclasses.asdict(report) | {"accepted_per_forward": report.accepted_per_forward}


def as_words(report: Speculated) -> list[str]:
    """Return what the statistics say of it, fact by fact."""
    if report.guessed:
        facts = [
            f"{report.guesser}: {report.accepted:,} of {report.guessed:,} guesses right",
            f"{report.accepted_per_forward:.1f} a pass",
        ]
    else:
        facts = [f"{report.guesser}: nothing guessed"]
    if report.guessed and report.real is not None:
        facts.append(f"{report.real:.2f}× as fast, {report.expected:.2f}× expected")
    return [*facts, report.off] if report.off else facts
