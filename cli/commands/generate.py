"""`lm generate`: continue a prompt, streaming."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from cli.options import (
    Device,
    Drafts,
    DraftTokens,
    Dtype,
    Json,
    Kernels,
    KeysValues,
    Model,
    PrefixCache,
    PrefixCacheSize,
    Quiet,
    Variables,
)

# What --help shows together, and in which order.
PANELS = {
    "Model": "model device dtype",
    "Prompt": "file chat system messages var on_overflow",
    "Sampling": "max_tokens temperature top_k top_p min_p repetition_penalty seed stop number",
    "Speed": "kernels kv draft draft_tokens prefix_cache prefix_cache_size",
    "Batch": "batch out rows resume force",
    "Output": "as_json logprobs quiet show_prompt verify help",
}
Overflow = Literal["error", "left", "middle", "right"]


def generate(
    prompt: Annotated[
        Optional[str], typer.Argument(help="Text to continue; - or nothing reads a pipe.")
    ] = None,
    model: Model = None,
    file: Annotated[Optional[Path], typer.Option("-f", "--file", help="Read a file.")] = None,
    max_tokens: Annotated[
        Optional[int],
        typer.Option(min=0, help="Most tokens; else the model's own, or 200; in a chat, 2,048."),
    ] = None,
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
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a message; answer it as in lm chat.")
    ] = False,
    system: Annotated[
        Optional[str], typer.Option("--system", help="With --chat: instruction before it.")
    ] = None,
    messages: Annotated[
        Optional[Path],
        typer.Option("--messages", help="Answer a JSON file of messages, - for a pipe."),
    ] = None,
    batch: Annotated[
        Optional[Path],
        typer.Option("--batch", help="Answer each line of a JSON-lines file, - for a pipe."),
    ] = None,
    out: Annotated[
        Optional[Path], typer.Option("-o", "--out", help="With --batch: to here.")
    ] = None,
    rows: Annotated[
        Optional[int], typer.Option(min=1, max=1024, help="With --batch: lines at once; else 8.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="With --batch: go on, and redo what failed.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="With --batch: replace the output that is there.")
    ] = False,
    var: Variables = None,
    show_prompt: Annotated[
        bool, typer.Option("--show-prompt", help="Print the exact text and ids; do not generate.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Prove that every way of computing gives the same ids.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    kernels: Kernels = "auto",
    kv: KeysValues = "auto",
    draft: Drafts = None,
    draft_tokens: DraftTokens = None,
    prefix_cache: PrefixCache = False,
    prefix_cache_size: PrefixCacheSize = None,
) -> None:
    """Continue a prompt, or answer it, with a model.

    The text goes to stdout as it comes, how fast to stderr. What is not given
    comes from the checkpoint. The order is: repetition penalty, temperature,
    top-k, top-p, min-p. The keys of a --batch line: docs/formats.md.

    \b
    lm generate "def fib(n):" -m stdlib --max-tokens 100 --seed 1
    cat a.py | lm generate -m stdlib --temperature 0 --stop $'\\n'
    lm generate "import " -m stdlib -n 3 --json --logprobs 5 | jq .text
    lm generate --chat "What is the capital of France?" -m smollm2
    lm generate --chat "Hi" -m smollm2 --show-prompt
    lm generate --batch questions.jsonl -m smollm2 -o answers.jsonl
    lm generate -f a.py -m smollm2 --draft lookup   # guesses from the text so far
    lm generate -f a.py -m smollm2 --prefix-cache   # a prompt is read once
    lm generate "def fib(n):" -m smollm2 --dtype int8
    lm generate "def fib(n):" -m stdlib --verify   # exit code 7 if they differ
    """
    from cli.generation import Request, answer
    from cli.generation import show_prompt as show
    from cli.options import prefix_room, template_variables, the_model
    from engine.errors import RecipeError

    wishes = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    wishes = {name: value for name, value in wishes.items() if value is not None}
    _check(wishes, stop, logprobs is not None and not as_json and not batch)
    _check_chat(chat or bool(messages or batch), system, var, messages and (prompt or file))
    alone = {"a prompt": prompt, "-f": file, "--messages": messages, "-n": number > 1}
    alone |= {"--draft": draft, "--prefix-cache": prefix_cache, "--verify": verify}
    apart = {"-o": out, "--rows": rows, "--resume": resume, "--force": force}
    _check_batch(batch, alone | {"--show-prompt": show_prompt}, apart)
    if verify:
        given = {"stop": stop, "logprobs": logprobs, "n": number > 1, "draft": draft}
        _check_verify(wishes | given | {"prefix_cache": prefix_cache})
    folder = the_model(model)
    data, conversation = b"", None
    if not batch:  # each of its lines has its own
        data, conversation = _prompt(prompt, file, messages, chat, system)
    if conversation and on_overflow != "error":
        raise RecipeError("--on-overflow cuts a prompt, which would cut a conversation's template")
    request = Request(
        folder=folder,
        prompt=data,
        messages=conversation,
        variables=template_variables(var),
        wishes=wishes,
        seed=seed,
        stops=stop or [],
        logprobs=logprobs,
        number=number,
        on_overflow=on_overflow,
        how={"device": device, "dtype": dtype, "kernels": kernels, "kv": kv},
        draft=draft,
        draft_tokens=draft_tokens,
        prefix_room=prefix_room(prefix_cache, prefix_cache_size),
    )
    if batch:
        from cli.batch_lines import Defaults
        from cli.batching import answer_lines

        defaults = Defaults(replace(request, seed=None), seed, chat, system)
        answer_lines(batch, out, defaults, rows=rows or 8, resume=resume, force=force, quiet=quiet)
    elif show_prompt:
        show(request, as_json=as_json)
    elif verify:
        from cli.verify_ways import verify_ways

        verify_ways(request, as_json=as_json, quiet=quiet)
    else:
        answer(request, as_json=as_json, quiet=quiet)


def _prompt(
    prompt: str | None, file: Path | None, messages: Path | None, chat: bool, system: str | None
) -> tuple[bytes, list[dict] | None]:
    """Read what is to be continued, and the conversation if it is to be answered."""
    from cli.options import read_input

    data, conversation = b"", None
    if messages:
        from cli.chat import read_messages

        conversation = read_messages(messages)
    else:
        data = read_input(prompt, file)
    if chat and not messages:
        text = data.decode("utf-8", "replace").removesuffix("\n")
        conversation = [{"role": "user", "content": text}]
    if conversation and system:
        conversation = [{"role": "system", "content": system}, *conversation]
    return data, conversation


def _check(wishes: dict, stops: list[str] | None, hidden: bool) -> None:
    """Refuse options that make no sense. Raises: RecipeError."""
    from engine.errors import RecipeError

    for name, value in wishes.items():
        if not math.isfinite(value):
            option = name.replace("_", "-")
            raise RecipeError(f"--{option} {value} is not a number to compute with")
    if "" in (stops or []):
        raise RecipeError("--stop '' would end before the first token; leave it out")
    if hidden:
        raise RecipeError("--logprobs shows its figures in --json output; add --json")


def _check_batch(batch: Path | None, alone: dict, apart: dict) -> None:
    """Refuse options that would be ignored. Raises: RecipeError."""
    from engine.errors import RecipeError

    for option, value in (alone if batch else apart).items():
        if value and batch:
            own = option in ("a prompt", "-f", "--messages")
            why = ": its lines have their own" if own else ""
            raise RecipeError(f"{option} does not go with --batch{why}")
        if value:
            raise RecipeError(f"{option}: leave it out, it is for --batch")


def _check_verify(given: dict) -> None:
    """Refuse what --verify would ignore. Raises: RecipeError."""
    from engine.errors import RecipeError

    for name, value in given.items():
        if name != "max_tokens" and value not in (None, False):
            option = "-n" if name == "n" else "--" + name.replace("_", "-")
            raise RecipeError(f"--verify takes the likeliest token each time; leave out {option}")
    if given.get("max_tokens") == 0:
        raise RecipeError("--verify with --max-tokens 0 would compare nothing; ask for some")


def _check_chat(
    chat: bool, system: str | None, var: list[str] | None, both: str | Path | None
) -> None:
    """Refuse options that would be ignored. Raises: RecipeError."""
    from engine.errors import RecipeError

    for option, value in (("--system", system), ("--var", var)):
        if value and not chat:
            raise RecipeError(f"{option} needs a conversation; add --chat")
    if both:
        raise RecipeError("--messages and a prompt: which one? Put the prompt into the messages")
