"""Tokens to batches, where batch k of a run is a pure function of (seed, k).

Nothing is remembered between batches, so the data position of a run is one integer and resuming
is exact. Pretraining cuts a stream into windows, each epoch at its own random offset; finetuning
lays samples end to end in packs. Each epoch visits all of them in its own random order. Next on the
arrow: `engine/model/transformer.py`.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.data.packing import best_fit
from engine.data.samples import Sample
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

    def __getstate__(self) -> dict[str, Any]:
        """Travel to another process without the tokens, if they are in a file."""
        state = vars(self) | {"_order": None}
        if isinstance(self.tokens, np.memmap):
            state["tokens"] = (self.tokens.filename, self.tokens.dtype)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Arrive in another process, and map the file there."""
        vars(self).update(state)
        if isinstance(self.tokens, tuple):
            file, dtype = self.tokens
            self.tokens = np.memmap(file, dtype=dtype, mode="r")

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a sample lies: its pack, how many tokens lie before it there, and who else is in it."""

    pack: int
    offset: int
    samples: tuple[int, ...]  # of the pack, in order


class SampleBatches:
    """Whole samples, several to a pack or one, for finetuning.

    A part of a batch is one row of samples end to end; there is no padding. A pack only bounds how
    long a row gets: what a sample gives to the loss and to the gradient is the same in any.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        capacity: int,
        packs: int,
        parts: int,
        seed: int,
        packing: bool,
    ) -> None:
        """Serve `packs` packs of up to `capacity` tokens a batch, or as many single samples.

        Raises: DataError if there are no samples.
        """
        if not samples:
            raise DataError("no rows are left to train on; see what data.overlong did to them")
        assert packs % parts == 0
        lengths = [len(sample.ids) for sample in samples]
        self.bins = best_fit(lengths, capacity) if packing else [[i] for i in range(len(samples))]
        self.samples, self.packs, self.parts, self.seed = samples, packs, parts, seed
        self._order: tuple[int, np.ndarray] | None = None  # only a memory of the last epoch

    def epoch(self, number: int) -> np.ndarray:
        """Return the order in which an epoch visits the bins."""
        if self._order is None or self._order[0] != number:
            random = np.random.default_rng([self.seed, number])
            self._order = (number, random.permutation(len(self.bins)))
        return self._order[1]

    def __call__(self, number: int) -> list[Batch]:
        """Return the parts of batch `number` of the run, counted from 0 across epochs."""
        first, count = number * self.packs, len(self.bins)
        places = range(first, first + self.packs)
        return self._batch([int(self.epoch(i // count)[i % count]) for i in places])

    def longest(self) -> list[Batch]:
        """Return a batch of the longest bins: no other takes more memory."""
        sizes = [self.size(chosen) for chosen in self.bins]
        order = sorted(range(len(sizes)), key=lambda number: -sizes[number])
        return self._batch([order[i % len(order)] for i in range(self.packs)])

    def size(self, chosen: Sequence[int]) -> int:
        """Return the tokens of some samples."""
        return sum(len(self.samples[index].ids) for index in chosen)

    def where(self, sample: int) -> Place:
        """Return where a sample lies."""
        pack = next(number for number, chosen in enumerate(self.bins) if sample in chosen)
        chosen = self.bins[pack]
        before = chosen[: chosen.index(sample)]
        return Place(pack=pack, offset=self.size(before), samples=tuple(chosen))

    def _batch(self, numbers: list[int]) -> list[Batch]:
        """Return the bins of these numbers in parts of as many each."""
        size = self.packs // self.parts
        groups = [numbers[start : start + size] for start in range(0, self.packs, size)]
        return [
            end_to_end([self.samples[i] for number in group for i in self.bins[number]])
            for group in groups
        ]


def end_to_end(samples: Sequence[Sample]) -> Batch:
    """Lay samples in one row; the last token of each has nothing to predict."""
    tokens = np.concatenate([sample.ids for sample in samples]).astype(np.int64)
    learned = np.concatenate([sample.learned for sample in samples])
    targets = np.where(learned, tokens, IGNORE)
    targets = np.append(targets[1:], IGNORE)  # a sample's first token is never learned
    return Batch(
        tokens_BT=torch.from_numpy(tokens)[None],
        targets_BT=torch.from_numpy(targets)[None],
        lengths=tuple(len(sample.ids) for sample in samples),
    )


def digest(samples: Iterable[Sample]) -> str:
    """Identify samples by their ids and masks: what a resumed run must find again."""
    found = hashlib.sha256()
    for sample in samples:
        found.update(len(sample.ids).to_bytes(8, "little"))
        found.update(sample.ids.astype("<i4").tobytes())
        found.update(sample.learned.tobytes())
    return found.hexdigest()
