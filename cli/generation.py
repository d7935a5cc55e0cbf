"""Answering a prompt on the two streams: the text, or JSON, and a line about how it went.

What only some answers need is imported where it is used: the first letter waits for every import.
"""

import dataclasses
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.options import cache_folder, let_threads_sleep
from cli.render import emit, emit_json, say, say_facts
from engine.adapter_config import holder
from engine.config import SampleConfig
from engine.errors import CheckpointError, DataError, RecipeError
from engine.generate.decode import fit_prompt, generate, prefill
from engine.generate.decoder import Weighed
from engine.generate.load import first_build, load_decoder
from engine.generate.writer import Token
from engine.peak import peak_memory
from engine.sampling_defaults import ANSWER, sample_defaults
from engine.text.settings import read_settings
from engine.text.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from engine.generate.prefixes import Prefixes
    from engine.generate.speculate import Guesser
    from engine.text.chat import Rendered


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What `lm generate` was asked for."""

    folder: Path
    prompt: bytes = b""
    messages: list[dict[str, Any]] | None = None  # a conversation in place of a prompt
    variables: dict[str, Any]  # for the chat template
    wishes: dict[str, Any]  # sampling settings given on the command line
    seed: int | None
    stops: list[str]
    logprobs: int | None
    number: int
    on_overflow: str
    how: dict[str, Any]  # it is computed: device, dtype, kernels, kv
    draft: str | None = None  # what guesses ahead
    draft_tokens: int | None = None
    prefix_room: int | None = None  # bytes on disk for prompts that were read; None: not kept


def answer(request: Request, *, as_json: bool, quiet: bool) -> None:
    """Generate and write what the request asks for.

    Raises: DataError for an empty prompt; LimitError if it does not fit the context.
    """
    if request.messages is not None:
        check_template(request.folder)
    decoder, tokenizer, guesser = load_both(
        request.folder, request.how, request.draft, request.draft_tokens, quiet
    )
    _, whole = read_prompt(request, tokenizer, quiet)
    prompt, settings = fit(request, whole, decoder.config.max_seq_len)
    if cut := len(whole) - len(prompt):
        say(f"cut {cut:,} of {len(whole):,} prompt tokens ({request.on_overflow})", quiet)
    seed = random_seed() if request.seed is None else request.seed

    began = time.perf_counter()
    room, several = len(prompt) + settings.max_tokens, request.number > 1
    cache = decoder.cache(room, rows=1 + several)
    prefixes = open_prefixes(request.folder, request.prefix_room, quiet)
    restored = prefixes.restore(decoder, cache, 0, prompt) if prefixes else 0
    short = prefixes is not None and len(prompt) < prefixes.least(decoder)
    loaded = time.perf_counter()
    start = prefill(decoder, prompt, cache)
    reading = time.perf_counter() - loaded
    facts = {
        "model": str(request.folder),
        "prompt_tokens": len(prompt),
        "cut_prompt_tokens": cut,
        "prefix_tokens": restored,
        **({"prefix_too_short": short} if prefixes else {}),
        "settings": dataclasses.asdict(settings),
    }
    tokens: list[Token] = []
    first: float | None = None
    for index in range(request.number):
        if several and not as_json:
            say(f"--- {index + 1}/{request.number}, seed {seed + index}", quiet)
        stream = generate(
            decoder,
            tokenizer,
            start.copied(1) if several else start,
            settings,
            seed=seed + index,
            stops=request.stops,
            logprobs=request.logprobs,
            guesser=guesser,
        )
        tokens = list(stream) if as_json else _write(stream)
        first = first or (tokens[0].time if tokens else None)
        if as_json:
            result = result_of(tokens, tokenizer) | _guessing(guesser)
            emit_json("generate", facts | {"seed": seed + index} | result)
    waited = None if first is None else first - began
    stats = _stats(tokens, len(prompt) - restored, reading, waited)
    if restored:
        stats.insert(0, f"prefix {restored:,} of {len(prompt):,} tok from cache")
    if prefixes and short:
        stats.append(f"a prompt below {prefixes.least(decoder)} tok is not kept")
    who = [decoder.name, "keys and values in int8"] if decoder.kv == "int8" else [decoder.name]
    say_facts([*stats, *who, f"seed {seed}"], quiet)
    if guesser:
        _say_guesses(guesser, quiet)
    if prefixes:
        prefixes.store(decoder, cache, 0, prompt)


def open_prefixes(folder: Path, room: int | None, quiet: bool) -> "Prefixes | None":
    """Open the prefix cache for a checkpoint, unless there is to be none."""
    if room is None:
        return None
    from engine.generate.prefix_folder import place
    from engine.generate.prefixes import Prefixes

    return Prefixes(
        place(cache_folder()), limit=room, name=str(folder), tell=lambda text: say(text, quiet)
    )


def read_prompt(
    request: Request, tokenizer: Tokenizer, quiet: bool = True
) -> tuple[str, list[int]]:
    """Return what the model will read, the conversation in its template or the prompt itself.

    Raises: DataError if the prompt is empty.
    """
    if request.messages is not None:
        from engine.text.chat import render

        rendered = render(request.messages, tokenizer, variables=request.variables)
        if not quiet:
            _warn(rendered, request.messages, tokenizer)
        return rendered.text, rendered.ids
    if not request.prompt:
        raise DataError("the prompt is empty: there is nothing to continue")
    return request.prompt.decode("utf-8", "replace"), tokenizer.prompt(request.prompt)


def _warn(rendered: "Rendered", messages: list[dict], tokenizer: Tokenizer) -> None:
    """Say what a template did with a conversation that its author may not expect."""
    from engine.text.chat import ignores_system

    if rendered.kept_as_text:
        found = ", ".join(sorted(set(rendered.kept_as_text))[:3])
        say(f"{len(rendered.kept_as_text)} look like control tokens and stay text: {found}")
    instructed = any(message["role"] == "system" for message in messages)
    if instructed and ignores_system(messages, tokenizer):
        say("warning: this model's chat template ignores the system message")


def random_seed() -> int:
    """Choose a seed below 2³¹ (the `secrets` module would be slow to import)."""
    return int.from_bytes(os.urandom(4), "big") >> 1


def show_prompt(request: Request, *, as_json: bool) -> None:
    """Write the exact text and ids that the model would read, without loading the model."""
    if request.messages is not None:
        check_template(request.folder)
    tokenizer = load_tokenizer(holder(request.folder, "tokenizer.json"))
    text, ids = read_prompt(request, tokenizer, quiet=as_json)
    if as_json:
        emit_json("prompt", {"text": text, "ids": ids})
        return
    emit(text)
    emit(" ".join(map(str, ids)))
    say(f"{len(ids):,} tokens")


def fit(request: Request, whole: list[int], context: int) -> tuple[list[int], SampleConfig]:
    """Settle how long prompt and answer are. Raises: LimitError if they do not fit."""
    settings = settle(request, whole, context)
    return fit_prompt(whole, settings.max_tokens, context, request.on_overflow), settings


def settle(request: Request, whole: list[int], context: int) -> SampleConfig:
    """Return the settings of an answer to a prompt.

    A length that nobody asked for gives way to the context; a conversation may be answered at
    some length.
    """
    settings = dataclasses.replace(sample_defaults(request.folder), **request.wishes)
    if "max_tokens" not in request.wishes and len(whole) < context:
        usual = settings.max_tokens if request.messages is None else ANSWER
        settings = dataclasses.replace(settings, max_tokens=min(usual, context - len(whole)))
    return settings


def load_for(
    folder: Path,
    device: str = "auto",
    dtype: str = "auto",
    kernels: str = "auto",
    kv: str = "auto",
    layers: int = 0,
    quiet: bool = False,
) -> tuple[Weighed, Tokenizer]:
    """Load a model to generate with, as every command does."""
    cache = cache_folder()
    if doing := first_build(folder, device, kernels, cache):
        say(f"{doing} …", quiet)
    let_threads_sleep()
    how: dict[str, Any] = {"device": device, "dtype": dtype, "kernels": kernels, "kv": kv}
    threads = os.environ.get("OMP_NUM_THREADS", "")
    loaded = load_decoder(
        folder, **how, cache=cache, layers=layers, threads=int(threads) if threads.isdigit() else 0
    )
    if why := getattr(loaded[0], "instead", ""):
        say(f"computed by torch, which is slower and takes more memory: {why}", quiet)
    return loaded


def load_both(
    folder: Path, how: dict[str, Any], draft: str | None, most: int | None, quiet: bool
) -> tuple[Weighed, Tokenizer, "Guesser | None"]:
    """Load a model and what guesses ahead of it, if anything."""
    if draft == "":
        raise RecipeError("--draft names nothing; give it lookup, layers:N or a checkpoint")
    if most and not draft:
        raise RecipeError("--draft-tokens counts the guesses of --draft; add --draft lookup")
    decoder, tokenizer = load_for(folder, **how, quiet=quiet)
    if not draft:
        return decoder, tokenizer, None
    from cli.drafting import make_guesser

    load = partial(load_for, **how, quiet=quiet)
    return decoder, tokenizer, make_guesser(draft, most, folder, decoder, tokenizer, load)


def check_template(folder: Path) -> None:
    """Refuse to talk with a base model, before it is loaded. Raises: CheckpointError."""
    if not read_settings(holder(folder, "tokenizer.json")).template:
        raise CheckpointError(
            f"{folder}: has no chat template, so it is a base model; continue text with"
            " `lm generate`, or use a model tuned for conversation (instruct, chat, it)"
        )


def _write(stream: Iterable[Token]) -> list[Token]:
    """Write the text as it comes; on Ctrl-C what was made so far is already there."""
    tokens = []
    try:
        for token in stream:
            tokens.append(token)
            if token.text:
                emit(token.text, end="")
    finally:
        emit("")
    return tokens


def result_of(tokens: list[Token], tokenizer: Tokenizer) -> dict[str, Any]:
    """Describe one continuation for --json."""
    result: dict[str, Any] = {
        "text": "".join(token.text for token in tokens),
        "tokens": [token.id for token in tokens],
        "finish_reason": tokens[-1].finish_reason if tokens else "length",
    }
    if tokens and tokens[0].logprob is not None:
        result["logprobs"] = [
            {
                "id": token.id,
                "piece": _piece(token.id, tokenizer),
                "logprob": token.logprob,
                "top": [
                    {"id": other, "piece": _piece(other, tokenizer), "logprob": value}
                    for other, value in token.top
                ],
            }
            for token in tokens
        ]
    return result


def _say_guesses(guesser: "Guesser", quiet: bool) -> None:
    from cli.drafting import as_words

    say_facts(as_words(guesser.pace.report(guesser.name)), quiet)


def _guessing(guesser: "Guesser | None") -> dict[str, Any]:
    if not guesser:
        return {}
    from cli.drafting import as_fields

    return {"draft": as_fields(guesser.pace.report(guesser.name))}


def _piece(token_id: int, tokenizer: Tokenizer) -> str:
    return tokenizer.pieces[token_id].decode("utf-8", "replace")


def _stats(tokens: list[Token], prompt: int, reading: float, waited: float | None) -> list[str]:
    """Say how fast the prompt was read and the last continuation written, fact by fact."""
    facts = [f"prompt {prompt:,} tok at {prompt / reading:,.0f} tok/s"]
    if waited is not None:
        facts.append(f"first token {waited * 1000:,.0f} ms")
    if len(tokens) > 1:
        # The first token came out of the prompt's pass; the others took one pass each.
        speed = (len(tokens) - 1) / (tokens[-1].time - tokens[0].time)
        facts.append(f"{len(tokens):,} tok at {speed:,.0f} tok/s")
    facts.append(f"stop: {tokens[-1].finish_reason if tokens else 'length'}")
    facts.append(f"peak {peak_memory() / 1e6:,.0f} MB")
    return facts
