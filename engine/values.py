"""Does a value fit a setting: its type, its choices, its range? And which name was meant?

Recipes, config.json, generation_config.json and `/set` in a chat all ask here.
"""

import dataclasses
import difflib
import math
import typing
from typing import Any, Literal


def convert(value: Any, field: dataclasses.Field) -> Any:
    """Check a YAML value against a field's type and range. Raises: ValueError saying what fits."""
    kind: Any = field.type
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}{nearest(str(value), choices)}")
        return value
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError("must be true or false")
        return value
    if kind is str:
        if isinstance(value, (bool, list, dict)):
            raise ValueError("must be text; put it in quotes")
        return "" if value is None else str(value)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError("must be a list of numbers")
        return tuple(_number(float, item, None, None) for item in value)
    return _number(kind, value, field.metadata["low"], field.metadata["high"])


def _number(kind: type, value: Any, low: float | None, high: float | None) -> float:
    """Check a number's type and range. Raises: ValueError saying what fits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("must be a whole number" if kind is int else "must be a number")
    if not math.isfinite(value):
        raise ValueError("must be finite")
    if kind is int and value != int(value):
        raise ValueError("must be a whole number")
    if (low is not None and value < low) or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"is out of range: must be {limits}")
    return kind(value)


def nearest(key: str, known: typing.Iterable[str]) -> str:
    """Suggest the key that was probably meant, by spelling or by its last part."""

    def alike(name: str) -> float:
        """Return how alike two keys are, or their last parts; whole keys have much in common."""
        ends = (key.rsplit(".", 1)[-1], name.rsplit(".", 1)[-1])
        whole, last = (difflib.SequenceMatcher(None, *pair).ratio() for pair in ((key, name), ends))
        return max(whole if whole >= 0.75 else 0.0, last if last >= 0.6 else 0.0)

    best = max(known, key=alike, default="")
    return f"; did you mean {best}?" if best and alike(best) else ""
