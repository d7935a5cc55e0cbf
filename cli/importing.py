"""Showing an import: where from, how far, what came of it."""

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import TypeVar

from cli.render import console, count, emit_json, say, size
from engine.interop.importing import Imported, Progress
from engine.interop.source import Source
from engine.peak import peak_memory

Result = TypeVar("Result")
INTERVAL = 10.0  # seconds between lines of progress where there is no bar


def show_import(
    events: Iterator[Progress | Imported],
    source: Source,
    began: float,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run an import to its end, with a bar on a terminal, and say what was made."""
    with tidy_interrupt():
        result = follow(events, Imported, quiet)
    seconds = time.perf_counter() - began
    if as_json:
        emit_json(
            "import",
            {
                "folder": str(result.folder),
                "model_type": result.model_type,
                "parameters": result.parameters,
                "bytes": result.bytes,
                "stored": result.stored,
                "licence": result.licence,
                "seconds": round(seconds, 3),
                "peak_memory": peak_memory(),
            },
        )
        return
    config = result.config
    say(
        f"{result.model_type}  {count(result.parameters)} parameters ({result.parameters:,}):"
        f" {config.n_layers} layers × {config.d_model}, vocabulary {config.vocab_size:,},"
        f" context {config.max_seq_len:,}",
        quiet,
    )
    say(f"weights  {source.stored} → {size(result.bytes)} in {seconds:.1f} s", quiet)
    say(f"licence  {result.licence}", quiet)
    say(f"made {result.folder} (peak memory {size(peak_memory())})", quiet)
    verb = "chat" if result.template else "generate 'Once'"
    name = result.folder.name if result.folder.parent.name == "checkpoints" else result.folder
    say(f"next: lm {verb} -m {name}", quiet)


@contextlib.contextmanager
def tidy_interrupt() -> Iterator[None]:
    """Let Ctrl-C unwind what is going on, so that nothing half written stays behind."""
    asked = False

    def _handle(number: int, frame: object) -> None:
        nonlocal asked
        asked = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, _handle)
    try:
        yield
    except Exception:
        if asked:  # a library turned the interrupt into an error of its own
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGINT, before)


def follow(events: Iterator[Progress | Result], kind: type[Result], quiet: bool) -> Result:
    """Draw progress where a person is looking, or say it now and then; return the result."""
    err = console(stderr=True)
    if quiet or not err.is_terminal:
        said = time.monotonic()
        for event in events:
            if isinstance(event, kind):
                return event
            assert isinstance(event, Progress)
            if time.monotonic() - said > INTERVAL:
                said = time.monotonic()
                say(f"{event.doing} {size(event.done)} of {size(event.total)}", quiet)
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=err, transient=True) as bar:
        task = bar.add_task("writing", total=None)
        for event in events:
            if isinstance(event, kind):
                return event
            assert isinstance(event, Progress)
            bar.update(task, description=event.doing, completed=event.done, total=event.total)
    raise AssertionError("writing ends with its result")
