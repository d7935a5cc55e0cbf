"""Fill in a chat template. It is a program from a stranger, so this runs as a process apart.

`engine.text.renderer.Renderer` starts it, sends lines of JSON, each a list of requests, and reads a
list of replies for each. Three walls, each enough alone: Jinja's sandbox keeps a template from
reaching Python's objects; the process holds nothing but two pipes, no environment, little memory
and little time; and the parent waits only so long before it ends the process.

Source: what a template finds here is what `transformers` 5 offers it: the two whitespace options,
loop controls, `{% generation %}`, `tojson`, `raise_exception`, `strftime_now`.
"""

import contextlib
import functools
import json
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

try:
    import resource
except ImportError:  # not on every platform; the sandbox and the parent's clock remain
    resource = None

MEMORY = 1 << 30  # bytes of address space
MAX_CHARACTERS = 1 << 24  # of a rendering
MAX_MESSAGE = 300  # characters of an error
# Loads what Jinja imports only when it first needs it, while files can still be opened.
WARM_UP = "{% generation %}{{ 'a' | tojson }}{% endgeneration %}{{ strftime_now('%d') }}{{ 1 / 0 }}"
MARKS = "_generation_marks"  # a variable under which the request's marks are kept


class RaisedByTemplate(Exception):
    """Carry what a template says is wrong with the conversation."""


class _Generation(Extension):
    """Understand `{% generation %}`, which marks the words of the assistant.

    Its body is rendered as a block of its own, with its own scope, as in `transformers`. If the
    request names two marks, they are written around it.
    """

    tags = {"generation"}  # noqa: RUF012 (declared by Jinja)

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the nodes of a block whose tag was read."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_write", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _write(self, context: Mapping[str, Any], caller: Macro) -> str:
        before, after = context.get(MARKS) or ("", "")
        return before + caller() + after


class _Namespace(Namespace):
    """Jinja's `namespace`, without names that begin with an underscore."""

    def __init__(self, *arguments: Any, **values: Any) -> None:
        super().__init__()
        for name, value in dict(*arguments, **values).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)


class _Dict:
    """What a template needs of Python's `dict`, without the type itself."""

    def __call__(self, *arguments: Any, **values: Any) -> dict[Any, Any]:
        return dict(*arguments, **values)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        """Return a dict with the same value for all keys."""
        return dict.fromkeys(keys, value)


def _raise(message: object) -> None:
    raise RaisedByTemplate(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON for a model to read: unlike Jinja's own filter, nothing is escaped for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise,
        "namespace": _Namespace,
        "dict": _Dict(),
    }
    return environment


@functools.lru_cache(maxsize=4)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


def fill(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"text"} for a request {"template", "variables", "now", "marks"}, or {"error"}.

    `raised` in the reply tells whether the template itself rejected the conversation.
    """
    now = datetime.fromisoformat(request["now"])
    ours = {MARKS: request.get("marks")}
    try:
        text = _compiled(request["template"]).render(
            {"strftime_now": now.strftime} | request["variables"] | ours
        )
        if len(text) > MAX_CHARACTERS:
            return {"error": f"writes more than {MAX_CHARACTERS} characters", "raised": False}
        return {"text": text}
    except RaisedByTemplate as error:
        return {"error": _one_line(error), "raised": True}
    except MemoryError:
        return {"error": f"needs more than {MEMORY >> 20} MB of memory", "raised": False}
    except RecursionError:
        return {"error": "nests or recurses too deeply", "raised": False}
    except Exception as error:  # noqa: BLE001 (a stranger's program can raise anything)
        return {"error": f"{_where(error)}{_one_line(error)}", "raised": False}


def _one_line(error: Exception) -> str:
    words = " ".join((str(error) or type(error).__name__).split())
    words = "".join(c if c.isprintable() else "\ufffd" for c in words)
    return words if len(words) <= MAX_MESSAGE else words[:MAX_MESSAGE] + " …"


def _where(error: Exception) -> str:
    """Return the line of the template that failed, in words."""
    line = getattr(error, "lineno", None)
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return f"line {line}: " if line else ""


def _confine(seconds: int) -> None:
    """Give up all that a template does not need; more seconds are granted for each request."""
    if resource is None:
        return
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used = int(usage.ru_utime + usage.ru_stime) + 1
    limits = {
        "RLIMIT_AS": MEMORY,
        "RLIMIT_CPU": used + seconds,
        "RLIMIT_NOFILE": 0,
        "RLIMIT_FSIZE": 0,
        "RLIMIT_CORE": 0,
    }
    for name, limit in limits.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):  # differs by platform
            kind = getattr(resource, name)
            resource.setrlimit(kind, (limit, resource.getrlimit(kind)[1]))


def serve(seconds: int) -> None:
    """Answer lines of requests until the input ends, each within `seconds` of processor time."""
    fill({"template": WARM_UP, "variables": {}, "now": datetime.now().isoformat()})
    for line in sys.stdin.buffer:
        _confine(seconds)
        replies = [fill(request) for request in json.loads(line)]
        sys.stdout.buffer.write(json.dumps(replies).encode() + b"\n")
        sys.stdout.buffer.flush()
