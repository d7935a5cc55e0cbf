"""The steps of a recipe without its text: the real model, loss and processes on random tokens.

What a step takes does not depend on what the tokens say, only on their shape. `engine/rehearsal.py`
counts such steps for `lm plan`, `engine/bench/work.py` watches them for `lm bench`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import numpy as np

from engine.clock import IDLE, Clock
from engine.config import Recipe
from engine.data.batches import WindowBatches
from engine.model.transformer import Transformer
from engine.train.gradient import Batches, Share, Sums
from engine.train.loss import next_token_loss
from engine.train.precision import Precision
from engine.train.team import together


def random_windows(recipe: Recipe, rows: int) -> WindowBatches:
    """Return batches of `rows` windows of the recipe's length, over random text just long enough.

    Every size of the recipe is filled in.
    """
    length, seed = recipe.data.seq_len, recipe.run.seed
    text = np.random.default_rng(seed).integers(
        recipe.model.vocab_size, size=(rows + 2) * length + 1, dtype=np.uint32
    )
    return WindowBatches(text, length, rows, seed, recipe.train.accumulate)


def drill(
    model: Transformer,
    batches: Batches,
    recipe: Recipe,
    precision: Precision,
    threads: int,
    clock: Clock = IDLE,
) -> AbstractContextManager[Callable[[int], Sums]]:
    """Give the gradient that a run of the recipe would follow, by as many processes.

    Raises: ResourceError if one of them does not start.
    """
    chunk, recompute = recipe.train.loss_chunk, recipe.train.recompute
    share = Share(
        model=model,
        batches=batches,
        loss=partial(next_token_loss, chunk=chunk, recompute=recompute, clock=clock),
        seed=recipe.run.seed,
        dtype=precision.dtype,
        clock=clock,
    )
    return together(share, recipe.train.processes, threads)
