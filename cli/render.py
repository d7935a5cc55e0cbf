"""Writing to the two streams: the payload to stdout, everything about it to stderr.

Off a terminal there is no colour and no animation. Numbers are written one way everywhere.
"""

import io
import json
import math
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, cast

from engine.errors import ResourceError

if TYPE_CHECKING:
    from rich.console import Console


def emit(text: str, end: str = "\n") -> None:
    """Write payload to stdout at once; end the program quietly if nobody reads it any more."""
    try:
        data = (text + end).encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half of a surrogate pair, as a JSON file may spell it
        data = (text + end).encode("utf-8", "replace")
    emit_bytes(data)


def emit_bytes(data: bytes) -> None:
    """Write raw payload to stdout, like `emit`. Raises: ResourceError if the disk is full."""
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except OSError as error:
        silence(sys.stdout)
        if isinstance(error, BrokenPipeError):
            raise SystemExit(128 + signal.SIGPIPE) from None
        raise ResourceError(f"cannot write to stdout: {error.strerror or error}") from None


class _Stdout(io.TextIOBase):
    """Standard output as rich wants it, written through `emit`."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        """Pass text on."""
        emit(text, end="")
        return len(text)

    def isatty(self) -> bool:
        """Tell whether a person is looking."""
        return sys.stdout.isatty()

    def fileno(self) -> int:
        """Return the descriptor, from which rich reads the width."""
        return sys.stdout.fileno()


def emit_json(schema: str, value: Mapping[str, Any]) -> None:
    """Write one JSON object on one line, with its schema first."""
    emit(json.dumps({"schema": f"lm/{schema}/1", **value}, ensure_ascii=False))


def say(text: str, quiet: bool = False) -> None:
    """Write one plain line to stderr."""
    if quiet:
        return
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:  # a full disk for talk is no reason to stop the work, nor for another exit code
        silence(sys.stderr)


def say_facts(facts: Sequence[str], quiet: bool = False) -> None:
    """Write facts to stderr, as many on a line as 80 columns hold."""
    line = ""
    for fact in facts:
        if line and len(line) + len(f" · {fact}") > 80:
            say(line, quiet)
            line = ""
        line += f" · {fact}" if line else fact
    say(line, quiet)


def silence(stream: IO[str]) -> None:
    """Let a stream that cannot be written go nowhere; the interpreter flushes it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def console(stderr: bool = False) -> "Console":
    """Return a rich console on one of the streams; rich turns colour off where it should."""
    from rich.console import Console

    if stderr:
        return Console(stderr=True, highlight=False)
    return Console(file=cast(IO[str], _Stdout()), highlight=False, soft_wrap=True)


def count(number: float) -> str:
    """Write a count shortly: 3.3M, 12.4k, 950."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{number / (1e3 if unit == 'k' else size):.1f}{unit}"
    return f"{number:,.0f}"


def size(number: float) -> str:
    """Write a number of bytes: 1.2 GB, 34 MB, 512 bytes."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= limit:
            return f"{number / limit:.1f} {unit}"
    return f"{number:.0f} bytes"


def percent(share: float) -> str:
    """Write a small share to two digits that are not 0: 6.8 %, 0.53 %, 0.000047 %; or 0 %."""
    number = 100 * share
    digits = max(0, 1 - math.floor(math.log10(number))) if number > 0 else 0
    return f"{number:.{digits}f} %"


def clock(seconds: float) -> str:
    """Write a duration: 0:42, 5:03, 1:02:09."""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
