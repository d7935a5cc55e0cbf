"""A price list times a usage: the bill of one request, exact to the last digit.

    rates     dollars per million tokens of each kind, in steps by total input
    kinds     one without a price of its own costs what the wider kind costs, and the line says so
    tiers     a cliff: above a threshold *all* tokens of the request cost the higher rate

`engine/text/prices.py` finds the price list, `engine/text/price_file.py` reads one of yours.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from decimal import Context, Decimal, localcontext

from engine.errors import RecipeError
from engine.text.usage import Usage

Steps = tuple[tuple[int, Decimal], ...]  # (above this total input, dollars per million), rising

# What a kind without its own price is billed as: providers bill a cache write that has no price
# as input, and reasoning as output.
WIDER = {
    "cached_input": "input",
    "cache_write_1h": "cache_write",
    "cache_write": "input",
    "reasoning": "output",
}
STALE_DAYS = 60


@dataclass(frozen=True)
class CostLine:
    """One kind of token: how many, dollars per million, dollars, and what is special about it."""

    kind: str
    tokens: int
    per_million: Decimal
    amount: Decimal
    note: str = ""


@dataclass(frozen=True)
class Cost:
    """The price of one request in dollars, and everything it rests on.

    The amounts of the lines add up to `total`; their tokens to input + output.
    """

    model: str
    priced_as: str
    lines: tuple[CostLine, ...]
    total: Decimal
    tier: str
    batch: bool
    source: str
    dated: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Prices:
    """What the tokens of one model cost, on one day, from one source.

    `standard` are the kinds that cost the same in a batch because no batch price is known.
    """

    model: str  # as the user named it
    priced_as: str  # as the source names it
    rates: Mapping[str, Steps]
    source: str
    dated: str
    per_request: Decimal = Decimal(0)
    context_window: int | None = None
    batch: bool = False
    standard: frozenset[str] = frozenset()
    rate_known: bool = True  # False: it was served in a way whose rates nobody told us
    notes: tuple[str, ...] = ()

    def bill(self, usage: Usage) -> Cost:
        """Price one request.

        Raises: RecipeError if a kind of token has no price at all.
        """
        counts = {
            "input": usage.uncached,
            "cached_input": usage.cache_read,
            "cache_write": usage.cache_write - usage.cache_write_1h,
            "cache_write_1h": usage.cache_write_1h,
            "output": usage.output - usage.reasoning,
            "reasoning": usage.reasoning,
        }
        with localcontext(Context(prec=60)):  # no sum of prices is that long: nothing is rounded
            lines = [self._line(k, n, usage.input) for k, n in counts.items() if n]
            if self.per_request:
                each = CostLine(
                    "request", 0, self.per_request.scaleb(6), self.per_request, "a fee per request"
                )
                lines.append(each)
            total = sum((line.amount for line in lines), Decimal(0))
        notes = self.notes
        if self.batch and self.standard >= set(self.rates):
            notes += ("no batch price is known: standard rates",)
        return Cost(
            self.model,
            self.priced_as,
            tuple(lines),
            total,
            self._tier(usage.input),
            self.batch,
            self.source,
            self.dated,
            notes + usage.notes,
        )

    def _line(self, kind: str, tokens: int, total_input: int) -> CostLine:
        priced = kind
        while priced not in self.rates:
            if priced not in WIDER:
                raise RecipeError(
                    f"{self.priced_as} has no price for {kind} tokens in {self.source};"
                    " give one with --price-file"
                )
            priced = WIDER[priced]
        notes = []
        if kind != priced and kind != "reasoning":  # reasoning *is* output
            notes.append(f"no price of its own: billed as {priced}")
        if self.batch and priced in self.standard < set(self.rates):
            notes.append("no batch price: standard rate")
        steps = self.rates[priced]
        rate = next((rate for above, rate in reversed(steps) if total_input > above), steps[0][1])
        return CostLine(kind, tokens, rate, (tokens * rate).scaleb(-6), "; ".join(notes))

    def _tier(self, total_input: int) -> str:
        """Name the step that the total input falls on."""
        limits = sorted({above for steps in self.rates.values() for above, _ in steps if above})
        passed = [above for above in limits if total_input > above]
        if not limits:
            return "flat"
        if not passed:
            return f"up to {limits[0]:,} input tokens"
        return f"over {passed[-1]:,} input tokens"


def staleness(dated: date, today: date) -> tuple[str, ...]:
    """Return a note if prices of one day are old on another."""
    age = (today - dated).days
    return (f"these prices are {age} days old",) if age > STALE_DAYS else ()
