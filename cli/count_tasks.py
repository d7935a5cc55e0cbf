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
    on_terminal,
)
from cli.inputs import Source, gather, read_diff
from cli.render import emit_json, say
from engine.errors import LimitError, RecipeError

if TYPE_CHECKING:
    from cli.count_costs import Priced, Pricing
    from cli.cutting import Strategy
    from engine.text.counting import TokenCounter


# What is counted; files may narrow a diff.
SUBJECTS = ("FILE", "--text", "--chat", "--git-diff", "--usage")
# An option that would do nothing without one of others.
NEEDS = {
    **dict.fromkeys(("--output-tokens", "--cached", "--cache-write", "--reasoning"), ("--cost",)),
    **dict.fromkeys(("--batch", "--price-file", "--at"), ("--cost", "--usage")),
    **dict.fromkeys(("--overlap", "-o"), ("--split",)),
    "--strategy": ("--fit-to",),
}
# An option that would do nothing beside others.
COUNTS = ("--cost", "--budget", "--by", "--top", "--jsonl")
EXCLUDES = {
    "--fit-to": ("--split", "--chat", "--git-diff", "--usage", "--special", *COUNTS),
    "--split": ("--chat", "--git-diff", "--usage", "--special", *COUNTS),
    "--usage": ("--special", "--all", *COUNTS),
    "--special": ("--chat", "--git-diff"),
    "--all": ("--text", "--chat", "--git-diff", "--fit-to", "--split"),
    "--by": ("--chat", "--jsonl"),
    "--top": ("--chat", "--jsonl"),
    "--json": ("--jsonl",),
    "-o": ("--json",),
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
    views = [name for name in ("--by", "--top") if name in given]
    if views and "--cost" in given and "--json" not in given and not on_terminal():
        raise RecipeError(f"{views[0]} does nothing with --cost in a pipe; choose one, or --json")


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
    """Count the diff from a revision to the working tree. Raises: RecipeError if it is empty."""
    if not revision:
        raise RecipeError("--git-diff needs a revision, such as HEAD")
    return Report(counters, count_diff(read_diff(revision, words), counters))


def count_chat(path: Path, models: Sequence[str] | None, quiet: bool) -> Report:
    """Count the requests of a file: for the models of -m, or for the one that they name."""
    from cli.chat_counts import count_chats, own_model, read_requests

    requests = read_requests(the_file(path))
    if models:
        return count_chats(requests, counters_of(models))
    requests = list(requests)
    if (own := own_model(requests)) is None:
        return count_chats(requests, counters_or_default(None, quiet))
    try:
        counters = counters_of([own])
    except RecipeError as error:
        raise RecipeError(f"{path} names the model {own}: {error}; or give -m") from None
    say(f"for {own} ({class_of(counters[0])}), as the requests say", quiet)
    return count_chats(requests, counters)


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
    paths: Sequence[Path], models: Sequence[str] | None, pricing: "Pricing", show: Showing
) -> None:
    """Price the usage that providers reported."""
    from cli import count_usage
    from cli.count_views import show_costs, show_sum
    from engine.text.answers import LeftOut

    names = [name for word in models or [] for name in word.split(",") if name]
    if len(names) > 1:
        raise RecipeError("--usage was of one model; give one -m, or none if the file names them")
    left_out = LeftOut()
    sources = [the_file(path) for path in paths]
    priced = count_usage.price_usage(sources, names[0] if names else None, pricing, left_out)
    if show.as_json:
        emit_json("count-tokens/usage", {"costs": [one.as_json() for one in priced]})
    else:
        show_costs(priced)
        show_sum(priced)
    for line in left_out.lines():
        say(line, show.quiet)
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
    plain = not (show.as_json or show.as_lines or on_terminal())
    if plain and priced and all(one.fits is False for one in priced):
        raise LimitError("no model is large enough: " + ", ".join(one.model for one in priced))


def _say_sources(priced: Sequence["Priced"], quiet: bool) -> None:
    """Say where prices come from and how old they are."""
    for source, dated in dict.fromkeys((one.source, one.dated) for one in priced if one.source):
        say(f"prices: {source}, {dated}, USD", quiet)
    for one in priced:
        for note in [*_ends(one), *filter(None, [one.missing]), *sorted(one.notes)]:
            say(f"{one.model}: {note}", quiet)


def _ends(one: "Priced") -> list[str]:
    """Say between what a price lies that is not exact."""
    if one.ends is None:
        return []
    low, high = one.ends
    return [f"at least {low:f} USD" if high is None else f"{low:f} to {high:f} USD"]
