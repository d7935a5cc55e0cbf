"""Counting conversations: a row for each line of a JSONL file, broken down into parts.

For models behind an interface it is words and published frame rules; for a checkpoint here it is
the ids that its own chat template gives, and exact.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from cli.counting import Report, Row
from cli.inputs import Source
from cli.json_lines import read_values
from engine.errors import DataError, EngineError, RecipeError
from engine.text.chat import render
from engine.text.frames import Part, add, count_parts
from engine.text.fromfile import FromFile
from engine.text.renderer import Renderer
from engine.text.request import Request, name_of, read_request

if TYPE_CHECKING:
    from engine.text.counting import TokenCounter

Placed = tuple[str, int, Request]  # where it stands, its bytes, and what it asks


def read_requests(source: Source) -> Iterator[Placed]:
    """Yield the requests of a file. Raises: DataError that names file and line."""
    for where, size, value in read_values(source):
        try:
            request = read_request(value, where)
        except RecursionError:
            raise DataError(f"{where}: nested too deeply") from None
        yield where, size, request


def own_model(requests: Sequence[Placed]) -> str | None:
    """Return the model that requests name. Raises: RecipeError if they name several."""
    named = list(dict.fromkeys(r.model for _, _, r in requests if r.model))
    if len(named) > 1:
        raise RecipeError(
            f"the requests name several models ({', '.join(named[:3])}); say with -m which to"
            " count for"
        )
    return named[0] if named else None


def count_chats(requests: Iterable[Placed], counters: Sequence["TokenCounter"]) -> Report:
    """Count each request for each model.

    Raises: DataError that names file and line.
    """
    report = Report(counters, requests=True)
    with Renderer() as renderer:
        for where, size, request in requests:
            try:
                parts = tuple(_parts(c, request, renderer) for c in counters)
            except RecursionError:
                raise DataError(f"{where}: nested too deeply") from None
            except EngineError as error:
                raise DataError(f"{where}: {error}") from None
            tokens = tuple(sum(part.tokens or 0 for part in found) for found in parts)
            report.rows.append(Row(where, size, tokens, parts=parts))
    return report


def _parts(counter: "TokenCounter", request: Request, renderer: Renderer) -> tuple[Part, ...]:
    """Return the parts of one request for one model."""
    tokenizer = counter.source.tokenizer if isinstance(counter.source, FromFile) else None
    if tokenizer is None or not tokenizer.template:
        exact = counter.exactness == "exact"
        count = partial(_count, counter)
        return tuple(count_parts(request, counter.name, count, exact=exact, frame=counter.frame))
    messages = request.messages
    tools = [_as_templates_expect(tool) for tool in request.tools]
    ids = render(messages, tokenizer, tools=tools or None, renderer=renderer).ids
    words = [m["content"] for m in messages if isinstance(m.get("content"), str)]
    pieces = [
        piece for m in messages if isinstance(m.get("content"), list) for piece in m["content"]
    ]
    words += [piece["text"] for piece in pieces if isinstance(piece.get("text"), str)]
    content = min(len(ids), sum(_count(counter, word) for word in words))
    parts = [Part("content", content, "exact"), Part("frame", len(ids) - content, "exact")]
    unknown = [name_of(str(piece["type"])) for piece in pieces if "text" not in piece]
    unknown += ["format"] * bool(request.formats) + list(request.unread)
    return tuple(parts + [Part(kind, None, "unknown") for kind in dict.fromkeys(unknown)])


def _as_templates_expect(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a tool in the shape that chat templates read: a function with parameters."""
    if "function" in tool or tool.get("type", "function") != "function":
        return tool
    names = {"input_schema": "parameters"}
    function = {names.get(k, k): v for k, v in tool.items() if k not in ("type", "cache_control")}
    return {"type": "function", "function": function}


def _count(counter: "TokenCounter", text: str) -> int:
    return counter.count(text.encode("utf-8", "replace").decode())  # JSON may hold half a character


def parts_of(rows: Sequence[Row], index: int) -> list[Part]:
    """Return the parts of conversations for one model, added up."""
    return add([part for row in rows for part in row.parts[index]])


def class_of_parts(parts: Sequence[Part]) -> str:
    """Return how well a sum is known: as its least known part."""
    order = ("exact", "frame rule", "estimated", "unknown")
    return max((part.how for part in parts), key=order.index, default="exact")
