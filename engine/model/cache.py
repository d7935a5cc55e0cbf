"""The KV cache: keys and values of past tokens, kept so that they are computed once.

A cache is an argument of `Transformer.forward`, never a part of the model: two conversations are
two caches over one set of weights. Attention calls `cache.layers[i].update`, the model calls
`advance` once per forward pass, and nobody else needs to know which kind a layer has.

Source: Pope et al. 2022, arXiv:2211.05102 (the cost model: 2·L·K·H numbers a token).
"""

import copy

import torch
from torch import Tensor

from engine.config import ModelConfig


class FullLayer:
    """One layer's keys and values for all positions, in a buffer allocated once."""

    def __init__(self, rows: int, config: ModelConfig, capacity: int, dtype, device) -> None:
        shape = (rows, config.n_kv_heads, capacity, config.head_dim)
        self.k_BKSH = torch.empty(shape, dtype=dtype, device=device)
        self.v_BKSH = torch.empty(shape, dtype=dtype, device=device)
        self.first = 0  # position of the oldest key kept

    def update(self, length: int, k_BKTH: Tensor, v_BKTH: Tensor) -> tuple[Tensor, Tensor]:
        """Store T new keys and values at `length` and return all that queries may look at.

        Raises: ValueError if they do not fit; a slice would drop them without a word.
        """
        end = length + k_BKTH.shape[2]
        if end > self.k_BKSH.shape[2]:
            raise ValueError(f"{end} tokens do not fit a cache of {self.k_BKSH.shape[2]}")
        self.k_BKSH[:, :, length:end] = k_BKTH
        self.v_BKSH[:, :, length:end] = v_BKTH
        return self.k_BKSH[:, :, :end], self.v_BKSH[:, :, :end]

    def positions(self, length: int, new: int, device) -> Tensor:
        """Return the position of each key that `update` will return."""
        return torch.arange(length + new, device=device)

    def rewind(self, length: int) -> None:
        """Forget positions from `length` on: they will be overwritten."""


class WindowLayer:
    """One layer's last `window` keys and values, plus a slack that allows rewinding."""

    SLACK = 64

    def __init__(self, rows: int, config: ModelConfig, window: int, dtype, device) -> None:
        shape = (rows, config.n_kv_heads, 0, config.head_dim)
        self.k_BKSH = torch.empty(shape, dtype=dtype, device=device)
        self.v_BKSH = torch.empty(shape, dtype=dtype, device=device)
        self.keep = window - 1 + self.SLACK
        self.first = 0

    def update(self, length: int, k_BKTH: Tensor, v_BKTH: Tensor) -> tuple[Tensor, Tensor]:
        """Append T new keys and values, return all, then drop what no later query can see."""
        k_BKSH = torch.cat((self.k_BKSH, k_BKTH.to(self.k_BKSH.dtype)), dim=2)
        v_BKSH = torch.cat((self.v_BKSH, v_BKTH.to(self.v_BKSH.dtype)), dim=2)
        drop = max(0, k_BKSH.shape[2] - self.keep)
        self.k_BKSH, self.v_BKSH = k_BKSH[:, :, drop:], v_BKSH[:, :, drop:]
        if drop > self.keep:  # after a long prompt, do not hold on to all of it through the view
            self.k_BKSH, self.v_BKSH = self.k_BKSH.clone(), self.v_BKSH.clone()
        self.first += drop
        return k_BKSH, v_BKSH

    def positions(self, length: int, new: int, device) -> Tensor:
        """Return the position of each key that `update` will return."""
        return torch.arange(self.first, length + new, device=device)

    def rewind(self, length: int) -> None:
        """Forget positions from `length` on.

        Raises: ValueError if keys that a query at `length` needs were already dropped.
        """
        if length == 0:
            self.first = 0  # nothing is needed of what was
        window = self.keep - self.SLACK + 1
        if length == 0:  # beginning anew needs nothing
            self.first = 0
        if self.first > max(0, length - window + 1):
            raise ValueError(f"cannot rewind to {length}: keys before {self.first} are gone")
        self.k_BKSH = self.k_BKSH[:, :, : length - self.first]
        self.v_BKSH = self.v_BKSH[:, :, : length - self.first]


class KVCache:
    """Keys and values of every layer for `rows` sequences of equal length."""

    def __init__(
        self,
        config: ModelConfig,
        rows: int = 1,
        capacity: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocate room for `capacity` tokens (0: the model's longest context) in `rows` rows."""
        self.capacity = capacity or config.max_seq_len
        self.length = 0
        self.layers: list[FullLayer | WindowLayer] = []
        for index in range(config.n_layers):
            window = config.window(index)
            if window and window < self.capacity:
                self.layers.append(WindowLayer(rows, config, window, dtype, device))
            else:
                self.layers.append(FullLayer(rows, config, self.capacity, dtype, device))

    @property
    def bytes(self) -> int:
        """Memory held by all keys and values, in bytes."""
        return sum(
            tensor.numel() * tensor.element_size()
            for layer in self.layers
            for tensor in (layer.k_BKSH, layer.v_BKSH)
        )

    def advance(self, new: int) -> None:
        """Count `new` tokens as stored; called once per forward pass, after the last layer."""
        self.length += new

    def rewind(self, length: int) -> None:
        """Cut the cache back to its first `length` tokens, as if the rest had never come."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind to {length}: the cache holds {self.length} tokens")
        for layer in self.layers:
            layer.rewind(length)
        self.length = length

    def fork(self, rows: int) -> "KVCache":
        """Copy a one-row cache into `rows` rows: one prefill, many continuations."""
        twin = copy.copy(self)
        twin.layers = [copy.copy(layer) for layer in self.layers]
        for layer in twin.layers:
            layer.k_BKSH = layer.k_BKSH.repeat(rows, 1, 1, 1)
            layer.v_BKSH = layer.v_BKSH.repeat(rows, 1, 1, 1)
        return twin
