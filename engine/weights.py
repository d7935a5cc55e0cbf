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

import safetensors
import torch
from torch import Tensor

from engine.errors import CheckpointError, ResourceError
from engine.files import flush

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PIECE = 1 << 22  # numbers that are converted at once
LARGEST_INDEX = 50_000_000  # bytes; published ones have less than a tenth
SHARD_BYTES = 5_000_000_000  # what Hugging Face takes for one file

# The format's name of a type ↔ torch's; weights are floating-point numbers.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
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
    """The tensors of a folder by name, read one at a time."""

    def __init__(self, folder: Path, only: str = "") -> None:
        """Open the weight files of a folder, or the `only` one, and read their headers.

        Raises: CheckpointError if a file is missing or malformed, or the index leads elsewhere.
        """
        self.folder = folder
        self.specs: dict[str, TensorSpec] = {}
        self.files: list[Path] = []
        self._file_of: dict[str, Any] = {}
        files: dict[str, set[str] | None] = {only: None} if only else _files(folder)
        for file, expected in files.items():
            self.files.append(folder / file)
            try:
                if (folder / file).exists() and not (folder / file).is_file():
                    raise OSError("not a file")  # a pipe would keep us waiting
                opened = safetensors.safe_open(folder / file, framework="pt")
                found = set(opened.keys())
            except (OSError, ValueError, safetensors.SafetensorError) as error:
                raise CheckpointError(f"{folder / file}: cannot be read: {error}") from None
            if missing := (expected or found) - found:
                raise CheckpointError(f"{folder / file} lacks {min(missing)}, which {INDEX} names")
            for name in sorted(expected or found):
                view = opened.get_slice(name)
                kind = str(view.get_dtype())
                if kind in DTYPES:
                    self.specs[name] = TensorSpec(name, tuple(view.get_shape()), DTYPES[kind])
                    self._file_of[name] = opened
                elif not name.endswith((".attn.bias", ".masked_bias")):  # GPT-2's causal masks
                    raise CheckpointError(
                        f"{folder / file}: {name} is stored as {kind}; only"
                        f" {', '.join(DTYPES)} are supported, so use unquantized weights"
                    )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor."""
        return {spec.name: spec.shape for spec in self.specs.values()}

    def read(self, name: str) -> Tensor:
        """Return a tensor over the mapped file; its pages are read when they are touched."""
        return self._file_of[name].get_tensor(name)


def _files(folder: Path) -> dict[str, set[str] | None]:
    """Return the weight files of a folder, each with the names that the index puts there."""
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return {SINGLE: None}
    where = folder / INDEX
    if where.stat().st_size > LARGEST_INDEX:
        raise CheckpointError(f"{where}: has more than {LARGEST_INDEX:,} bytes, so it is no index")
    try:
        placed = json.loads(where.read_text(encoding="utf-8"))["weight_map"].items()
        files: dict[str, set[str]] = {}
        for name, file in placed:
            # A plain name: an index must not lead out of its folder.
            if not isinstance(file, str) or Path(file).name != file or not file.strip("."):
                raise CheckpointError(f"{where}: {file!r} is not the name of a file in this folder")
            files.setdefault(file, set()).add(name)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{where}: not an index of weights: {error!r:.200}") from None
    if not files:
        raise CheckpointError(f"{where}: names no weights")
    return dict(files)


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
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8, so that they can be mapped
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
