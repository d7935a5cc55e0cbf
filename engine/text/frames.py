"""What a conversation costs beyond its words: frames, names, tools, pictures, the reply's primer.

Each part says how well it is known. A sum with an unknown part is a lower bound, never an answer.

Source: OpenAI cookbook, "How to count tokens with tiktoken" (3 for a message, 1 for a name, 3 for
the reply); the TypeScript namespace is how models were seen to repeat the tools they were given.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from engine.text.chat import REASONING
from engine.text.images import image_tokens
from engine.text.request import Request, name_of

Class = Literal["exact", "frame rule", "estimated", "unknown"]
PARTS = ("content", "frame", "names", "tools", "format", "reasoning", "images", "primer")
TYPES = {"integer": "number", "null": "null", "string": "string", "boolean": "boolean"}
FUNCTION = {"type", "name", "description", "parameters", "strict"}
SCHEMA = {"type", "description", "properties", "required", "enum", "items", "anyOf"}
SCHEMA |= {"additionalProperties"}


@dataclass(frozen=True)
class Part:
    """Tokens of one kind in a conversation; None where nobody has published how many."""

    kind: str
    tokens: int | None
    how: Class


def count_parts(
    request: Request,
    model: str,
    count: Callable[[str], int],
    *,
    exact: bool,
    frame: tuple[int, int, int] | None,
) -> list[Part]:
    """Return the parts of a request to a model that is reached through an interface.

    `frame` is what it adds per message, per name and for the reply, if that is known.
    """
    pieces = _Pieces(model, count, "exact" if exact else "estimated", frame is not None)
    parts: list[Part] = []
    for message in request.messages:
        parts += pieces.of_message(message)
        if frame:
            parts.append(Part("frame", frame[0] + count(message["role"]), "frame rule"))
        if isinstance(name := message.get("name"), str):
            tokens = frame[1] + count(name) if frame else None
            parts.append(Part("names", tokens, "frame rule" if frame else "unknown"))
    parts += pieces.of_tools(request.tools)
    parts += [Part("format", count(_json(each)), "estimated") for each in request.formats]
    parts += [Part(key, None, "unknown") for key in request.unread]
    if frame:
        parts.append(Part("primer", frame[2], "frame rule"))
    else:
        parts.append(Part("frame", None, "unknown"))
    return add(parts)


def add(parts: Sequence[Part]) -> list[Part]:
    """Add up parts of one kind and class."""
    sums: dict[tuple[str, Class], int] = {}
    for part in parts:
        key = (part.kind, part.how)
        sums[key] = sums.get(key, 0) + (part.tokens or 0)
    order = sorted(sums, key=lambda key: PARTS.index(key[0]) if key[0] in PARTS else len(PARTS))
    return [Part(*key[:1], None if key[1] == "unknown" else sums[key], key[1]) for key in order]


@dataclass(frozen=True)
class _Pieces:
    """Counts what messages and tools consist of, for one model."""

    model: str
    count: Callable[[str], int]
    words: Class
    published: bool  # whether the maker says how tools and pictures are put before the model

    def of_message(self, message: Mapping[str, Any]) -> Iterator[Part]:
        """Yield the parts of a message: content, refusal, thoughts, calls."""
        yield from self.of_content(message.get("content"))
        if isinstance(refusal := message.get("refusal"), str):
            yield Part("content", self.count(refusal), self.words)
        thoughts = [message[name] for name in REASONING if message.get(name) is not None]
        for thought in thoughts[:1]:  # the same under each of its names
            text = thought if isinstance(thought, str) else _json(thought)
            yield Part("reasoning", self.count(text), "estimated")
        for call in message.get("tool_calls") or []:
            yield Part("tools", self.count(_call_text(call)), "estimated")

    def of_content(self, content: object) -> Iterator[Part]:
        """Yield the parts of a content: text, or a list of pieces."""
        if isinstance(content, str):
            yield Part("content", self.count(content), self.words)
        elif content is not None and not isinstance(content, list):
            yield Part(name_of("content"), None, "unknown")
        for piece in content if isinstance(content, list) else []:
            yield from self.of_piece(piece if isinstance(piece, Mapping) else {"type": "?"})

    def of_piece(self, piece: Mapping[str, Any]) -> Iterator[Part]:
        """Yield the parts of a piece of content: text, a picture, a tool's call or its result."""
        kind = str(piece.get("type"))
        said = piece.get("refusal" if kind == "refusal" else "text")
        if kind in ("text", "input_text", "output_text", "refusal") and isinstance(said, str):
            yield Part("content", self.count(said), self.words)
        elif kind == "thinking":
            yield Part("reasoning", self.count(str(piece.get("thinking"))), "estimated")
        elif kind == "tool_use":
            text = f"{piece.get('name')}({_json(piece.get('input'))})"
            yield Part("tools", self.count(text), "estimated")
        elif kind == "tool_result":
            yield from self.of_content(piece.get("content"))
        elif kind in ("image_url", "input_image", "image"):
            yield self.of_picture(piece)
        elif kind == "document" and _source(piece).get("type") == "text":
            said = [_source(piece).get("data"), piece.get("title"), piece.get("context")]
            tokens = sum(self.count(str(text)) for text in said if text is not None)
            yield Part("content", tokens, "estimated")
        else:  # a sound, a file
            yield Part(name_of(kind), None, "unknown")

    def of_picture(self, piece: Mapping[str, Any]) -> Part:
        """Return the part of a picture, as far as its size is told and a rule is published."""
        picture, source = piece.get("image_url"), _source(piece)
        given = picture if isinstance(picture, Mapping) else {"url": picture}
        detail = given.get("detail") or piece.get("detail") or "auto"
        url = str(given.get("url"))
        if source.get("type") == "base64":
            url = f"data:image/;base64,{source.get('data')}"
        # Without a word about detail the model may choose; high is what it does now.
        tokens = image_tokens(self.model, url, "high" if detail == "auto" else str(detail))
        if tokens is None:
            return Part("images", None, "unknown")
        told = self.published and detail != "auto"
        return Part("images", tokens, "frame rule" if told else "estimated")

    def of_tools(self, tools: Sequence[Mapping[str, Any]]) -> Iterator[Part]:
        """Yield a part for the tools as TypeScript, one for each that this does not show whole."""
        shown = [tool for tool in tools if self.published and _shows_whole(tool)]
        if shown:
            yield Part("tools", self.count(typescript(shown)), "estimated")
        for tool in tools:
            if any(tool is each for each in shown):
                continue
            if tool.get("type") in (None, "function", "custom"):
                text = _json({k: v for k, v in tool.items() if k != "cache_control"})
                yield Part("tools", self.count(text), "estimated")
            else:  # one of the provider's own, with words of its own
                yield Part(f"tool {name_of(str(tool['type']))}", None, "unknown")


