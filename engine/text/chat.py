"""Conversations to prompt ids, by the checkpoint's own chat template, for every command.

The template is filled in by a process apart (`renderer.py`), its control tokens are kept from
content (`guard.py`), and the ids are final. Text and ids are those of `transformers`.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Any

from engine.errors import CheckpointError, DataError
from engine.text.guard import Guard
from engine.text.renderer import Renderer
from engine.text.tokenizer import Tokenizer

NAMED_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
REASONING = ("reasoning_content", "thinking", "reasoning")  # names that templates read it under
GENERATION = re.compile(r"\{%[-+]?\s*generation\b")

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as the model reads it."""

    text: str
    ids: list[int]  # final: if the model wants a BOS, it is the first
    kept_as_text: tuple[str, ...]  # what only looks like a control token, in the content


def render(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    tools: Sequence[Message] | None = None,
    add_generation_prompt: bool = True,
    continue_last: bool = False,
    variables: Message | None = None,
    renderer: Renderer | None = None,
    now: datetime | None = None,
) -> Rendered:
    """Render a conversation with the template of `tokenizer`, ready for the model.

    `continue_last` leaves the last message open for the model to go on with; `variables` are for
    the template (`enable_thinking`); `now` is its clock. Give a `renderer` to render many.

    Raises: CheckpointError if there is no template or it fails; DataError if it rejects `messages`.
    """
    filling = _Filling(messages, tokenizer, tools, variables, now)
    if continue_last:
        filling.leave_open()
    with nullcontext(renderer) if renderer else Renderer() as process:
        shaded = filling.shaded(process, add_generation_prompt and not continue_last)
    return filling.rendered(filling.cut(shaded) if continue_last else shaded)


def find_answers(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    tools: Sequence[Message] | None = None,
    variables: Message | None = None,
    last_only: bool = False,
    renderer: Renderer | None = None,
    now: datetime | None = None,
) -> tuple[Rendered, list[range]]:
    """Render a whole conversation and find which ids are the assistant's, each answer's end too.

    Answers are the template's `{% generation %}` blocks if it has any. Else the prompt of each, and
    the conversation up to it, must be how the whole begins. Nothing is guessed. Where one token of
    the whole would hold the end of a prompt and the beginning of its answer, both are encoded
    apart, which is how the model meets them when it answers.

    Raises: DataError if that does not hold, beside what `render` raises.
    """
    filling = _Filling(messages, tokenizer, tools, variables, now or datetime.now())
    with nullcontext(renderer) if renderer else Renderer() as process:
        if GENERATION.search(filling.template):
            shaded = filling.shaded(process, prompt=False)
            spans = filling.marked_answers(process, shaded)[-1 if last_only else 0 :]
        else:
            numbers = [i for i, m in enumerate(messages) if m.get("role") == "assistant"]
            chosen = numbers[-1 if last_only else 0 :]
            filling.ask_ahead(process, chosen)
            shaded = filling.shaded(process, prompt=False)
            spans = [filling.answer(process, shaded, number) for number in chosen]
    whole = filling.rendered(shaded)
    ends = filling.guard.ends(shaded, whole.ids)
    places = []
    for start, stop in spans:
        begin = filling.place(shaded[:start], whole.ids)
        end = ends.get(stop) or filling.place(shaded[:stop], whole.ids)
        if begin is None or end is None:
            return filling.apart(shaded, spans, whole)
        places.append(range(begin, end))
    return whole, places


def ignores_system(messages: Sequence[Message], tokenizer: Tokenizer, **options: Any) -> bool:
    """Tell whether the template leaves out the system messages; `options` are those of `render`."""
    others = [message for message in messages if message.get("role") != "system"]
    if not others or len(others) == len(messages):
        return False
    with_them = render(messages, tokenizer, **options).text
    try:
        return render(others, tokenizer, **options).text == with_them
    except DataError:  # it wants a system message
        return False


