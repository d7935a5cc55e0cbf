"""A checkpoint's parameters by our names, as matrices in some format: needs no torch.

A folder holds the matrices of its family in f32, bf16 or f16; or, quantized, ours in int8 or int4,
each NAME with its NAME.scale in the layout of `engine/quantize.py`, which config.json says:

    "quantization_config": {"quant_method": "lm-workbench", "format": "int8", "version": 1}
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.manifest import read_json, read_manifest
from engine.model.config_json import OWN_TYPE, QUANTIZATION, is_quantized
from engine.model.shapes import Shape, check_fit, parameter_shapes
from engine.pages import Arena
from engine.quantize import (
    Empty,
    Format,
    Matrix,
    format_of,
    pack,
    packed_shapes,
    widen,
)
from engine.tensors import Tensors
from engine.text.tokenizer import Tokenizer, load_tokenizer

VERSION = 1
INFINITE = 0x7C00  # the exponent of NaN and infinity in f16
QUANTIZED: tuple[Format, ...] = ("int8", "int4")
PLAIN: dict[str, Format] = {"float32": "f32", "uint16": "bf16", "float16": "f16"}
Parameters = dict[str, Matrix | np.ndarray]


def read_matrices(folder: Path, config: ModelConfig, format: Format | None) -> Parameters:
    """Read a checkpoint: matrices in a format (None: as stored), vectors as fp32.

    What lies in the file as it is wanted stays there, mapped; what is made lies in large pages.

    Raises: CheckpointError if anything is missing, corrupt or does not fit together, or a quantized
    checkpoint is wanted in another format.
    """
    read_manifest(folder)
    stored = stored_format(folder)
    if stored is None:
        return dict(_converted(folder, config, format))
    if format not in (None, stored):
        raise CheckpointError(
            f"{folder}: is stored as {stored}, which cannot become {format}; use it as it is, or"
            " the checkpoint that it was made of"
        )
    shapes = parameter_shapes(config)
    tensors = Tensors(folder, kinds=("U8", "F32", "F16"))
    formats = _check_quantized(folder, shapes, stored, tensors)
    return dict(_quantized(folder, shapes, formats, tensors))


def tokenizer_of(folder: Path, config: ModelConfig) -> Tokenizer:
    """Load the tokenizer of a model. Raises: CheckpointError if it has more tokens than that."""
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model only"
            f" {config.vocab_size}"
        )
    return tokenizer


def stored_format(folder: Path) -> Format | None:
    """Return the format of a quantized checkpoint, None if it is not one.

    Raises: CheckpointError if its format is not one of ours.
    """
    raw = read_json(folder / "config.json")
    if not is_quantized(raw):
        return None
    format, version = (raw[QUANTIZATION].get(key) for key in ("format", "version"))
    known = type(version) is int and version == VERSION  # 1.0 and True equal 1 too
    if format not in QUANTIZED or not known:
        raise CheckpointError(
            f"{folder / 'config.json'}: quantized as {format!r:.40}, version {version!r:.40}; known"
            f" are {' and '.join(QUANTIZED)}, version {VERSION}"
        )
    return format


def refuse_quantized(folder: Path, purpose: str) -> None:
    """Raise CheckpointError if a checkpoint is quantized: what it was made of serves better."""
    if format := stored_format(folder):
        raise CheckpointError(
            f"{folder}: is quantized to {format}, too rough to {purpose}; take the checkpoint that"
            " it was made of, `lm show` names it"
        )


def quantization(format: Format) -> dict[str, Any]:
    """Return what config.json says of a quantized checkpoint."""
    return {"quant_method": OWN_TYPE, "format": format, "version": VERSION}


def plain_parameters(folder: Path, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the parameters of a checkpoint that is not quantized, as they are stored.

    Of fused tensors, ours are parts; transposed ones are views. Each is given back to the system
    afterwards: what was touched of it costs memory no longer, and comes again when it is touched.

    Raises: CheckpointError.
    """
    model_type = read_json(folder / "config.json")["model_type"]
    tensors, shapes = Tensors(folder), parameter_shapes(config)
    for item in check_fit(config, model_type, tensors.shapes, folder):
        whole = tensors.read(item.name)
        whole = whole.T if item.transposed else whole
        first = 0
        for part in item.parts:
            last = first + shapes[part][0]
            yield part, whole[first:last]
            first = last
        tensors.release(item.name)


