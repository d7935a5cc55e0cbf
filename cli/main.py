"""The `lm` program: registers the commands, turns errors into one line and an exit code."""

import errno
import os
import signal
import sys
from collections.abc import Sequence

import typer

from cli.commands import (
    bench,
    cache,
    chat,
    count_tokens,
    data,
    doctor,
    export,
    finetune,
    generate,
    import_model,
    merge,
    plan,
    plot,
    quantize,
    recipes,
    runs,
    show,
    tokenize,
    train,
    train_tokenizer,
    verify,
)
from cli.panels import grouped
from cli.render import say, silence
from engine.errors import EngineError, ResourceError

# In the order that --help shows.
COMMANDS = {
    "count-tokens": count_tokens.count_tokens,
    "tokenize": tokenize.tokenize,
    "train-tokenizer": train_tokenizer.train_tokenizer,
    "train": train.train,
    "finetune": finetune.finetune,
    "plan": plan.plan,
    "generate": generate.generate,
    "chat": chat.chat,
    "merge": merge.merge,
    "import": import_model.import_model,
    "quantize": quantize.quantize,
    "export": export.export,
    "show": show.show,
    "verify": verify.verify,
    "runs": runs.runs,
    "plot": plot.plot,
    "doctor": doctor.doctor,
}
SHAPES = {"generate": grouped(generate.PANELS)}
GROUPS = {"recipes": recipes.app, "data": data.app, "bench": bench.app, "cache": cache.app}


def program(asked: str = "") -> typer.Typer:
    """Return the program with the command that is asked for, or with all if that is none of them.

    Typer takes ten milliseconds to read the options of all, which every answer would wait for.
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
    asked = asked if asked in COMMANDS or asked in GROUPS else ""
    for name, function in COMMANDS.items():
        if asked in ("", name):
            app.command(name, cls=SHAPES.get(name))(function)
    for name, group in GROUPS.items():
        if asked in ("", name):
            app.add_typer(group, name=name)
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
