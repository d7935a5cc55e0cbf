"""Bills worked by hand, and the sums that hold for every bill."""

from datetime import date
from decimal import Context, Decimal, localcontext
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import RecipeError
from engine.text.bill import Prices, staleness
from engine.text.usage import Usage

KINDS = ("input", "cached_input", "cache_write", "cache_write_1h", "output", "reasoning")
COUNT = st.integers(0, 400_000)
PRICE = st.decimals(0, 1000, places=6)


def flat(**rates: str) -> Prices:
    steps = {kind: ((0, Decimal(rate)),) for kind, rate in rates.items()}
    return Prices("m", "p/m", steps, "source", "dated")


@st.composite
def usages(draw):
    write, output = draw(COUNT), draw(COUNT)
    hour, reasoning = draw(st.integers(0, write)), draw(st.integers(0, output))
    return Usage(draw(COUNT), draw(COUNT), write, output, reasoning, hour)


@st.composite
def price_lists(draw):
    """Price lists with holes, and with tiers."""
    limits = sorted(draw(st.sets(st.integers(1, 500_000), max_size=2)))
    kinds = {"input", "output"} | draw(st.sets(st.sampled_from(KINDS)))
    rates = {kind: tuple((limit, draw(PRICE)) for limit in (0, *limits)) for kind in kinds}
    return Prices("m", "p/m", rates, "source", "dated")


@given(price_lists(), usages())
def test_lines_add_up_and_hold_every_token_once(prices, usage):
    """Property: no token is billed twice or never, whatever kinds and tiers have prices."""
    cost = prices.bill(usage)
    assert sum(line.tokens for line in cost.lines) == usage.input + usage.output
    with localcontext(Context(prec=60)):
        assert sum(line.amount for line in cost.lines) == cost.total
        for line in cost.lines:
            assert line.amount * 1_000_000 == line.tokens * line.per_million


@given(usages(), st.decimals(0, 100, places=4))
def test_at_one_price_for_all_only_the_number_of_tokens_counts(usage, price):
    """Property: what is cached, written or thought changes nothing where nothing has its price."""
    cost = flat(input=str(price), output=str(price)).bill(usage)
    assert cost.total * 1_000_000 == (usage.input + usage.output) * price


def test_a_kind_without_a_price_costs_the_wider_kind_and_says_so():
    cost = flat(input="2", output="8").bill(Usage(1, 10, 30, 100, 40, 20))
    assert [(line.kind, line.tokens, line.per_million) for line in cost.lines] == [
        ("input", 1, 2),
        ("cached_input", 10, 2),
        ("cache_write", 10, 2),
        ("cache_write_1h", 20, 2),
        ("output", 60, 8),
        ("reasoning", 40, 8),
    ]
    said = [line.kind for line in cost.lines if "billed as input" in line.note]
    assert said == ["cached_input", "cache_write", "cache_write_1h"]
    hour = flat(input="2", cache_write="3", output="8").bill(Usage(0, 0, 20, 0, 0, 20)).lines[0]
    assert hour.per_million == 3
    assert "billed as cache_write" in hour.note


@pytest.mark.parametrize(("rates", "kind"), [({"input": "1"}, "output"), ({}, "input")])
def test_what_has_no_price_at_all_is_never_free(rates, kind):
    with pytest.raises(RecipeError, match=f"p/m has no price for {kind} tokens"):
        flat(**rates).bill(Usage(uncached=1, output=1))


@pytest.mark.parametrize(
    ("total", "per_million", "tier"),
    [
        (0, None, "up to 100 input tokens"),
        (100, 1, "up to 100 input tokens"),
        (101, 2, "over 100 input tokens"),
        (300, 2, "over 100 input tokens"),
        (301, 5, "over 300 input tokens"),
    ],
)
def test_a_tier_begins_above_its_limit_and_takes_all_tokens(total, per_million, tier):
    steps = ((0, Decimal(1)), (100, Decimal(2)), (300, Decimal(5)))
    prices = Prices("m", "p/m", {"input": steps, "output": steps}, "source", "dated")
    cost = prices.bill(Usage(cache_read=total, output=7))
    assert cost.tier == tier
    assert {line.per_million for line in cost.lines} == {per_million or 1}


def test_nothing_is_rounded():
    """The control: the default of 28 digits would round this product."""
    price, count = 123_456_789_123_456_789_012, 999_999_999_999_999
    rate = Decimal(price).scaleb(-12)
    total = flat(input=str(rate)).bill(Usage(uncached=count)).total
    assert Fraction(total) == Fraction(price * count, 10**18)
    assert Fraction(rate * count) != Fraction(price * count, 10**12)


def test_a_fee_per_request_is_a_line_without_tokens():
    prices = Prices("m", "p/m", {}, "source", "dated", per_request=Decimal("0.012"))
    cost = prices.bill(Usage())
    assert cost.total == Decimal("0.012")
    assert [(line.kind, line.tokens) for line in cost.lines] == [("request", 0)]


def test_a_batch_says_what_has_no_batch_price():
    rates = {"input": ((0, Decimal(1)),), "output": ((0, Decimal(1)),)}
    for standard, on_lines, on_bill in (
        (set(), 0, 0),
        ({"output"}, 1, 0),
        ({"input", "output"}, 0, 1),
    ):
        prices = Prices("m", "p/m", rates, "s", "d", batch=True, standard=frozenset(standard))
        cost = prices.bill(Usage(uncached=1, output=1))
        assert sum("standard rate" in line.note for line in cost.lines) == on_lines
        assert sum("standard rates" in note for note in cost.notes) == on_bill


def test_notes_of_the_usage_reach_the_bill():
    assert flat().bill(Usage(notes=("3 searches",))).notes == ("3 searches",)


def test_prices_are_stale_after_sixty_days():
    day = date(2026, 11, 1)
    assert staleness(day, date(2026, 12, 31)) == ()
    assert staleness(day, date(2027, 1, 1)) == ("these prices are 61 days old",)
