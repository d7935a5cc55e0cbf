"""What usage did cost: the answers, streams and batches that providers reported it in."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from cli.count_costs import Priced, Pricing
from cli.inputs import Source
from engine.errors import DataError
from engine.text.answers import LeftOut, read_answers

if TYPE_CHECKING:
    from engine.text.bill import Prices


def price_usage(
    sources: Sequence[Source], model: str | None, how: Pricing, left_out: LeftOut
) -> list[Priced]:
    """Price the usage that providers reported, summed by model, the cheapest first.

    Raises: DataError that names the line if something there is no usage or names no model.
    """
    from engine.text.usage import read_usage

    found: dict[str, Priced] = {}
    prices: dict[tuple[str, str], Prices] = {}
    for answer in read_answers(_values(sources), left_out):
        name = model or answer.model
        if name is None:
            raise DataError(f'{answer.where}: names no "model"; give -m')
        used = read_usage(answer.value, answer.where)
        if how.batch and used.served not in ("", "batch"):
            raise DataError(f"{answer.where}: was served as {used.served}, not --batch")
        key = (name, used.served)
        if key not in prices:
            prices[key] = how.prices(name, used.served)
        one = found.setdefault(name, Priced(name))
        one.requests += 1
        one.tokens += used.input
        one.rate_known &= prices[key].rate_known
        one.pay(prices[key].bill(used))
    if not found:
        names = ", ".join(source.name for source in sources)
        raise DataError("; ".join([f"{names}: holds no usage", *left_out.lines()]))
    for one in found.values():
        one.low = one.high = one.amount(*one.kinds)
    return sorted(found.values(), key=lambda one: (one.low, one.model))


def _values(sources: Sequence[Source]) -> Iterator[tuple[str, Any]]:
    """Yield place and value of each usage, or of what it is in: an answer, a line of a batch."""
    from cli.json_lines import read_values

    for source in sources:
        for where, _, value in read_values(source):
            for one in value if isinstance(value, list) else [value]:
                yield where, one
