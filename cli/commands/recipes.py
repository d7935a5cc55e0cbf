"""`lm recipes`: list, show, check and explain recipes."""

from typing import Annotated, Optional

import typer

from cli.options import Json, Overrides

app = typer.Typer(invoke_without_command=True)


@app.callback()
def recipes(context: typer.Context, as_json: Json = False) -> None:
    """List, show, check and explain recipes.

    \b
    lm recipes
    lm recipes show stdlib train.budget=10m
    lm recipes check my.yaml
    lm recipes explain train.optim
    """
    from cli.options import recipes_folder
    from cli.render import console, emit_json

    if context.invoked_subcommand:
        return
    rows = []
    for file in sorted(recipes_folder().glob("*.yaml")):
        lines = file.read_text(encoding="utf-8").splitlines()
        head = [line.removeprefix("#").strip() for line in lines if line.startswith("#")]
        rows.append((file.stem, head[0] if head else ""))
    if as_json:
        emit_json("recipes", {"recipes": [{"name": n, "summary": s} for n, s in rows]})
        return
    out = console()
    width = max(len(name) for name, _ in rows)
    for name, summary in rows:
        out.print(f"[bold]{name:<{width}}[/]  {summary}")


@app.command("show")
def show(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe, or a .yaml file.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Print a recipe with every default filled in, as `lm train` would run it."""
    from cli.options import load_recipe
    from cli.render import emit, emit_json
    from engine.recipe import dump, to_dict

    resolved = load_recipe(recipe, overrides)
    if as_json:
        emit_json("recipe", to_dict(resolved))
    else:
        emit(dump(resolved), end="")


@app.command("check")
def check(
    files: Annotated[list[str], typer.Argument(help="Names of recipes, or .yaml files.")],
) -> None:
    """Check recipes for unknown keys, wrong types and impossible combinations."""
    from cli.options import load_recipe
    from cli.render import emit

    for file in files:
        load_recipe(file, None)
        emit(f"{file}: ok")


@app.command("explain")
def explain(
    section: Annotated[Optional[str], typer.Argument(help="Only this key or section.")] = None,
    as_json: Json = False,
) -> None:
    """Say what each field means, accepts and defaults to."""
    from cli.render import console, emit_json
    from engine.errors import RecipeError
    from engine.recipe import choices, fields
    from engine.values import nearest

    every = fields()
    found = {
        key: field
        for key, field in every.items()
        if section is None or key == section or key.startswith(f"{section}.")
    }
    if not found:
        raise RecipeError(f"{section} is no recipe key or section{nearest(section or '', every)}")
    if as_json:
        rows = [
            {"key": k, "default": f.default, "accepts": choices(f), "meaning": f.metadata["doc"]}
            for k, f in found.items()
        ]
        emit_json("recipe-fields", {"fields": rows})
        return
    out = console()
    for key, field in found.items():
        default = "empty" if field.default == "" else field.default
        out.print(f"[bold]{key}[/] = {default}  [dim]{choices(field)}[/]")
        out.print(f"    {field.metadata['doc']}")
