"""What one request used, in numbers that no provider's bookkeeping can bill twice.

    OpenAI      the input contains what was cached; the output contains the reasoning
    Anthropic   input, cache reads and cache writes lie side by side

Both become one `Usage` whose parts never overlap: input = uncached + cache_read + cache_write.
The next stop is `engine/text/prices.py`.

Source: OpenAI API reference, "usage" of chat completions and of responses; Anthropic API
reference, "usage" of messages, and its page on prompt caching.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.errors import DataError

# Where a response, a stream event or a line of a batch's results keeps what it used.
_WRAPPERS = ("usage", "usage_metadata", "response", "body", "message", "result")
# The singular is of OpenAI's realtime events and of LangChain, which also shortens the keys inside.
_BEFORE = ("prompt_tokens_details", "input_tokens_details", "input_token_details")
_STANDARD = ("standard", "default", "auto")
_BESIDE = ("cache_read_input_tokens", "cache_creation_input_tokens", "cache_creation")
_OUTPUT = ("output_tokens", "completion_tokens")
_AFTER = ("completion_tokens_details", "output_tokens_details", "output_token_details")


@dataclass(frozen=True)
class Usage:
    """Tokens of one request; reasoning is inside output, cache_write_1h inside cache_write.

    `notes` names what the request used that these numbers cannot say.
    Raises: DataError for a negative number, or a part that exceeds its whole.
    """

    uncached: int = 0
    cache_read: int = 0
    cache_write: int = 0
    output: int = 0
    reasoning: int = 0
    cache_write_1h: int = 0
    served: str = ""  # flex, priority, batch: what has rates of its own
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        for name in vars(self).keys() - {"notes", "served"}:
            _number(vars(self), name)
        _within("reasoning", self.reasoning, "output", self.output)
        _within("cache_write_1h", self.cache_write_1h, "cache_write", self.cache_write)

    @property
    def input(self) -> int:
        """Return all tokens that went in; tiers are chosen by it."""
        return self.uncached + self.cache_read + self.cache_write


def read_usage(found: Any, where: str = "usage") -> Usage:
    """Read a usage object, or the response, stream event or JSON line that holds one.

    Raises: DataError naming `where` and the keys, if the shape is unknown or contradicts itself.
    """
    try:
        if isinstance(found, (str, bytes)):
            try:
                found = json.loads(found, object_pairs_hook=no_duplicates)
            except DataError:
                raise
            except (ValueError, RecursionError):
                raise DataError("not JSON; give one usage object a line") from None
        return _read(*_unwrap(found))
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON, for `object_pairs_hook`. Raises: DataError if a key comes twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DataError(f"{ascii(twice)[:40]} stands twice in one object; keep one")
    return made


def _unwrap(found: Any) -> tuple[Mapping[str, Any], Any]:
    """Go down to the object that counts tokens; on the way lies how the request was served."""
    served = None
    for _ in range(6):
        if not isinstance(found, Mapping):
            break
        served = found.get("service_tier") or served
        if "input_tokens" in found or "prompt_tokens" in found:
            return found, served
        inner = [found[key] for key in _WRAPPERS if isinstance(found.get(key), Mapping)]
        if not inner:
            break
        found = inner[0]
    has = type(found).__name__
    if isinstance(found, Mapping):
        has = ", ".join(sorted(ascii(key)[:40] for key in found)[:8]) or "no keys"
    raise DataError(
        f"no usage of OpenAI or Anthropic shape, but {has}; prompt_tokens or input_tokens is needed"
    )


def _read(usage: Mapping[str, Any], served: Any) -> Usage:
    beside = any(name in usage for name in _BESIDE)
    inside = "prompt_tokens" in usage or any(name in usage for name in _BEFORE)
    parts = _inside(usage) if inside or not beside else _beside(usage)
    output = _agreed(usage, *_OUTPUT)
    after = _part(usage, *_AFTER)
    reasoning = _agreed(after, "reasoning_tokens", "thinking_tokens", "reasoning")
    said = _number(usage, "total_tokens")
    whole = parts["uncached"] + parts["cache_read"] + parts["cache_write"] + output
    _told(usage, "input_tokens", "prompt_tokens")
    if said is None:  # an embedding has no output, and says so by its total
        _told(usage, *_OUTPUT)
    if said is not None and said != whole:
        if said != whole + reasoning:
            raise DataError(f"total_tokens is {said}, but its parts add up to {whole}")
        output += reasoning  # this provider counts reasoning beside its output, and so bills it
    if served is not None and not isinstance(served, str):
        raise DataError(f"service_tier={ascii(served)[:40]} is not a word")
    served = "" if served in (None, *_STANDARD) else ascii(served)[1:-1][:40]
    return Usage(**parts, output=output, reasoning=reasoning, served=served, notes=_notes(usage))


def _told(usage: Mapping[str, Any], *names: str) -> None:
    """Refuse a usage in which none of these counts is given: missing is not nought."""
    if all(usage.get(name) is None for name in names):
        raise DataError(f"{' or '.join(names)} is missing or null, which is not the same as 0")


def _inside(usage: Mapping[str, Any]) -> dict[str, int]:
    """Read the shape in which the input contains what was cached."""
    total = _agreed(usage, "prompt_tokens", "input_tokens")
    details = _part(usage, *_BEFORE)
    read = _agreed({**usage, **details}, "cached_tokens", "prompt_cache_hit_tokens", "cache_read")
    write = _agreed(details, "cache_write_tokens", "cache_creation_tokens", "cache_creation")
    for key, own in (("cache_read_input_tokens", read), ("cache_creation_input_tokens", write)):
        # A proxy may repeat a number under Anthropic's name; alone it could mean either shape.
        if _number(usage, key) not in (None, 0, own):
            raise DataError(
                f"{key} stands beside an input that would contain it; it is unclear whether it is"
                " counted twice: give prompt_tokens_details.cached_tokens, or Anthropic's keys only"
            )
    _within("cached and cache-written tokens", read + write, "the input", total)
    if missed := _number({**usage, **details}, "prompt_cache_miss_tokens"):
        _within("cache hits and misses together", read + missed, "the input", total)
    return {"uncached": total - read - write, "cache_read": read, "cache_write": write}


def _beside(usage: Mapping[str, Any]) -> dict[str, int]:
    """Read the shape in which input, cache reads and cache writes lie side by side."""
    creation = _part(usage, "cache_creation")
    lives = [_number(creation, f"ephemeral_{life}_input_tokens") for life in ("5m", "1h")]
    split = {} if lives == [None, None] else {"cache_creation": sum(life or 0 for life in lives)}
    return {
        "uncached": _agreed(usage, "input_tokens"),
        "cache_read": _agreed(usage, "cache_read_input_tokens"),
        "cache_write": _agreed(
            {**usage, "cache_creation": None, **split},
            "cache_creation_input_tokens",
            "cache_creation",
        ),
        "cache_write_1h": lives[1] or 0,
    }


def _notes(usage: Mapping[str, Any]) -> tuple[str, ...]:
    """Name what was used and is not billed as text tokens at the standard rate."""
    notes = []
    before = _part(usage, *_BEFORE)
    after = _part(usage, *_AFTER)
    for side, details in (("input", before), ("output", after)):
        for key in ("audio_tokens", "image_tokens"):
            if count := _number(details, key):
                notes.append(f"{count} {key} of the {side} are priced here as text")
    for key in _part(usage, "server_tool_use"):
        if count := _number(_part(usage, "server_tool_use"), key):
            notes.append(f"{count} {ascii(key)[:40]} are billed apart, not in this price")
    return tuple(notes)


def _part(usage: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """Return the first of these inner objects that is there."""
    for name in names:
        value = usage.get(name)
        if isinstance(value, Mapping):
            return value
        if value is not None:
            raise DataError(f"{name} must be an object, not {type(value).__name__}")
    return {}


def _agreed(usage: Mapping[str, Any], *names: str) -> int:
    """Return the number that stands under these names; 0 if under none."""
    said = {name: count for name in names if (count := _number(usage, name)) is not None}
    if len(set(said.values())) > 1:
        raise DataError(
            f"{' and '.join(f'{n}={v}' for n, v in said.items())} contradict each other"
        )
    return next(iter(said.values()), 0)


def _number(values: Mapping[str, Any], name: str) -> int | None:
    value = values.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise DataError(f"{name}={ascii(value)[:40]} is not a number of tokens")
    if value > 10**15:
        raise DataError(f"{name} is beyond 10^15 tokens")
    return value


def _within(part: str, small: int, whole: str, large: int) -> None:
    if small > large:
        raise DataError(f"{part} ({small}) exceed {whole} ({large}), of which they are a part")
