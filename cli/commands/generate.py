"""`lm generate`: continue a prompt, streaming."""

import math
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from cli.options import Device, Json, Model, Quiet

Overflow = Literal["error", "left", "middle", "right"]


def generate(
    prompt: Annotated[
        Optional[str], typer.Argument(help="Text to continue; - or nothing reads a pipe.")
    ] = None,
    model: Model = None,
    file: Annotated[Optional[Path], typer.Option("-f", "--file", help="Read a file.")] = None,
    max_tokens: Annotated[Optional[int], typer.Option(min=0, help="Most tokens to make.")] = None,
    temperature: Annotated[
        Optional[float], typer.Option(min=0, help="0 takes the likeliest token each time.")
    ] = None,
    top_k: Annotated[Optional[int], typer.Option(min=0, help="Keep the k likeliest.")] = None,
    top_p: Annotated[
        Optional[float], typer.Option(min=0, max=1, help="Keep the smallest set this probable.")
    ] = None,
    min_p: Annotated[
        Optional[float], typer.Option(min=0, max=1, help="Drop below this share of the best.")
    ] = None,
    repetition_penalty: Annotated[
        Optional[float], typer.Option(min=0.01, help="Above 1: tokens seen become less likely.")
    ] = None,
    seed: Annotated[
        Optional[int], typer.Option(min=0, max=2**62, help="Same seed, same text.")
    ] = None,
    stop: Annotated[
        Optional[list[str]], typer.Option("--stop", help="End before this text; repeatable.")
    ] = None,
    logprobs: Annotated[
        Optional[int], typer.Option(min=0, max=100, help="With --json: K alternatives a token.")
    ] = None,
    number: Annotated[int, typer.Option("-n", min=1, help="Continuations of the prompt.")] = 1,
    on_overflow: Annotated[
        Overflow, typer.Option(help="Prompt too long: error, or cut it there.")
    ] = "error",
    as_json: Json = False,
    quiet: Quiet = False,
    device: Device = "auto",
) -> None:
    """Continue a prompt with a trained model.

    The text goes to stdout as it comes, how fast to stderr. What is not given
    comes from the checkpoint. The order is: repetition penalty, temperature,
    top-k, top-p, min-p.

    \b
    lm generate "def fib(n):" -m stdlib --max-tokens 100 --seed 1
    cat a.py | lm generate -m stdlib --temperature 0 --stop $'\\n'
    lm generate "import " -m stdlib -n 3 --json --logprobs 5 | jq .text
    """
    from cli.generation import Request, answer
    from cli.options import read_input, the_model
    from engine.errors import RecipeError

    for name, value in (
        ("temperature", temperature),
        ("top-p", top_p),
        ("min-p", min_p),
        ("repetition-penalty", repetition_penalty),
    ):
        if value is not None and not math.isfinite(value):
            raise RecipeError(f"--{name} {value} is not a number to compute with")
    if "" in (stop or []):
        raise RecipeError("--stop '' would end before the first token; leave it out")
    if logprobs is not None and not as_json:
        raise RecipeError("--logprobs shows its figures in --json output; add --json")
    wishes = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    request = Request(
        folder=the_model(model),
        prompt=read_input(prompt, file),
        wishes={name: value for name, value in wishes.items() if value is not None},
        seed=seed,
        stops=stop or [],
        logprobs=logprobs,
        number=number,
        on_overflow=on_overflow,
        device=device,
    )
    answer(request, as_json=as_json, quiet=quiet)
