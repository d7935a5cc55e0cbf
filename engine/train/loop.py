"""The training loop, the only one: an objective is this loop with its own batches and loss.

Their gradient comes from `engine/train/gradient.py`, whole or from several processes. The loop
yields a `TrainStep` after each update and does nothing else: evaluating, saving and sampling are
done by whoever iterates, between two steps.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from engine.clock import IDLE, Clock
from engine.config import TrainConfig
from engine.errors import DivergenceError
from engine.hardware import synchronize
from engine.model.transformer import Transformer
from engine.train.gradient import Sums
from engine.train.optim import Optimizers


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
    gradient: Callable[[int], Sums],
    config: TrainConfig,
    *,
    start: int,
    steps: Callable[[int], int],
    factor: Callable[[int], float],
    clock: Clock = IDLE,
) -> Iterator[TrainStep]:
    """Train from update `start` until `steps(step)` updates are done, yielding after each.

    `gradient(k)` adds the gradient of batch k, summed over targets, to that on the parameters. It
    depends on k and the weights alone, so a run continued at `start` is the run that never stopped.
    `steps` may grow known while running: a time budget is turned into a number of steps after some
    of them were measured. `factor(k)` is that of the peak learning rates in update k.

    Raises: DivergenceError before an update whose loss or gradient is not finite.
    """
    device = model.embed_tokens.weight.device
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    step = start
    while step < steps(step):
        began = time.perf_counter()
        sums = gradient(step)
        gradients = [p.grad for p in parameters if p.grad is not None]
        # One division for the whole batch: every token weighs the same, however it was split.
        torch._foreach_div_(gradients, max(1, sums.targets))

        mean = sums.nats / max(1, sums.targets)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))).item()
        if not math.isfinite(mean) or not math.isfinite(norm):
            raise DivergenceError(
                f"loss is {mean:.4g} and gradient norm {norm:.4g} at step {step + 1}, before the"
                " update; lower train.optim.lr, or look at the batch's text"
            )
        if config.optim.clip and norm > config.optim.clip:
            torch._foreach_mul_(gradients, config.optim.clip / norm)
        lr = factor(step)
        optimizer.step(lr)
        for parameter in parameters:
            parameter.grad = None

        synchronize(device)
        clock.lap("optimizer")
        step += 1
        yield TrainStep(
            step=step,
            loss=mean,
            lr=lr,
            grad_norm=norm,
            tokens=sums.targets,
            seen=sums.tokens,
            seconds=time.perf_counter() - began,
        )
