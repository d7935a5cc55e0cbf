"""The lines of a batch: read one at a time, each made a request of its own, or refused by name."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cli.generation import Request
from cli.inputs import LOOKED_AT, BinaryFile, Source, printable, unreadable
from engine.config import SampleConfig
from engine.errors import DataError
from engine.text.chat import check_messages
from engine.text.usage import no_duplicates
from engine.values import convert, nearest

LONGEST = 16 << 20  # bytes of a line
BLOCK = 1 << 16
SAMPLING = {field.name: field for field in dataclasses.fields(SampleConfig)}
KNOWN = ("prompt", "messages", *SAMPLING, "seed", "stop", "logprobs")
NAMES = ("id", "custom_id")
FRAME = ("method", "url", "body")  # beside its name, of a line of an OpenAI batch


@dataclass(frozen=True, slots=True)
class Defaults:
    """What holds for every line that does not say otherwise."""

    request: Request  # without a seed
    seed: int | None  # of line 1 and, counting up, of those after it
    chat: bool = False  # a prompt is a message
    system: str | None = None


def read_lines(source: Source) -> Iterator[tuple[int, bytes]]:
    """Yield each line that is not blank, with its number; no more than LONGEST + 1 bytes of it.

    Raises: DataError if there are none, or the file is not text.
    """
    name = printable(source.name)
    found = False
    with source.open() as stream:
        try:
            for number, line in enumerate(_split(stream, name), start=1):
                if line.strip():
                    found = True
                    yield number, line
        except OSError as error:
            raise unreadable(source.name, error) from None
    if not found:
        raise DataError(f'{name}: holds no requests; each line is one, like {{"prompt": "…"}}')


def _split(stream: Any, name: str) -> Iterator[bytes]:
    """Yield the lines of a stream as they come, without their ends, in bounded memory."""
    held = bytearray()
    first = True
    while block := stream.read1(BLOCK):
        if first and b"\0" in block[:LOOKED_AT]:
            raise BinaryFile(f"{name}: a binary file, not lines of JSON in UTF-8")
        first = False
        *ends, rest = block.split(b"\n")
        for end in ends:
            yield bytes(held + end)[: LONGEST + 1]
            held.clear()
        held += rest[: LONGEST + 1 - len(held)]
    if held:
        yield bytes(held)


def parse(line: bytes) -> dict[str, Any]:
    """Return the object that a line holds. Raises: DataError saying why there is none."""
    if len(line) > LONGEST:
        raise DataError(f"the line is longer than {LONGEST >> 20} MB")
    try:
        text = line.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=no_duplicates, parse_constant=_no_number)
    except UnicodeDecodeError:
        raise DataError("the line is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise DataError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError('not a JSON object like {"prompt": "…"}')
    return value


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def name_of(value: Mapping[str, Any]) -> str | int | float | None:
    """Return what a line calls itself, as it stands there. Raises: DataError if it is no name."""
    names = [value[key] for key in NAMES if value.get(key) is not None]
    if len(names) > 1:
        raise DataError("id and custom_id: which one? Keep one")
    name = names[0] if names else None
    finite = not isinstance(name, float) or abs(name) < float("inf")
    if isinstance(name, bool) or not isinstance(name, (str, int, float, type(None))) or not finite:
        raise DataError("id is neither text nor a number")
    return name


def read_request(value: Mapping[str, Any], defaults: Defaults) -> Request:
    """Make a request of a line. Raises: DataError that names the key and says what fits."""
    body = {key: item for key, item in value.items() if key not in NAMES}
    if "body" in body:
        _refuse_unknown(body, FRAME)
        if not isinstance(body["body"], dict):
            raise DataError("body is not an object of JSON")
        body = _translate(body["body"])
    body = {key: item for key, item in body.items() if item is not None}
    _refuse_unknown(body, KNOWN)
    request = defaults.request
    prompt, messages = _question(body, defaults)
    wishes = {key: _number(key, body[key], SAMPLING[key]) for key in SAMPLING if key in body}
    return dataclasses.replace(
        request,
        prompt=prompt,
        messages=messages,
        wishes=request.wishes | wishes,
        seed=_whole("seed", body.get("seed"), 2**62),
        stops=_stops(body["stop"]) if "stop" in body else request.stops,
        logprobs=_whole("logprobs", body.get("logprobs", request.logprobs), 100),
        on_overflow=request.on_overflow if messages is None else "error",
    )


def _refuse_unknown(value: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in value:
        if key not in known:
            raise DataError(f"{key} is not a setting of a line{nearest(key, known)}")


def _translate(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body of a request to OpenAI in our words; what asks for nothing is left out."""
    rest = {key: item for key, item in body.items() if key != "model" and item is not None}
    for key, usual in (("n", 1), ("stream", False)):
        if rest.pop(key, usual) != usual:
            raise DataError(f"{key}: only {str(usual).lower()} is possible in a batch")
    if "max_completion_tokens" in rest:
        if "max_tokens" in rest:
            raise DataError("max_tokens and max_completion_tokens: which one? Keep one")
        rest["max_tokens"] = rest.pop("max_completion_tokens")
    alternatives = rest.pop("top_logprobs", None)
    if isinstance(rest.get("logprobs"), bool):
        rest["logprobs"] = (alternatives or 0) if rest["logprobs"] else None
    elif alternatives is not None:
        raise DataError("top_logprobs needs logprobs: true")
    return rest


def _question(
    body: Mapping[str, Any], defaults: Defaults
) -> tuple[bytes, list[dict[str, Any]] | None]:
    """Return the prompt or the conversation of a line."""
    if ("prompt" in body) == ("messages" in body):
        raise DataError("a line has a prompt or messages, one of the two")
    if "messages" in body:
        conversation = check_messages(body["messages"], "messages")
    elif not isinstance(body["prompt"], str):
        raise DataError("prompt is not text")
    elif defaults.chat:
        conversation = [{"role": "user", "content": body["prompt"]}]
    else:
        return body["prompt"].encode("utf-8", "surrogatepass"), None
    if defaults.system:
        conversation = [{"role": "system", "content": defaults.system}, *conversation]
    return b"", conversation


def _number(key: str, value: Any, field: dataclasses.Field) -> Any:
    try:
        return convert(value, field)
    except (ValueError, OverflowError) as error:
        raise DataError(f"{key} {error}") from None


def _whole(key: str, value: Any, most: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise DataError(f"{key} must be a whole number from 0 to {most}")
    return value


def _stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise DataError("stop must be a text, or a list of texts, none of them empty")
    return stops
