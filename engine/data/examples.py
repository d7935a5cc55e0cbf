"""One row to one example, for each format: text, a prompt with its completion, messages, tokens.

Alpaca becomes a prompt, or messages where it has a system text or a history; ShareGPT becomes
messages. Whoever reads on has these four kinds, and all that a row says about what is learned.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from engine.errors import DataError
from engine.text.chat import check_messages
from engine.values import nearest

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
SHARE_GPT = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"},
    **{"system": "system", "tool": "tool", "observation": "tool", "function_call": "assistant"},
}
NAMES = ("where", "task")  # fields that are no content
MARKS = ("train", "weight")  # of a message: whether it is learned
MASKS = ("labels", "mask", "loss_mask")
IGNORED = -100  # a label that is not learned, as everywhere
LARGEST_ID = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """What one row teaches; which fields are filled follows from `kind`."""

    where: str
    kind: Literal["text", "prompt", "messages", "tokens"]
    text: str = ""
    prompt: str = ""
    completion: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    learned: tuple[bool | None, ...] = ()  # per message; None: the row does not say
    tools: tuple[dict[str, Any], ...] = ()
    ids: tuple[int, ...] = ()
    mask: tuple[bool, ...] = ()  # per id: whether it is learned
    task: str = ""  # the kind of question, if the row names one: right answers are counted by it

    @property
    def digest(self) -> str:
        """Return the sha256 of the content, which a row keeps wherever it moves."""
        content = [getattr(self, field.name) for field in fields(self) if field.name not in NAMES]
        text = json.dumps(content, sort_keys=True, default=repr)
        return hashlib.sha256(text.encode()).hexdigest()


def is_share_gpt(message: object) -> bool:
    """Tell whether a message is written as ShareGPT's are."""
    if not isinstance(message, Mapping):
        return False
    role, content = message.get("role"), message.get("content")
    own_role = isinstance(role, str) and role in SHARE_GPT and role not in ROLES
    from_in_place = role is None and message.get("from") is not None
    return own_role or from_in_place or (content is None and message.get("value") is not None)


