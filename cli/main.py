"""The `lm` program: registers the commands, turns errors into one line and an exit code."""

import sys
from collections.abc import Sequence

import typer

from cli.commands import (
    generate,
    plot,
    recipes,
    runs,
    show,
    tokenize,
    train,
    train_tokenizer,
)
from engine.errors import EngineError

app = typer.Typer(
    name="lm",
    help="A workbench for language models: tokenize, train, generate and measure, on this machine.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

# (function, name, panel), in the order that --help shows.
COMMANDS = (
    (tokenize.tokenize, "tokenize", "Text"),
    (train_tokenizer.train_tokenizer, "train-tokenizer", "Text"),
    (train.train, "train", "Train"),
    (runs.runs, "runs", "Train"),
    (plot.plot, "plot", "Train"),
    (show.show, "show", "Train"),
    (generate.generate, "generate", "Run"),
)
for _function, _name, _panel in COMMANDS:
    app.command(_name, rich_help_panel=_panel)(_function)
app.add_typer(recipes.app, name="recipes", rich_help_panel="Train")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        typer.echo(f"lm {metadata.version('lm-workbench')}")
        raise typer.Exit()


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version and exit."
    ),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> None:
    """Run `lm` with `argv` (default: the process's own); always ends in SystemExit."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        app(arguments)
    except EngineError as error:
        if "--debug" in arguments:
            raise
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
