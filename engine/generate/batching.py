"""Several prompts of one length continued together, by the likeliest token each time.

A step reads every weight once, however many rows it serves: that is why a batch is worth it. Rows
that have ended go on until whoever iterates has enough; `engine/finetune/answers.py` and
`engine/bench` do.
"""

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from engine.clock import IDLE, Clock
from engine.model.cache import KVCache
from engine.model.transformer import Transformer


@torch.inference_mode()
def greedy(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    most: int,
    vocab_size: int,
    *,
    cached: bool = True,
    clock: Clock = IDLE,
) -> Generator[Tensor]:
    """Yield the next id of each row, `most` times.

    Without `cached` nothing is kept, and all tokens are run again for each new one: only good for
    seeing what the cache is worth.

    Shapes: prompts (B, T) → one id per row (B, 1).
    """
    weight = model.embed_tokens.weight
    tokens_BT = torch.tensor([list(prompt) for prompt in prompts], device=weight.device)
    B, T = tokens_BT.shape
    cache = KVCache(model.config, B, T + most, weight.dtype, weight.device) if cached else None
    stage = "prefill"
    for _ in range(most):
        logits_BV = model.head(model.hidden(tokens_BT, cache)[:, -1])[:, :vocab_size]
        clock.lap(stage)
        next_B1 = logits_BV.argmax(-1, keepdim=True)
        clock.lap("sample")
        yield next_B1
        tokens_BT = next_B1 if cached else torch.cat((tokens_BT, next_B1), dim=1)
        stage = "decode"
