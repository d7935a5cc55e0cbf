"""What a request costs: the price list of a model, found by any of its names.

    prices_for("openai/gpt-5")  →  Prices     from your price file, else from genai-prices
    Prices.bill(usage)          →  Cost       see engine/text/bill.py

genai-prices carries its data inside the package; it is imported only here, only when asked for,
and its updater is never started: no price comes from the network.
"""

import difflib
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import date, datetime, time, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

from engine.errors import RecipeError, ResourceError
from engine.text.bill import Cost, CostLine, Prices, Steps, staleness
from engine.text.price_file import read_prices
from engine.text.usage import Usage

__all__ = ["Cost", "CostLine", "Prices", "compare", "context_window", "cost", "prices_for"]

_KEYS = {
    "input_mtok": "input",
    "cache_read_mtok": "cached_input",
    "cache_write_mtok": "cache_write",
    "cache_write_1h_mtok": "cache_write_1h",
    "output_mtok": "output",
    "output_reasoning_mtok": "reasoning",
}
_BATCH = {"processing": "batch"}


def cost(
    model: str,
    usage: Usage,
    *,
    at: date | None = None,
    batch: bool = False,
    price_file: Path | None = None,
) -> Cost:
    """Price one request; for many to one model, ask `prices_for` once and bill each.

    Raises: RecipeError for an unknown model, ResourceError without genai-prices.
    """
    return prices_for(model, at=at, batch=batch, price_file=price_file).bill(usage)


def compare(
    models: Iterable[str],
    usage: Usage,
    *,
    at: date | None = None,
    batch: bool = False,
    price_file: Path | None = None,
) -> list[Cost]:
    """Price one request to several models, the cheapest first."""
    costs = [cost(model, usage, at=at, batch=batch, price_file=price_file) for model in models]
    return sorted(costs, key=lambda each: each.total)


def context_window(model: str, *, price_file: Path | None = None) -> int | None:
    """Return how many tokens a model takes, where the prices' source knows."""
    return prices_for(model, price_file=price_file).context_window


def prices_for(
    model: str,
    *,
    at: date | None = None,
    batch: bool = False,
    price_file: Path | None = None,
    served: str = "",
) -> Prices:
    """Find what a model's tokens cost at a moment; a day means its noon, none means now (UTC).

    `served` is how, if not in the standard way: batch, flex, priority.

    Raises: RecipeError naming the nearest models; ResourceError saying what to install.
    """
    moment = _moment(at)
    batch, served = batch or served == "batch", "" if served == "batch" else served
    own: dict[str, Prices] = {}
    if price_file is not None:
        own = read_prices(price_file, at=moment.date(), batch=batch)
        wanted = model.strip().lower()
        for name in (wanted, wanted.rpartition("/")[2]):
            if name in own:
                return _at_rate(replace(own[name], model=model), served, not served)
    try:
        return _packaged(model, moment, batch, served, tuple(own))
    except ResourceError:
        if own:
            raise RecipeError(
                f"no prices for {model[:80]!r} in {price_file}{_nearest(model, own)}"
                " (and genai-prices, which has more, is not installed)"
            ) from None
        raise


def _at_rate(prices: Prices, served: str, known: bool) -> Prices:
    """Say so where a request was served at a rate that the source does not have."""
    if known:
        return prices
    note = f"served as {served}, a rate that {prices.source} does not have: priced as standard"
    return replace(prices, rate_known=False, notes=(*prices.notes, note))


def _moment(at: date | None) -> datetime:
    if at is None:
        return datetime.now(timezone.utc)
    if not isinstance(at, datetime):
        at = datetime.combine(at, time(12))
    return at if at.tzinfo else at.replace(tzinfo=timezone.utc)


def _packaged(model: str, moment: datetime, batch: bool, served: str, own: Sequence[str]) -> Prices:
    """Take the prices of one model out of genai-prices."""
    package = _package()
    provider, info = _find(model, package.data.providers, own)
    # A provider that resells does not owe the maker's discounts.
    its_own = any(info is each for each in provider.models)
    context = (_BATCH if batch else {}) | ({"service_tier": served} if served else {})
    variants = [
        variant
        for variant in (info.price_variants or () if its_own else ())
        if not variant.constraint or variant.constraint.active(moment)
    ]
    prices = info.get_prices(moment, context if its_own else None)
    discounted = {
        _KEYS.get(key)
        for variant in variants
        if variant.when == _BATCH
        for key, price in vars(variant.prices).items()
        if price is not None
    }
    rates = {
        kind: _steps(price)
        for key, kind in _KEYS.items()
        if (price := getattr(prices, key)) is not None
    }
    dated = _newest(package.data, datetime.now(timezone.utc).date())
    notes = staleness(dated, moment.date()) + _older_than_known(info, moment.date(), dated)
    if any(hasattr(each.constraint, "start_time") for each in _conditions(info)):
        notes += (f"the price depends on the hour: this is {moment:%H:%M} UTC",)
    found = Prices(
        model,
        f"{provider.id}/{info.id}",
        rates,
        source=f"genai-prices {package.__version__}",
        dated=f"newest price inside begins {dated}",
        per_request=Decimal(prices.requests_kcount or 0).scaleb(-3),
        context_window=info.context_window,
        batch=batch,
        standard=frozenset(rates) - discounted,
        notes=notes,
    )
    known = not served or any(each.when == {"service_tier": served} for each in variants)
    return _at_rate(found, served, known)


