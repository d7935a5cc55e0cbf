"""Keys and values as our own C keeps them: `engine/kernels/decoder.c` reads and writes them."""

from ctypes import c_int64, c_void_p

import numpy as np

from engine.config import ModelConfig
from engine.generate.decoder import BLOCK
from engine.kernels.decoder import FORMATS, CCache
from engine.model.angles import angles, attention_factor

PIECE = 256  # tokens that one call runs
SLACK = 64  # tokens that a windowed layer can be rewound by
KINDS = {"fp32": ("f32", np.float32), "fp16": ("f16", np.uint16), "int8": ("int8", np.int8)}


def address(array: np.ndarray | None) -> int | None:
    """Return where an array lies; C reads its numbers in order."""
    assert array is None or array.flags.c_contiguous
    return None if array is None else array.ctypes.data


class NativeCache:
    """Keys and values in blocks of 64 tokens, as `decoder.c` reads them."""

    def __init__(self, config: ModelConfig, capacity: int, rows: int, kv: str) -> None:
        self.capacity = capacity
        self.lengths = [0] * rows
        self._written = [0] * rows  # tokens that a row has ever held since it was last emptied
        whole = -(-capacity // BLOCK)
        windows = [config.window(layer) for layer in range(config.n_layers)]
        rings = [-(-(window + PIECE + SLACK) // BLOCK) + 1 for window in windows]
        self._windows = windows
        self._blocks = [min(whole, r) if w else whole for r, w in zip(rings, windows, strict=True)]
        kind, dtype = KINDS[kv]
        K, H = config.n_kv_heads, config.head_dim
        self._kept: list[list[np.ndarray]] = []  # keys, values and, in int8, their scales
        for blocks in self._blocks:
            shape = (rows, K, blocks, BLOCK * H)
            kept = [np.zeros(shape, dtype) for _ in range(2)]
            if kind == "int8":
                kept += [np.zeros((rows, K, blocks, BLOCK), np.float32) for _ in range(2)]
            self._kept.append(kept)
        self.struct = CCache(format=FORMATS[kind])
        self._config, self._turned = config, 0
        self.turn(min(capacity, PIECE))
        L = config.n_layers
        for n, name in enumerate(("keys", "values", "key_scales", "value_scales")):
            places = [address(kept[n]) if n < len(kept) else None for kept in self._kept]
            setattr(self.struct, name, (c_void_p * L)(*places))
        self.struct.blocks = (c_int64 * L)(*self._blocks)

    def turn(self, length: int) -> None:
        """Have the angles of the first `length` positions ready, or of twice as many as before."""
        config = self._config
        if length <= self._turned or config.position != "rope":
            return
        self._turned = min(self.capacity, max(length, 2 * self._turned))
        both = angles(config, np.arange(self._turned), self.capacity)
        # The factor sharpens attention in layers whose frequencies are stretched.
        factor = attention_factor(config)
        self._turns = []
        for index, angle in enumerate(both):
            by = 1.0 if index and config.local_rope_theta else factor
            turn = [(f(angle) * by).astype(np.float32) for f in (np.cos, np.sin)]
            self.struct.cosine[index], self.struct.sine[index] = map(address, turn)
            self._turns.append(turn)

    @property
    def bytes(self) -> int:
        """Memory set aside for all keys and values; pages never written take none."""
        return sum(array.nbytes for kept in self._kept for array in kept)

    def rewind(self, row: int, length: int) -> None:
        """Cut a row back; see `Cache.rewind`."""
        if not 0 <= length <= self.lengths[row]:
            raise ValueError(f"cannot rewind to {length}: row {row} holds {self.lengths[row]}")
        newest = (self._written[row] - 1) // BLOCK
        for window, blocks in zip(self._windows, self._blocks, strict=True):
            oldest = max(0, length - window + 1) // BLOCK
            if length and window and newest - blocks >= oldest:
                raise ValueError(f"cannot rewind to {length}: older keys are gone")
        self.lengths[row] = length
        if not length:
            self._written[row] = 0

    def copy(self, source: int, target: int) -> None:
        """Make a row hold what another holds."""
        if source == target:
            return
        for blocks, kept in zip(self._blocks, self._kept, strict=True):
            used = min(blocks, -(-self._written[source] // BLOCK))
            for array in kept:
                array[target, :, :used] = array[source, :, :used]
        self.lengths[target] = self.lengths[source]
        self._written[target] = self._written[source]

    def save_block(self, row: int, index: int) -> np.ndarray:
        """Return the bytes of a block; see `Cache.save_block`."""
        if (index + 1) * BLOCK > self.lengths[row]:
            raise ValueError(f"row {row} holds less than {(index + 1) * BLOCK} tokens")
        parts = [part.reshape(-1).view(np.uint8) for part in self._parts(row, index)]
        return np.concatenate(parts)

    def load_block(self, row: int, block: np.ndarray) -> None:
        """Append a saved block; see `Cache.load_block`."""
        first = self.lengths[row]
        if first % BLOCK or first + BLOCK > self.capacity:
            raise ValueError(f"no room for a block after {first} of {self.capacity} tokens")
        parts = self._parts(row, first // BLOCK)
        if len(block) != sum(part.nbytes for part in parts):
            raise ValueError(f"a block of {len(block)} bytes is of another model")
        offset = 0
        for part in parts:
            data = block[offset : offset + part.nbytes]
            part[...] = data.view(part.dtype).reshape(part.shape)
            offset += part.nbytes
        self.grow(row, BLOCK)

    def _parts(self, row: int, index: int) -> list[np.ndarray]:
        if any(self._windows):
            raise ValueError("layers with a sliding window keep no blocks")
        return [array[row, :, index] for kept in self._kept for array in kept]

    def grow(self, row: int, tokens: int) -> None:
        """Count some more tokens of a row in."""
        self.lengths[row] += tokens
        self._written[row] = max(self._written[row], self.lengths[row])
