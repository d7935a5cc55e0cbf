"""A request as an interface takes it, whichever of the published shapes it has, made one shape.

    OpenAI      messages, tools, functions, response_format; or instructions and input
    Anthropic   system, messages, tools with an input_schema
    batches     any of these as the `body` or the `params` of a line

Nothing that may hold words is dropped: what is not understood here is named in `unread`.

Source: OpenAI API reference, chat completions, responses and batches; Anthropic API reference,
messages and message batches.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import DataError
from engine.text.chat import REASONING, check_messages

# Keys that put no words before the model.
_SETTINGS = """
    model temperature top_p top_k min_p max_tokens max_completion_tokens max_output_tokens stop
    stop_sequences stream stream_options n seed logprobs top_logprobs logit_bias user metadata
    presence_penalty frequency_penalty store service_tier parallel_tool_calls max_tool_calls
    tool_choice function_call reasoning_effort reasoning thinking modalities verbosity truncation
    include background prompt_cache_key prompt_cache_retention safety_identifier cache_control
    anthropic_version anthropic_beta betas inference_geo speed
"""
SETTINGS = frozenset(_SETTINGS.split())
READ = {"messages", "input", "system", "instructions", "tools", "functions"}
FORMATS = ("response_format", "output_format")
OUTPUTS = ("text", "output_config")  # where other interfaces keep the format
MESSAGE = {"role", "content", "name", "tool_calls", "refusal", *REASONING}
MESSAGE |= {"tool_call_id", "id", "type", "status", "cache_control", "weight"}  # without words
PIECE = {"type", "text", "id", "cache_control", "annotations", "logprobs"}


@dataclass(frozen=True, slots=True)
class Request:
    """What is put before a model."""

    messages: list[dict[str, Any]]
    tools: tuple[Mapping[str, Any], ...] = ()
    formats: tuple[Mapping[str, Any], ...] = ()  # what the answer must look like
    model: str | None = None
    unread: tuple[str, ...] = ()  # keys with words that nobody here knows how to count


def read_request(value: Any, where: str) -> Request:
    """Read a request, or the list of messages that is all of one.

    Raises: DataError that names `where` and what is wrong.
    """
    for key in ("body", "params"):
        if isinstance(value, Mapping) and not value.keys() & {"messages", "input"}:
            value = value.get(key, value)  # a line of a batch
    if not isinstance(value, Mapping):
        messages = _messages(value, where)
        return Request(messages, unread=tuple(_unread_in(messages)))
    given = {key: each for key, each in value.items() if each is not None}
    if "messages" in given and "input" in given:
        raise DataError(f'{where}: has "messages" and "input"; keep one')
    asked = given.get("messages", _items(given.get("input"), where))
    messages = [
        *(message for key in ("system", "instructions") for message in _system(given, key, where)),
        *_messages(asked, where),
    ]
    holders = [given.get(key) for key in FORMATS]
    holders += [each.get("format") for key in OUTPUTS if isinstance(each := given.get(key), dict)]
    formats = tuple(each for each in holders if isinstance(each, dict) and each.keys() - {"type"})
    known = SETTINGS | READ | {*FORMATS}
    known |= {key for key in OUTPUTS if isinstance(given.get(key), dict)}
    unread = [key for key in given.keys() - known if holds_words(given[key])]
    model = given.get("model")
    return Request(
        messages,
        (*_objects(given, "tools", where), *_objects(given, "functions", where)),
        formats,
        model if isinstance(model, str) else None,
        tuple(sorted({*map(name_of, unread), *_unread_in(messages)})),
    )


def _objects(given: Mapping[str, Any], key: str, where: str) -> list[Mapping[str, Any]]:
    found = given.get(key) or []
    if not isinstance(found, list) or not all(isinstance(each, Mapping) for each in found):
        raise DataError(f'{where}: "{key}" is not a list of objects')
    return found


def _system(given: Mapping[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    """Return what stands apart from the messages and is read before them."""
    if not given.get(key):
        return []
    return _messages([{"role": "system", "content": given[key]}], f"{where}: {key}")


def _items(given: Any, where: str) -> Any:
    """Return the messages that the input of a response is."""
    if given is None or isinstance(given, list):
        return None if given is None else [_item(each) for each in given]
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    raise DataError(f'{where}: "input" is neither text nor a list')


def _item(item: Any) -> Any:
    if not isinstance(item, Mapping) or "role" in item:
        return item
    if item.get("type") == "function_call":
        return {"role": "assistant", "tool_calls": [{"function": item}]}
    if item.get("type") == "function_call_output":
        return {"role": "tool", "content": item.get("output")}
    return {"role": "assistant", "content": [item]}  # a part of a kind that is named, not counted


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    """Return messages checked, their parts with a type, their calls under one name."""
    if isinstance(value, list):
        value = [_message(each) if isinstance(each, Mapping) else each for each in value]
    messages = check_messages(value, where)
    for number, message in enumerate(messages, start=1):
        calls = message.get("tool_calls")
        if calls is not None and not isinstance(calls, list):
            raise DataError(f'{where}: message {number} has "tool_calls" that are not a list')
    return messages


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    made = dict(message)
    if isinstance(made.get("content"), list):
        made["content"] = [
            {"type": "text", **part} if isinstance(part, Mapping) and "text" in part else part
            for part in made["content"]
        ]
    if isinstance(call := made.get("function_call"), Mapping) and "tool_calls" not in made:
        made["tool_calls"] = [{"type": "function", "function": call}]
        del made["function_call"]
    return made


def _unread_in(messages: list[dict[str, Any]]) -> Iterator[str]:
    for message in messages:
        content = message.get("content")
        pieces = (
            [piece for piece in content if "text" in piece] if isinstance(content, list) else []
        )
        for known, found in ((MESSAGE, message), *((PIECE, piece) for piece in pieces)):
            yield from (name_of(k) for k in found.keys() - known if holds_words(found[k]))


def holds_words(value: Any) -> bool:
    """Tell whether there is text anywhere in a value of JSON."""
    held = [value]
    while held:
        one = held.pop()
        if isinstance(one, str) and one:
            return True
        if isinstance(one, (list, Mapping)):
            held += one.values() if isinstance(one, Mapping) else one
    return False


def name_of(key: str) -> str:
    """Return a key of a stranger's file as a name that can be shown."""
    return f'"{ascii(key)[1:-1][:40]}"'
