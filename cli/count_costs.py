"""What counts would cost: prices come from elsewhere, dated; estimates become ranges."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.counting import Report
from engine.errors import RecipeError

if TYPE_CHECKING:
    from engine.text.prices import Cost, Prices
    from engine.text.usage import Usage

OUTPUT = ("output", "reasoning")


@dataclass(frozen=True)
class Pricing:
    """How requests are to be priced."""

    output: int = 0  # tokens of each answer
    cached: int = 0  # tokens of each prompt that are read from a cache
    cache_write: int = 0  # and that are stored in it
    reasoning: int = 0  # the part of each answer that is thinking
    batch: bool = False
    at: date | None = None
    price_file: Path | None = None

    def prices(self, model: str, served: str = "") -> "Prices":
        """Return the price list of a model. Raises: RecipeError if nobody knows it."""
        from engine.text.prices import prices_for

        return prices_for(
            model, at=self.at, batch=self.batch, price_file=self.price_file, served=served
        )

    def usage(self, tokens: int) -> "Usage":
        """Return what a request with a prompt of so many tokens uses."""
        from engine.text.usage import Usage

        cached = min(self.cached, tokens)
        written = min(self.cache_write, tokens - cached)
        return Usage(tokens - cached - written, cached, written, self.output, self.reasoning)

    def check(self, shortest: int, model: str) -> None:
        """Raise RecipeError if more is said of a prompt or an answer than there is of it."""
        if self.reasoning > self.output:
            raise RecipeError(
                f"--reasoning {self.reasoning:,} is more than --output-tokens {self.output:,}, of"
                " which it is a part"
            )
        said = self.cached + self.cache_write
        if said > shortest:
            raise RecipeError(
                f"--cached and --cache-write say {said:,} tokens, but a prompt for {model} has"
                f" only {shortest:,}"
            )


@dataclass
class Priced:
    """The requests to one model, and their price."""

    model: str
    tokens: int = 0  # of all prompts
    answers: int = 0  # tokens of all answers
    longest: int = 0  # prompt and answer of the longest request
    window: int | None = None
    fits: bool | None = None  # None: nobody knows
    requests: int = 0
    kinds: dict[str, tuple[int, Decimal]] = field(default_factory=dict)
    tiers: set[str] = field(default_factory=set)
    notes: set[str] = field(default_factory=set)
    source: str = ""
    dated: str = ""
    missing: str = ""  # why there is no price
    not_counted: list[str] = field(default_factory=list)  # then the price is a lower bound
    spread: float = 0.0  # the share by which the tokens may be off
    low: Decimal = Decimal(0)  # the price at the ends of that estimate
    high: Decimal = Decimal(0)
    rate_known: bool = True
    batch: bool = False

    @property
    def total(self) -> Decimal | None:
        """The price of all requests; None if it is not known."""
        return None if self.missing else sum((a for _, a in self.kinds.values()), Decimal(0))

    @property
    def sign(self) -> str:
        """What stands before a number that is not exact."""
        return "≥ " * bool(self.not_counted) + "≈ " * bool(self.spread)

    @property
    def ends(self) -> tuple[Decimal, Decimal | None] | None:
        """The lowest and the highest price, if they are not one; None for no highest."""
        if self.missing or (self.low == self.high and not self.not_counted):
            return None
        return self.low, None if self.not_counted else self.high

    @property
    def remarks(self) -> list[str]:
        """What the numbers do not say: whether it fits, whether there is more."""
        fit = {False: ["does not fit"], None: ["may not fit"] if self.window else []}
        bound = ["at least"] if self.not_counted else []
        rate = [] if self.rate_known else ["unknown rate"]
        return [*fit.get(self.fits, []), *bound, *rate]

    @property
    def note(self) -> str:
        """The remarks, and the tiers that fired."""
        return ", ".join([*self.remarks, *sorted(self.tiers - {"flat"}), *["batch"] * self.batch])

    def amount(self, *kinds: str) -> Decimal:
        """Return the price of some kinds of tokens."""
        return sum((self.kinds[kind][1] for kind in kinds if kind in self.kinds), Decimal(0))

    def pay(self, bill: "Cost", times: int = 1) -> None:
        """Add the price of requests that are all alike."""
        for line in bill.lines:
            tokens, amount = self.kinds.get(line.kind, (0, Decimal(0)))
            self.kinds[line.kind] = (tokens + times * line.tokens, amount + times * line.amount)
            self.answers += times * line.tokens * (line.kind in OUTPUT)
            self.notes.update([f"{line.kind}: {line.note}"] if line.note else [])
        self.notes.update(bill.notes)
        self.tiers.add(bill.tier)
        self.source, self.dated, self.batch = bill.source, bill.dated, bill.batch

    def as_json(self) -> dict[str, Any]:
        """Return it for JSON, amounts as exact decimal strings."""
        whole = not self.missing and not self.not_counted
        how = "unknown" if self.not_counted else "estimated" if self.spread else "exact"
        return {
            "model": self.model,
            "requests": self.requests,
            "input_tokens": self.tokens,
            "output_tokens": self.answers,
            "class": how if self.rate_known else "unknown rate",
            "plus_minus": self.spread,
            "not_counted": self.not_counted,
            "total_usd": None if self.total is None else f"{self.total:f}",
            "low_usd": None if self.missing else f"{self.low:f}",
            "high_usd": f"{self.high:f}" if whole else None,
            "lines": [
                {"kind": kind, "tokens": tokens, "usd": f"{amount:f}"}
                for kind, (tokens, amount) in self.kinds.items()
            ],
            "tiers": sorted(self.tiers),
            "notes": sorted(self.notes),
            "context_window": self.window,
            "fits": self.fits,
            "source": self.source,
            "dated": self.dated,
            "missing": self.missing or None,
        }


def price_counts(report: Report, how: Pricing) -> list[Priced]:
    """Price what was counted, once for each model, the cheapest first."""
    found = []
    for index, counter in enumerate(report.counters):
        requests = report.prompts(index)
        how.check(min(requests, default=0), counter.name)
        one = Priced(counter.name, sum(requests), window=counter.window)
        one.spread, one.not_counted = counter.plus_minus, report.unknown(index)
        one.longest = max(requests, default=0) + how.output
        one.requests = len(requests)
        own_window = None
        try:
            prices = how.prices(counter.name)
            if prices.source == str(how.price_file):
                own_window = prices.context_window
            one.window = own_window or one.window or prices.context_window
            for tokens, times in Counter(requests).items():
                _pay(one, prices, how, counter.interval(tokens), tokens, times)
        except RecipeError as error:
            if len(report.counters) == 1:
                raise
            one.missing = str(error).split(";")[0]
        window = own_window or (None if counter.window else one.window)
        one.fits = counter.fits(
            max(requests, default=0), how.output, at_least=bool(one.not_counted), window=window
        )
        found.append(one)
    return cheapest_first(found)


def _pay(
    one: Priced, prices: "Prices", how: Pricing, ends: tuple[int, int], tokens: int, times: int
) -> None:
    """Add the price of so many requests of one length, and of the ends of an estimate."""
    bill = prices.bill(how.usage(tokens))
    one.pay(bill, times)
    low, high = (prices.bill(how.usage(end)) if one.spread else bill for end in ends)
    one.low += times * low.total
    one.high += times * high.total
    if low.tier != high.tier:
        one.tiers |= {low.tier, high.tier}
        one.notes.add("the estimate crosses a price tier")


def cheapest_first(priced: Sequence[Priced]) -> list[Priced]:
    """Sort by price; what may not fit or is a lower bound comes after, what has no price last."""
    return sorted(
        priced,
        key=lambda one: (
            one.total is None,
            {True: 0, None: 1, False: 2}[one.fits],
            bool(one.not_counted),
            one.total or Decimal(0),
            one.model,
        ),
    )
