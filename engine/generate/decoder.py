"""What generating asks of a model: tokens in, logits out, over a cache of rows.

    decoder.forward(cache, [Run(0, prompt), Run(3, [token]), Run(5, guesses, wanted=4)])

One call serves a prompt, one more token of many conversations, and the check of guesses, mixed as
they come: each `Run` goes on where its row of the cache ends. `engine/generate/reference.py` runs
them by torch, `engine/generate/native.py` by our own C. Arrays are NumPy's, so that generating by C
need not import torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from engine.config import ModelConfig

BLOCK = 64  # tokens whose keys and values are saved and loaded as one


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens that continue a row; logits are wanted after each of the last `wanted` of them."""

    row: int
    tokens: Sequence[int]
    wanted: int = 1


class Cache(Protocol):
    """Keys and values of some rows, each of its own length."""

    capacity: int  # tokens that a row has room for

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row holds."""
        ...

    @property
    def bytes(self) -> int:
        """Memory held by all keys and values."""
        ...

    def rewind(self, row: int, length: int) -> None:
        """Cut a row back to its first `length` tokens.

        Raises: ValueError if a sliding window has let go of what it would need.
        """
        ...

    def copy(self, source: int, target: int) -> None:
        """Make row `target` hold what row `source` holds."""
        ...

    def save_block(self, row: int, index: int) -> np.ndarray:
        """Return keys and values of tokens BLOCK·index up to the next block. Shapes: → uint8 (n,).

        Raises: ValueError if the row does not hold them all, or a sliding window let go of them.
        """
        ...

    def load_block(self, row: int, block: np.ndarray) -> None:
        """Append the tokens of a saved block to a row whose length is a multiple of BLOCK.

        Raises: ValueError if the block is of another size, or there is no room for it.
        """
        ...


class Decoder(Protocol):
    """A model that can be asked for the next token."""

    config: ModelConfig
    name: str  # who computes, and in what: "torch fp32", "native int8"
    identity: str  # sha256 of all that its keys and values depend on: weights, format, layout

    def cache(self, capacity: int, rows: int = 1) -> Cache:
        """Return an empty cache with room for `capacity` tokens in each of `rows` rows."""
        ...

    def forward(self, cache: Cache, runs: Sequence[Run]) -> np.ndarray:
        """Run tokens through the model and add them to their rows, of which each has one run.

        Shapes: → fp32 (sum of all `wanted`, V), in the order of the runs.
        Raises: ValueError if a row has no room for its tokens.
        """
        ...


class Weighed(Decoder, Protocol):
    """A decoder that tells what its weights take, and what of them a token reads."""

    kv: str  # how keys and values lie in memory: "fp16"

    @property
    def bytes(self) -> int:
        """Memory held by the weights."""
        ...

    def bytes_read(self, depth: int, rows: int = 1) -> float:
        """Return what one more token after `depth` others reads if `rows` share a pass.

        Its part of the weights in their format, and all keys and values of its own row.
        """
        ...
