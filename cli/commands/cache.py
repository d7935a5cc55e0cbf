"""`lm cache`: what is kept between calls, and how much of it."""

from typing import Annotated, Optional

import typer

from cli.options import Json

app = typer.Typer(no_args_is_help=True)


@app.callback()
def cache() -> None:
    """Look after what is kept between calls: read prompts, tokens, libraries."""


@app.command("ls")
def ls(as_json: Json = False) -> None:
    """List what --prefix-cache kept of each model, and what else the cache folder holds.

    \b
    lm cache ls
    lm cache ls --json | jq '.prefixes[] | .name, .tokens'
    """
    from cli.caching import show
    from cli.options import cache_folder

    show(cache_folder(), as_json)


@app.command("gc")
def gc(
    max_size: Annotated[
        Optional[str], typer.Option(metavar="SIZE", help="Remove blocks until this is left: 1GB.")
    ] = None,
    older_than: Annotated[
        Optional[str], typer.Option(metavar="TIME", help="Remove what was unused for long: 30d.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: Json = False,
) -> None:
    """Free what --prefix-cache kept, the longest unused first.

    Nothing else is touched: tokens and libraries are only listed by lm cache ls.

    \b
    lm cache gc --max-size 500MB
    lm cache gc --older-than 30d --dry-run
    lm cache gc --max-size 0
    """
    from cli.caching import free, seconds
    from cli.options import byte_count, cache_folder
    from engine.errors import RecipeError

    if max_size is None and older_than is None:
        raise RecipeError("what may go? Give --max-size 1GB, --older-than 30d, or both")
    most = None if max_size is None else byte_count(max_size, "--max-size")
    age = None if older_than is None else seconds(older_than, "--older-than")
    free(cache_folder(), most, age, dry_run, as_json)


@app.command("verify")
def verify(
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove those that are damaged.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check every block that --prefix-cache kept: its name, its tokens, its digest.

    Exit code 7 and the names if some are damaged and still there. Using them does no
    harm: they are checked then too, and computed again.

    \b
    lm cache verify
    lm cache verify --repair
    """
    from cli.caching import examine
    from cli.options import cache_folder

    examine(cache_folder(), repair, as_json)
