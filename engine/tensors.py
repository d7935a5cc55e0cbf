"""Tensors of a folder's safetensors files, as NumPy arrays: needs no torch.

A file is the length of a header (8 bytes), the header (JSON: name → type, shape, place), then the
tensors end to end. Nothing in a header is believed before it was held against the file's size. A
mapped tensor costs memory only for the pages that are touched, and writing to it changes this
process's copy, never the file. What every token reads is moved elsewhere (`engine/pages.py`).

Source: the format, https://huggingface.co/docs/safetensors.
"""

import json
import math
import mmap
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import CheckpointError
from engine.pages import Mapping

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LARGEST_INDEX = 50_000_000  # bytes; published ones have less than a tenth
LARGEST_HEADER = 100_000_000  # what the format's own library takes at the most
MOST_AXES = 8

# The format's name of a type → NumPy's; it has no bf16, so these are the bits.
KINDS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "|u1"}
FLOATS = ("F64", "F32", "F16", "BF16")  # what weights are stored as


@dataclass(frozen=True, slots=True)
class Place:
    """What a header says of a tensor; `begin` counts from the end of the header."""

    kind: str
    shape: tuple[int, ...]
    begin: int
    end: int


class _File:
    """One file: its header, and the bytes behind it."""

    def __init__(self, path: Path) -> None:
        try:
            if path.exists() and not path.is_file():
                raise OSError("not a file")  # a pipe would keep us waiting
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                size = path.stat().st_size - 8 - length
                if size < 0 or length > LARGEST_HEADER:
                    raise ValueError(f"its header of {length:,} bytes does not end in the file")
                self.places = _read_header(file.read(length), size)
                self._map = Mapping(file.fileno(), 0, access=mmap.ACCESS_COPY)
                self._bytes = np.frombuffer(self._map, np.uint8)
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error!s:.200}") from None
        self._begin = 8 + length

    def read(self, place: Place) -> np.ndarray:
        """Return a tensor where it lies; a copy of one that lies askew."""
        data = self._bytes[self._begin + place.begin : self._begin + place.end]
        return np.require(data.view(KINDS[place.kind]).reshape(place.shape), requirements="A")

    def release(self, place: Place) -> None:
        """Give back the pages of a tensor that is not used any more and was not written to."""
        self._map.give_back(self._begin + place.begin, self._begin + place.end)


def _read_header(text: bytes, size: int) -> dict[str, Place]:
    """Read a header over `size` bytes of tensors. Raises: ValueError if it is not true of them."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """Make an object of pairs."""
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("its header has a name twice")
        return found

    header = json.loads(text, object_pairs_hook=once)
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    header.pop("__metadata__", None)
    places = {name: _read_place(name, value) for name, value in header.items()}
    end = 0
    for name, place in sorted(places.items(), key=lambda item: (item[1].begin, item[1].end)):
        if place.begin != end:
            raise ValueError(f"{name} does not begin where the tensor before it ends")
        end = place.end
    if end != size:
        raise ValueError(f"holds {size:,} bytes of tensors, and its header speaks of {end:,}")
    return places


def _read_place(name: str, value: Any) -> Place:
    """Read what a header says of one tensor."""
    try:
        kind, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(kind, str) or not isinstance(shape, list) or len(shape) > MOST_AXES:
            raise TypeError
        if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
            raise TypeError
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{name} has no type, shape and place") from None
    if kind in KINDS and end - begin != math.prod(shape) * np.dtype(KINDS[kind]).itemsize:
        raise ValueError(f"{name} has another size than its shape")
    if end < begin:
        raise ValueError(f"{name} ends before it begins")
    return Place(kind, tuple(shape), begin, end)


class Tensors:
    """The tensors of a folder by name."""

    def __init__(self, folder: Path, only: str = "", kinds: Collection[str] = FLOATS) -> None:
        """Open the weight files of a folder, or the `only` one, and read their headers.

        Raises: CheckpointError if a file is missing or malformed, the index leads elsewhere, or a
        tensor is of none of these `kinds`.
        """
        self.places: dict[str, Place] = {}
        self.files: list[Path] = []
        self._file_of: dict[str, _File] = {}
        files: dict[str, set[str] | None] = {only: None} if only else _files(folder)
        for name, expected in files.items():
            path = folder / name
            self.files.append(path)
            file = _File(path)
            if missing := (expected or set()) - set(file.places):
                raise CheckpointError(f"{path} lacks {min(missing)}, which {INDEX} names")
            for tensor in sorted(expected or file.places):
                place = file.places[tensor]
                if place.kind in kinds:
                    self.places[tensor], self._file_of[tensor] = place, file
                elif not tensor.endswith((".attn.bias", ".masked_bias")):  # GPT-2's causal masks
                    raise CheckpointError(
                        f"{path}: {tensor} is stored as {place.kind}; only {', '.join(kinds)} are"
                        " supported, so use unquantized weights"
                    )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor."""
        return {name: place.shape for name, place in self.places.items()}

    def read(self, name: str) -> np.ndarray:
        """Return a tensor where it lies, bf16 as uint16; of a mapped file, read when touched."""
        return self._file_of[name].read(self.places[name])

    def release(self, name: str) -> None:
        """Give back the memory of a tensor that was copied out and was not written to."""
        self._file_of[name].release(self.places[name])


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
