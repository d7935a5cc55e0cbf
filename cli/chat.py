"""Talking to a model: lines in, answers out, with commands that begin with a slash."""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cli.drafting import as_fields, as_words
from cli.generation import check_template, load_both, open_prefixes, random_seed
from cli.render import emit, emit_json, say
from engine.config import SampleConfig
from engine.errors import DataError, EngineError, RecipeError, ResourceError
from engine.generate.session import Session
from engine.generate.writer import Token
from engine.sampling_defaults import sample_defaults
from engine.text.chat import check_messages, render
from engine.text.renderer import Renderer
from engine.values import convert, nearest

HELP = """\
/help              this list
/reset             forget the conversation
/undo              take back a turn
/retry             answer again, differently
/system [TEXT]     show the instruction; or set it, and forget the rest
/set KEY=VALUE     temperature top_k top_p min_p repetition_penalty max_tokens
/context           tokens used
/show              the exact prompt and its ids
/save FILE         write as JSON
/load FILE         read it back
/quit              leave (or Ctrl-D)
\\ at a line's end  the message goes on
Ctrl-C stops an answer and keeps what was said."""


def open_chat(
    folder: Path,
    *,
    system: str | None,
    messages: Path | None,
    variables: dict[str, Any],
    wishes: dict[str, Any],
    seed: int | None,
    how: dict[str, Any],
    draft: str | None,
    draft_tokens: int | None,
    prefix_room: int | None = None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Load a model and talk until the input ends.

    Raises: CheckpointError if the model has no chat template, or one that does not work.
    """
    check_template(folder)
    before = read_messages(messages) if messages else []
    if system:
        before = [{"role": "system", "content": system}, *before]
    with Renderer() as renderer:  # starts while the model loads
        decoder, tokenizer, guesser = load_both(folder, how, draft, draft_tokens, quiet)
        settings = dataclasses.replace(sample_defaults(folder), **{"max_tokens": 0} | wishes)
        prefixes = open_prefixes(folder, prefix_room, quiet)
        session = Session(
            decoder, tokenizer, settings, renderer, before, variables, guesser, prefixes
        )
        seed = random_seed() if seed is None else seed
        talk = Chat(session, seed, as_json, quiet)
        with contextlib.suppress(DataError):  # it works, whether or not it likes this
            render([{"role": "user", "content": "x"}], tokenizer, renderer=renderer)
        if sys.stdin.isatty():
            say(f"{folder}  context {session.context:,} tokens · seed {seed} · /help", quiet)
        talk.talk(typed_lines())


class Chat:
    """A conversation at a terminal or through a pipe."""

    def __init__(self, session: Session, seed: int, as_json: bool, quiet: bool) -> None:
        self.session = session
        self.seed = seed
        self.as_json = as_json
        self.quiet = quiet
        self.commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: say(HELP),
            "reset": self._reset,
            "undo": self._undo,
            "retry": self._retry,
            "system": self._system,
            "set": self._set,
            "context": lambda _: say(self.budget()),
            "show": self._show,
            "save": self._save,
            "load": self._load,
        }

    def talk(self, lines: Iterator[str]) -> None:
        """Answer a question left open, then every line until there are no more, or /quit."""
        if self.session.messages and self.session.messages[-1]["role"] == "user":
            self._answer()
        for line in lines:
            if line.split()[:1] in (["/quit"], ["/exit"]):
                return
            if not line.strip():
                continue
            try:
                if line.startswith("/"):
                    self._command(line[1:])
                else:
                    self._say(line)
            except EngineError as error:
                # At a terminal a mistake is no reason to lose the conversation.
                if not sys.stdin.isatty():
                    raise
                say(f"error: {error}")

    def budget(self) -> str:
        """Say how much of the context is used."""
        session = self.session
        used = len(session.prompt().ids) if session.messages else 0
        turns = sum(message["role"] == "user" for message in session.messages)
        share = used / session.context
        plural = "" if turns == 1 else "s"
        return f"{used:,} of {session.context:,} tokens ({share:.0%}), {turns} turn{plural}"

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name not in self.commands:
            near = nearest(f"/{name}", [f"/{known}" for known in self.commands])
            raise RecipeError(f"/{name} is not a command{near}; try /help")
        self.commands[name](rest.strip())

    def _say(self, text: str) -> None:
        """Add a message of the user and answer; take it back if there can be no answer."""
        self.session.messages.append({"role": "user", "content": text})
        try:
            self._answer()
        except EngineError:
            self.session.messages.pop()
            raise

    def _answer(self) -> None:
        """Write an answer as it comes; Ctrl-C ends it and keeps what was said."""
        began = time.perf_counter()
        stream = self.session.answer(self.seed)
        self.seed += 1
        tokens: list[Token] = []
        with _interruptible() as stop:
            for token in stream:
                tokens.append(token)
                if not self.as_json:
                    emit(token.text, end="")
                if stop.asked:
                    stream.close()
                    break
        reason = "stopped" if stop.asked else tokens[-1].finish_reason
        if self.as_json:
            answer = self.session.messages[-1]["content"]
            facts = {"text": answer, "tokens": len(tokens), "reused_tokens": self.session.reused}
            if guesser := self.session.guesser:
                facts["draft"] = as_fields(guesser.pace.report(guesser.name))
            facts |= {"prefix_tokens": self.session.restored}
            emit_json("chat", facts | {"finish_reason": reason, "seed": self.seed - 1})
            return
        emit("")
        if sys.stdin.isatty():
            self._stats(tokens, began, str(reason))

    def _stats(self, tokens: list[Token], began: float, reason: str) -> None:
        """Say how fast the answer came and what is left of the context."""
        first, last = tokens[0].time - began, tokens[-1].time - tokens[0].time
        speed = f" at {(len(tokens) - 1) / last:,.0f} tok/s" if last > 0 else ""
        say(
            f"[{len(tokens):,} tok{speed}, first {first:.2f} s · {reason} · {self.budget()}]",
            self.quiet,
        )
        if guesser := self.session.guesser:
            say(f"[{', '.join(as_words(guesser.pace.report(guesser.name)))}]", self.quiet)

    def _reset(self, _: str) -> None:
        kept = [m for m in self.session.messages[:1] if m["role"] == "system"]
        self.session.messages[:] = kept
        say("forgotten")

    def _undo(self, _: str) -> None:
        """Take back the last message of the user and what came after it."""
        messages = self.session.messages
        last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=None)
        if last is None:
            raise RecipeError("/undo: there is no turn to take back")
        del messages[last:]
        say(f"taken back; {self.budget()}")

    def _retry(self, _: str) -> None:
        if not self.session.messages or self.session.messages[-1]["role"] != "assistant":
            raise RecipeError("/retry: there is no answer yet")
        before = self.session.messages.pop()
        try:
            self._answer()
        except EngineError:
            self.session.messages.append(before)
            raise

    def _system(self, text: str) -> None:
        first = self.session.messages[:1]
        if text:
            self.session.messages[:] = [{"role": "system", "content": text}]
            say("set; the conversation begins anew")
        else:
            say(first[0]["content"] if first and first[0]["role"] == "system" else "none is set")

    def _set(self, text: str) -> None:
        """Change a sampling setting."""
        fields = {field.name: field for field in dataclasses.fields(SampleConfig)}
        key, equals, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or key not in fields:
            raise RecipeError(f"/set {text}: not KEY=VALUE with one of {', '.join(fields)}")
        try:
            number = convert(json.loads(value), fields[key])
        except ValueError as error:
            why = "is not a number" if isinstance(error, json.JSONDecodeError) else error
            raise RecipeError(f"/set {key}: {value.strip()!r} {why}") from None
        self.session.settings = dataclasses.replace(self.session.settings, **{key: number})
        say(f"{key} = {number}")

    def _show(self, _: str) -> None:
        rendered = self.session.prompt()
        emit(rendered.text)
        emit(" ".join(map(str, rendered.ids)))

    def _save(self, name: str) -> None:
        if not name:
            raise RecipeError("/save needs a file name")
        content = json.dumps({"messages": self.session.messages}, indent=2, ensure_ascii=False)
        try:
            Path(os.path.expanduser(name)).write_text(content + "\n", encoding="utf-8")
        except OSError as error:
            raise ResourceError(f"{name}: cannot be written: {error.strerror or error}") from None
        say(f"saved {len(self.session.messages)} messages to {name}")

    def _load(self, name: str) -> None:
        if not name:
            raise RecipeError("/load needs a file name")
        before = list(self.session.messages)
        self.session.messages[:] = read_messages(Path(os.path.expanduser(name)))
        try:
            say(f"loaded {len(self.session.messages)} messages; {self.budget()}")
        except EngineError:
            self.session.messages[:] = before
            raise


def read_messages(file: Path) -> list[dict[str, Any]]:
    """Read a conversation from a JSON file. Raises: DataError saying what is wrong where."""
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        return check_messages(json.loads(text), str(file))
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not valid JSON: {error}") from None


def typed_lines() -> Iterator[str]:
    """Yield what is typed or piped in; a backslash at the end of a line joins the next one."""
    if not sys.stdin.isatty():
        for data in sys.stdin.buffer:
            yield data.decode("utf-8", "replace").rstrip("\r\n")
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (editing and history for input)
    message = ""
    while True:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            line = _ask("… " if message else "> ")
        except EOFError:
            say("")
            return
        except KeyboardInterrupt:
            say("")
            message = ""
            continue
        except UnicodeDecodeError as error:
            say(f"error: what was typed is not UTF-8: {error.reason}")
            continue
        if line.endswith("\\"):
            message += line[:-1] + "\n"
            continue
        yield message + line
        message = ""


def _ask(prompt: str) -> str:
    """Read a line; the prompt goes to the terminal even if stdout goes elsewhere."""
    if sys.stdout.isatty():
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)
    return input()


class _Stop:
    asked = False


@contextlib.contextmanager
def _interruptible() -> Iterator[_Stop]:
    """Let the first Ctrl-C ask for a stop, and the second end the program."""
    stop = _Stop()

    def _handle(number: int, frame: object) -> None:
        if stop.asked:
            os._exit(130)
        stop.asked = True

    before = signal.signal(signal.SIGINT, _handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
