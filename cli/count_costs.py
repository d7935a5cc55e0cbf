"""What counts would cost, and what usage did cost: prices come from elsewhere, dated."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.counting import Report
from cli.inputs import Source
from engine.errors import DataError, RecipeError

if TYPE_CHECKING:
    from engine.text.prices import Cost, Prices


@dataclass(frozen=True)
class Pricing:
    """How requests are to be priced."""

    output: int = 0  # tokens of each answer
    cached: int = 0  # tokens of each prompt that are read from a cache
    batch: bool = False
    at: date | None = None
    price_file: Path | None = None

    def prices(self, model: str) -> "Prices":
        """Return the price list of a model. Raises: RecipeError if nobody knows it."""
        from engine.text.prices import prices_for

        return prices_for(model, at=self.at, batch=self.batch, price_file=self.price_file)


@dataclass
class Priced:
    """The requests to one model, and their price."""

    model: str
    tokens: int = 0  # of all prompts
    longest: int = 0  # prompt and answer of the longest request
    window: int | None = None
    requests: int = 0
    kinds: dict[str, tuple[int, Decimal]] = field(default_factory=dict)
    tiers: set[str] = field(default_factory=set)
    notes: set[str] = field(default_factory=set)
    source: str = ""
    dated: str = ""
    missing: str = ""  # why there is no price
    not_counted: list[str] = field(default_factory=list)  # then the price is a lower bound
    spread: float = 0.0  # the share by which the tokens, and so the price of the input, may be off

    @property
    def total(self) -> Decimal | None:
        """The price of all requests; None if it is not known."""
        return None if self.missing else sum((a for _, a in self.kinds.values()), Decimal(0))

    @property
    def note(self) -> str:
        """The tiers that fired."""
        return ", ".join(sorted(self.tiers - {"flat"}))

    def amount(self, side: str) -> Decimal:
        """Return the price of the output, or of everything else."""
        parts = [a for kind, (_, a) in self.kinds.items() if _is_output(kind) == (side == "output")]
        return sum(parts, Decimal(0))

    def pay(self, bill: "Cost", times: int = 1) -> None:
        """Add the price of requests that are all alike."""
        for line in bill.lines:
            tokens, amount = self.kinds.get(line.kind, (0, Decimal(0)))
            self.kinds[line.kind] = (tokens + times * line.tokens, amount + times * line.amount)
            self.notes.update([f"{line.kind}: {line.note}"] if line.note else [])
        self.notes.update(bill.notes)
        self.tiers.add(bill.tier)
        self.source, self.dated = bill.source, bill.dated

    def as_json(self) -> dict[str, Any]:
        """Return it for JSON, amounts as exact decimal strings."""
        return {
            "model": self.model,
            "requests": self.requests,
            "input_tokens": self.tokens,
            "plus_minus": self.spread,
            "not_counted": self.not_counted,
            "total_usd": None if self.total is None else f"{self.total:f}",
            "lines": [
                {"kind": kind, "tokens": tokens, "usd": f"{amount:f}"}
                for kind, (tokens, amount) in self.kinds.items()
            ],
            "tiers": sorted(self.tiers),
            "notes": sorted(self.notes),
            "context_window": self.window,
            "fits": fits(self),
            "source": self.source,
            "dated": self.dated,
            "missing": self.missing or None,
        }


def _is_output(kind: str) -> bool:
    return kind in ("output", "reasoning")


def fits(priced: Priced) -> bool | None:
    """Tell whether the longest request fits the context; None if nobody knows."""
    return None if priced.window is None else priced.longest <= priced.window


def price_counts(report: Report, how: Pricing) -> list[Priced]:
    """Price what was counted, once for each model, the cheapest first."""
    from engine.text.usage import Usage

    found = []
    for index, counter in enumerate(report.counters):
        rows = [row.tokens[index] for row in report.rows]
        requests = rows if report.requests else [sum(rows)]
        one = Priced(counter.name, sum(rows), window=counter.window)
        one.spread, one.not_counted = counter.plus_minus, report.unknown(index)
        one.longest = max(requests, default=0) + how.output
        one.requests = len(requests)
        try:
            prices = how.prices(counter.name)
            one.window = one.window or prices.context_window
            for tokens, times in Counter(requests).items():
                cached = min(how.cached, tokens)
                one.pay(prices.bill(Usage(tokens - cached, cached, output=how.output)), times)
        except RecipeError as error:
            if len(report.counters) == 1:
                raise
            one.missing = str(error).split(";")[0]
        found.append(one)
    return cheapest_first(found)


def cheapest_first(priced: Sequence[Priced]) -> list[Priced]:
    """Sort by price; what does not fit the context comes after, what has no price last."""
    return sorted(
        priced,
        key=lambda one: (one.total is None, fits(one) is False, one.total or Decimal(0), one.model),
    )


def price_usage(source: Source, model: str | None, how: Pricing) -> list[Priced]:
    """Price the usage that providers reported, summed by model.

    Raises: DataError that names the line if something there is no usage or names no model.
    """
    from engine.text.usage import read_usage

    found: dict[str, tuple[Priced, Prices]] = {}
    for where, value in _usages(source):
        name = model or _model_in(value)
        if name is None:
            raise DataError(f'{where}: names no "model"; give -m')
        used = read_usage(value, where)
        if name not in found:
            prices = how.prices(name)
            found[name] = Priced(name, window=prices.context_window), prices
        one, prices = found[name]
        one.requests += 1
        one.tokens += used.input
        one.longest = max(one.longest, used.input + used.output)
        one.pay(prices.bill(used))
    return cheapest_first([one for one, _ in found.values()])


def _usages(source: Source) -> Iterator[tuple[str, Any]]:
    """Yield place and value of each usage, or of what it is in: an answer, a line of a batch."""
    from cli.json_lines import read_values

    for where, _, value in read_values(source):
        for one in value if isinstance(value, list) else [value]:
            yield where, one


def _model_in(value: Any) -> str | None:
    """Return the model that an answer names, however deep it lies."""
    while isinstance(value, dict):
        if isinstance(value.get("model"), str):
            return value["model"]
        inner = (value.get(key) for key in ("response", "body", "message", "result"))
        value = next((one for one in inner if isinstance(one, dict)), None)
    return None
