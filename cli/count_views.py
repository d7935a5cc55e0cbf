"""How counts are shown: bare numbers in a pipe, tables on a terminal, JSON with its schema."""

from collections.abc import Mapping, Sequence
from typing import Any

from cli.count_costs import Priced, fits
from cli.counting import (
    By,
    Report,
    Row,
    added,
    class_of,
    grouped,
    left_out_line,
    on_terminal,
)
from cli.inputs import not_utf8, printable
from cli.render import console, emit, emit_json, say


def tell(report: Report, quiet: bool) -> None:
    """Say on stderr what the numbers do not: estimates, what was left out, odd bytes, specials."""
    whole = added("", report.rows) if report.rows else Row("", 0, ())
    if report.left_out:
        say(left_out_line(report.left_out), quiet)
    if whole.replaced:
        say(f"{not_utf8(whole.replaced)}; each counts as U+FFFD", quiet)
    if whole.specials:
        say(f"{whole.specials:,} special-looking spans (--special text|parse|error)", quiet)
    for index, counter in enumerate(report.counters):
        if kinds := ", ".join(report.unknown(index)):
            say(f"{counter.name}: at least; not known and not counted: {kinds}", quiet)
        if counter.plus_minus and not on_terminal():
            say(f"{counter.name}: {class_of(counter)}", quiet)


def show_all(report: Report, by: By | None, top: int | None, priced: Sequence[Priced]) -> None:
    """Show counts and costs; a pipe gets the one that was asked for."""
    if not priced or on_terminal():
        show(report, by, top)
    if priced:
        if on_terminal():
            emit("")
        show_costs(priced)


def show(report: Report, by: By | None, top: int | None) -> None:
    """Show the rows of a report on stdout, as the reader wants them."""
    rows = ranked(report, by, top)
    if on_terminal():
        if report.requests and by is None:
            _print_parts(report)
        elif len(report.rows) == 1 and by is None and not report.rows[0].changed:
            _print_models(report)
        else:
            _print_table(report, rows)
        return
    whole = added("total", report.rows) if report.rows else Row("total", 0, report.totals, files=0)
    asked = by or top
    if not asked and (report.requests or not (report.several or len(report.rows) > 1)):
        rows = []
    alone = len(report.counters) == 1 and not rows and not asked
    for row in [*rows, whole]:
        for counter, tokens in zip(report.counters, row.tokens, strict=True):
            model = [counter.name] if len(report.counters) > 1 else []
            names = [printable(row.name)] if rows or asked else []
            emit("\t".join([str(tokens), *([] if alone else [*model, *names])]))


def ranked(report: Report, by: By | None, top: int | None) -> list[Row]:
    """Return rows or groups, the largest first where an order was asked for, the rest as one."""
    rows = grouped(report.rows, by or "file")
    if not by and not top:
        return rows
    rows.sort(key=lambda row: -row.tokens[0])
    if top and len(rows) > top:
        rest = added(f"({len(rows) - top:,} more)", rows[top:])
        rows = [*rows[:top], rest]
    return rows


def _print_table(report: Report, rows: Sequence[Row]) -> None:
    """Print a line per row, a column per model."""
    from rich.table import Table

    whole = added("total", report.rows) if report.rows else Row("total", 0, report.totals)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for counter in report.counters:
        table.add_column(f"{counter.name}\n[dim]{_short_class(counter)}[/]", justify="right")
    if changes := any(row.changed for row in rows):
        table.add_column("added", justify="right", style="green")
        table.add_column("removed", justify="right", style="red")
    table.add_column("bytes/\ntoken", justify="right")
    table.add_column("share", justify="right")
    table.add_column("", overflow="fold")
    for row in [*rows, whole]:
        sign = [f"{row.changed[0][0]:,}", f"{row.changed[0][1]:,}"] if row.changed else ["", ""]
        style = "bold" if row is whole else None
        share = row.tokens[0] / whole.tokens[0] if whole.tokens[0] else 0.0
        table.add_row(
            *(_number(c, n) for c, n in zip(report.counters, row.tokens, strict=True)),
            *(sign if changes else []),
            _ratio(row, 0),
            f"{100 * share:.1f} %",
            _plain(printable(row.name)) + _files(row),
            style=style,
        )
    _print(table)


def _print_models(report: Report) -> None:
    """Print one input: a line per model."""
    from rich.table import Table

    row = report.rows[0]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("tokens", "bytes/token", "of context"):
        table.add_column(name, justify="right")
    table.add_column("model", overflow="fold")
    table.add_column("")
    for index, counter in enumerate(report.counters):
        window = counter.window
        share = f"{100 * row.tokens[index] / window:.1f} %" if window else ""
        cells = [_number(counter, row.tokens[index]), _ratio(row, index), share]
        table.add_row(*cells, _plain(counter.name), f"[dim]{_long_class(counter)}[/]")
    _print(table)


def _print_parts(report: Report) -> None:
    """Print what conversations consist of: a block per model."""
    from rich.table import Table

    from cli.chat_counts import parts_of

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(justify="right")
    for index, counter in enumerate(report.counters):
        parts = parts_of(report, index)
        for part in parts:
            tokens = "?" if part.tokens is None else f"{part.tokens:,}"
            table.add_row(tokens, part.kind, f"[dim]{part.how}[/]")
        unknown = any(part.tokens is None for part in parts)
        total = "at least " * unknown + _number(counter, report.totals[index])
        count = f"{len(report.rows):,} conversation{'s' * (len(report.rows) != 1)}"
        table.add_row(total, count, _plain(counter.name), style="bold")
    _print(table)


