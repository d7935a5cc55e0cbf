"""The process that fills in chat templates, seen from the side that asks.

Its program is `engine/text/template.py`; a separate process because a template is a program that
came with a download.
"""

import importlib.util
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError, DataError, ResourceError


class Renderer:
    """A process that fills in templates; `engine/text/template.py` is its program.

    It starts at once and stays for later conversations; one that had to be ended is replaced.
    """

    def __init__(self, limit_s: float = 5.0) -> None:
        self.limit_s = limit_s
        self._ahead: dict[str, dict[str, Any]] = {}  # request → reply
        self._process: subprocess.Popen[bytes] | None = self._start()

    def __enter__(self) -> "Renderer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def fill(
        self,
        template: str,
        variables: Mapping[str, Any],
        now: datetime | None = None,
        marks: tuple[str, str] | None = None,
    ) -> str:
        """Return the text of `template`; `marks` are written around `{% generation %}` blocks.

        Raises: CheckpointError if the template fails; DataError if it rejects the conversation.
        """
        request = _request(template, variables, now or datetime.now(), marks)
        reply = self._ahead.get(request) or self._ask([request])[0]
        if "text" in reply:
            return reply["text"]
        if reply["raised"]:
            raise DataError(f"the chat template rejects the conversation: {reply['error']}")
        raise CheckpointError(f"the chat template cannot be used: {reply['error']}")

    def fill_ahead(
        self, template: str, several: Sequence[Mapping[str, Any]], now: datetime
    ) -> None:
        """Fill in a template for several variables at once, for the calls of `fill` that follow.

        Asking takes longer than answering: it is two changes of process.
        """
        asked = [_request(template, variables, now, None) for variables in several]
        requests = list(dict.fromkeys(asked))
        replies = self._ask(requests)
        # If all of them were too much at once, each is asked for again when its turn comes.
        whole = len(replies) == len(requests)
        self._ahead = dict(zip(requests, replies, strict=True)) if whole else {}

    def _ask(self, requests: list[str]) -> list[dict[str, Any]]:
        """Send requests; a process that does not answer in time is ended."""
        line = f"[{', '.join(requests)}]\n".encode()
        if self._process is not None and self._process.poll() is not None:
            self.close()
        process = self._process = self._process or self._start()
        answer, in_time = b"", True
        try:
            answer, in_time = _exchange(process, line, self.limit_s)
        finally:  # after Ctrl-C, an answer must not be taken for that to a later request
            if not answer.endswith(b"\n"):
                self.close()
        if answer.endswith(b"\n"):
            return json.loads(answer)
        reason = "it ended the process" if in_time else f"not done after {self.limit_s:g} s"
        return [{"error": reason, "raised": False}]

    def _start(self) -> subprocess.Popen[bytes]:
        """Start the process with two pipes and nothing else of ours."""
        jinja2 = importlib.util.find_spec("jinja2")
        if jinja2 is None or jinja2.origin is None:
            raise ResourceError("chat templates need jinja2; install it with `pip install jinja2`")
        folders = [str(Path(jinja2.origin).parents[1]), str(Path(__file__).parents[2])]
        program = (
            "import sys; sys.path += sys.argv[2:]; from engine.text.template import serve;"
            " serve(int(sys.argv[1]))"
        )
        seconds = str(int(self.limit_s) + 1)
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", program, seconds, *folders],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={},
                cwd="/",
                start_new_session=True,  # Ctrl-C is for the chat, not for its templates
            )
        except OSError as error:
            raise ResourceError(f"cannot start a process for chat templates: {error}") from None
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        return process


def _exchange(process: subprocess.Popen[bytes], line: bytes, limit_s: float) -> tuple[bytes, bool]:
    """Write a line and read one; return as much as came, and whether that was in time."""
    assert process.stdin is not None and process.stdout is not None
    there, back = process.stdin.fileno(), process.stdout.fileno()
    left, answer, deadline = memoryview(line), bytearray(), time.monotonic() + limit_s
    with suppress(BrokenPipeError):
        while not answer.endswith(b"\n"):
            wait = max(0.0, deadline - time.monotonic())
            readable, writable, _ = select.select([back], [there] if left else [], [], wait)
            if writable:
                left = left[os.write(there, left) :]
            if readable:
                block = os.read(back, 1 << 16)
                answer += block
                if not block:
                    break
            if not (readable or writable):
                return bytes(answer), False
    return bytes(answer), True


def _request(
    template: str,
    variables: Mapping[str, Any],
    now: datetime,
    marks: tuple[str, str] | None,
) -> str:
    """Return a request as JSON. Raises: DataError if the conversation cannot be written so."""
    request = {"template": template, "variables": variables, "now": now.isoformat(), "marks": marks}
    try:
        return json.dumps(request)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"the conversation is not plain JSON: {error}") from None