def _source(piece: Mapping[str, Any]) -> Mapping[str, Any]:
    source = piece.get("source")
    return source if isinstance(source, Mapping) else {}


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _call_text(call: object) -> str:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return _json(call)
    return f"{function.get('name')}({function.get('arguments')})"


def _shows_whole(tool: Mapping[str, Any]) -> bool:
    """Tell whether the TypeScript of a tool says everything that the tool does."""
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or function.keys() - FUNCTION:
        return False
    outside = tool.keys() - {"type", "function"} if function is not tool else set()
    kind = tool.get("type", "function")
    return kind == "function" and not outside and _plain(function.get("parameters", {}), False)


def _plain(schema: object, described: bool) -> bool:
    """Tell whether a schema has only what the TypeScript shows; a description only of fields."""
    if not isinstance(schema, Mapping) or schema.keys() - SCHEMA:
        return False
    if "description" in schema and not described:
        return False
    if "anyOf" in schema and schema.keys() & {"properties", "items", "enum"}:
        return False
    fields, ways = schema.get("properties", {}), schema.get("anyOf", [])
    if not isinstance(fields, Mapping) or not isinstance(ways, list):
        return False
    if not isinstance(schema.get("additionalProperties", False), bool):
        return False
    inner = [schema["items"], *ways] if "items" in schema else ways
    return all(_plain(each, True) for each in fields.values()) and all(
        _plain(each, False) for each in inner
    )


def typescript(tools: Sequence[Mapping[str, Any]]) -> str:
    """Return tools as the namespace of TypeScript functions that models read them as."""
    lines = ["# Tools", "", "## functions", "", "namespace functions {", ""]
    for tool in tools:
        function = tool.get("function")
        function = function if isinstance(function, Mapping) else tool
        lines += _comment(function.get("description"))
        parameters = function.get("parameters")
        fields = _fields(parameters) if isinstance(parameters, Mapping) else []
        argument = ["(_: {", *fields, "})"] if fields else ["()"]
        argument[0] = f"type {function.get('name')} = {argument[0]}"
        argument[-1] += " => any;"
        lines += [*argument, ""]
    return "\n".join([*lines, "} // namespace functions"])


def _comment(text: object) -> list[str]:
    return [f"// {line}" for line in str(text).splitlines()] if text else []


def _fields(schema: Mapping[str, Any]) -> list[str]:
    """Return the lines of an object's fields."""
    lines = []
    required = schema.get("required")
    required = required if isinstance(required, list) else []
    properties = schema.get("properties")
    for name, value in properties.items() if isinstance(properties, Mapping) else []:
        value = value if isinstance(value, Mapping) else {}
        lines += _comment(value.get("description"))
        lines.append(f"{name}{'' if name in required else '?'}: {_type(value)},")
    return lines


def _type(schema: Mapping[str, Any]) -> str:
    """Return the type that a JSON schema describes."""
    if isinstance(choices := schema.get("enum"), list):
        return " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
    if isinstance(ways := schema.get("anyOf"), list):
        return " | ".join(_type(way) for way in ways if isinstance(way, Mapping))
    kind = schema.get("type")
    if kind == "array":
        items = schema.get("items")
        return f"{_type(items) if isinstance(items, Mapping) else 'any'}[]"
    if kind == "object":
        return "\n".join(["{", *_fields(schema), "}"]) if schema.get("properties") else "object"
    if isinstance(kind, list):
        return " | ".join(TYPES.get(str(name), str(name)) for name in kind)
    return TYPES.get(str(kind), "any" if kind is None else str(kind))
