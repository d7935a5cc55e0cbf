"""Prices by name: equal to genai-prices' own sums, without its network, and late."""

import doctest
import json
import random
import re
import subprocess
import sys
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal

import pytest

from engine.errors import RecipeError, ResourceError
from engine.text import prices
from engine.text.bill import CostLine
from engine.text.prices import compare, context_window, cost, prices_for
from engine.text.usage import Usage
from tests.conftest import ROOT

AT = datetime(2026, 11, 20, 9, 30, tzinfo=timezone.utc)
COSTS = (ROOT / "docs" / "costs.md").read_text(encoding="utf-8")
OWN = "currency: USD\nas_of: 2026-11-01\nmodels: {mine: {input: 1, output: 2, context_window: 10}}"

genai = pytest.importorskip("genai_prices") if sys.version_info >= (3, 11) else None
needs_package = pytest.mark.skipif(genai is None, reason="genai-prices needs Python 3.11")


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "prices.yaml"
    path.write_text(OWN, encoding="utf-8")
    return path


def _random_usage(draw: random.Random) -> Usage:
    sizes = (0, 1, 999, 32_001, 100_000, 128_000, 199_999, 200_000, 200_001, 272_001, 10**6)
    write, output = draw.choice(sizes) // 2, draw.choice(sizes)
    hour = draw.choice((0, draw.randint(0, write)))
    read = draw.choice((0, draw.randint(0, 150_000)))
    return Usage(draw.choice(sizes), read, write, output, draw.randint(0, output), hour)


def _theirs(provider, model, usage: Usage, batch: bool) -> Decimal:
    """The sum as genai-prices works it out from its own counts."""
    return genai.calc_price(
        genai.Usage(
            input_tokens=usage.input,
            cache_read_tokens=usage.cache_read,
            cache_write_tokens=usage.cache_write,
            cache_write_1h_tokens=usage.cache_write_1h,
            output_tokens=usage.output,
            output_reasoning_tokens=usage.reasoning,
        ),
        model.id,
        provider_id=provider.id,
        genai_request_timestamp=AT,
        price_context={"processing": "batch"} if batch else None,
    ).total_price


@needs_package
def test_equal_to_genai_prices_on_random_usages():
    """1,500 usages over 300 models and more, tiered, cached and batched ones too: equal digits."""
    from genai_prices.data import providers

    draw = random.Random(4)
    sold = [(each, model) for each in providers for model in each.models]
    seen = dict.fromkeys(("models", "tiered", "cached", "batched", "hour", "fallback"), 0)
    for provider, model in draw.sample(sold, 500):
        name = f"{provider.id}/{model.id}"
        if provider.find_model(model.id) is not model:
            continue  # an older name of it, or a pattern for several
        if not {"input", "output"} <= prices_for(name, at=AT).rates.keys():
            continue  # not priced by tokens
        seen["models"] += 1
        for batch in (False, True):
            own = prices_for(name, at=AT, batch=batch)
            assert own.priced_as == name
            for _ in range(3 if batch else 2):
                usage = _random_usage(draw)
                bill = own.bill(usage)
                assert bill.total == _theirs(provider, model, usage, batch), (own, usage)
                seen["tiered"] += bill.tier.startswith("over")
                seen["cached"] += any(line.kind == "cached_input" for line in bill.lines)
                seen["batched"] += batch and own.standard < own.rates.keys()
                seen["hour"] += usage.cache_write_1h > 0 and "cache_write_1h" in own.rates
                seen["fallback"] += any("billed as" in line.note for line in bill.lines)
    assert seen["models"] > 300, seen
    assert min(seen.values()) >= 10, seen


@needs_package
def test_the_comparison_can_fail():
    """The control: billing cached tokens twice, as others did, is seen."""
    usage = Usage(uncached=100, cache_read=900, output=10)
    twice = Usage(uncached=1000, cache_read=900, output=10)
    provider, model = prices._find("gpt-5", prices._package().data.providers, ())
    assert cost("gpt-5", usage, at=AT).total == _theirs(provider, model, usage, False)
    assert cost("gpt-5", twice, at=AT).total != _theirs(provider, model, usage, False)


