"""Answering a prompt on the two streams: the text, or JSON, and a line about how it went."""

import dataclasses
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.render import emit, emit_json, say
from engine.checkpoint import load_model, sample_defaults
from engine.errors import DataError
from engine.generate.decode import Token, fit_prompt, generate, prefill
from engine.hardware import peak_memory, pick_device, use_threads
from engine.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What `lm generate` was asked for."""

    folder: Path
    prompt: bytes
    wishes: dict[str, Any]  # sampling settings given on the command line
    seed: int | None
    stops: list[str]
    logprobs: int | None
    number: int
    on_overflow: str
    device: str


def answer(request: Request, *, as_json: bool, quiet: bool) -> None:
    """Generate and write what the request asks for.

    Raises: DataError for an empty prompt; LimitError if it does not fit the context.
    """
    if not request.prompt:
        raise DataError("the prompt is empty: there is nothing to continue")
    use_threads(0)
    model, tokenizer = load_model(request.folder, pick_device(request.device))
    settings = dataclasses.replace(sample_defaults(request.folder), **request.wishes)
    context = model.config.max_seq_len
    # Nothing goes before the prompt: it need not be the beginning of a document.
    whole = tokenizer.encode_bytes(request.prompt)
    if "max_tokens" not in request.wishes and len(whole) < context:
        # Nobody asked for this length: the checkpoint's default gives way to the context.
        room = context - len(whole)
        settings = dataclasses.replace(settings, max_tokens=min(settings.max_tokens, room))
    prompt = fit_prompt(whole, settings.max_tokens, context, request.on_overflow)
    if cut := len(whole) - len(prompt):
        say(f"cut {cut:,} of {len(whole):,} prompt tokens ({request.on_overflow})", quiet)
    seed = secrets.randbelow(1 << 31) if request.seed is None else request.seed

    began = time.perf_counter()
    start = prefill(model, prompt, len(prompt) + settings.max_tokens)
    read = time.perf_counter()
    facts = {
        "model": str(request.folder),
        "prompt_tokens": len(prompt),
        "cut_prompt_tokens": cut,
        "settings": dataclasses.asdict(settings),
    }
    tokens: list[Token] = []
    first: float | None = None
    for index in range(request.number):
        if request.number > 1 and not as_json:
            say(f"--- {index + 1}/{request.number}, seed {seed + index}", quiet)
        stream = generate(
            model,
            tokenizer,
            start,
            settings,
            seed=seed + index,
            stops=request.stops,
            logprobs=request.logprobs,
        )
        tokens = list(stream) if as_json else _write(stream)
        first = first or (tokens[0].time if tokens else None)
        if as_json:
            emit_json("generate", facts | {"seed": seed + index} | _result(tokens, tokenizer))
    waited = None if first is None else first - began
    say(_stats(tokens, len(prompt), read - began, waited) + f" · seed {seed}", quiet)


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


def _result(tokens: list[Token], tokenizer: Tokenizer) -> dict[str, Any]:
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


def _piece(token_id: int, tokenizer: Tokenizer) -> str:
    return tokenizer.pieces[token_id].decode("utf-8", "replace")


def _stats(tokens: list[Token], prompt: int, reading: float, waited: float | None) -> str:
    """Say how fast the prompt was read and the last continuation written."""
    parts = [f"prompt {prompt:,} tok {prompt / reading:,.0f} tok/s"]
    if waited is not None:
        parts.append(f"first token {waited * 1000:,.0f} ms")
    if len(tokens) > 1:
        # The first token came out of the prompt's pass; the others took one pass each.
        speed = (len(tokens) - 1) / (tokens[-1].time - tokens[0].time)
        parts.append(f"{len(tokens):,} tok {speed:,.0f} tok/s")
    parts.append(f"stop: {tokens[-1].finish_reason if tokens else 'length'}")
    parts.append(f"peak {peak_memory() / 1e6:,.0f} MB")
    return " · ".join(parts)
