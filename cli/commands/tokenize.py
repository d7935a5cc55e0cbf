"""`lm tokenize`: see text as the model sees it."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from cli.options import Json, Model


def tokenize(
    text: Annotated[
        Optional[str], typer.Argument(help="Text, or ids with --decode; - or nothing reads a pipe.")
    ] = None,
    model: Model = None,
    file: Annotated[Optional[Path], typer.Option("-f", "--file", help="Read this file.")] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Print only the ids.")] = False,
    decode: Annotated[bool, typer.Option("--decode", help="Turn ids back into bytes.")] = False,
    as_json: Json = False,
) -> None:
    """Show how text splits into tokens.

    On a terminal: pieces and ids in colour. In a pipe: offset, id, piece.

    -m also takes a tokenizer.json or a folder that holds one. Any bytes are
    fine, and --decode gives back exactly those.

    \b
    lm tokenize "def add(a, b):" -m stdlib
    lm tokenize -f README.md -m stdlib --ids | lm tokenize --decode -m stdlib
    """
    from cli.options import read_input, the_model
    from cli.render import console, emit, emit_bytes, emit_json, say
    from engine.errors import DataError, RecipeError
    from engine.text.tokenizer import load_tokenizer

    if ids + decode + as_json > 1:
        raise RecipeError("--ids, --decode and --json exclude each other; choose one")
    direct = Path(model) if model and model.endswith(".json") else None
    tokenizer = load_tokenizer(direct or the_model(model, "tokenizer.json"))
    data = read_input(text, file)
    if decode:
        try:
            numbers = [int(word) for word in data.replace(b",", b" ").strip(b"[] \n").split()]
        except ValueError as error:
            raise DataError(f"--decode takes token ids, whole numbers: {error}") from None
        emit_bytes(tokenizer.decode_bytes(numbers))
        return
    tokens = tokenizer.encode_bytes(data)
    if ids and not as_json:
        emit(" ".join(map(str, tokens)))
        return
    pieces = [tokenizer.pieces[token] for token in tokens]
    shown = [piece.decode("utf-8", "replace") for piece in pieces]
    # Some tokenizers put a space before the text; it is in the first piece and not in the text.
    starts = [len(tokenizer.decode_bytes(tokens)) - sum(map(len, pieces))]
    for piece in pieces:
        starts.append(starts[-1] + len(piece))
    starts[0] = 0
    if as_json:
        rows = [
            {"id": token, "piece": text, "start": start, "end": end}
            for token, text, start, end in zip(tokens, shown, starts, starts[1:], strict=False)
        ]
        counts = {"tokens": len(tokens), "bytes": len(data), "vocab_size": tokenizer.vocab_size}
        emit_json("tokenize", counts | {"pieces": rows})
        return
    out = console()
    if out.is_terminal:
        _coloured(out, tokens, shown)
    else:
        for start, token, text in zip(starts, tokens, shown, strict=False):
            emit(f"{start}\t{token}\t{text!r}")
    ratio = f" · {len(data) / len(tokens):.2f} bytes/token" if tokens else ""
    say(f"{len(tokens):,} tokens · {len(data):,} bytes{ratio}")


def _coloured(out, tokens: list[int], shown: list[str]) -> None:
    """Print the pieces on alternating backgrounds, then their ids in the same colours."""
    from rich.text import Text

    styles = ("black on bright_cyan", "black on bright_yellow", "black on bright_green")
    line, ids = Text(), Text()
    for index, (token, piece) in enumerate(zip(tokens, shown, strict=True)):
        ids.append(str(token), style=styles[index % len(styles)]).append(" ")
        visible = piece.replace("\t", "→").replace("\r", "␍").replace("\n", "⏎\n")
        line.append(visible, style=styles[index % len(styles)])
    out.print(line)
    out.print(ids)
