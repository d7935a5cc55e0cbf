"""`lm data`: look at rows before a model is finetuned on them."""

from typing import Annotated, Optional

import typer

from cli.options import Json, Model, Overrides

app = typer.Typer(no_args_is_help=True)


@app.callback()
def data() -> None:
    """Look at rows before a model is finetuned on them."""


@app.command("check")
def check(
    rows: Annotated[str, typer.Argument(help="A file, folder or glob of rows; - is the pipe.")],
    overrides: Overrides = None,
    model: Model = None,
    row: Annotated[
        Optional[str],
        typer.Option("--row", metavar="N", help="Show this one: 217, or rows.jsonl:217."),
    ] = None,
    ids: Annotated[bool, typer.Option("--ids", help="With --row: a line per token.")] = False,
    valid: Annotated[
        Optional[str], typer.Option("--valid", help="Rows to evaluate on; count what they share.")
    ] = None,
    recipe: Annotated[
        str, typer.Option("--recipe", help="Whose settings of data to go by.")
    ] = "sft",
    as_json: Json = False,
) -> None:
    """Check rows as lm finetune would read them, and show what is learned.

    Counts, lengths, duplicates, rows over data.seq_len, tokens that are learned, answers whose
    end is learned. --row shows one row as the model sees it: learned tokens are green, in a pipe
    between ⟦ and ⟧. A bad row is named by file and line, exit code 3.

    \b
    lm data check rows.jsonl -m smollm2
    lm data check rows.jsonl -m smollm2 --row 217 --ids
    lm data check train.jsonl --valid valid.jsonl -m smollm2 data.seq_len=1024
    """
    import sys
    import tempfile
    from pathlib import Path

    from cli import data_check
    from cli.options import load_recipe, the_model
    from engine.errors import RecipeError
    from engine.recipe import override

    if ids and row is None:
        raise RecipeError("--ids is for one row; name it with --row")
    settings = load_recipe(recipe, overrides)
    settings = override(settings, data={"train": rows, "valid": valid or settings.data.valid})
    folder = the_model(model or settings.train.base or None, "tokenizer.json")
    with tempfile.TemporaryDirectory() as place:
        checked = data_check.check(settings, folder, Path(place), sys.stdin.buffer, row)
    if row is None:
        data_check.show(checked, as_json)
    else:
        data_check.show_row(checked, ids, as_json)
