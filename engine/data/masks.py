"""An example as token ids, with the stretches of them that are answers.

    text                  the text, end of text               an answer from its second token on
    prompt, completion    encoded apart, end of text          the completion and the end are one
    messages              by the checkpoint's chat template   what the assistant says, and its end
    tokens                the ids and mask that the row gives

A prompt and its answer never share a token, content never writes a control token, and which tokens
are an answer is proved (`engine/text/chat.py`), not searched for. Next on the arrow:
`engine/data/samples.py`.
"""

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import numpy as np

from engine.data.examples import Example
from engine.errors import CheckpointError, DataError
from engine.text.chat import Rendered, find_answers
from engine.text.renderer import Renderer
from engine.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Masked:
    """A row as the model reads it. Shapes: ids, learned (T), int32 and bool."""

    ids: np.ndarray
    learned: np.ndarray  # never the first: nothing comes before it
    answers: list[range]  # the stretches to learn, each with its end
    bos: int = 0  # how many ids at the beginning belong to every text
    lookalike: bool = False  # something in the content looks like a control token


class Masker:
    """A tokenizer, what to learn, and a process for chat templates once one is needed."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat: str,
        learn: str,
        renderer: Renderer | None = None,
        now: datetime | None = None,
    ) -> None:
        """Mask by the settings `data.chat` and `data.learn`; `now` is the clock of templates."""
        self.tokenizer, self.chat, self.learn = tokenizer, chat, learn
        self.now = now or datetime.now()  # one for all rows
        self._renderer, self._own = renderer, ExitStack()
        names = [re.escape(name) for name in tokenizer.special.values() if name]
        self._control = re.compile("|".join(names) or "$.")

    def __enter__(self) -> "Masker":
        return self

    def __exit__(self, *_: object) -> None:
        self._own.close()

    def mask(self, example: Example) -> Masked:
        """Return an example as ids and mask, of whatever length.

        Raises: DataError if nothing in it is to be learned, or its answers cannot be proved.
        """
        match example.kind:
            case "text":
                masked = self._text(example.text)
            case "prompt" if self._by_template():
                turns = (("user", example.prompt), ("assistant", example.completion))
                masked = self._messages([{"role": role, "content": text} for role, text in turns])
            case "prompt":
                masked = self._prompt(example.prompt, example.completion)
            case "messages":
                masked = self._messages(example.messages, example.learned, example.tools)
            case _:
                masked = self._tokens(example.ids, example.mask)
        if not masked.learned.any():
            raise DataError("nothing in it is to be learned: it is empty or has no answer")
        return masked

    def _by_template(self) -> bool:
        return self.chat == "template" or (self.chat == "auto" and bool(self.tokenizer.template))

    def _text(self, text: str) -> Masked:
        """Return a text and its end."""
        ids = [*self._beginning(text), self.tokenizer.end_of_text]
        return self._masked(ids, [range(1, len(ids))], text)

    def _prompt(self, prompt: str, completion: str) -> Masked:
        """Return a prompt and, encoded apart so that no token is of both, what follows it."""
        ids = self._beginning(prompt)
        start = len(ids)
        ids += self.tokenizer.encode(completion, continuing=bool(prompt))
        ids.append(self.tokenizer.end_of_text)
        return self._masked(ids, [range(start, len(ids))], f"{prompt}\n{completion}")

    def _beginning(self, text: str) -> list[int]:
        return self.tokenizer.prompt(text.encode("utf-8", "surrogatepass"))

    def _messages(
        self,
        messages: Sequence[dict[str, Any]],
        flags: Sequence[bool | None] = (),
        tools: Sequence[dict[str, Any]] = (),
    ) -> Masked:
        """Return a conversation as the template writes it; `flags` of messages overrule `learn`."""
        wanted = self._wanted(messages, flags or [None] * len(messages))
        # Some templates rewrite earlier turns: only what is learned has to be proved.
        last_only = self.learn != "all" and sum(wanted) == 1 and wanted[-1]
        rendered, answers = self._render(messages, tools, last_only)
        wanted = [True] if last_only else wanted
        if len(answers) != len(wanted):
            if not all(wanted):
                raise DataError("the chat template does not mark one answer for each message")
            wanted = [True] * len(answers)
        answers = [self._with_end(answer, rendered.ids) for answer in answers]
        chosen = [answer for answer, want in zip(answers, wanted, strict=True) if want]
        others = [answer for answer, want in zip(answers, wanted, strict=True) if not want]
        masked = self._masked(rendered.ids, chosen, lookalike=bool(rendered.kept_as_text))
        for answer in others:
            masked.learned[answer.start : answer.stop] = False
        return masked

    def _wanted(
        self, messages: Sequence[dict[str, Any]], flags: Sequence[bool | None]
    ) -> list[bool]:
        """Tell for each message of the assistant whether it is learned."""
        roles = [message.get("role") for message in messages]
        for number, (role, flag) in enumerate(zip(roles, flags, strict=True), start=1):
            if role != "assistant" and flag not in (None, self.learn == "all"):
                raise DataError(
                    f"message {number} is not the assistant's, so train or weight cannot choose it;"
                    " data.learn=all learns prompts too, answers does not"
                )
        said = [flag for role, flag in zip(roles, flags, strict=True) if role == "assistant"]
        default = [self.learn != "last"] * (len(said) - 1) + [True]
        return [rule if flag is None else flag for flag, rule in zip(said, default, strict=False)]

    def _render(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], last_only: bool
    ) -> tuple[Rendered, list[range]]:
        if not self.tokenizer.template:
            raise DataError(
                "a conversation needs a chat template, which this checkpoint has not, nor the"
                " tokens <|im_start|> and <|im_end|> for the built-in one; give prompt and"
                " completion, with data.chat=plain"
            )
        self._renderer = self._renderer or self._own.enter_context(Renderer())
        try:
            return find_answers(
                messages,
                self.tokenizer,
                tools=tools or None,
                last_only=last_only,
                renderer=self._renderer,
                now=self.now,
            )
        except CheckpointError as error:  # the template fails, perhaps at this row only
            raise DataError(str(error)) from None
        except DataError as error:
            several = sum(message.get("role") == "assistant" for message in messages) > 1
            hint = "" if last_only or not several else "; data.learn=last learns only the last"
            raise DataError(f"{error}{hint}") from None

    def _with_end(self, answer: range, ids: list[int]) -> range:
        """Return an answer with its end, which the marks of a template may leave out."""
        ends = self.tokenizer.ends
        open_ended = ids[answer.stop - 1] not in ends and answer.stop < len(ids)
        return range(answer.start, answer.stop + (open_ended and ids[answer.stop] in ends))

    def _tokens(self, ids: Sequence[int], mask: Sequence[bool]) -> Masked:
        """Return ids and mask as they were given; without a mask all are learned."""
        mask = mask or [True] * len(ids)
        if len(mask) != len(ids):
            raise DataError(f"{len(ids)} ids but a mask, or labels, of {len(mask)}")
        for token_id in (min(ids, default=0), max(ids, default=0)):
            self.tokenizer.piece(token_id)
        masked = self._masked(ids, [])
        masked.learned[1:] = mask[1:]
        edges = np.flatnonzero(np.diff(masked.learned, append=False)) + 1
        answers = [range(*map(int, pair)) for pair in edges.reshape(-1, 2)]
        return replace(masked, answers=answers)

    def _masked(
        self, ids: Sequence[int], answers: list[range], text: str = "", lookalike: bool = False
    ) -> Masked:
        """Return ids of which `answers` are learned, or all of them if that is the setting."""
        learned = np.zeros(len(ids), dtype=bool)
        for answer in answers:
            learned[answer.start : answer.stop] = True
        learned |= self.learn == "all"
        learned[:1] = False
        bos = self.tokenizer.add_bos and list(ids[:1]) == [self.tokenizer.bos]
        return Masked(
            ids=np.array(ids, dtype=np.int32),
            learned=learned,
            answers=answers,
            bos=int(bos),
            lookalike=lookalike or bool(self._control.search(text)),
        )
