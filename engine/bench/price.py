"""What a million tokens cost here, in electricity, and elsewhere, by the price list."""

from dataclasses import dataclass
from pathlib import Path

from engine.text.prices import prices_for

BESIDE = ("gpt-5-mini", "claude-haiku-4-5", "gemini-2.5-flash-lite")


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """Dollars for a million tokens read and written, as somebody sells them."""

    model: str
    input: float | None
    output: float | None
    source: str


def per_million(rate: float, watts: float, price_kwh: float) -> float:
    """Return the price of a million tokens at `rate` tokens/s, in the money of `price_kwh`.

    A thousand watts for an hour are one kWh.
    """
    hours = 1e6 / rate / 3600
    return hours * watts / 1000 * price_kwh


def offer(model: str, price_file: Path | None = None) -> Offer:
    """Look up what a model costs. Raises: RecipeError, ResourceError as `prices_for`."""
    prices = prices_for(model, price_file=price_file)
    rates = {kind: float(steps[0][1]) for kind, steps in prices.rates.items()}
    return Offer(
        model=prices.priced_as,
        input=rates.get("input"),
        output=rates.get("output"),
        source=f"{prices.source}, {prices.dated}",
    )
