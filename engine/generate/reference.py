"""A `Decoder` by torch: any device, any model; what our own C is tested against.

Rows are run one after the other, so a batch gains nothing here.
"""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from engine.adapter_config import holder, model_digest, weights_stamp
from engine.checkpoint import load_model
from engine.cost import decode_bytes, weights_read
from engine.generate.decoder import BLOCK, Cache, Run
from engine.hardware import pick_device, pick_dtype, use_threads
from engine.manifest import read_json
from engine.model.cache import FullLayer, KVCache
from engine.model.transformer import Transformer
from engine.text.tokenizer import Tokenizer

CHUNK = 256  # tokens of a prompt that are run at once


class TorchCache:
    """A `KVCache` for each row."""

    def __init__(self, model: Transformer, capacity: int, rows: int) -> None:
        weight = model.embed_tokens.weight
        self.capacity = capacity
        self.rows = [
            KVCache(model.config, 1, capacity, weight.dtype, weight.device) for _ in range(rows)
        ]

    @property
    def lengths(self) -> list[int]:
        """Return how many tokens each row holds."""
        return [row.length for row in self.rows]

    @property
    def bytes(self) -> int:
        """Memory held by all keys and values."""
        return sum(row.bytes for row in self.rows)

    def rewind(self, row: int, length: int) -> None:
        """Cut a row back; see `Cache.rewind`."""
        self.rows[row].rewind(length)

    def copy(self, source: int, target: int) -> None:
        """Make a row hold what another holds."""
        self.rows[target] = self.rows[source].fork(1)

    def save_block(self, row: int, index: int) -> np.ndarray:
        """Return the bytes of a block; see `Cache.save_block`."""
        first, last = index * BLOCK, (index + 1) * BLOCK
        if last > self.rows[row].length:
            raise ValueError(f"row {row} holds less than {last} tokens")
        parts = [x[:, :, first:last] for layer in self._full(row) for x in layer]
        return (
            torch.cat([x.contiguous().view(torch.uint8).reshape(-1) for x in parts]).cpu().numpy()
        )

    def load_block(self, row: int, block: np.ndarray) -> None:
        """Append a saved block; see `Cache.load_block`."""
        cache = self.rows[row]
        first, last = cache.length, cache.length + BLOCK
        if first % BLOCK or last > self.capacity:
            raise ValueError(f"no room for a block after {first} of {self.capacity} tokens")
        parts = [x[:, :, first:last] for layer in self._full(row) for x in layer]
        sizes = [x.numel() * x.element_size() for x in parts]
        if len(block) != sum(sizes):
            raise ValueError(f"a block of {len(block)} bytes is not one of {sum(sizes)}")
        for x, data in zip(parts, torch.from_numpy(block).split(sizes), strict=True):
            x.copy_(data.clone().view(x.dtype).view(x.shape))
        cache.advance(BLOCK)

    def _full(self, row: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        layers = self.rows[row].layers
        if not all(isinstance(layer, FullLayer) for layer in layers):
            raise ValueError("layers with a sliding window keep no blocks")
        return [(layer.k_BKSH, layer.v_BKSH) for layer in layers]


def first_layers(model: Transformer, count: int) -> Transformer:
    """Return a model of the first blocks, then the final norm and the head; weights are shared.

    Raises: ValueError if there are not so many.
    """
    if not 0 < count <= model.config.n_layers:
        raise ValueError(f"cannot take {count} of {model.config.n_layers} layers")
    shorter = copy.copy(model)
    shorter.__dict__["_modules"] = dict(model._modules)  # of its own, but for what is in it
    shorter.config = replace(model.config, n_layers=count)
    shorter.blocks = model.blocks[:count]
    return shorter


class TorchDecoder:
    """A transformer as something to generate with."""

    grid = CHUNK  # cut a prompt here, and the bits of what follows do not change

    def __init__(self, model: Transformer, identity: str = "") -> None:
        self.model = model
        self.config = model.config
        self.identity = identity
        self.instead = ""  # of our own C, if that was to be had: why not
        short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        self.kv = short[model.embed_tokens.weight.dtype]
        self.name = f"torch {self.kv}"

    def cache(self, capacity: int, rows: int = 1) -> TorchCache:
        """Return an empty cache; see `Decoder.cache`."""
        return TorchCache(self.model, capacity, rows)

    @torch.inference_mode()
    def forward(self, cache: Cache, runs: Sequence[Run]) -> np.ndarray:
        """Run each row's tokens on a fixed grid of positions, whatever the cache holds already.

        So a prompt's logits do not depend on how much of it came out of a cache, as long as that
        ends on the grid: every product then has the same shape.
        """
        assert isinstance(cache, TorchCache)
        return np.concatenate([self._forward(cache.rows[run.row], run) for run in runs])

    @property
    def bytes(self) -> int:
        """Memory held by the weights; see `Weighed.bytes`."""
        return sum(self._sizes().values())

    def bytes_read(self, depth: int, rows: int = 1) -> float:
        """Return what a token reads; see `Weighed.bytes_read`."""
        # Rows are run one after the other, so each reads all weights for itself.
        weights = weights_read(self.config, self._sizes())
        number = self.model.embed_tokens.weight.element_size()
        return decode_bytes(self.config, depth, 1, weights, number)

    def _sizes(self) -> dict[str, int]:
        """Return the bytes of each parameter, and of what stands for one in 8 bits."""
        every = chain(self.model.named_parameters(), self.model.named_buffers())
        return {name: tensor.nbytes for name, tensor in every}

    def _forward(self, cache: KVCache, run: Run) -> np.ndarray:
        """Run one row. Shapes: → (wanted, V)."""
        device = self.model.embed_tokens.weight.device
        if cache.length + len(run.tokens) > cache.capacity:
            raise ValueError(f"{len(run.tokens)} tokens more do not fit {cache.capacity}")
        left, wanted = list(run.tokens), []
        while left:
            size = CHUNK - cache.length % CHUNK
            piece, left = left[:size], left[size:]
            x_BTD = self.model.hidden(torch.tensor([piece], device=device), cache)
            wanted.append(x_BTD[0])
            while len(wanted) > 1 and sum(map(len, wanted[1:])) >= run.wanted:
                wanted.pop(0)
        x_TD = torch.cat(wanted)
        x_TD = x_TD[len(x_TD) - run.wanted :]
        return self.model.head(x_TD).float().cpu().numpy()


def load_reference(
    folder: Path, device: str = "auto", dtype: str = "auto", threads: int = 0, layers: int = 0
) -> tuple[TorchDecoder, Tokenizer]:
    """Load a checkpoint to generate with by torch, or the first `layers` of it.

    Half-precision weights are computed in bf16 where that is fast, in fp32 elsewhere; fp32 weights
    stay as they are, and mapped from disk.
    """
    use_threads(threads)
    place = pick_device(device)
    config = read_json(holder(folder, "config.json") / "config.json")
    half = config.get("dtype") in ("bfloat16", "float16")
    wish = pick_dtype("fp32" if dtype == "auto" and not half else dtype, place)
    model, tokenizer = load_model(folder, place, dtype=wish)
    model = first_layers(model, layers) if layers else model
    facts = f"{model_digest(folder)} {weights_stamp(folder)} torch {torch.__version__}"
    facts += f" {place.type} {wish} {layers}"
    return TorchDecoder(model, hashlib.sha256(facts.encode()).hexdigest()), tokenizer