@needs_package
def test_published_prices_by_hand():
    """OpenAI's price page, GPT-5: $1.25 input, $0.125 cached input, $10 output a million."""
    bill = cost("gpt-5", Usage(uncached=86, cache_read=1920, output=300, reasoning=128), at=AT)
    assert bill.lines == (
        CostLine("input", 86, Decimal("1.25"), Decimal("0.0001075")),
        CostLine("cached_input", 1920, Decimal("0.125"), Decimal("0.00024")),
        CostLine("output", 172, Decimal(10), Decimal("0.00172")),
        CostLine("reasoning", 128, Decimal(10), Decimal("0.00128")),
    )
    assert bill.total == Decimal("0.0033475")
    assert bill.source == f"genai-prices {genai.__version__}"
    assert re.fullmatch(r"newest price inside begins 20\d\d-\d\d-\d\d", bill.dated)
    assert bill.dated[-10:] <= date.today().isoformat()


@needs_package
@pytest.mark.parametrize(
    ("name", "priced_as"),
    [
        ("gpt-5", "openai/gpt-5"),
        ("GPT-5", "openai/gpt-5"),
        ("openai/gpt-5", "openai/gpt-5"),
        ("openai:gpt-5", "openai/gpt-5"),
        ("azure/gpt-5", "azure/gpt-5"),
        ("openrouter/openai/gpt-5", "openrouter/openai/gpt-5"),
        ("gpt-4o-2024-08-06", "openai/gpt-4o"),
        ("anthropic/claude-sonnet-4-5", "anthropic/claude-sonnet-4-5"),
        ("text-embedding-3-small", "openai/text-embedding-3-small"),
        ("gpt-oss-120b", "openai/gpt-oss-120b"),
        ("llama-3.3-70b-versatile", "groq/llama-3.3-70b-versatile"),
    ],
)
def test_names_that_mean_a_model(name, priced_as):
    assert prices_for(name, at=AT).priced_as == priced_as


@needs_package
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gtp-5", "did you mean gpt-5"),
        ("openai/gtp-5", "did you mean openai/gpt-5"),
        ("somebody/gpt-5", "did you mean"),
        ("meta-llama/llama-3.3-70b-instruct", "say which one"),
        ("zzzz", "--price-file"),
        ("", "--price-file"),
        ("/", "--price-file"),
        ("x" * 10_000, "--price-file"),
    ],
)
def test_a_name_that_means_none_or_several_is_refused(name, says):
    with pytest.raises(RecipeError, match=re.escape(says)) as refused:
        prices_for(name, at=AT)
    assert len(str(refused.value)) < 700
    assert "\n" not in str(refused.value)


@needs_package
def test_the_cheapest_comes_first():
    bills = compare(["gpt-5", "gpt-5-nano", "gpt-5-mini"], Usage(uncached=1000, output=100), at=AT)
    assert [bill.model for bill in bills] == ["gpt-5-nano", "gpt-5-mini", "gpt-5"]
    assert bills[0].total < bills[1].total < bills[2].total


@needs_package
def test_context_windows_where_known(own):
    assert context_window("gpt-4o") == 128_000
    assert context_window("gemini-2.5-pro") is None
    assert context_window("mine", price_file=own) == 10


@needs_package
def test_a_reseller_owes_no_batch_discount():
    usage = Usage(uncached=10**6)
    assert cost("gpt-4o", usage, at=AT, batch=True).total == Decimal("1.25")
    resold = cost("azure/gpt-4o", usage, at=AT, batch=True)
    assert resold.total == Decimal("2.5")
    assert "no batch price is known: standard rates" in resold.notes


@needs_package
def test_the_day_and_the_hour_decide():
    usage = Usage(uncached=10**6)
    day, night = (cost("deepseek-chat", usage, at=AT.replace(hour=h)) for h in (9, 20))
    assert day.total != night.total
    assert "the price depends on the hour: this is 20:30 UTC" in night.notes
    noon = cost("deepseek-chat", usage, at=AT.date())
    assert "the price depends on the hour: this is 12:00 UTC" in noon.notes
    earlier = cost("o3", usage, at=date(2025, 5, 1)).total
    assert (earlier, cost("o3", usage, at=AT).total) == (10, 2)  # its price fell in June 2025


@needs_package
def test_old_data_say_so():
    newest = date.fromisoformat(prices_for("gpt-5").dated[-10:])
    assert prices_for("gpt-5", at=newest + timedelta(60)).notes == ()
    late = prices_for("gpt-5", at=newest + timedelta(61))
    assert late.notes == ("these prices are 61 days old",)


