"""A log of answers, each of which is billed once: whole ones, streams, results of batches.

OpenAI      chunks of one id; the last that has a usage counts
Anthropic   message_start, then message_delta: each repeats the sums so far
batches     lines that failed used nothing
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.errors import DataError

_INNER = ("response", "body", "message", "result")
_FAILED = ("errored", "canceled", "expired")
_EVENTS = ("ping", "message_stop", "content_block_start", "content_block_delta")
_EVENTS += ("content_block_stop",)


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: where its last usage stands, its model, and what holds the usage."""

    where: str
    model: str | None
    value: Any


@dataclass
class LeftOut:
    """What a log holds beside usage."""

    silent: int = 0  # events and chunks that say nothing of usage
    earlier: int = 0  # usages of answers that say more later
    unfinished: int = 0  # streams that end without their last usage
    failed: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """Yield what to tell."""
        if self.silent:
            yield f"skipped: {self.silent:,} events without usage"
        if self.earlier:
            yield f"skipped: {self.earlier:,} usages of answers whose id comes again later"
        if self.unfinished:
            yield f"{self.unfinished:,} streams break off: their output is a lower bound"
        if self.failed:
            some = ", ".join(self.failed[:3]) + ", …" * (len(self.failed) > 3)
            yield f"skipped: {len(self.failed):,} that failed ({some})"


def read_answers(values: Iterable[tuple[str, Any]], left_out: LeftOut) -> Iterator[Answer]:
    """Yield each answer of a log once: those without an id as they come, then the others.

    Raises: DataError if an end of a stream has no beginning.
    """
    last: dict[str, Answer] = {}
    stream: dict[str, Any] | None = None
    unfinished: set[str] = set()
    for where, value in values:
        kind = value.get("type") if isinstance(value, Mapping) else None
        if kind == "message_start" and isinstance(value.get("message"), Mapping):
            stream = dict(value["message"])
            stream["id"] = _inside(stream, "id") or where
            unfinished.add(stream["id"])
            value = stream
        elif kind == "message_delta":
            if stream is None:
                raise DataError(f"{where}: message_delta without its message_start")
            value = stream = stream | {"usage": _updated(stream.get("usage"), value.get("usage"))}
            unfinished.discard(stream["id"])
        elif failed(value):
            name = value.get("custom_id")
            left_out.failed.append(f"{where} {ascii(str(name))[1:-1][:40]}" if name else where)
            continue
        elif is_silent(value):
            left_out.silent += 1
            continue
        answer = Answer(where, _inside(value, "model"), value)
        if (own := _inside(value, "id")) is None:
            yield answer
        else:
            left_out.earlier += own in last and kind != "message_delta"
            last[own] = answer
    left_out.unfinished = len(unfinished)
    yield from last.values()


def _updated(before: Any, after: Any) -> Any:
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return before if after is None else after
    return {**before, **{key: value for key, value in after.items() if value is not None}}


def failed(value: Any) -> bool:
    """Tell whether a line is the result of a request that failed, and so used nothing."""
    if not isinstance(value, Mapping) or isinstance(value.get("usage"), Mapping):
        return False
    result, response = value.get("result"), value.get("response")
    if isinstance(result, Mapping) and result.get("type") in _FAILED:
        return True
    status = response.get("status_code") if isinstance(response, Mapping) else None
    return bool(value.get("error")) or (isinstance(status, int) and status >= 400)


def is_silent(value: Any) -> bool:
    """Tell whether a value is an event or a chunk of a stream that says nothing of usage."""
    if not isinstance(value, Mapping) or value.get("usage") is not None:
        return False
    kind, thing = str(value.get("type")), str(value.get("object"))
    if kind.startswith("response."):
        response = value.get("response")
        return not isinstance(response, Mapping) or response.get("usage") is None
    choices = value.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    partial = isinstance(first, Mapping) and "delta" in first
    return kind in _EVENTS or thing.endswith(".chunk") or partial


def _inside(value: Any, key: str) -> str | None:
    """Return the model or the id that an answer has, however deep it lies."""
    if isinstance(value, Mapping) and "custom_id" in value:  # the line of a batch has its own id
        value = next((value[name] for name in _INNER if value.get(name) is not None), None)
    for _ in range(6):
        if not isinstance(value, Mapping):
            return None
        if isinstance(value.get(key), str) and value[key]:
            return value[key]
        value = next((value[name] for name in _INNER if isinstance(value.get(name), Mapping)), None)
    return None
