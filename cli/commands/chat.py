"""`lm chat`: a conversation with a model."""

from pathlib import Path
from typing import Annotated, Optional

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


def chat(
    model: Model = None,
    system: Annotated[
        Optional[str], typer.Option("--system", help="Instruction before the conversation.")
    ] = None,
    messages: Annotated[
        Optional[Path],
        typer.Option("--messages", help="Go on from a JSON file of messages, - for a pipe."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=0, help="Most tokens of an answer; 0: up to 2,048 if they fit.")
    ] = 0,
    temperature: Annotated[
        Optional[float], typer.Option(min=0, help="0 takes the likeliest token each time.")
    ] = None,
    top_k: Annotated[Optional[int], typer.Option(min=0, help="Keep the k likeliest.")] = None,
    top_p: Annotated[
        Optional[float], typer.Option(min=0, max=1, help="Keep the smallest set this probable.")
    ] = None,
    seed: Annotated[
        Optional[int], typer.Option(min=0, max=2**62, help="Same seed, same answers.")
    ] = None,
    var: Variables = None,
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
    """Talk to a model that has a chat template.

    History stays in the KV cache: each turn runs only its new tokens. /help
    lists the commands; Ctrl-C stops an answer, Ctrl-D ends. Without a terminal
    each line of the input is a message.

    \b
    lm chat -m smollm2
    lm chat -m smollm2 --system "Answer in one sentence." --temperature 0
    echo "What is the capital of France?" | lm chat -m smollm2
    """
    from cli.chat import open_chat
    from cli.options import prefix_room, template_variables, the_model

    wishes = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "max_tokens": max_tokens}
    open_chat(
        the_model(model),
        system=system,
        messages=messages,
        variables=template_variables(var),
        wishes={name: value for name, value in wishes.items() if value is not None},
        seed=seed,
        how={"device": device, "dtype": dtype, "kernels": kernels, "kv": kv},
        draft=draft,
        draft_tokens=draft_tokens,
        prefix_room=prefix_room(prefix_cache, prefix_cache_size),
        as_json=as_json,
        quiet=quiet,
    )
