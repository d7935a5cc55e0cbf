"""The `lm` program: registers the commands, turns errors into one line and an exit code."""

import errno
import gc
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

import typer

from cli.panels import grouped
from cli.render import say, silence
from engine.errors import EngineError, ResourceError

# In the order that --help shows. Each is in the file of its name, `import` in import_model.py.
COMMANDS = (
    *("count-tokens", "tokenize", "train-tokenizer", "train", "finetune", "plan", "generate"),
    *("chat", "merge", "import", "quantize", "export", "show", "verify", "runs", "plot", "doctor"),
)
GROUPS = ("recipes", "data", "bench", "cache")


def program(asked: str = "") -> typer.Typer:
    """Return the program with the command that is asked for, or with all if that is none of them.

    To import all and have Typer read their options takes 20 ms, which every answer would wait for.
    """
    app = typer.Typer(
        name="lm",
        help="A workbench for language models: train, import, chat, generate and measure.",
        epilog="Begin with: lm train stdlib, then lm generate 'def ' -m stdlib",
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # plain help: rich would cost a tenth of a second to import
    )
    app.callback()(_root)
    names = (*COMMANDS, *GROUPS)
    for name in [asked] if asked in names else names:
        word = "import_model" if name == "import" else name.replace("-", "_")
        module = import_module(f"cli.commands.{word}")
        if name in GROUPS:
            app.add_typer(module.app, name=name)
        else:
            panels = getattr(module, "PANELS", None)  # of options, in --help
            app.command(name, cls=grouped(panels) if panels else None)(getattr(module, word))
    return app


def _version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        typer.echo(f"lm {metadata.version('lm-workbench')}")
        raise typer.Exit()


def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version and exit."
    ),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    pass


def _prepare_process() -> None:
    """Give a process without some stream a silent one, and let Ctrl-C end it without a traceback.

    A KeyboardInterrupt in the middle of importing torch leaves a trail of half-made modules.
    """
    gc.set_threshold(10_000)  # nothing that imports make is garbage: 60 searches would take 8 ms
    # Read as NumPy is imported, of whose OpenBLAS we use little: wait 2⁴ cycles for work, not 2²⁶,
    # which keep a core busy for 30 ms.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(nowhere, "r" if name == "stdin" else "w"))
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))


def main(argv: Sequence[str] | None = None) -> None:
    """Run `lm` with `argv` (default: the process's own); always ends in SystemExit."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        _prepare_process()
    try:
        program(*arguments[:1])(arguments)
    except EngineError as error:
        if "--debug" in arguments:
            raise
        for line in str(error).splitlines():
            say(f"error: {line}")
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        silence(sys.stdout)  # as when help goes to a full disk
        say(f"error: cannot write: {error.strerror}")
        sys.exit(ResourceError.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