class _Filling:
    """A conversation, its template, and all that filling it in again takes."""

    def __init__(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        tools: Sequence[Message] | None,
        variables: Message | None,
        now: datetime | None,
    ) -> None:
        if not tokenizer.template:
            raise CheckpointError(
                "the checkpoint has no chat template; models tuned for conversation have one (their"
                " names say instruct, chat or it), base models only continue text"
            )
        if not messages:
            raise DataError("the conversation has no messages")
        self.template = tokenizer.template
        self.tokenizer = tokenizer
        self.now = now
        self.given = {
            "messages": [_as_templates_expect(message) for message in messages],
            "tools": tools,
            "variables": dict(variables or {}),
        }
        self.guard = Guard(self.given, tokenizer)
        self.named_tokens = _named_tokens(tokenizer)

    def fill(
        self,
        process: Renderer,
        given: Message,
        prompt: bool,
        marks: tuple[str, str] | None = None,
    ) -> str:
        """Return the text of the template for `given`, which may hold stand-ins."""
        text = process.fill(self.template, self.names(given, prompt), self.now, marks)
        return self.guard.unescape(text)

    def names(self, given: Message, prompt: bool) -> dict[str, Any]:
        """Return what the template is given."""
        frame = {
            "messages": given["messages"],
            "tools": given["tools"],
            "documents": None,
            "add_generation_prompt": prompt,
        }
        return self.named_tokens | given["variables"] | frame

    def ask_ahead(self, process: Renderer, numbers: Sequence[int]) -> None:
        """Let the template be filled in at once for all that finding these answers takes."""
        assert self.now is not None
        wanted = [self.names(self.marked, False), self.names(self.probe, False)]
        for number in numbers:
            for upto, prompt in self.around(number):
                wanted.append(self.names(self.given | {"messages": upto}, prompt))
        process.fill_ahead(self.template, wanted, self.now)

    @cached_property
    def marked(self) -> Any:
        """What is given, with stand-ins in all that reads as a control token."""
        return self.guard.mark(self.given)

    @cached_property
    def probe(self) -> Any:
        """What is given, with stand-ins wherever it could be part of a control token."""
        return self.guard.probe(self.given)

    def around(self, number: int) -> tuple[tuple[list[Any], bool], tuple[list[Any], bool]]:
        """Return the messages before an answer, to be answered, and those up to it."""
        messages = self.given["messages"]
        return (messages[:number], True), (messages[: number + 1], False)

    def shaded(self, process: Renderer, prompt: bool) -> str:
        """Return the rendering with stand-ins wherever content would write a control token."""
        shaded = self.fill(process, self.marked, prompt)
        if self.probe != self.given:
            # A token put together at a seam, or by a filter, is one that the probe does not have.
            probed = self.fill(process, self.probe, prompt)
            if self.guard.controls(probed) != self.guard.controls(shaded):
                shaded = probed
        return shaded

    def rendered(self, shaded: str) -> Rendered:
        """Return text and ids of a rendering with stand-ins."""
        text = self.guard.reveal(shaded)
        literal = tuple(text[start:end] for start, end in self.guard.literal(shaded))
        return Rendered(text, self.ids(shaded), literal)

    def ids(self, shaded: str) -> list[int]:
        """Return the ids of a rendering with stand-ins; they begin with one BOS if any is due."""
        ids = self.guard.encode(shaded)
        bos = self.tokenizer.bos
        if self.tokenizer.add_bos and bos is not None and ids[:1] != [bos]:
            return [bos, *ids]
        return ids

    def leave_open(self) -> None:
        """Mark the end of the last text of the last message, for `cut`."""
        last = self.given["messages"][-1]
        mark = self.guard.end + " "  # the space tells whether the template trims
        content = last.get("content")
        parts = [{"text": content}] if isinstance(content, str) else content or []
        texts = [part for part in parts if isinstance(part, Mapping) and "text" in part]
        if not texts or not isinstance(texts[-1]["text"], str):
            raise DataError("the last message has no text to continue")
        self.last_text = texts[-1]["text"]
        opened = {**texts[-1], "text": self.last_text + mark}
        content = [opened if part is texts[-1] else part for part in parts]
        last["content"] = content if isinstance(last["content"], list) else opened["text"]

    def cut(self, shaded: str) -> str:
        """Return what comes before the mark that `leave_open` put."""
        head, mark, rest = shaded.rpartition(self.guard.end)
        if not mark or self.last_text.strip() not in self.guard.reveal(shaded):
            raise DataError(
                "the last message cannot be continued: the chat template leaves out or rewrites it"
            )
        return head if rest.startswith(" ") else head.rstrip()

    def marked_answers(self, process: Renderer, shaded: str) -> list[tuple[int, int]]:
        """Return where the `{% generation %}` blocks of the template are in a rendering."""
        begin, end = self.guard.begin_answer, self.guard.end_answer
        marked = self.fill(process, self.given, False, (begin, end))
        pieces = re.split(f"[{begin}{end}]", marked)
        order = re.sub(f"[^{begin}{end}]", "", marked)
        whole = self.guard.reveal(shaded)
        if "".join(pieces) != whole or order != (begin + end) * (len(order) // 2):
            raise DataError("the chat template does not write its generation blocks as they are")
        places = list(accumulate(map(len, pieces[:-1])))
        return list(zip(places[::2], places[1::2], strict=True))

    def answer(self, process: Renderer, shaded: str, number: int) -> tuple[int, int]:
        """Return where a message of the assistant is in a rendering, up to its control token."""
        if not number:
            raise DataError(
                "message 1 is an answer to nothing; begin with a question, or say train: false"
            )
        whole = self.guard.reveal(shaded)
        (before, _), (upto, _) = self.around(number)
        prompt = self.fill(process, self.given | {"messages": before}, True)
        answered = self.fill(process, self.given | {"messages": upto}, False)
        start = len(prompt)
        if prompt and whole.startswith(prompt):
            # Up to where generation stops: what a template writes after its last turn is no answer.
            stop = start + self.guard.until(shaded[start:], self.tokenizer.ends)
            if stop > start and answered[:stop] == whole[:stop]:
                return start, stop
            if whole.startswith(answered):
                controls = self.guard.spans(shaded[start : len(answered)])
                return start, start + controls[-1][1] if controls else len(answered)
        raise DataError(
            f"which tokens are the answer of message {number + 1} cannot be proved: the chat"
            " template writes it differently when the conversation goes on"
        )

    def place(self, head: str, ids: list[int]) -> int | None:
        """Return how many ids the beginning of a rendering has; None if a token goes beyond it."""
        own = self.ids(head)
        return len(own) if own == ids[: len(own)] else None

    def apart(
        self, shaded: str, spans: list[tuple[int, int]], whole: Rendered
    ) -> tuple[Rendered, list[range]]:
        """Encode prompts and answers each by itself."""
        edges = [*chain.from_iterable(spans), len(shaded)]
        pieces = [self.ids(shaded[: edges[0]])]
        pieces += [self.guard.encode(shaded[a:b]) for a, b in pairwise(edges)]
        ids = list(chain.from_iterable(pieces))
        if self.tokenizer.decode(ids) != self.tokenizer.decode(whole.ids):
            raise DataError("one token holds the end of a prompt and the beginning of its answer")
        bounds = list(accumulate(map(len, pieces)))
        places = [range(*pair) for pair in zip(bounds[:-1:2], bounds[1::2], strict=True)]
        return Rendered(whole.text, ids, whole.kept_as_text), places


def _as_templates_expect(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message as templates expect it: no nulls, reasoning under each of its names."""
    if not isinstance(message, Mapping):
        raise DataError(f"a message is an object with a role and content, not {message!r:.40}")
    kept = {key: value for key, value in message.items() if value is not None}
    reasoning = next((kept[name] for name in REASONING if name in kept), None)
    if reasoning is None:
        return kept
    return {"thinking": reasoning} | kept | {"reasoning_content": reasoning}


def _named_tokens(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the tokens that a template may write by name: `bos_token` and its like."""
    named = {}
    if tokenizer.bos in tokenizer.special:
        named["bos_token"] = tokenizer.special[tokenizer.bos]
    for name in NAMED_TOKENS:
        token = tokenizer.settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(token, str):
            named[f"{name}_token"] = token
    return named


def check_messages(value: object, where: str) -> list[dict[str, Any]]:
    """Return the messages of a conversation read from JSON: a list, or {"messages": a list}.

    Raises: DataError that names the message, counted from 1.
    """
    if isinstance(value, Mapping):
        value = value.get("messages")
    if not isinstance(value, list):
        raise DataError(
            f'{where}: a conversation is a list of messages or an object with "messages"'
        )
    if not value:
        raise DataError(f"{where}: the conversation has no messages")
    for number, message in enumerate(value, start=1):
        problem = _problem(message)
        if problem:
            raise DataError(f"{where}: message {number} {problem}")
    return value


def _problem(message: object) -> str:
    """Say what is wrong with one message, if anything."""
    if not isinstance(message, Mapping):
        return 'is not an object like {"role": "user", "content": "…"}'
    if "role" not in message:
        share_gpt = "from" in message and "value" in message
        return 'has no "role"' + ('; rename "from" and "value" to "role" and "content"' * share_gpt)
    if not isinstance(message["role"], str) or not message["role"]:
        return 'has a "role" that is not a word'
    content = message.get("content")
    if content is None:
        others = message.keys() - {"role", "content"}
        return "" if any(message[key] is not None for key in others) else 'has no "content"'
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
                return 'has a part of "content" without a "type"'
            if part["type"] == "text" and not isinstance(part.get("text"), str):
                return 'has a part of type "text" without its "text"'
        return ""
    return "" if isinstance(content, str) else 'has a "content" that is neither text nor a list'
