"""How counts are shown: bare numbers in a pipe, tables on a terminal, JSON with its schema."""

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from cli.count_costs import Priced
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

if TYPE_CHECKING:
    from rich.table import Table

NAMES = 18  # columns that a name or a note may be folded into


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
            # Without this the number would be taken for the answer: said even if all else is not.
            say(f"{counter.name}: at least; not known and not counted: {kinds}")
        if counter.plus_minus and not on_terminal():
            say(f"{counter.name}: {class_of(counter)}", quiet)
        longest = max(report.prompts(index), default=0)
        if counter.window and counter.fits(longest) is None:
            low, high = counter.interval(longest)
            ends = f"between {low:,} and {high:,} tokens"
            say(f"{counter.name}: {ends}, may not fit its {counter.window:,}", quiet)


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
        parts = parts_of(report.rows, index)
        for part in parts:
            tokens = "?" if part.tokens is None else f"{part.tokens:,}"
            table.add_row(tokens, part.kind, f"[dim]{part.how}[/]")
        unknown = any(part.tokens is None for part in parts)
        total = "≥ " * unknown + _number(counter, report.totals[index])
        count = f"{len(report.rows):,} conversation{'s' * (len(report.rows) != 1)}"
        table.add_row(total, count, _plain(counter.name), style="bold")
    _print(table)


# Columns of money, and the kinds of tokens that each adds up.
MONEY = {
    "input": ("input",),
    "cached": ("cached_input",),
    "written": ("cache_write", "cache_write_1h"),
    "output": ("output",),
    "reasoning": ("reasoning",),
    "requests": ("request",),
}


def show_costs(priced: Sequence[Priced]) -> None:
    """Show what each model would take, or took."""
    if not on_terminal():
        for one in priced:
            amount = "-" if one.total is None else f"{one.total:f}"
            emit("\t".join([str(one.tokens), amount, one.model, *one.remarks]))
        return
    from rich.table import Table

    rows = [_cost_cells(one) for one in priced]
    names = [name for name in (rows[0] if rows else []) if any(row[name] for row in rows)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        if name in ("model", ""):
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(row[name] for name in names))
    _print(table)


def _cost_cells(one: Priced) -> dict[str, str]:
    """Return the cells of a model's line by their column; a column without any is not shown."""
    amounts = {name: one.amount(*kinds) for name, kinds in MONEY.items()}
    return {
        "USD": "?" if one.total is None else one.sign + money(one.total),
        "range": _range(one),
        **{name: money(amount) if amount else "" for name, amount in amounts.items()},
        "tokens": f"{one.sign}{one.tokens:,}",
        "out": f"{one.answers:,}" if one.answers else "",
        "of context": f"{100 * one.longest / one.window:.1f} %" if one.window else "",
        "model": _plain(one.model),
        "": f"[dim]{_plain(one.note)}[/]" if one.note else "",
    }


def _range(one: Priced) -> str:
    """Return between what a price lies."""
    if one.ends is None:
        return ""
    low, high = one.ends
    return f"≥ {money(low)}" if high is None else f"{money(low)} – {money(high)}"


def show_sum(priced: Sequence[Priced]) -> None:
    """Show on a terminal what all models cost together."""
    if on_terminal() and len(priced) > 1:
        whole = sum((one.low for one in priced), Decimal(0))
        tokens, answers = sum(one.tokens for one in priced), sum(one.answers for one in priced)
        emit(f"{money(whole)} USD in all, for {tokens:,} tokens read and {answers:,} written")


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
        models.append(
            {
                "model": counter.name,
                "tokenizer": counter.tokenizer,
                "tokens": report.totals[index],
                **_exactness(report, index, report.rows),
                "context_window": counter.window,
                "input_limit": counter.input_limit,
                "fits": counter.fits(
                    max(report.prompts(index), default=0), at_least=bool(report.unknown(index))
                ),
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


def _exactness(report: Report, index: int, rows: Sequence[Row]) -> dict[str, Any]:
    """Return the class of a model's sum, and its interval; it has no end if a part is unknown."""
    counter, how = report.counters[index], report.counters[index].exactness
    parts: Sequence[Any] = ()
    if report.requests:
        from cli.chat_counts import class_of_parts, parts_of

        parts = parts_of(rows, index)
        how = class_of_parts(parts)
    low, high = counter.interval(sum(row.tokens[index] for row in rows))
    listed = [{"part": p.kind, "tokens": p.tokens, "class": p.how} for p in parts]
    return {
        "class": how,
        "plus_minus": counter.plus_minus,
        "low": low,
        "high": None if any(part.tokens is None for part in parts) else high,
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
    for row in report.rows:
        known = {c.name: _exactness(report, i, [row]) for i, c in enumerate(report.counters)}
        how = {
            key: {name: found[key] for name, found in known.items()}
            for key in ("class", "low", "high")
        }
        emit_json("count-tokens/input", _row(report, row) | how)


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


def _print(table: "Table") -> None:
    """Print a table; one that would not fit without cutting numbers, as a block for each row."""
    from rich.text import Text

    out = console()
    needed = 0
    blocks: list[list[str]] = [[] for _ in range(table.row_count)]
    for column in table.columns:
        head, *cells = (Text.from_markup(str(c)) for c in (column.header, *column.cells))
        width = max(line.cell_len for text in (head, *cells) for line in text.split())
        needed += 1 + (width if column.justify == "right" else min(width, NAMES))
        column.no_wrap = column.justify == "right"
        named = [f"{' '.join(head.plain.split())}: "] if head.plain else [""]
        for block, cell in zip(blocks, cells, strict=True):
            block += [named[0] + cell.plain] if cell.plain else []
    if needed - 1 > out.width:
        emit("\n\n".join("\n".join(block) for block in blocks))
        return
    out.soft_wrap = False  # a table folds its names, it must not run over the edge
    out.print(table)
