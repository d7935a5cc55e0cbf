"""What `lm bench` found: tables that fit 80 columns, JSON lines, a picture, a verdict."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.render import console, count, emit_json, size
from engine.bench.cases import Case
from engine.bench.compare import Comparison, Effect, compare
from engine.bench.price import Offer, per_million
from engine.bench.record import read_records
from engine.bench.result import Limits, Result
from engine.bench.stats import mad
from engine.errors import CheckFailed, RecipeError, ResourceError

if TYPE_CHECKING:
    from rich.table import Table

    from engine.machine import Machine

# What of a case is worth a million tokens, and what sellers call it.
SOLD = {"prefill": "input", "decode": "output", "batch": "output"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Money:
    """What power costs here, and what tokens cost elsewhere."""

    watts: float
    price_kwh: float
    offers: Sequence[Offer]


def show_tables(
    results: Sequence[Result], machine: "Machine", limits: Sequence[Limits], money: Money | None
) -> None:
    """Print what was measured: speeds, limits, where the time went, what it costs."""
    out = console()
    out.print(
        f"[dim]{machine.cpu}, {machine.cores} cores, torch {machine.torch}[/]", soft_wrap=False
    )
    for limit in limits:
        peaks = ", ".join(f"{name} {flops / 1e12:.2f}" for name, flops in limit.peaks.items())
        threads = f"{limit.threads} thread{'s' * (limit.threads > 1)}"
        bandwidth = f"memory {limit.bandwidth / 1e9:.1f} GB/s"
        out.print(f"[dim]limits, {threads}: {bandwidth}; TFLOP/s: {peaks}[/]", soft_wrap=False)
    if not results:
        return
    for line in dict.fromkeys(map(_computed, results)):
        out.print(f"[dim]{line}[/]", soft_wrap=False)
    labels = _labels([result.case for result in results])
    tables = [_speeds(results, labels), _shares(results, labels), _stages(results, labels)]
    if money:
        tables.append(_prices(results, labels, money))
    for table in tables:
        if table.row_count:
            out.print()
            out.print(table)
    out.print("[dim]memory: the peak of this process, which has torch in it[/]", soft_wrap=False)
    for line in _cache_lines(results):
        out.print(line, soft_wrap=False)
    if money and money.offers:
        out.print(f"[dim]{money.offers[0].source}; here: electricity alone[/]", soft_wrap=False)
    if any(result.noisy for result in results):
        out.print("\n[yellow]~[/] noisy: the middle half of its repetitions is over 5 % apart")


def _computed(result: Result) -> str:
    """Say who computed, and in what: native int8, keys and values in fp16."""
    case = result.case
    kept = f", keys and values in {case.kv}" if case.kv else ""
    who = "trained" if case.what == "train" else "loaded" if case.what == "load" else "generated"
    return f"{who}: {case.kernels} {case.dtype}{kept}"


def _labels(cases: Sequence[Case]) -> list[tuple[str, str]]:
    """Name each case, with what there is several of in its work, or in all of them."""
    said = {"kernels": "", "dtype": "", "threads": "×", "kv": "kv="}
    labels = []
    for case in cases:
        alike = [other for other in cases if other.what == case.what]
        label = case.name
        for name, sign in said.items():
            among = alike if name == "kernels" else cases
            if name == "kv":  # which goes without saying if it follows from the kernels
                among = [other for other in alike if other.kernels == case.kernels]
            if len({getattr(other, name) for other in among}) > 1:
                label += f" {sign}{getattr(case, name)}"
        common = set.intersection(*(set(other.settings.split()) for other in alike))
        label += "".join(f" {word}" for word in case.settings.split() if word not in common)
        labels.append((case.what, label))
    return labels


def _table(*columns: str) -> "Table":
    """Make a table whose first two columns name a case."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("what")
    table.add_column("case", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _speeds(results: Sequence[Result], labels: Sequence[tuple[str, str]]) -> "Table":
    """Show how fast, how evenly, and how long a reader waits."""
    table = _table("tok/s", "±", "first", "p50", "p95", "p99 ms", "memory")
    for result, label in zip(results, labels, strict=True):
        rate = f"{size(result.rate)}/s" if result.case.what == "load" else _number(result.rate)
        spread = f"{'~' if result.noisy else ''}{100 * result.spread / 2:.0f}%"
        gaps = [_ms(result.gap(share)) for share in (0.5, 0.95, 0.99)]
        table.add_row(*label, rate, spread, _ms(result.first), *gaps, size(result.peak_memory))
    return table


def _shares(results: Sequence[Result], labels: Sequence[tuple[str, str]]) -> "Table":
    """Show what a token costs, and which limit of the machine is near."""
    table = _table("bytes/tok", "GB/s", "of memory", "FLOP/tok", "TFLOP/s", "of peak")
    for result, label in zip(results, labels, strict=True):
        read, flops = result.last.bytes, result.last.flops
        if flops is None:
            continue
        table.add_row(
            *label,
            "" if read is None else size(read),
            "" if read is None else f"{result.rate * read / 1e9:.2f}",
            _percent(result.of_bandwidth),
            count(flops),
            f"{result.rate * flops / 1e12:.3f}",
            _percent(result.of_peak),
        )
    return table


def _stages(results: Sequence[Result], labels: Sequence[tuple[str, str]]) -> "Table":
    """Show where the time of a repetition went; the shares add up to all of it."""
    table = _table("ms")
    table.add_column("where the time goes")
    for result, label in zip(results, labels, strict=True):
        whole = sum(result.stages.values())
        longest = sorted(result.stages.items(), key=lambda item: -item[1])
        parts = [f"{name} {100 * seconds / whole:.1f}%" for name, seconds in longest]
        table.add_row(*label, f"{1000 * whole:,.1f}", " · ".join(parts))
    return table


def _cache_lines(results: Sequence[Result]) -> Iterator[str]:
    """Say what the cache is worth: without it a token costs the more, the longer the text is."""
    gaps = {result.case: result.gap(0.5) for result in results if result.case.what == "kv"}
    several = len({case.how for case in gaps}) > 1
    for case, without in gaps.items():
        kept = gaps.get(dataclasses.replace(case, cache=True))
        if not case.cache and kept and without:
            who = f"{case.kernels} {case.dtype}: " if several else ""
            yield (
                f"{who}without its cache a token at {case.depth:,} takes {without / kept:.1f}"
                f" times as long; a text of as many tokens, about {case.depth * without / 2:,.1f} s"
            )


def _prices(results: Sequence[Result], labels: Sequence[tuple[str, str]], money: Money) -> "Table":
    """Show dollars for a million tokens, here and where they are sold."""
    table = _table("$ per 1M read", "written")
    for result, label in zip(results, labels, strict=True):
        if result.case.what in SOLD:
            price = _money(per_million(result.rate, money.watts, money.price_kwh))
            read = SOLD[result.case.what] == "input"
            table.add_row(*label, price if read else "", "" if read else price)
    for each in money.offers:
        table.add_row("API", each.model, _money(each.input), _money(each.output))
    return table


def show_json(
    results: Sequence[Result], machine: "Machine", limits: Sequence[Limits], money: Money | None
) -> None:
    """Write one object with everything."""
    emit_json(
        "bench",
        {
            "machine": dataclasses.asdict(machine),
            "limits": [dataclasses.asdict(limit) for limit in limits],
            "cases": [_row(result, money) for result in results],
            "offers": [dataclasses.asdict(each) for each in money.offers] if money else [],
        },
    )


def _row(result: Result, money: Money | None) -> dict[str, Any]:
    """Describe one case for --json; times in seconds."""
    row = dataclasses.asdict(result.case) | {
        "repeats": len(result.rates),
        "rate": result.rate,
        "mad": mad(result.rates),
        "spread": result.spread,
        "noisy": result.noisy,
        "first_token": result.first,
        "inter_token": {f"p{p}": result.gap(p / 100) for p in (50, 95, 99)},
        "peak_memory": result.peak_memory,
        "bytes_per_token": result.last.bytes,
        "flops_per_token": result.last.flops,
        "share_of_bandwidth": result.of_bandwidth,
        "share_of_matmul_peak": result.of_peak,
        "stages": result.stages,
        "seconds": sum(each.seconds for each in result.repetitions) / len(result.repetitions),
    }
    if money and result.case.what in SOLD:
        row["usd_per_million"] = per_million(result.rate, money.watts, money.price_kwh)
    return row


def compare_files(a: Path, b: Path, most: str | None, *, as_json: bool) -> None:
    """Compare two records and show it.

    Raises: CheckFailed if a case is slower by more than `most`.
    """
    share = None if most is None else _share(most)
    found = compare(read_records(a), read_records(b))
    if as_json:
        rows = [_effect(effect) for effect in found.effects]
        alone = {
            "only_a": [dataclasses.asdict(case) for case in found.only_a],
            "only_b": [dataclasses.asdict(case) for case in found.only_b],
        }
        emit_json("bench/compare", {"cases": rows, "differs": found.differs} | alone)
    else:
        _show_comparison(found)
    worse = [] if share is None else found.slower(share)
    if worse:
        names = ", ".join(f"{e.case.what} {e.case.name} {_change(e.ratio)}" for e in worse)
        raise CheckFailed(f"slower by more than {most}: {names}")


def _effect(effect: Effect) -> dict[str, Any]:
    """Describe one comparison for --json; an end that is not known is null."""
    known = math.isfinite(effect.high)
    return dataclasses.asdict(effect.case) | {
        "a": effect.a,
        "b": effect.b,
        "ratio": effect.ratio,
        "low": effect.low if known else None,
        "high": effect.high if known else None,
        "repeats": effect.n,
        "verdict": effect.verdict,
    }


def _show_comparison(found: Comparison) -> None:
    out = console()
    for name, (one, other) in found.differs.items():
        out.print(f"[dim]{name}: {one} → {other}[/]")
    table = _table("A tok/s", "B tok/s", "change", "95 % interval", "n")
    table.add_column("verdict")
    style = {"faster": "green", "slower": "red", "noise": "dim"}
    both = [effect.case for effect in found.effects]
    labels = _labels([*both, *found.only_a, *found.only_b])
    for effect, label in zip(found.effects, labels, strict=False):
        known = math.isfinite(effect.high)
        interval = f"{_change(effect.low)} … {_change(effect.high)}" if known else "too few"
        table.add_row(
            *label,
            _number(effect.a),
            _number(effect.b),
            _change(effect.ratio),
            interval,
            "/".join(map(str, effect.n)),
            f"[{style[effect.verdict]}]{effect.verdict}[/]",
        )
    out.print(table)
    alone = [" ".join(label) for label in labels[len(both) :]]
    for side, names in (
        ("A", alone[: len(found.only_a)]),
        ("B", alone[len(found.only_a) :]),
    ):
        if names:
            out.print(f"only in {side}: {', '.join(names)}")


def _share(text: str) -> float:
    """Read 3% or 0.03. Raises: RecipeError."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 <= share < 1:
        raise RecipeError(f"--fail-if-slower {text}: not a share from 0% to 100%, like 3%")
    return share


def check_picture(path: Path | None) -> None:
    """Refuse a picture that could not be drawn, before anything takes time.

    Raises: RecipeError for another ending; ResourceError without matplotlib.
    """
    if path is None:
        return
    if path.suffix not in (".png", ".svg"):
        raise RecipeError(f"--plot {path}: a picture must end in .png or .svg")
    if find_spec("matplotlib") is None:
        raise ResourceError("drawing a picture needs matplotlib; pip install 'lm-workbench[plot]'")


def picture(results: Sequence[Result], path: Path) -> None:
    """Draw throughput, latency and the roofline side by side. Raises: ResourceError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    rates, waits, roof = figure.subplots(1, 3)
    work = [result for result in results if result.last.flops is not None]
    names = [" ".join(label) for label in _labels([result.case for result in work])]
    rates.barh(names, [result.rate for result in work])
    rates.errorbar(
        [result.rate for result in work],
        names,
        xerr=[result.rate * result.spread / 2 for result in work],
        fmt="none",
        ecolor="black",
    )
    rates.set(xscale="log", xlabel="tokens/s", title="throughput")
    rates.invert_yaxis()
    for name, result in zip(names, work, strict=True):
        if result.gaps:
            ordered = sorted(1000 * gap for gap in result.gaps)
            shares = [(index + 1) / len(ordered) for index in range(len(ordered))]
            waits.step(ordered, shares, label=name)
        if result.last.bytes:
            intensity = (result.last.flops or 0) / result.last.bytes
            roof.plot(intensity, result.rate * (result.last.flops or 0) / 1e12, "o", label=name)
    waits.set(xscale="log", xlabel="ms to the next token", ylabel="share", title="latency")
    _roof(roof, work)
    for axes in (waits, roof):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=7)
        axes.grid(alpha=0.3)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ResourceError(f"{path}: cannot be written: {error.strerror or error}") from None


def _roof(axes: Any, results: Sequence[Result]) -> None:
    """Draw what memory and matrix products allow. Source: Williams et al. 2009 (roofline)."""
    places = [10 ** (exponent / 4) for exponent in range(-4, 17)]
    for peak, dtype, bandwidth in {
        (r.last.peak_flops, r.case.dtype, r.last.bandwidth) for r in results if r.last.peak_flops
    }:
        line = [min(peak, place * bandwidth) / 1e12 for place in places]
        axes.plot(places, line, color="black", linewidth=1, label=f"limit, {dtype}")
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte read", ylabel="TFLOP/s")
    axes.set_title("roofline")


def _number(value: float) -> str:
    """Write a speed with three digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else _number(1000 * seconds)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.{0 if share >= 0.1 else 1}f} %"


def _money(dollars: float | None) -> str:
    return "" if dollars is None else f"{dollars:.3g}"


def _change(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"