@needs_package
def test_prices_announced_for_later_do_not_make_the_data_new():
    data = prices._package().data
    assert prices._newest(data, date(2020, 1, 1)) == date.min
    assert prices._newest(data, date(2025, 12, 31)) <= date(2025, 12, 31)
    assert prices._newest(data, date(2100, 1, 1)) <= date.today()


@needs_package
def test_an_updated_snapshot_in_the_process_changes_nothing():
    """Another library may start the updater; our prices are still those of the version we name."""
    from genai_prices.data_snapshot import DataSnapshot, set_custom_snapshot

    before = prices_for("gpt-5", at=AT)
    set_custom_snapshot(DataSnapshot(providers=[], from_auto_update=True))
    try:
        assert prices_for("gpt-5", at=AT) == before
    finally:
        set_custom_snapshot(None)


def test_a_price_file_overrides_and_others_remain(own):
    assert cost("mine", Usage(uncached=5), price_file=own, at=AT).total == Decimal("0.000005")
    assert cost("proxy/MINE", Usage(output=5), price_file=own, at=AT).model == "proxy/MINE"
    if genai is not None:
        assert prices_for("gpt-5", price_file=own, at=AT).priced_as == "openai/gpt-5"
        with pytest.raises(RecipeError, match="did you mean mine"):
            prices_for("minee", price_file=own)


@pytest.mark.parametrize(
    ("running", "says"), [((3, 10), "Python 3.11"), ((3, 12), "lm-workbench[prices]")]
)
def test_without_the_package_it_is_said_what_to_do(own, monkeypatch, running, says):
    for name in [name for name in sys.modules if name.split(".")[0] == "genai_prices"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "genai_prices", None)
    monkeypatch.setattr(sys, "version_info", running)
    with pytest.raises(ResourceError, match=re.escape(says)):
        prices_for("gpt-5")
    assert prices_for("mine", price_file=own)
    with pytest.raises(RecipeError, match=r"no prices for 'mime' .*did you mean mine"):
        prices_for("mime", price_file=own)


PROBE = """
import json, socket, sys
def refuse(*_, **__): raise AssertionError("a socket was opened")
class Refused(socket.socket): __init__ = refuse
socket.socket, socket.create_connection, socket.getaddrinfo = Refused, refuse, refuse
from pathlib import Path
from engine.text.prices import cost, context_window, compare
from engine.text.usage import Usage
own = Path(sys.argv[2]) if len(sys.argv) > 2 else None
print(cost(sys.argv[1], Usage(100, 10, 5, 20, 10), price_file=own).total)
heavy = {"torch", "numpy", "pydantic", "httpx2", "genai_prices"}
print(json.dumps(sorted(heavy & {name.split(".")[0] for name in sys.modules})))
"""


def _loaded(*words: str) -> list[str]:
    process = subprocess.run(
        [sys.executable, "-c", PROBE, *words],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        timeout=60,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def test_a_price_file_needs_no_package(own):
    assert _loaded("mine", str(own)) == []


@needs_package
def test_the_package_is_imported_when_asked_and_opens_no_socket():
    assert _loaded("gpt-5") == ["genai_prices", "httpx2", "pydantic"]


def test_the_probe_can_fail():
    """The control: a socket, had one been opened, is seen."""
    code = PROBE.split("from pathlib")[0] + "socket.socket()"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "a socket was opened" in process.stderr


def test_the_examples_in_the_documentation(tmp_path, monkeypatch):
    """Every example of docs/costs.md gives what the page says, with the prices it prints."""
    blocks = re.findall(r"```yaml\n(.*?)```", COSTS, re.DOTALL)
    assert len(blocks) == 1
    (tmp_path / "prices.yaml").write_text(blocks[0], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    code = "\n\n".join(re.findall(r"```python\n(.*?)```", COSTS, re.DOTALL))
    examples = doctest.DocTestParser().get_doctest(code, {}, "docs/costs.md", None, 0)
    assert len(examples.examples) >= 15
    said: list[str] = []
    outcome = doctest.DocTestRunner(verbose=False).run(examples, out=said.append)
    assert outcome.failed == 0, "".join(said)
    wrong = code.replace("total 0.0033475", "total 0.0057475")  # the control: cached billed twice
    examples = doctest.DocTestParser().get_doctest(wrong, {}, "wrong", None, 0)
    assert doctest.DocTestRunner(verbose=False).run(examples, out=said.append).failed == 1
