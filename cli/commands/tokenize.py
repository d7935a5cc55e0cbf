"""`lm tokenize`: see text as the model sees it."""

from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from cli.options import Json


def tokenize(
    text: Annotated[
        Optional[str], typer.Argument(help="Text, or ids with --decode; - or nothing reads a pipe.")
    ] = None,
    model: Annotated[
        Optional[str],
        typer.Option("-m", "--model", help="gpt-5, o200k_base, a checkpoint, a tokenizer.json."),
    ] = None,
    file: Annotated[Optional[Path], typer.Option("-f", "--file", help="Read this file.")] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Print only the ids.")] = False,
    decode: Annotated[bool, typer.Option("--decode", help="Turn ids back into bytes.")] = False,
    compare: Annotated[
        Optional[list[str]],
        typer.Option("--compare", metavar="MODEL", help="Beside this one; repeatable, or A,B,C."),
    ] = None,
    special: Annotated[
        Literal["text", "parse", "error"],
        typer.Option("--special", help="What looks like a control token is text, one, or refused."),
    ] = "text",
    as_json: Json = False,
) -> None:
    """Show how text splits into tokens.

    On a terminal: pieces and ids in colour. In a pipe: offset, id, piece.
    Several models are compared: their counts, and where they split differently.

    -m takes an OpenAI model or encoding, a checkpoint, a tokenizer.json or a
    folder that holds one. With those of files any bytes are fine, and --decode
    gives back exactly those.

    \b
    lm tokenize "def add(a, b):" -m stdlib
    lm tokenize "def add(a, b):" -m gpt-5 --compare gpt-4,stdlib
    lm tokenize -f README.md -m stdlib --ids | lm tokenize --decode -m stdlib
    """
    from cli import tokenizing
    from cli.counting import names_of
    from cli.options import read_input
    from cli.render import emit, emit_bytes
    from engine.errors import DataError, RecipeError

    if ids + decode + as_json > 1:
        raise RecipeError("--ids, --decode and --json exclude each other; choose one")
    if compare and (ids or decode):
        raise RecipeError("--compare shows counts and differences; leave out --ids and --decode")
    models = names_of([word for word in [model, *(compare or [])] if word])
    if len(models) > 1 and (ids or decode):
        raise RecipeError("--ids and --decode are for one model; give one -m")
    data = read_input(text, file, glue=False)
    if compare or len(models) > 1:
        tokenizing.compare(models, data, special, as_json)
        return
    seer = tokenizing.seer_of(models[0] if models else None)
    if decode:
        try:
            numbers = [int(word) for word in data.replace(b",", b" ").strip(b"[] \n").split()]
        except ValueError as error:
            raise DataError(f"--decode takes token ids, whole numbers: {error}") from None
        emit_bytes(seer.decode(numbers))
        return
    pieces = seer.pieces(data, special)
    if ids and not as_json:
        emit(" ".join(str(token) for token, _ in pieces))
        return
    tokenizing.show_pieces(seer, data, pieces, as_json)