def type_of(value: object) -> str:
    """Name the type of a value as JSON does, so that nobody has to know Python's."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number"}
    return "null" if value is None else {**names, float: "a number"}.get(type(value), repr(value))


def _quoted(value: object) -> str:
    """Return a value as its row spells it, cut where it is long."""
    return f"{json.dumps(value, ensure_ascii=False, default=repr):.60}"


def _text(row: dict[str, Any], column: str, where: str) -> str:
    """Return the text of a column, "" if there is no such column."""
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise DataError(f'{where}: "{column}" is {type_of(value)}, not text')
    return value or ""


def _list(row: dict[str, Any], column: str, where: str) -> list[Any]:
    """Return the list of a column, or that which its text is as JSON; [] if there is none."""
    value = row.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value or "[]")
        except (ValueError, RecursionError) as error:
            raise DataError(f'{where}: "{column}" is text, and no JSON: {error}') from None
    if value is not None and not isinstance(value, list):
        raise DataError(f'{where}: "{column}" is {type_of(value)}, not a list')
    return value or []


def _from_text(row: dict[str, Any], where: str) -> Example:
    text = _text(row, "text", where)
    if not text:
        raise DataError(f'{where}: "text" is empty')
    return Example(where=where, kind="text", text=text)


def _from_alpaca(row: dict[str, Any], where: str) -> Example:
    parts = [_text(row, column, where) for column in ("instruction", "input")]
    prompt = "\n\n".join(filter(None, parts))
    return _answered(row, where, prompt, _text(row, "output", where))


def _from_prompt(row: dict[str, Any], where: str) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if not isinstance(prompt, list) and not isinstance(completion, list):
        prompt, completion = (_text(row, column, where) for column in ("prompt", "completion"))
        return _answered(row, where, prompt, completion)
    if not isinstance(prompt, list):
        prompt = [{"role": "user", "content": _text(row, "prompt", where)}]
    if not isinstance(completion, list):
        completion = [{"role": "assistant", "content": _text(row, "completion", where)}]
    return _conversation(prompt + completion, row, where, given=len(prompt))


def _answered(row: dict[str, Any], where: str, prompt: str, completion: str) -> Example:
    """Return a prompt with its completion; as messages if something comes before them."""
    history = _list(row, "history", where)
    if not history and not row.get("system") and not row.get("tools"):
        task = _text(row, "task", where)
        return Example(where=where, kind="prompt", prompt=prompt, completion=completion, task=task)
    talk = []
    for turn in (*history, [prompt, completion]):
        if not isinstance(turn, list) or [type(text) for text in turn] != [str, str]:
            raise DataError(f'{where}: "history" is a list of pairs of texts, prompt and answer')
        talk += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return _conversation(talk, row, where)


def _from_messages(row: dict[str, Any], where: str) -> Example:
    return _conversation(_list(row, "messages", where), row, where)


def _from_share_gpt(row: dict[str, Any], where: str) -> Example:
    talk = _list(row, "messages", where)
    if talk and not any(map(is_share_gpt, talk)):
        raise DataError(
            f'{where}: message 1 has no "from" and "value"; looks like messages:'
            " data.format=messages"
        )
    turned = [_turned(message, f"{where}: message {n}") for n, message in enumerate(talk, 1)]
    return _conversation(turned, row, where)


def _turned(message: Any, where: str) -> Any:
    """Return a message of ShareGPT with role and content."""
    if not isinstance(message, dict):
        return message  # the check of messages says what is wrong
    name = message.get("from", message.get("role"))
    content = message.get("value", message.get("content"))
    others = {k: v for k, v in message.items() if k not in ("from", "role", "value", "content")}
    if not isinstance(name, str) or name not in SHARE_GPT:
        raise DataError(f"{where} is from {_quoted(name)}; known are {', '.join(SHARE_GPT)}")
    if name == "function_call":
        content, others = "", others | {"tool_calls": _calls(content, where)}
    return {"role": SHARE_GPT[name], "content": content, **others}


def _calls(content: Any, where: str) -> list[dict[str, Any]]:
    """Return the calls of tools that ShareGPT writes as JSON: one object or a list of them."""
    try:
        calls = json.loads(content) if isinstance(content, str) else content
    except (ValueError, RecursionError):
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and call.get("name") for call in calls):
        raise DataError(f'{where} is a function_call and no JSON like {{"name", "arguments"}}')
    return [{"type": "function", "function": call} for call in calls]


def _conversation(talk: list[Any], row: dict[str, Any], where: str, *, given: int = 0) -> Example:
    """Return messages as templates take them, and for each whether the row says to learn it.

    Answers among the first `given` messages are not learned, unless they say so themselves.
    """
    _refuse_share_gpt(talk, where)
    unmarked = [
        {key: value for key, value in message.items() if key not in MARKS}
        if isinstance(message, dict)
        else message
        for message in talk
    ]
    messages, learned = [], []
    for number, message in enumerate(check_messages(unmarked, where), 1):
        place = f"{where}: message {number}"
        if message["role"] not in ROLES:
            near = nearest(message["role"], ROLES) or f"; known are {', '.join(ROLES)}"
            raise DataError(f'{place} has role "{message["role"]}"{near}')
        flag = _is_learned(talk[number - 1], place)
        answer = message["role"] == "assistant"
        learned.append(False if flag is None and answer and number <= given else flag)
        messages.append(_bare(message, place))
    answers = [m["role"] == "assistant" for m in messages]
    if not any(a if flag is None else flag for a, flag in zip(answers, learned, strict=True)):
        why = "all answers are marked as not learned" if any(answers) else "no message of assistant"
        raise DataError(f"{where}: nothing to learn: {why}")
    system = _text(row, "system", where)
    if system and messages[0]["role"] == "system":
        raise DataError(f'{where}: "system" beside a first message that has role "system"')
    if system:
        messages, learned = [{"role": "system", "content": system}, *messages], [None, *learned]
    tools = _list(row, "tools", where)
    if not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f'{where}: "tools" is not a list of objects')
    return Example(
        where=where,
        kind="messages",
        messages=tuple(messages),
        learned=tuple(learned),
        tools=tuple(tools),
    )


def _refuse_share_gpt(talk: list[Any], where: str) -> None:
    """Raise DataError for a message of ShareGPT among others."""
    for number, message in enumerate(talk, 1):
        if is_share_gpt(message):
            has = f'role "{message["role"]}"' if message.get("role") else 'no "role"'
            has += "" if message.get("content") is not None else ' and no "content"'
            raise DataError(
                f"{where}: message {number} has {has}; looks like ShareGPT: data.format=sharegpt"
            )


def _is_learned(message: Mapping[str, Any], where: str) -> bool | None:
    """Return what a message, or all parts of its content, say on being learned; None: nothing."""
    train, weight, content = (message.get(key) for key in ("train", "weight", "content"))
    parts = [part.get("train") for part in content] if isinstance(content, list) else []
    for flag in (train, *parts):
        if flag is not None and not isinstance(flag, bool):
            raise DataError(f'{where} has "train" {_quoted(flag)}; it is true or false')
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise DataError(f'{where} has "weight" {_quoted(weight)}; it is 0 or 1: learned or not')
    said = {train, None if weight is None else weight == 1} - {None}
    if any(flag is not None for flag in parts):
        said |= set(parts)
    if len(said) > 1:
        raise DataError(f"{where} is to be learned and is not: train and weight must agree in it")
    return next(iter(said), None)


def _bare(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a message without nulls, its parts joined to one text."""
    bare = {key: value for key, value in message.items() if value is not None}
    if isinstance(bare.get("content"), list):
        other = next((part["type"] for part in bare["content"] if part["type"] != "text"), None)
        if other is not None:
            raise DataError(f'{where} has a part of type "{other}"; only text can be learned from')
        bare["content"] = "".join(part["text"] for part in bare["content"])
    return {**bare, "content": bare.get("content", "")}  # templates add it to text


