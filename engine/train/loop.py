"""The training loop, the only one: an objective is this loop with its own batches and loss.

It yields a `TrainStep` after each update and does nothing else: evaluating, saving and sampling are
done by whoever iterates, between two steps.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import TrainConfig
from engine.data.batches import Batch
from engine.errors import DivergenceError
from engine.hardware import synchronize
from engine.model.transformer import Transformer
from engine.train.optim import Optimizers
from engine.train.schedule import lr_factor

Loss = Callable[[Transformer, Batch], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainStep:
    """One update: its number (from 1), what it was computed on, and how long it took."""

    step: int
    loss: float  # nats per target, over the whole batch
    lr: float  # factor of the peak learning rates
    grad_norm: float  # before clipping
    tokens: int  # targets in this batch
    seen: int  # tokens in this batch, of which targets may be only a part
    seconds: float


def train(
    model: Transformer,
    optimizer: Optimizers,
    batches: Callable[[int], Sequence[Batch]],
    loss: Loss,
    config: TrainConfig,
    *,
    seed: int,
    start: int,
    steps: Callable[[int], int],
    precision: Callable[[], AbstractContextManager],
) -> Iterator[TrainStep]:
    """Train from update `start` until `steps(step)` updates are done, yielding after each.

    `batches(k)` is the batch of update k, in parts, and dropout is seeded by (seed, k), so a run
    continued at `start` is the run that never stopped. `steps` may grow known while running: a time
    budget is turned into a number of steps after some of them were measured.

    Raises: DivergenceError before an update whose loss or gradient is not finite.
    """
    device = model.embed_tokens.weight.device
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    step = start
    while step < steps(step):
        began = time.perf_counter()
        model.train()
        parts = batches(step)
        torch.manual_seed(hash_seed(seed, step))  # dropout is the only thing that draws from it

        total = torch.zeros((), device=device)
        count = torch.zeros((), dtype=torch.long, device=device)
        for part in parts:
            with precision():
                part_sum, part_count = loss(model, part.to(device))
            part_sum.backward()
            total += part_sum.detach()
            count += part_count
        gradients = [p.grad for p in parameters if p.grad is not None]
        # One division for the whole batch: every token weighs the same, however it was split.
        torch._foreach_div_(gradients, max(1, count.item()))

        mean = total.item() / max(1, count.item())
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))).item()
        if not math.isfinite(mean) or not math.isfinite(norm):
            raise DivergenceError(
                f"loss is {mean:.4g} and gradient norm {norm:.4g} at step {step + 1}, before the"
                " update; lower train.optim.lr, or look at the batch's text"
            )
        if config.optim.clip and norm > config.optim.clip:
            torch._foreach_mul_(gradients, config.optim.clip / norm)
        factor = lr_factor(step, steps(step), config.schedule)
        optimizer.step(factor)
        for parameter in parameters:
            parameter.grad = None

        synchronize(device)
        step += 1
        yield TrainStep(
            step=step,
            loss=mean,
            lr=factor,
            grad_norm=norm,
            tokens=int(count),
            seen=sum(part.tokens_BT.numel() for part in parts),
            seconds=time.perf_counter() - began,
        )


def hash_seed(seed: int, step: int) -> int:
    """Mix a run's seed with a step into a seed of its own (splitmix64, Steele et al. 2014)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step + 1) & 0xFFFFFFFFFFFFFFFF
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (mixed ^ (mixed >> 31)) >> 1
