"""GGUF, the one-file format of llama.cpp: a strict reader over mmap.

    "GGUF" | version u32 | number of tensors u64 | number of keys u64
    per key      name, type u32, value          a string is: length u64, UTF-8 bytes
    per tensor   name, n u32, n sizes u64 (the fastest first), type u32, offset u64
    padding to `general.alignment` | data; offsets count from here

Weights are stored in blocks: `block` elements of a row share `bytes` bytes. Nothing in a file is
believed: each count, length and offset is held against the size of the file before it is used.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (format), ggml.h (types).
"""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from engine.errors import CheckpointError, ResourceError

# name → (number in a file, elements in a block, bytes of a block)
TYPES = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
    "IQ2_XXS": (16, 256, 66),
    "IQ2_XS": (17, 256, 74),
    "IQ3_XXS": (18, 256, 98),
    "IQ1_S": (19, 256, 50),
    "IQ4_NL": (20, 32, 18),
    "IQ3_S": (21, 256, 110),
    "IQ2_S": (22, 256, 82),
    "IQ4_XS": (23, 256, 136),
    "IQ1_M": (29, 256, 56),
    "BF16": (30, 1, 2),
    "TQ1_0": (34, 256, 54),
    "TQ2_0": (35, 256, 66),
    "MXFP4": (39, 32, 17),
}
_NAMES = {number: name for name, (number, _, _) in TYPES.items()}

# Numbers of the value types of keys; a scalar is a letter of `struct`.
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9
ALIGNMENT = 32
_MOST_DIMS = 4
_LONGEST_KEY, _LONGEST_NAME = 65535, 64
CHUNK = 1 << 20  # elements that are converted at once: what bounds the memory beside the result


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies in the file; the shape is in torch's order, the slowest size first."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    bytes: int


@dataclass(frozen=True, slots=True)
class GGUF:
    """An open file: its keys (numeric arrays as numpy, strings as lists) and its tensors."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    content: mmap.mmap

    def tensor(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Read one tensor as plain numbers; what it needs beside the result is a few megabytes.

        Raises: ResourceError if its type needs the optional package; CheckpointError if not even
            that can read it.
        """
        info = self.tensors[name]
        _, block, size = TYPES[info.type]
        blocks = np.frombuffer(self.content, np.uint8, info.bytes, info.offset).reshape(-1, size)
        result = torch.empty(len(blocks), block, dtype=dtype)
        step = CHUNK // block
        for first in range(0, len(blocks), step):
            values = _dequantize(blocks[first : first + step].reshape(-1), info.type, self.path)
            # torch refuses arrays that it may not write to, such as a view of the file
            values = np.require(values, requirements="W").reshape(-1, block)
            result[first : first + step] = torch.from_numpy(values)
        self._let_go(info)
        return result.view(info.shape)

    def _let_go(self, info: TensorInfo) -> None:
        """Tell the system that the pages of a tensor are not needed again soon.

        Else a whole file comes to lie in memory while it is read, tensor by tensor.
        """
        if hasattr(mmap, "MADV_DONTNEED"):
            first = info.offset // mmap.PAGESIZE * mmap.PAGESIZE
            self.content.madvise(mmap.MADV_DONTNEED, first, info.offset + info.bytes - first)


def _dequantize(data: np.ndarray, type_name: str, path: Path) -> np.ndarray:
    """Turn whole blocks into float32."""
    if type_name == "F32":
        return data.view("<f4")
    if type_name == "F16":
        return data.view("<f2").astype(np.float32)
    if type_name == "BF16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    quants, kinds = package()
    try:
        with np.errstate(all="ignore"):  # a damaged scale may be infinite
            return quants.dequantize(data, kinds[type_name])
    except (NotImplementedError, KeyError):
        raise CheckpointError(
            f"{path}: weights of type {type_name} cannot be read; use a file of another type"
        ) from None


def package() -> tuple[Any, Any]:
    """Import what knows the quantized types: the package and its enumeration of them."""
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError:
        raise ResourceError(
            "quantized GGUF weights need the package gguf; pip install 'lm-workbench[gguf]'"
        ) from None
    return quants, GGMLQuantizationType


def shown(value: Any) -> str:
    """Show something from a file in a message, on the one line that it has."""
    return " ".join(f"{value!r:.60}".split())


