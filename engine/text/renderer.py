"""The process that fills in chat templates, seen from the side that asks.

Its program is `engine/text/template.py`; a separate process because a template is a program that
came with a download.
"""

import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Mapping
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
        when = (now or datetime.now()).isoformat()
        request = {"template": template, "variables": variables, "now": when, "marks": marks}
        try:
            line = json.dumps(request).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(f"the conversation is not plain JSON: {error}") from None
        reply = self._ask(line)
        if "text" in reply:
            return reply["text"]
        if reply["raised"]:
            raise DataError(f"the chat template rejects the conversation: {reply['error']}")
        raise CheckpointError(f"the chat template cannot be used: {reply['error']}")

    def _ask(self, line: bytes) -> dict[str, Any]:
        """Send one request; a process that does not answer in time is ended."""
        if self._process is not None and self._process.poll() is not None:
            self.close()
        process = self._process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        clock = threading.Timer(self.limit_s, process.kill)
        clock.start()
        answer = b""
        try:
            with suppress(BrokenPipeError):
                process.stdin.write(line)
                process.stdin.flush()
                answer = process.stdout.readline()
        finally:  # after Ctrl-C, an answer must not be taken for that to a later request
            in_time = clock.is_alive()
            clock.cancel()
            if not answer.endswith(b"\n"):
                self.close()
        if answer.endswith(b"\n"):
            return json.loads(answer)
        reason = "it ended the process" if in_time else f"not done after {self.limit_s:g} s"
        return {"error": reason, "raised": False}

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
            return subprocess.Popen(
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
