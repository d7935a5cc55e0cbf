"""What a conversation costs beyond its words: frames, names, tools, pictures, the reply's primer.

Each part says how well it is known. A sum with an unknown part is a lower bound, never an answer.

Source: OpenAI cookbook, "How to count tokens with tiktoken" (3 for a message, 1 for a name, 3 for
the reply); the TypeScript namespace is how models were seen to repeat the tools they were given.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from engine.text.images import image_tokens

Class = Literal["exact", "frame rule", "estimated", "unknown"]
PARTS = ("content", "frame", "names", "tools", "images", "other", "primer")
TYPES = {"integer": "number", "null": "null", "string": "string", "boolean": "boolean"}


@dataclass(frozen=True)
class Part:
    """Tokens of one kind in a conversation; None where nobody has published how many."""

    kind: str
    tokens: int | None
    how: Class


def count_parts(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    model: str,
    count: Callable[[str], int],
    *,
    exact: bool,
    frame: tuple[int, int, int] | None,
) -> list[Part]:
    """Return the parts of a conversation for a model that is reached through an interface.

    `frame` is what it adds per message, per name and for the reply, if that is known.
    """
    words: Class = "exact" if exact else "estimated"
    parts = []
    for message in messages:
        parts += _content_parts(message.get("content"), model, count, words)
        if frame:
            parts.append(Part("frame", frame[0] + count(str(message["role"])), "frame rule"))
        if isinstance(name := message.get("name"), str):
            known = frame is not None
            tokens = frame[1] + count(name) if frame else None
            parts.append(Part("names", tokens, "frame rule" if known else "unknown"))
        for call in message.get("tool_calls") or []:
            parts.append(Part("tools", count(_call_text(call)), "estimated"))
    if tools:
        parts.append(Part("tools", count(typescript(tools)), "estimated"))
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
    order = sorted(sums, key=lambda key: PARTS.index(key[0]))
    return [Part(*key[:1], None if key[1] == "unknown" else sums[key], key[1]) for key in order]


def _content_parts(
    content: object, model: str, count: Callable[[str], int], words: Class
) -> Iterator[Part]:
    """Yield the parts of a message's content: text, or a list of text and pictures."""
    if isinstance(content, str):
        yield Part("content", count(content), words)
    for piece in content if isinstance(content, list) else []:
        text, picture = piece.get("text"), piece.get("image_url")
        if isinstance(text, str):
            yield Part("content", count(text), words)
        elif "image" in str(piece.get("type")):
            given = picture if isinstance(picture, Mapping) else {"url": picture}
            detail = given.get("detail") or piece.get("detail") or "auto"
            # Without a word about detail the model may choose; high is what it does now.
            url, wanted = str(given.get("url")), "high" if detail == "auto" else str(detail)
            tokens = image_tokens(model, url, wanted)
            published: Class = "estimated" if detail == "auto" else "frame rule"
            yield Part("images", tokens, "unknown" if tokens is None else published)
        else:  # a sound, a file
            yield Part("other", None, "unknown")


def _call_text(call: object) -> str:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return json.dumps(call, ensure_ascii=False)
    return f"{function.get('name')}({function.get('arguments')})"


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