def read(path: Path) -> GGUF:
    """Open a GGUF file, versions 2 and 3; weights stay on the disk until asked for.

    Raises: CheckpointError naming what is wrong with the file.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise CheckpointError(f"{path}: is empty; use a GGUF file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    file = _Parser(path, content)
    n_tensors, n_keys = file.header()
    metadata = file.keys(n_keys)
    shards = metadata.get("split.count", 1)
    if type(shards) is not int or shards > 1:
        file.fail(f"is one of {shown(shards)} shards", "join them with llama-gguf-split --merge")
    tensors = file.tensors(n_tensors, metadata.get("general.alignment", ALIGNMENT))
    return GGUF(path, metadata, tensors, content)


class _Parser:
    """A position in the file; every step forward is checked against its end."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path, self.content, self.size, self.at = path, content, len(content), 0

    def fail(self, what: str, fix: str = "the file is damaged, get it again") -> NoReturn:
        """Refuse the file."""
        raise CheckpointError(f"{self.path}: {what}; {fix}")

    def number(self, letter: str) -> Any:
        """Read one number, whose type is a letter of `struct`."""
        start = self.advance(struct.calcsize(f"<{letter}"))
        if letter == "?" and self.content[start] > 1:
            self.fail(f"a truth value at byte {start} is {self.content[start]}")
        return struct.unpack_from(f"<{letter}", self.content, start)[0]

    def advance(self, count: int) -> int:
        """Step over `count` bytes and return where they start."""
        start = self.at
        if count > self.size - start:
            self.fail(f"ends at byte {self.size}, inside something that needs {count} more")
        self.at += count
        return start

    def string(self, longest: int | None = None) -> str:
        """Read one string."""
        length = self.number("Q")
        if longest is not None and length > longest:
            self.fail(f"a name at byte {self.at} is {length} bytes long")
        start = self.advance(length)
        try:
            return self.content[start : self.at].decode()
        except UnicodeDecodeError:
            self.fail(f"the text at byte {start} is not UTF-8")

    def strings(self, count: int) -> list[str]:
        """Read many strings; a vocabulary has hundreds of thousands, so this loop is bare."""
        content, size, at, found = self.content, self.size, self.at, []
        unpack = struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                start = at + 8
                at = start + unpack(content, at)[0]
                if at > size:
                    raise struct.error
                found.append(content[start:at].decode())
        except struct.error:
            self.fail(f"ends at byte {size}, inside a list of {count} strings")
        except UnicodeDecodeError:
            self.fail(f"string {len(found)} of a list of {count} is not UTF-8")
        self.at = at
        return found

    def header(self) -> tuple[int, int]:
        """Check what kind of file this is; return how many tensors and keys it claims."""
        if self.content[:4] != b"GGUF":
            self.fail("is not a GGUF file", "use one, or a Hugging Face folder")
        self.advance(4)
        version = self.number("I")
        if version & 0xFFFF == 0 and version:
            self.fail("is big endian", "convert it with gguf_convert_endian.py")
        if version not in (2, 3):
            self.fail(f"is GGUF version {version}", "only 2 and 3 are read, convert it again")
        n_tensors, n_keys = self.number("Q"), self.number("Q")
        # The smallest tensor takes 33 bytes here, the smallest key 14.
        if 33 * n_tensors + 14 * n_keys > self.size - self.at:
            self.fail(f"claims {n_tensors} tensors and {n_keys} keys in {self.size} bytes")
        return n_tensors, n_keys

    def keys(self, count: int) -> dict[str, Any]:
        """Read all keys with their values."""
        metadata: dict[str, Any] = {}
        for _ in range(count):
            key = self.string(_LONGEST_KEY)
            if key in metadata:
                self.fail(f"has the key {shown(key)} twice")
            metadata[key] = self.value(self.number("I"), key)
        return metadata

    def value(self, kind: int, key: str) -> Any:
        """Read a value of the given type."""
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind != ARRAY:
            self.fail(f"{shown(key)} is of the unknown type {kind}")
        element, count = self.number("I"), self.number("Q")
        if element == STRING:
            # Each string takes 8 bytes at least, whatever its own length claims.
            if 8 * count > self.size - self.at:
                self.fail(f"{shown(key)} claims {count} strings in {self.size} bytes")
            return self.strings(count)
        if element not in SCALARS:
            self.fail(f"{shown(key)} is a list of type {element}, which no model needs")
        letter = SCALARS[element]
        dtype = np.dtype(f"<{letter}")
        start = self.advance(count * dtype.itemsize)
        values = np.frombuffer(self.content, dtype, count, start).copy()
        if letter == "?" and (values.view(np.uint8) > 1).any():
            self.fail(f"{shown(key)} has truth values that are neither 0 nor 1")
        return values

    def tensors(self, count: int, alignment: Any) -> dict[str, TensorInfo]:
        """Read where the tensors lie: apart from each other and inside the file."""
        aligned = type(alignment) is int and alignment >= 8 and alignment.bit_count() == 1
        if not aligned or alignment > self.size:
            self.fail(f"general.alignment is {shown(alignment)}, not a power of two")
        found: dict[str, tuple[tuple[int, ...], str, int, int]] = {}
        for _ in range(count):
            name = self.string(_LONGEST_NAME)
            if name in found:
                self.fail(f"has the tensor {name!r} twice")
            found[name] = self.tensor(name, alignment)
        start = -(-self.at // alignment) * alignment
        infos = {name: TensorInfo(name, s, t, start + o, b) for name, (s, t, o, b) in found.items()}
        end, before = start, ""
        for info in sorted(infos.values(), key=lambda info: info.offset):
            if info.offset < end:
                self.fail(f"the tensors {before!r} and {info.name!r} overlap")
            end, before = info.offset + info.bytes, info.name
        if end > self.size and infos:
            self.fail(f"is {self.size} bytes long, but the tensor {before!r} ends at byte {end}")
        return infos

    def tensor(self, name: str, alignment: int) -> tuple[tuple[int, ...], str, int, int]:
        """Read one entry: shape, type, offset from the start of the data, bytes."""
        dims = self.number("I")
        if not 1 <= dims <= _MOST_DIMS:
            self.fail(f"the tensor {name!r} has {dims} dimensions")
        shape = tuple(self.number("Q") for _ in range(dims))[::-1]
        number, offset = self.number("I"), self.number("Q")
        if number not in _NAMES:
            self.fail(f"the tensor {name!r} is of the unknown type {number}", "use another file")
        _, block, size = TYPES[_NAMES[number]]
        if 0 in shape or shape[-1] % block:
            self.fail(f"the tensor {name!r} has the impossible shape {shape}")
        if offset % alignment:
            self.fail(f"the tensor {name!r} is not aligned to {alignment} bytes")
        return shape, _NAMES[number], offset, prod(shape) // block * size
