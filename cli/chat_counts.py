"""Counting conversations: a row for each line of a JSONL file, broken down into parts.

For models behind an interface it is words and published frame rules; for a checkpoint here it is
the ids that its own chat template gives, and exact.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from cli.counting import Report, Row
from cli.inputs import Source
from cli.json_lines import read_values
from engine.errors import DataError, EngineError
from engine.text.chat import check_messages, render
from engine.text.frames import Part, add, count_parts
from engine.text.fromfile import FromFile
from engine.text.renderer import Renderer

if TYPE_CHECKING:
    from engine.text.counting import TokenCounter


def count_chats(source: Source, counters: Sequence["TokenCounter"]) -> Report:
    """Count each conversation of a file for each model.

    Raises: DataError that names file and line.
    """
    report = Report(counters, requests=True)
    with Renderer() as renderer:
        for where, size, value in read_values(source):
            if isinstance(value, dict) and isinstance(value.get("body"), dict):
                value = value["body"]  # a line of a batch of requests
            messages = check_messages(value, where)
            tools = _tools(value, where)
            try:
                parts = tuple(_parts(c, messages, tools, renderer) for c in counters)
            except (EngineError, RecursionError) as error:
                raise DataError(f"{where}: {error}") from None
            tokens = tuple(sum(part.tokens or 0 for part in found) for found in parts)
            report.rows.append(Row(where, size, tokens, parts=parts))
    return report


def _tools(value: Any, where: str) -> list[dict[str, Any]]:
    tools = (value.get("tools") if isinstance(value, dict) else None) or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f'{where}: "tools" is not a list of objects')
    return tools


def _parts(
    counter: "TokenCounter", messages: list, tools: list, renderer: Renderer
) -> tuple[Part, ...]:
    """Return the parts of one conversation for one model."""
    tokenizer = counter.source.tokenizer if isinstance(counter.source, FromFile) else None
    if tokenizer is None or not tokenizer.template:
        exact = counter.exactness == "exact"
        count = partial(_count, counter)
        frame = counter.frame
        return tuple(count_parts(messages, tools, counter.name, count, exact=exact, frame=frame))
    ids = render(messages, tokenizer, tools=tools or None, renderer=renderer).ids
    words = [m["content"] for m in messages if isinstance(m.get("content"), str)]
    lists = [m["content"] for m in messages if isinstance(m.get("content"), list)]
    words += [p["text"] for pieces in lists for p in pieces if isinstance(p.get("text"), str)]
    content = min(len(ids), sum(counter.count(word) for word in words))
    parts = [Part("content", content, "exact"), Part("frame", len(ids) - content, "exact")]
    if any("text" not in piece for pieces in lists for piece in pieces):
        parts.append(Part("images", None, "unknown"))
    return tuple(parts)


def _count(counter: "TokenCounter", text: str) -> int:
    return counter.count(text.encode("utf-8", "replace").decode())  # JSON may hold half a character


def parts_of(report: Report, index: int) -> list[Part]:
    """Return the parts of all conversations for one model, added up."""
    return add([part for row in report.rows for part in row.parts[index]])


def class_of_parts(parts: Sequence[Part]) -> str:
    """Return how well a sum is known: as its least known part."""
    order = ("exact", "frame rule", "estimated", "unknown")
    return max((part.how for part in parts), key=order.index, default="exact")
