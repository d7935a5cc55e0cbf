"""`lm plan`: what a run will take, before it is started."""

from typing import Annotated, Optional

import typer

from cli.options import Cache, Json, Model, Out, Overrides, Quiet


def plan(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe (lm recipes) or a .yaml file.")],
    overrides: Overrides = None,
    model: Model = None,
    watts: Annotated[
        Optional[float], typer.Option("--watts", min=0.001, help="Power drawn while it computes.")
    ] = None,
    price_kwh: Annotated[
        Optional[float], typer.Option("--price-kwh", min=0, help="Price of a kilowatt-hour.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Take a few steps to know the time.")
    ] = True,
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
    cache: Cache = None,
) -> None:
    """Say what a run will take: parameters, FLOPs, tokens, memory, disk, time, energy, money.

    A few real steps are taken, on random tokens and in a process of their own. A recipe that is
    known to fail is refused with the reason; what is only unwise is noted.
    With -m, and for recipes of `lm finetune`, it plans finetuning.

    \b
    lm plan stdlib
    lm plan stdlib model.n_layers=8 train.budget=1h --watts 65 --price-kwh 0.30
    lm plan sft-lora -m smollm2 data.train=rows.jsonl --no-measure
    """
    import sys

    from cli.options import CHECKPOINTS, cache_folder, is_finetuning, load_recipe
    from cli.planning import show_plan
    from engine.forecast import forecast

    given = [*(overrides or []), *([f"train.base={model}"] if model else [])]
    resolved = load_recipe(recipe, given)
    events = forecast(
        resolved,
        out or CHECKPOINTS / resolved.run.name,
        cache or cache_folder(),
        CHECKPOINTS,
        finetune=bool(resolved.train.base) or is_finetuning(recipe),
        measure=measure,
        stdin=sys.stdin.buffer if resolved.data.train == "-" else None,
    )
    show_plan(events, watts, price_kwh, as_json=as_json, quiet=quiet)
