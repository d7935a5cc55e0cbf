"""Tensors on disk: safetensors files, mapped rather than copied in, streamed rather than held out.

A folder has `model.safetensors`, or several shards and an index that says which tensor lies in
which. A mapped tensor costs memory only for the pages that are touched, and writing to it changes
this process's copy, never the file.
"""

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from engine.errors import ResourceError
from engine.files import flush
from engine.tensors import INDEX, SINGLE, Tensors

PIECE = 1 << 22  # numbers that are converted at once
SHARD_BYTES = 5_000_000_000  # what Hugging Face takes for one file

# The format's name of a type ↔ torch's.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,  # of rounded matrices, which are read by `engine/matrices.py`
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What is known of a tensor before it is read."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


class Weights:
    """The tensors of a folder by name, as torch's, read one at a time."""

    def __init__(self, folder: Path, only: str = "") -> None:
        """Open the weight files of a folder, or the `only` one, and read their headers.

        Raises: CheckpointError if a file is missing or malformed, or the index leads elsewhere.
        """
        self._tensors = Tensors(folder, only)
        self.files = self._tensors.files
        self.shapes = self._tensors.shapes
        self.specs = {
            name: TensorSpec(name, place.shape, DTYPES[place.kind])
            for name, place in self._tensors.places.items()
        }

    def read(self, name: str) -> Tensor:
        """Return a tensor over the mapped file; its pages are read when they are touched."""
        tensor = torch.from_numpy(self._tensors.read(name))
        return tensor.view(self.specs[name].dtype)  # bf16 comes as its bits


def write_weights(
    folder: Path,
    specs: Sequence[TensorSpec],
    tensors: Iterable[Tensor],
    shard_bytes: int = SHARD_BYTES,
) -> Iterator[TensorSpec]:
    """Write tensors as safetensors, one at a time, and yield each spec when it is written.

    `tensors` come in the order of `specs` and are converted to the dtype named there.

    Raises: ResourceError if the disk refuses.
    """
    shards: list[list[TensorSpec]] = [[]]
    for spec in specs:
        if shards[-1] and sum(s.bytes for s in shards[-1]) + spec.bytes > shard_bytes:
            shards.append([])
        shards[-1].append(spec)
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    stream = iter(tensors)
    try:
        for name, shard in zip(names, shards, strict=True):
            yield from _write_shard(folder / name, shard, stream)
        if len(shards) > 1:
            placed = {
                s.name: name for name, shard in zip(names, shards, strict=True) for s in shard
            }
            total = {"total_size": sum(spec.bytes for spec in specs)}
            index = json.dumps({"metadata": total, "weight_map": placed}, indent=2) + "\n"
            (folder / INDEX).write_text(index, encoding="utf-8")
            flush(folder / INDEX)
    except OSError as error:
        raise ResourceError(
            f"{folder}: cannot be written: {error.strerror or error}; make room, or choose another"
            " place"
        ) from None


def _write_shard(
    path: Path, specs: Sequence[TensorSpec], tensors: Iterator[Tensor]
) -> Iterator[TensorSpec]:
    """Write one file: the length of its header, the header, the tensors end to end."""
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        place = [offset, offset + spec.bytes]
        header[spec.name] = {
            "dtype": kinds[spec.dtype],
            "shape": spec.shape,
            "data_offsets": place,
        }
        offset = place[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # so that what is mapped begins at a cache line
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for spec in specs:
            _write_tensor(file, next(tensors), spec)  # no name: free before the next is made
            yield spec
        file.flush()
        os.fsync(file.fileno())


def _write_tensor(file: BinaryIO, tensor: Tensor, spec: TensorSpec) -> None:
    """Convert and write a tensor piece by piece."""
    assert tuple(tensor.shape) == spec.shape, f"{spec.name}: {tensor.shape}"
    for piece in tensor.detach().reshape(-1).split(PIECE):
        data = piece.to(device="cpu", dtype=spec.dtype)
        file.write(data.view(torch.uint8).numpy().data)


def check_room(folder: Path, needed: int) -> None:
    """Refuse to begin writing what the disk cannot hold.

    Raises: ResourceError naming what is needed and what is free.
    """
    place = folder
    while not os.path.exists(place):  # unlike Path's own, false for a name that is too long
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ResourceError(
            f"{folder}: {needed / 1e9:,.1f} GB are needed and {free / 1e9:,.1f} GB are free on that"
            " disk; make room or choose another place with -o"
        )
