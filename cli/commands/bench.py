"""`lm bench`: how fast a model runs here, and how far from the limits of the machine."""

from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from typer.core import TyperGroup

from cli.options import Device, Json, Model, Overrides, Quiet, let_threads_sleep


class _Bench(TyperGroup):
    """`lm bench …` is the command `run`, unless its first word is that of another."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        """Hand over to `run` under this name, so that its help and its usage are those of bench."""
        if args and args[0] in self.commands and args[0] != "run":
            return super().make_context(info_name, args, *rest, **extra)
        return self.commands["run"].make_context(info_name, args, *rest, **extra)


app = typer.Typer(cls=_Bench, help="Measure how fast a model runs here, and how near the limits.")


@app.command("run")
def run(
    recipe: Annotated[
        Optional[str], typer.Argument(help="A recipe: its training step; without -m all of it.")
    ] = None,
    overrides: Overrides = None,
    model: Model = None,
    what: Annotated[
        Optional[str],
        typer.Option(help="Of prefill,decode,batch,kv,train,load; else all that apply."),
    ] = None,
    prompt: Annotated[
        Optional[str],
        typer.Option(metavar="LIST", help="prefill: tokens of the prompt; else 128,512."),
    ] = None,
    depth: Annotated[
        Optional[str], typer.Option(metavar="LIST", help="decode, kv: tokens before the answer.")
    ] = None,
    batch: Annotated[str, typer.Option(metavar="LIST", help="batch: rows at once.")] = "1,2,4,8",
    tokens: Annotated[int, typer.Option(min=2, help="decode, batch: tokens to generate.")] = 32,
    dtype: Annotated[
        str, typer.Option(metavar="LIST", help="Of auto,fp32,bf16,int8,int4; train: no int4.")
    ] = "auto",
    kernels: Annotated[
        str, typer.Option(metavar="LIST", help="auto: as lm generate; torch: without our C.")
    ] = "auto",
    kv: Annotated[
        str, typer.Option("--kv", metavar="LIST", help="Keys and values: auto,fp32,fp16,int8.")
    ] = "auto",
    threads: Annotated[
        Optional[str], typer.Option(metavar="LIST", help="CPU threads; else one per core.")
    ] = None,
    temperature: Annotated[
        Optional[float], typer.Option(min=0, help="Of sampling; else the model's own settings.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each case.")] = 5,
    warm_up: Annotated[int, typer.Option(min=0, help="Repetitions before, not measured.")] = 1,
    record: Annotated[
        Optional[Path], typer.Option(help="Add a JSON line per repetition to a file.")
    ] = None,
    plot: Annotated[
        Optional[Path], typer.Option(help="Draw throughput, latency, roofline: .png or .svg.")
    ] = None,
    watts: Annotated[
        Optional[float], typer.Option(min=0.001, help="Power drawn while it computes.")
    ] = None,
    price_kwh: Annotated[
        Optional[float], typer.Option(min=0, help="Dollars per kWh, for what tokens cost here.")
    ] = None,
    beside: Annotated[
        Optional[list[str]],
        typer.Option(help="With --watts: API model to price beside it; repeatable."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    device: Device = "auto",
) -> None:
    """Measure how fast a model runs here, and how far that is from the limits of the machine.

    The code is that of lm generate and lm train: our own C where there is a
    compiler, else torch. A recipe without -m is measured with random weights.
    Shares are of the memory bandwidth and matmul peak measured in the same call.
    LIST is 128,512 or a range: 128..2048x2 (times 2), 0..512+128 (plus 128).

    \b
    lm bench -m smollm2
    lm bench -m smollm2 --dtype bf16,int8,int4 --kernels auto,torch
    lm bench stdlib --what train
    lm bench -m smollm2 --what decode --depth 0..2048+512 --record a.jsonl
    lm bench compare a.jsonl b.jsonl --fail-if-slower 3%
    """
    _check(recipe, model, what)
    if what != "train":  # as in lm generate; lm train does not, and torch brings the same OpenMP
        let_threads_sleep()
    from cli.benching import Request, bench

    wishes = Request(
        recipe=recipe,
        overrides=overrides or [],
        model=model,
        what=what,
        prompt=prompt,
        depth=depth,
        batch=batch,
        tokens=tokens,
        dtype=dtype,
        kernels=kernels,
        kv=kv,
        threads=threads,
        temperature=temperature,
        repeats=repeats,
        warm_up=warm_up,
        record=record,
        plot=plot,
        watts=watts,
        price_kwh=price_kwh,
        beside=beside,
        device=device,
    )
    bench(wishes, as_json=as_json, quiet=quiet)


def _check(recipe: str | None, model: str | None, what: str | None) -> None:
    """Refuse names that lead nowhere before torch is imported, which takes seconds.

    Raises: CheckpointError, RecipeError.
    """
    from cli.options import recipes_folder, the_model
    from engine.bench.cases import read_whats
    from engine.recipe import find_recipe

    if recipe:
        find_recipe(recipe, recipes_folder())
    if model or not recipe:
        the_model(model)
    if what:
        read_whats(what)


@app.command("compare")
def compare(
    a: Annotated[Path, typer.Argument(help="A file of lm bench --record: before.")],
    b: Annotated[Path, typer.Argument(help="Another: after.")],
    fail_if_slower: Annotated[
        Optional[str],
        typer.Option(metavar="SHARE", help="Exit 7 if a case is slower by more, like 3%."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare two records: how much faster each case became, how surely, or only noise.

    The interval holds the true ratio in 95 of 100 cases, whatever way the times
    are spread; it needs four repetitions a side. What changed between two runs
    beside the code, it cannot know: measure A, B, A, B on a noisy machine.

    \b
    lm bench compare before.jsonl after.jsonl
    lm bench compare before.jsonl after.jsonl --fail-if-slower 3% --json
    """
    from cli.bench_views import compare_files

    compare_files(a, b, fail_if_slower, as_json=as_json)