def show_costs(priced: Sequence[Priced]) -> None:
    """Show what each model would take, the cheapest first."""
    if not on_terminal():
        for one in priced:
            amount = "-" if one.total is None else f"{one.total:f}"
            note = ["does not fit"] if fits(one) is False else []
            emit("\t".join([str(one.tokens), amount, one.model, *note]))
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("USD", "input", "output", "tokens", "of context"):
        table.add_column(name, justify="right")
    table.add_column("model", overflow="fold")
    table.add_column("")
    for one in priced:
        whole = "?" if one.total is None else money(one.total)
        sides = [money(one.amount("input")), money(one.amount("output"))] if one.kinds else ["", ""]
        window = f"{100 * one.longest / one.window:.1f} %" if one.window else ""
        note = "does not fit" if fits(one) is False else one.note
        about = "≈ " * bool(one.spread)
        cells = [about + whole, *sides, f"{about}{one.tokens:,}", window]
        table.add_row(*cells, _plain(one.model), f"[dim]{_plain(note)}[/]")
    _print(table)


def money(amount: Any) -> str:
    """Write an amount of USD with enough digits to be compared."""
    return (
        f"{amount:,.2f}" if amount >= 100 else f"{amount:.4f}" if amount >= 1 else f"{amount:.6f}"
    )


def as_json(
    report: Report, by: By | None, top: int | None, priced: Sequence[Priced]
) -> Mapping[str, Any]:
    """Return everything that was found, for `--json`."""
    models = []
    for index, counter in enumerate(report.counters):
        tokens, window = report.totals[index], counter.window
        longest = max((row.tokens[index] for row in report.rows), default=0)
        longest = longest if report.requests else tokens
        models.append(
            {
                "model": counter.name,
                "tokenizer": counter.tokenizer,
                "tokens": tokens,
                **_exactness(report, index),
                "context_window": window,
                "fits": None if window is None else longest <= window,
            }
        )
    value: dict[str, Any] = {"models": models, "inputs": [_row(report, r) for r in report.rows]}
    if by or top:
        value["groups"] = [
            _row(report, row) | {"files": row.files} for row in ranked(report, by, top)
        ]
    value["left_out"] = {k: list(map(_text, names)) for k, names in report.left_out.items()}
    value["unreadable"] = [str(error) for error in report.problems]
    if priced:
        value["costs"] = [one.as_json() for one in priced]
    return value


def _exactness(report: Report, index: int) -> dict[str, Any]:
    """Return the class of a model's sum, and its interval where it is an estimate."""
    counter, how = report.counters[index], report.counters[index].exactness
    parts: Sequence[Any] = ()
    if report.requests:
        from cli.chat_counts import class_of_parts, parts_of

        parts = parts_of(report, index)
        how = class_of_parts(parts)
    tokens, spread = report.totals[index], counter.plus_minus
    listed = [{"part": p.kind, "tokens": p.tokens, "class": p.how} for p in parts]
    return {
        "class": how,
        "plus_minus": spread,
        "low": round(tokens * (1 - spread)),
        "high": round(tokens * (1 + spread)),
        **({"parts": listed} if listed else {}),
    }


def _row(report: Report, row: Row) -> dict[str, Any]:
    """Return one row for JSON; tokens by the name of the model."""
    names = [counter.name for counter in report.counters]
    value: dict[str, Any] = {
        "name": _text(row.name),
        "bytes": row.bytes,
        "tokens": dict(zip(names, row.tokens, strict=True)),
        "not_utf8": row.replaced,
        "special_spans": row.specials,
    }
    if row.changed:
        value["added"] = {n: a for n, (a, _) in zip(names, row.changed, strict=True)}
        value["removed"] = {n: r for n, (_, r) in zip(names, row.changed, strict=True)}
    return value


def emit_rows(report: Report) -> None:
    """Write an object per input, for `--jsonl`."""
    classes = {c.name: _exactness(report, i)["class"] for i, c in enumerate(report.counters)}
    for row in report.rows:
        emit_json("count-tokens/input", _row(report, row) | {"class": classes})


def _text(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _plain(text: str) -> str:
    """Return text that rich takes as it is."""
    from rich.markup import escape

    return escape(text)


def _files(row: Row) -> str:
    several = row.files > 1 and not row.name.startswith("(")
    return f" [dim]{row.files:,} files[/]" if several else ""


def _short_class(counter) -> str:
    return counter.tokenizer if counter.exactness == "exact" else class_of(counter)


def _long_class(counter) -> str:
    return f"{counter.tokenizer}, exact" if counter.exactness == "exact" else class_of(counter)


def _number(counter, tokens: int) -> str:
    return f"{'≈ ' if counter.plus_minus else ''}{tokens:,}"


def _ratio(row: Row, index: int) -> str:
    return f"{row.bytes / row.tokens[index]:.2f}" if row.tokens[index] else ""


def _print(table) -> None:
    out = console()
    out.soft_wrap = False  # a table folds its names, it must not run over the edge
    out.print(table)
