"""What `lm count-tokens` can be asked for, one function each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cli.counting import (
    DEFAULT_MODEL,
    By,
    Report,
    Special,
    check_budget,
    class_of,
    count_all,
    count_diff,
    counters_of,
)
from cli.inputs import Source, gather, read_diff
from cli.render import emit_json, say
from engine.errors import RecipeError

if TYPE_CHECKING:
    from cli.count_costs import Priced, Pricing
    from cli.cutting import Strategy
    from engine.text.counting import TokenCounter


# What is counted; files may narrow a diff.
SUBJECTS = ("FILE", "--text", "--chat", "--git-diff", "--usage")
# An option that would do nothing without one of others.
NEEDS = {
    "--output-tokens": ("--cost",),
    "--cached": ("--cost",),
    **dict.fromkeys(("--batch", "--price-file", "--at"), ("--cost", "--usage")),
    **dict.fromkeys(("--overlap", "-o"), ("--split",)),
}
# An option that would do nothing beside others.
COUNTS = ("--cost", "--budget", "--by", "--top", "--jsonl")
EXCLUDES = {
    "--fit-to": ("--split", "--chat", "--git-diff", "--usage", "--special", *COUNTS),
    "--split": ("--chat", "--git-diff", "--usage", "--special", *COUNTS),
    "--usage": ("--special", *COUNTS),
    "--special": ("--chat", "--git-diff"),
    "--json": ("--jsonl",),
}


def check_together(options: Mapping[str, object]) -> None:
    """Refuse options that would be ignored: `options` are all of them, those not given empty.

    Raises: RecipeError naming two that do not go together, or one that lacks another.
    """
    given = [name for name, value in options.items() if value not in (None, False, [])]
    subjects = [name for name in SUBJECTS if name in given]
    if len(subjects) > 1 and subjects != ["FILE", "--git-diff"]:
        raise RecipeError(f"{' and '.join(subjects)} exclude each other; choose one")
    for name in given:
        wanted = NEEDS.get(name, ())
        if wanted and not any(other in given for other in wanted):
            raise RecipeError(f"{name} does nothing without {' or '.join(wanted)}")
        for other in EXCLUDES.get(name, ()):
            if other in given:
                raise RecipeError(f"{name} and {other} exclude each other; choose one")


@dataclass(frozen=True)
class Showing:
    """How the answer is to be shown."""

    as_json: bool
    as_lines: bool
    quiet: bool
    by: By | None
    top: int | None


@dataclass(frozen=True)
class Cut:
    """How a text is to be cut."""

    size: int
    overlap: int
    strategy: "Strategy"
    folder: Path | None
    into_chunks: bool


def counters_or_default(models: Sequence[str] | None, quiet: bool) -> list["TokenCounter"]:
    """Return a counter for each model of -m; without any, for the default, which is said."""
    counters = counters_of(models, DEFAULT_MODEL)
    if not models:
        counter = counters[0]
        say(f"for {counter.name} ({counter.tokenizer}, {class_of(counter)}), as no -m says", quiet)
    return counters


def the_file(path: Path) -> Source:
    """Return a file of JSON, or standard input for `-`."""
    return Source("-") if str(path) == "-" else Source(str(path), path)


def count_texts(
    words: Sequence[str],
    text: str | None,
    everything: bool,
    counters: Sequence["TokenCounter"],
    special: Special,
) -> Report:
    """Count files, folders, the pipe or one text."""
    return count_all(gather(words, text, everything), counters, special)


def count_git_diff(
    revision: str, words: Sequence[str], counters: Sequence["TokenCounter"]
) -> Report:
    """Count the diff from a revision to the working tree."""
    return Report(counters, count_diff(read_diff(revision, words), counters))


def count_chat(path: Path, counters: Sequence["TokenCounter"]) -> Report:
    """Count the requests of a file."""
    from cli.chat_counts import count_chats

    return count_chats(the_file(path), counters)


def cut(
    words: Sequence[str],
    text: str | None,
    counters: Sequence["TokenCounter"],
    how: Cut,
    show: Showing,
) -> None:
    """Print what fits, or write chunks."""
    from cli.cutting import only_source, print_fitting, write_chunks

    option = "--split" if how.into_chunks else "--fit-to"
    if len(counters) != 1:
        raise RecipeError(f"{option} cuts for one model; give one -m")
    source = only_source(gather(words, text, False), option)
    if how.into_chunks:
        write_chunks(source, counters[0], how.size, how.overlap, how.folder, show.quiet)
    else:
        print_fitting(source, counters[0], how.size, how.strategy, show.as_json, show.quiet)


def price_usage(
    path: Path, models: Sequence[str] | None, pricing: "Pricing", show: Showing
) -> None:
    """Price the usage that providers reported."""
    from cli import count_costs
    from cli.count_views import show_costs

    if models and len(models) > 1:
        raise RecipeError("--usage was of one model; give one -m, or none if the file names them")
    priced = count_costs.price_usage(the_file(path), models[0] if models else None, pricing)
    if show.as_json:
        emit_json("count-tokens/usage", {"costs": [one.as_json() for one in priced]})
    else:
        show_costs(priced)
    _say_sources(priced, show.quiet)


def present(report: Report, show: Showing, pricing: "Pricing | None", budget: int | None) -> None:
    """Show a report, then raise what is wrong: an input that could not be read, the budget.

    Raises: the error of the first unreadable input; LimitError over the budget.
    """
    from cli import count_views

    priced: list[Priced] = []
    if pricing:
        from cli.count_costs import price_counts

        priced = price_counts(report, pricing)
    if show.as_lines:
        count_views.emit_rows(report)
        for one in priced:
            emit_json("count-tokens/cost", one.as_json())
    elif show.as_json:
        emit_json("count-tokens", count_views.as_json(report, show.by, show.top, priced))
    else:
        count_views.show_all(report, show.by, show.top, priced)
    count_views.tell(report, show.quiet)
    _say_sources(priced, show.quiet)
    for error in report.problems[1:]:
        say(f"error: {error}")
    if report.problems:
        raise report.problems[0]
    if budget is not None:
        check_budget(report, budget)


def _say_sources(priced: Sequence["Priced"], quiet: bool) -> None:
    """Say where prices come from and how old they are."""
    for source, dated in dict.fromkeys((one.source, one.dated) for one in priced if one.source):
        say(f"prices: {source}, {dated}, USD", quiet)
    for one in priced:
        for note in sorted(one.notes) + ([one.missing] if one.missing else []):
            say(f"{one.model}: {note}", quiet)
