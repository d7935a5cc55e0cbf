"""Price files: what they say, exactly; and every mistake named with its line."""

import json
from datetime import date
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import InputError
from engine.text.price_file import read_prices

DAY = date(2026, 11, 20)
GOOD = """\
currency: USD
as_of: 2026-11-01
models:
  Big:
    input: 2.50
    output: 10
    context_window: 400000
    batch: 0.5
    tiers:
      - {above: 200000, input: 5, output: 15}
"""


@pytest.fixture
def read(tmp_path):
    def call(text, **options):
        path = tmp_path / "prices.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_prices(path, **({"at": DAY} | options))

    return call


def test_prices_are_the_very_digits_of_the_file(read):
    prices = read(GOOD)["big"]
    assert prices.rates == {
        "input": ((0, Decimal("2.50")), (200_000, Decimal(5))),
        "output": ((0, Decimal(10)), (200_000, Decimal(15))),
    }
    assert str(prices.rates["input"][0][1]) == "2.50"
    assert prices.context_window == 400_000
    assert prices.dated == "as of 2026-11-01"
    assert prices.source.endswith("prices.yaml")
    assert read(GOOD.replace("2.50", "0.1"))["big"].rates["input"][0][1] == Decimal("0.1")


def test_a_batch_is_a_share_of_every_price(read):
    rates = read(GOOD, batch=True)["big"].rates
    assert rates["input"] == ((0, Decimal("1.25")), (200_000, Decimal("2.5")))
    none = read(GOOD.replace("    batch: 0.5\n", ""), batch=True)["big"]
    assert none.rates["output"][0][1] == 10
    assert none.standard == {"input", "output"}


@pytest.mark.parametrize("indent", [None, 2, "\t"])
def test_json_says_the_same(read, indent):
    own = {
        "input": 2.5,
        "output": 10,
        "context_window": 400000,
        "batch": 0.5,
        "tiers": [{"above": 200000, "input": 5, "output": 15}],
    }
    whole = {"currency": "USD", "as_of": "2026-11-01", "models": {"Big": own}}
    assert read(json.dumps(whole, indent=indent)) == read(GOOD)


def test_old_prices_say_so(read):
    assert read(GOOD)["big"].notes == ()
    assert read(GOOD, at=date(2027, 2, 1))["big"].notes == ("these prices are 92 days old",)


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("currency: USD", "currency: EUR", 1, "must be USD"),
        ("currency: USD\n", "", 1, "needs currency"),
        ("2026-11-01", "2026-13-01", 2, "such as 2026-11-01"),
        ("2026-11-01", "yesterday", 2, "not 'yesterday'"),
        ("input: 2.50", "input: -1", 5, "must be a price"),
        ("input: 2.50", "input: 1e-400", 5, "must be a price"),
        ("input: 2.50", "input: .nan", 5, "must be a price"),
        ("input: 2.50", "input: [1]", 5, "must be a price"),
        ("input: 2.50", "input: ٣", 5, "must be a price"),
        ("input: 2.50", "input:", 5, "must be a price"),
        ("input: 2.50", "inptu: 2.50", 5, "inptu is no key of Big"),
        ("    input: 2.50\n", "", 5, "Big needs input"),
        ("output: 10", "input: 10", 6, "given twice"),
        ("400000", "0", 7, "whole number"),
        ("batch: 0.5", "batch: 2", 8, "share"),
        ("- {", "- 1 #", 10, "must be a mapping"),
        ("tiers:\n      - {above: 200000, input: 5, output: 15}", "tiers: 5", 9, "a list"),
        (", output: 15", "", 10, "needs output"),
        ("output: 15}", "output: 15, cache_write: 1}", 10, "none below"),
        ("15}", "15}\n      - {above: 9, input: 1, output: 1}", 11, "must rise"),
        (GOOD.partition("models:\n")[2], "  x: 1\n", 4, "must be a mapping"),
        (GOOD.partition("models:")[2], " {}\n", 3, "no model"),
        ("input: 2.50", '"in\\nput": 2.50', 5, "in put is no key"),
        ("  Big:", "  Big: [", 6, "not valid YAML"),
        ("  Big:", "  ? [a]\n  :", 4, "must be a word"),
    ],
)
def test_a_mistake_is_named_with_its_line(read, old, new, line, says):
    assert old in GOOD
    with pytest.raises(InputError) as refused:
        read(GOOD.replace(old, new, 1))
    message = str(refused.value)
    assert f"prices.yaml:{line}: " in message, message
    assert says in message, message
    assert "\n" not in message


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"[" * 50_000, b"a: *b", b"5", b"\x00"])
def test_what_is_no_price_file_is_refused(read, content):
    with pytest.raises(InputError, match=r"prices\.yaml"):
        read(content)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_prices(tmp_path / "none.yaml", at=DAY)


@given(st.data())
def test_a_damaged_file_is_read_or_refused(tmp_path_factory, data):
    """Property: no byte of the file, changed, makes anything but prices or an InputError."""
    content = bytearray(GOOD.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "prices.yaml"
    path.write_bytes(content)
    try:
        assert read_prices(path, at=DAY)
    except InputError as error:
        assert "\n" not in str(error)
