"""Prices of your own: a small YAML or JSON file that overrides the ones that came with a package.

currency: USD
as_of: 2026-11-01
models:
  big-model:                       dollars per million tokens
    input: 2.50
    cached_input: 0.25
    output: 10
    context_window: 400000
    batch: 0.5                     a batch costs half
    tiers:                         each prices every kind that the model prices
      - {above: 200000, input: 5, cached_input: 0.50, output: 15}
"""

import re
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

from engine.errors import InputError
from engine.text.bill import Prices, Steps, staleness

KINDS = ("input", "cached_input", "cache_write", "cache_write_1h", "output", "reasoning")
_TOP = ("currency", "as_of", "models")
_MODEL = (*KINDS, "context_window", "batch", "tiers")


def read_prices(path: Path, *, at: date, batch: bool = False) -> dict[str, Prices]:
    """Read every model of a price file.

    Raises: InputError naming file, line and what fits.
    """
    return _Reader(path, at, batch).read()


class _Reader:
    """Walks the nodes of one file, each of which knows its line."""

    def __init__(self, path: Path, at: date, batch: bool) -> None:
        self.path, self.at, self.batch = path, at, batch

    def read(self) -> dict[str, Prices]:
        """Return the prices of every model by its name in lower case."""
        try:
            text = self.path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or "not UTF-8 text"
            raise InputError(f"{self.path}: cannot be read: {why}") from None
        if text.lstrip().startswith("{"):
            text = text.replace("\t", " ")  # JSON may be indented with tabs, YAML may not
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except (yaml.YAMLError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            what = getattr(error, "problem", None) or "cannot be read"
            line = f":{mark.line + 1}" if mark else ""
            raise InputError(f"{self.path}{line}: not valid YAML or JSON: {what}") from None
        if root is None:
            raise InputError(f"{self.path}: is empty; it needs {', '.join(_TOP)}")
        top = self._mapping(root, "a price file", _TOP, needed=_TOP)
        if top["currency"].value != "USD":
            raise self._wrong(top["currency"], "currency must be USD")
        as_of = self._date(top["as_of"])
        models = self._mapping(top["models"], "models")
        if not models:
            raise self._wrong(top["models"], "models names no model")
        return {name.lower(): self._model(name, node, as_of) for name, node in models.items()}

    def _model(self, name: str, node: yaml.Node, as_of: date) -> Prices:
        found = self._mapping(node, name, _MODEL, needed=("input",))
        rates = {kind: [(0, self._price(found[kind], kind))] for kind in KINDS if kind in found}
        previous = 0
        for tier in self._sequence(found["tiers"]) if "tiers" in found else ():
            own = self._mapping(tier, "a tier", ("above", *KINDS), needed=("above", *rates))
            above = self._whole(own.pop("above"), "above")
            if above <= previous:
                raise self._wrong(tier, f"tiers must rise: above {above} follows {previous}")
            previous = above
            for kind, price in own.items():
                if kind not in rates:
                    raise self._wrong(price, f"{kind} has a price in a tier, but none below it")
                rates[kind].append((above, self._price(price, kind)))
        factor, standard = Decimal(1), frozenset(rates)
        if "batch" in found:
            wish = "batch must be a share of the price, from 0 to 1: 0.5"
            factor = self._scalar(found["batch"], r"0(\.\d{1,4})?|1(\.0{1,4})?", Decimal, wish)
            standard = frozenset()
        window = found.get("context_window")
        return Prices(
            name,
            name,
            {kind: self._steps(steps, factor) for kind, steps in rates.items()},
            source=str(self.path),
            dated=f"as of {as_of}",
            context_window=self._whole(window, "context_window") if window else None,
            batch=self.batch,
            standard=standard,
            notes=staleness(as_of, self.at),
        )

    def _steps(self, steps: list[tuple[int, Decimal]], factor: Decimal) -> Steps:
        return tuple((above, rate * factor if self.batch else rate) for above, rate in steps)

    def _mapping(
        self, node: Any, what: str, known: tuple[str, ...] = (), needed: tuple[str, ...] = ()
    ) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            raise self._wrong(node, f"{what} must be a mapping of keys")
        found: dict[str, yaml.Node] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self._wrong(key, "a key must be a word")
            name = key.value[:80]
            if known and name not in known:
                raise self._wrong(key, f"{name} is no key of {what}; it may have {_list(known)}")
            if name.lower() in map(str.lower, found):
                raise self._wrong(key, f"{name} is given twice; keep one")
            found[name] = value
        for name in needed:
            if name not in found:
                raise self._wrong(node, f"{what} needs {name}")
        return found

    def _sequence(self, node: yaml.Node) -> list[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode):
            raise self._wrong(node, "tiers must be a list, such as [{above: 200000, input: 5}]")
        return node.value

    def _price(self, node: yaml.Node, name: str) -> Decimal:
        # From the text itself: a float would turn 0.1 into 0.1000000000000000055.
        return self._scalar(node, r"\d{1,9}(\.\d{1,12})?", Decimal, f"{name} must be a price: 2.50")

    def _whole(self, node: yaml.Node, name: str) -> int:
        return self._scalar(node, r"[1-9]\d{0,14}", int, f"{name} must be a whole number")

    def _date(self, node: yaml.Node) -> date:
        pattern, wish = r"\d{4}-\d\d-\d\d", "as_of must be a day such as 2026-11-01"
        return self._scalar(node, pattern, date.fromisoformat, wish)

    def _scalar(self, node: yaml.Node, pattern: str, read: Callable[[str], Any], wish: str) -> Any:
        if isinstance(node, yaml.ScalarNode) and re.fullmatch(pattern, node.value, re.ASCII):
            try:
                return read(node.value)
            except ValueError:
                pass
        said = f", not {node.value[:40]!r}" if isinstance(node, yaml.ScalarNode) else ""
        raise self._wrong(node, wish + said)

    def _wrong(self, node: yaml.Node, problem: str) -> InputError:
        return InputError(f"{self.path}:{node.start_mark.line + 1}: {' '.join(problem.split())}")


def _list(names: tuple[str, ...]) -> str:
    return ", ".join(names)