def _older_than_known(info: Any, day: date, dated: date) -> tuple[str, ...]:
    """Return a note if a day lies before the first price of a model that has a date."""
    starts = [
        each.constraint.start_date
        for each in _conditions(info)
        if hasattr(each.constraint, "start_date")
    ]
    if day >= min([*starts, dated]):
        return ()
    return (f"no price is dated as early as {day}: this is the oldest known",)


def _package() -> Any:
    """Import the data that genai-prices carries; not its current snapshot, which may be updated."""
    try:
        import genai_prices.data
    except ImportError:
        if sys.version_info < (3, 11):
            how = "which needs Python 3.11 or newer; or give your own with --price-file"
        else:
            how = "pip install 'lm-workbench[prices]', or give your own with --price-file"
        raise ResourceError(f"prices need the package genai-prices: {how}") from None
    return genai_prices


def _find(model: str, providers: list[Any], own: Sequence[str]) -> tuple[Any, Any]:
    """Find who sells a model under this name: provider/model, provider:model, or the bare name."""
    wanted = model.strip().lower()
    for provider, name in _sellers(wanted, providers):
        if info := provider.find_model(name, all_providers=providers) or next(
            (each for each in provider.models if each.id.lower() == name), None
        ):
            return provider, info
    sold = [(each, info) for each in providers for info in each.models if info.id.lower() == wanted]
    # Only those that make models say which names are theirs; the others resell.
    made = [pair for pair in sold if pair[0].model_match]
    for pairs in (made, sold):
        if len(pairs) == 1:
            return pairs[0]
    if sold:
        names = ", ".join(f"{provider.id}/{info.id}" for provider, info in sold[:6])
        raise RecipeError(f"{model[:80]!r} is sold by several providers; say which one: {names}")
    known = [*own, *(f"{each.id}/{info.id}" for each in providers for info in each.models)]
    known += [info.id for each in providers if each.model_match for info in each.models]
    raise RecipeError(
        f"no prices for {model[:80]!r}{_nearest(model, known)}; give them with --price-file"
    )


def _sellers(wanted: str, providers: list[Any]) -> Iterator[tuple[Any, str]]:
    """Yield the providers that a name may speak of, and what each would call the model."""
    for mark in "/:":
        head, found, rest = wanted.partition(mark)
        if found and rest:
            named = [each for each in providers if each.id == head]
            named += [each for each in providers if _matches(each.provider_match, head)]
            yield from ((each, rest) for each in named[:1])
    maker = next((each for each in providers if _matches(each.model_match, wanted)), None)
    if maker is not None:
        yield maker, wanted


def _matches(rule: Any, name: str) -> bool:
    return rule is not None and rule.is_match(name)


def _steps(price: Any) -> Steps:
    if hasattr(price, "tiers"):
        return ((0, price.base), *((tier.start, tier.price) for tier in price.tiers))
    return ((0, price),)


def _newest(data: Any, today: date) -> date:
    """Return the newest day on which a price inside began, up to the day of installation.

    The package names no date and its wheel is stamped 2020. A price that begins after it was
    installed was announced ahead, and tells nothing about how new the data are.
    """
    installed = datetime.fromtimestamp(Path(data.__file__).stat().st_mtime, timezone.utc).date()
    starts = {
        each.constraint.start_date
        for provider in data.providers
        for info in provider.models
        for each in [*(info.price_variants or ()), *_conditions(info)]
        if hasattr(each.constraint, "start_date")
    }
    begun = [start for start in starts if start <= today]
    return max([start for start in begun if start <= installed] or begun, default=date.min)


def _conditions(info: Any) -> list[Any]:
    """Return the prices that hold from a day or at an hour; a single price has none."""
    return info.prices if isinstance(info.prices, list) else []


def _nearest(model: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(model.lower(), {name.lower() for name in known}, 3, 0.6)
    return f"; did you mean {', '.join(close)}?" if close else ""
