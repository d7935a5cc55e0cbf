"""Tokens to batches, where batch k of a run is a pure function of (seed, k).

Nothing is remembered between batches, so the data position of a run is one integer and resuming
is exact. Each epoch cuts the stream into windows at its own random offset and visits them in its
own random order. Next on the arrow: `engine/model/transformer.py`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.errors import DataError

IGNORE = -100  # a target that is not learned: padding, or a prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Tokens and, for each, the token to predict. Shapes: (B, T), int64; IGNORE masks a target.

    With `lengths` there is one row, in which samples of these lengths lie end to end without any
    padding. Each begins at position 0 and sees only itself; nothing is predicted from its last.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    lengths: tuple[int, ...] = ()

    def to(self, device: torch.device) -> "Batch":
        """Return the same batch on a device."""
        tokens_BT, targets_BT = self.tokens_BT.to(device), self.targets_BT.to(device)
        return Batch(tokens_BT=tokens_BT, targets_BT=targets_BT, lengths=self.lengths)


class WindowBatches:
    """Random windows of a token stream, for pretraining."""

    def __init__(
        self, tokens: np.ndarray, seq_len: int, batch_size: int, seed: int, parts: int = 1
    ) -> None:
        """Serve windows of `seq_len` + 1 tokens. Raises: DataError if the stream has none."""
        # One window less than fit, to leave room for each epoch's offset.
        self.windows = (len(tokens) - 1) // seq_len - 1
        if self.windows < 1:
            raise DataError(
                f"the training text has {len(tokens)} tokens, too few for data.seq_len={seq_len};"
                " lower it or give more text"
            )
        self.tokens, self.seq_len, self.batch_size, self.seed = tokens, seq_len, batch_size, seed
        self.parts = parts
        self._order: tuple[int, int, np.ndarray] | None = None  # only a memory of the last epoch

    def epoch(self, number: int) -> tuple[int, np.ndarray]:
        """Return the offset of an epoch's windows and the order in which they are visited."""
        if self._order is None or self._order[0] != number:
            random = np.random.default_rng([self.seed, number])
            offset = int(random.integers(self.seq_len))
            self._order = (number, offset, random.permutation(self.windows))
        return self._order[1], self._order[2]

    def __call__(self, number: int) -> list[Batch]:
        """Return the parts of batch `number` of the run, counted from 0 across epochs."""
        first = number * self.batch_size
        rows = []
        for index in range(first, first + self.batch_size):
            offset, order = self.epoch(index // self.windows)
            start = offset + int(order[index % self.windows]) * self.seq_len
            rows.append(self.tokens[start : start + self.seq_len + 1])
        rows_BS = torch.from_numpy(np.stack(rows).astype(np.int64))
        return [
            Batch(tokens_BT=rows_BS[:, :-1], targets_BT=rows_BS[:, 1:])
            for rows_BS in rows_BS.chunk(self.parts)
        ]