def _from_tokens(row: dict[str, Any], where: str) -> Example:
    ids = _list(row, "input_ids", where)
    for number, id in enumerate(ids):
        if type(id) is not int or not 0 <= id <= LARGEST_ID:
            raise DataError(f"{where}: input_ids[{number}] is {_quoted(id)}, not a token id")
    columns = [column for column in MASKS if row.get(column) is not None]
    if len(columns) > 1:
        raise DataError(f'{where}: "{columns[0]}" and "{columns[1]}"; one says what is learned')
    mask = [True] * len(ids)
    for column in columns:
        mask = _mask(_list(row, column, where), ids, column, where)
    if row.get("attention_mask") is not None:
        start, stop = _attended(_list(row, "attention_mask", where), len(ids), where)
        ids, mask = ids[start:stop], mask[start:stop]
    if not any(mask[1:]):  # nothing comes before the first token to predict it from
        raise DataError(f"{where}: nothing to learn: no token after the first is marked as learned")
    return Example(where=where, kind="tokens", ids=tuple(ids), mask=tuple(mask))


def _mask(flags: list[Any], ids: list[int], column: str, where: str) -> list[bool]:
    """Return which tokens are learned; a label is the token itself, or -100."""
    if len(flags) != len(ids):
        raise DataError(f'{where}: {len(flags)} in "{column}" for {len(ids)} in "input_ids"')
    for number, (flag, id) in enumerate(zip(flags, ids, strict=True)):
        allowed = (id, IGNORED) if column == "labels" else (0, 1)
        if flag not in allowed:
            raise DataError(
                f"{where}: {column}[{number}] is {_quoted(flag)}; it is {allowed[0]} or"
                f" {allowed[1]}" + (", the id at its own place or not learned" * (id in allowed))
            )
    return [flag != IGNORED if column == "labels" else bool(flag) for flag in flags]


def _attended(flags: list[Any], length: int, where: str) -> tuple[int, int]:
    """Return where the tokens begin and end that are not padding."""
    start = flags.index(1) if 1 in flags else 0
    count = flags.count(1)
    expected = [0] * start + [1] * count + [0] * (length - start - count)
    if flags != expected:
        raise DataError(
            f'{where}: "attention_mask" marks padding: one run of 1 among 0, as long as "input_ids"'
        )
    return start, start + count


CONVERT: dict[str, Callable[[dict[str, Any], str], Example]] = {
    "text": _from_text,
    "prompt": _from_prompt,
    "alpaca": _from_alpaca,
    "messages": _from_messages,
    "sharegpt": _from_share_gpt,
    "tokens": _from_tokens,
}
