"""Generating: read the prompt once (prefill), then one token at a time (decode), over a KV cache.

`generate` yields a `Token` per step with the text it makes ready to show. Streaming, JSON output,
samples during training and benchmarks all consume this one stream.
"""

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

from engine.clock import IDLE, Clock
from engine.config import SampleConfig
from engine.errors import DataError, LimitError
from engine.generate.sampler import sample, seeded
from engine.generate.writer import Token, Writer
from engine.model.cache import KVCache
from engine.model.transformer import Transformer
from engine.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefilled:
    """A prompt that has been read: its ids, the cache after it, the logits of what comes next."""

    prompt: list[int]
    cache: KVCache
    logits_V: torch.Tensor


def fit_prompt(prompt: list[int], max_tokens: int, context: int, on_overflow: str) -> list[int]:
    """Return the prompt, cut only if the caller chose how.

    `on_overflow` is `error`, `left` (drop the beginning), `middle` or `right` (drop the end).

    Raises: LimitError if prompt and answer do not fit the context and `error` was chosen, or if the
    answer alone fills it.
    """
    room = context - max_tokens
    if len(prompt) <= room:
        return prompt
    if on_overflow == "error":
        raise LimitError(
            f"prompt of {len(prompt):,} tokens + --max-tokens {max_tokens:,} > context"
            f" {context:,}; shorten one, or choose --on-overflow left|middle|right"
        )
    if room < 1:
        raise LimitError(
            f"--max-tokens {max_tokens:,} leaves no room for a prompt in a context of {context:,}"
        )
    if on_overflow == "left":
        return prompt[-room:]
    if on_overflow == "right":
        return prompt[:room]
    head = room // 2
    return prompt[:head] + prompt[len(prompt) - (room - head) :]


@torch.inference_mode()
def prefill(
    model: Transformer,
    prompt: list[int],
    capacity: int,
    onto: KVCache | None = None,
    clock: Clock = IDLE,
) -> Prefilled:
    """Run the prompt through the model, filling a cache with room for `capacity` tokens.

    `onto` is a cache whose tokens begin the prompt already, as in a conversation: only the rest is
    run. It is filled further, not copied.

    Raises: DataError if the prompt is empty; ValueError if `onto` holds all of it or more.
    """
    if not prompt:
        raise DataError("the prompt is empty: there is nothing to continue")
    weight = model.embed_tokens.weight
    cache = onto or KVCache(
        model.config, capacity=capacity, dtype=weight.dtype, device=weight.device
    )
    if cache.length >= len(prompt):
        raise ValueError(f"the cache holds {cache.length} of {len(prompt)} prompt tokens already")
    tokens_BT = torch.tensor([prompt[cache.length :]], device=weight.device)
    x_BTD = model.hidden(tokens_BT, cache)
    # Only the last position's logits are needed; the head is most of a small model's work.
    logits_V = model.head(x_BTD[0, -1]).float()
    clock.lap("prefill")
    return Prefilled(prompt=prompt, cache=cache, logits_V=logits_V)


@torch.inference_mode()
def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    start: Prefilled,
    config: SampleConfig,
    *,
    seed: int,
    stops: Sequence[str] = (),
    logprobs: int | None = None,
    keep: bool = False,
    clock: Clock = IDLE,
) -> Generator[Token]:
    """Continue a prompt until an end token, a stop string or `config.max_tokens`.

    The prefilled prompt is left as it is, so several continuations may start from it; with `keep`
    they are written into its cache instead, which then holds all tokens but the last. With
    `logprobs` k, each token comes with its log-probability and the k likeliest alternatives.
    """
    cache, logits_V = start.cache if keep else start.cache.fork(1), start.logits_V
    random = seeded(seed)
    writer = Writer(tokenizer, stops, config.max_tokens, tokenizer.ends)
    seen = list(start.prompt)
    clock.lap("decode")
    while writer.left:
        logits_V = logits_V[: tokenizer.vocab_size].cpu()
        token_id, now = sample(logits_V.numpy(), seen, config, random), time.perf_counter()
        logprob, top = None, []
        if logprobs is not None:
            log_probs_V = logits_V.log_softmax(-1)
            logprob = log_probs_V[token_id].item()
            best = log_probs_V.topk(min(logprobs, len(log_probs_V)))
            top = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        clock.lap("sample")
        token = writer.write(token_id, time=now, logprob=logprob, top=top)
        clock.lap("detokenize")
        yield token
        if token.finish_reason:
            return
        seen.append(token_id)
        tokens_BT = torch.tensor([[token_id]], device=start.logits_V.device)
        logits_V = model(tokens_BT, cache)[0, -1].float()
        clock.lap("decode")
