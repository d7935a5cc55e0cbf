"""The gradient of a batch: the sum over its parts, added to what the parameters hold.

A `Share` works out every nth part, with n = 1 all of them. In a team (`engine/train/team.py`) each
process has a share of every batch. Next on the arrow: `engine/train/loop.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.clock import IDLE, Clock
from engine.data.batches import Batch
from engine.hardware import autocast
from engine.model.transformer import Transformer

Batches = Callable[[int], Sequence[Batch]]
Loss = Callable[[Transformer, Batch], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """What a gradient was summed over."""

    nats: float
    targets: int
    tokens: int  # of which targets may be only a part

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            nats=self.nats + other.nats,
            targets=self.targets + other.targets,
            tokens=self.tokens + other.tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The parts `rank`, `rank` + `of`, `rank` + 2 · `of`, … of every batch."""

    model: Transformer
    batches: Batches
    loss: Loss
    seed: int
    dtype: torch.dtype
    rank: int = 0
    of: int = 1
    clock: Clock = IDLE

    def __call__(self, step: int) -> Sums:
        """Add the gradient of this share of batch `step` to that on the parameters."""
        device = self.model.embed_tokens.weight.device
        self.model.train()
        nats = torch.zeros((), device=device)
        targets = torch.zeros((), dtype=torch.long, device=device)
        tokens = 0
        parts = self.batches(step)
        for number in range(self.rank, len(parts), self.of):
            part = parts[number].to(device)
            # Only dropout draws from it. Each part has a seed, so it does not matter who comes by.
            torch.manual_seed(hash_seed(self.seed, step, number))
            self.clock.lap("data")
            with autocast(device, self.dtype):
                part_nats, part_targets = self.loss(self.model, part)
            part_nats.backward()
            nats += part_nats.detach()
            targets += part_targets
            tokens += part.tokens_BT.numel()
            self.clock.lap("backward")
        return Sums(nats=nats.item(), targets=int(targets), tokens=tokens)


def hash_seed(*numbers: int) -> int:
    """Mix a run's seed and where it is into a seed of its own (splitmix64, Steele et al. 2014)."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 0x9E3779B97F4A7C15 + number + 1) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return mixed >> 1
