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
    help="A workbench for language models: tokenize, train, generate and measure.",
    epilog="Begin with: lm train stdlib, then lm generate 'def ' -m stdlib",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich would cost a tenth of a second to import
)

# In the order that --help shows.
COMMANDS = {
    "tokenize": tokenize.tokenize,
    "train-tokenizer": train_tokenizer.train_tokenizer,
    "train": train.train,
    "generate": generate.generate,
    "runs": runs.runs,
    "show": show.show,
    "plot": plot.plot,
}
for _name, _function in COMMANDS.items():
    app.command(_name)(_function)
app.add_typer(recipes.app, name="recipes")


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
