"""Write a GGUF file: keys, then tensors that are quantized as they arrive, in any order."""

import os
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.errors import RecipeError, ResourceError
from engine.files import beside, flush
from engine.interop.gguf.reader import ALIGNMENT, ARRAY, CHUNK, SCALARS, STRING, TYPES, package

_NUMBERS = {letter: number for number, letter in SCALARS.items()}


def store(
    path: Path,
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[tuple[int, ...], str]],
    tensors: Iterable[tuple[str, Tensor]],
) -> int:
    """Write a file of `shapes` (name → shape and type), taking the tensors in any order, once each.

    Returns: its size in bytes.
    Raises: ResourceError if the disk refuses, and whatever `tensors` raises; then no file is left
        and one that was there before is untouched.
    """
    head = _header(metadata, shapes)
    offsets, size = {}, 0
    for name, (shape, type_name) in shapes.items():
        _, block, width = TYPES[type_name]
        offsets[name] = len(head) + size
        size += -(-(prod(shape) // block * width) // ALIGNMENT) * ALIGNMENT
    path = Path(path)
    temporary = beside(path)
    try:
        with temporary.open("wb") as file:
            file.write(head)
            file.truncate(len(head) + size)
            for name, tensor in tensors:
                file.seek(offsets.pop(name))
                flat = tensor.detach().reshape(-1)
                for piece in flat.split(CHUNK):
                    file.write(_quantize(piece, shapes[name][1], name))
        assert not offsets, f"no tensor was given for {list(offsets)}"
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    except OSError as error:
        raise ResourceError(
            f"{path}: cannot be written: {error.strerror or error}; make room or choose another"
            " place"
        ) from None
    finally:
        with suppress(OSError):
            temporary.unlink()
    return len(head) + size


def _header(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[tuple[int, ...], str]]
) -> bytes:
    """Return all that comes before the data, padded."""
    head = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(metadata)))
    for key, value in metadata.items():
        head += _text(key) + _packed(key, value)
    offset = 0
    for name, (shape, type_name) in shapes.items():
        number, block, width = TYPES[type_name]
        head += _text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += struct.pack("<IQ", number, offset)
        offset += -(-(prod(shape) // block * width) // ALIGNMENT) * ALIGNMENT
    return bytes(head) + bytes(-len(head) % ALIGNMENT)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _packed(key: str, value: Any) -> bytes:
    """Write a value of a key with its type: what other programs expect of that kind of value."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, (bool, int, float, np.generic)):
        letter = _letter(np.asarray(value))
        return struct.pack(f"<I{letter}", _NUMBERS[letter], value)
    if len(value) and isinstance(value[0], str):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_text, value))
    # Programs read lists of Python's integers as signed ones, single integers as unsigned ones.
    array = value if isinstance(value, np.ndarray) else np.asarray(value)
    if not isinstance(value, np.ndarray):
        array = array.astype({"i": "<i4", "f": "<f4"}.get(array.dtype.kind, array.dtype))
    letter = array.dtype.char.replace("l", "q").replace("L", "Q")
    assert letter in _NUMBERS and array.ndim == 1, f"{key} cannot be written: {value!r}"
    return struct.pack("<IIQ", ARRAY, _NUMBERS[letter], len(array)) + array.tobytes()


def _letter(value: np.ndarray) -> str:
    """Choose the type of a single number: u32 and f32 where they suffice."""
    if value.dtype.kind == "b":
        return "?"
    if value.dtype.kind == "f":
        return "f"
    if value < 0:
        return "i" if value >= -(1 << 31) else "q"
    return "I" if value < 1 << 32 else "Q"


def _quantize(values: Tensor, type_name: str, name: str) -> bytes:
    """Turn whole blocks of numbers into a type."""
    values = values.to(torch.float32)
    if type_name == "F32":
        return values.numpy().astype("<f4").tobytes()
    if type_name == "BF16":
        return values.to(torch.bfloat16).view(torch.int16).numpy().astype("<i2").tobytes()
    if type_name == "F16":
        half = values.to(torch.float16)
        if not torch.equal(half.isfinite(), values.isfinite()):
            raise RecipeError(f"{name} has weights beyond 65504, too large for f16; use bf16")
        return half.numpy().astype("<f2").tobytes()
    quants, kinds = package()
    return quants.quantize(values.numpy(), kinds[type_name]).tobytes()