def _converted(
    folder: Path, config: ModelConfig, format: Format | None
) -> Iterator[tuple[str, Matrix | np.ndarray]]:
    """Yield the parameters in a format. Raises: CheckpointError if one cannot be said in it."""
    arena = Arena()
    for name, values in plain_parameters(folder, config):
        if values.ndim == 1:
            yield name, np.array(widen(values))
            continue
        stored = PLAIN.get(values.dtype.name)
        wanted = format_of(name, format) if format else stored or "f32"
        if wanted == stored:
            rows, columns = values.shape
            data = np.ascontiguousarray(values)
            yield name, Matrix(format=wanted, rows=rows, columns=columns, data=data)
        else:
            yield name, pack_parameter(name, values, wanted, folder, arena.empty)


def pack_parameter(
    name: str, values: np.ndarray, format: Format, folder: Path, empty: Empty = np.empty
) -> Matrix:
    """Pack a parameter. Raises: CheckpointError naming it if its numbers cannot be."""
    try:
        return pack(values, format, empty)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {name} {error}") from None


def _check_quantized(
    folder: Path, shapes: Mapping[str, Shape], format: Format, tensors: Tensors
) -> dict[str, Format]:
    """Return the format of each parameter of a quantized checkpoint.

    Raises: CheckpointError if a tensor is missing or of another shape.
    """
    formats: dict[str, Format] = {name: format_of(name, format) for name in shapes}
    for name in formats:  # in int4, any matrix of a block may have int8, of four dimensions
        if format == "int4" and name.startswith("blocks.") and name in tensors.places:
            formats[name] = "int8" if len(tensors.places[name].shape) == 4 else "int4"
    expected = quantized_layout(shapes, formats)
    found = {name: (place.kind, place.shape) for name, place in tensors.places.items()}
    for name in expected.keys() | found.keys():
        if found.get(name) != expected.get(name):
            there, wanted = (
                f"{at[0]} {' × '.join(map(str, at[1]))}" if at else "nothing"
                for at in (found.get(name), expected.get(name))
            )
            raise CheckpointError(
                f"{folder}: {name} is {there:.200}, but config.json asks for {wanted}"
            )
    return formats


def _quantized(
    folder: Path, shapes: Mapping[str, Shape], formats: Mapping[str, Format], tensors: Tensors
) -> Iterator[tuple[str, Matrix | np.ndarray]]:
    """Yield the parameters of a quantized checkpoint. Raises: CheckpointError if it is damaged."""
    for name, shape in shapes.items():
        data = tensors.read(name)
        if len(shape) == 2:
            rows, columns = shape
            scale = tensors.read(f"{name}.scale")
            if not ((scale.view(np.uint16) & INFINITE) != INFINITE).all():
                raise CheckpointError(
                    f"{folder}: {name}.scale holds NaN or infinity; the checkpoint is damaged, make"
                    " it again with `lm quantize`"
                )
            kind = formats[name]
            data = Matrix(format=kind, rows=rows, columns=columns, data=data, scale=scale)
        yield name, data


def quantized_layout(
    shapes: Mapping[str, Shape], formats: Mapping[str, Format]
) -> dict[str, tuple[str, Shape]]:
    """Return type and shape of each tensor of a quantized checkpoint, in the order on disk.

    Scales and vectors come last: all matrices then begin at a multiple of 64 bytes.
    """
    layout: dict[str, tuple[str, Shape]] = {}
    scales: dict[str, tuple[str, Shape]] = {}
    for name, shape in shapes.items():
        if len(shape) == 2:
            data, scale = packed_shapes(formats[name], *shape)
            assert scale is not None
            layout[name], scales[f"{name}.scale"] = ("U8", data), ("F16", scale)
    vectors = {name: ("F32", shape) for name, shape in shapes.items() if len(shape) == 1}
    return layout | scales | vectors
