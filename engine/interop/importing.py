"""Bringing a published model in: checked, then streamed into a checkpoint folder of ours.

What is written is again a Hugging Face folder, with the weights under the same names, so that
transformers reads it too. Nothing is written before everything that can be checked was checked, and
the folder appears under its name only when it is whole.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.config import ModelConfig
from engine.errors import CheckpointError, RecipeError
from engine.files import sha256, whole_folder
from engine.interop.source import Source
from engine.manifest import write_manifest
from engine.model.families import FAMILIES
from engine.model.shapes import check_fit, parameter_shapes
from engine.sampling_defaults import sample_defaults
from engine.text.library import shorten
from engine.text.tokenizer import Tokenizer, load_tokenizer
from engine.weights import TensorSpec, check_room, write_weights

NO_LICENCE = "not stated"
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes of weights written so far, or otherwise dealt with."""

    done: int
    total: int
    doing: str = "writing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What came of an import, the last thing that `bring_in` yields."""

    folder: Path
    config: ModelConfig
    model_type: str
    parameters: int
    bytes: int
    licence: str
    stored: str
    template: bool  # has a chat template


def check_free(out: Path) -> None:
    """Refuse to write over something. Raises: RecipeError if `out` exists."""
    if os.path.lexists(out):
        raise RecipeError(f"{out} exists; remove it, or choose another place with -o")


def bring_in(
    source: Source, out: Path, origin: str, *, dtype: str = "auto", licence: str = ""
) -> Iterator[Progress | Imported]:
    """Write a source as a checkpoint in `out`; yields progress, then the result.

    `dtype` is how weights are stored: `auto` as they are in the source, quantized ones as f32,
    which holds exactly what the file says.

    Raises: CheckpointError for a model that is damaged or not understood; RecipeError if `out`
    exists; ResourceError if the disk is too small.
    """
    check_free(out)
    licence = source.licence or licence or NO_LICENCE
    model_type = source.config["model_type"]
    names, specs = _plan(source, dtype)
    total = sum(spec.bytes for spec in specs)
    beside = sum(file.stat().st_size for file in source.files.values() if isinstance(file, Path))
    check_room(out, total + beside + 50_000_000)
    with whole_folder(out) as folder:
        _write_files(source, folder, specs[0].dtype)
        tokenizer = _check_files(source, folder)
        shorten(folder / "tokenizer.json")
        done = 0
        for spec in write_weights(folder, specs, source.read(names)):
            done += spec.bytes
            yield Progress(done, total)
        write_manifest(folder, {"step": 0, "source": _lineage(source, origin, licence)})
    yield Imported(
        folder=out,
        config=source.shape,
        model_type=model_type,
        parameters=sum(math.prod(shape) for shape in parameter_shapes(source.shape).values()),
        bytes=total,
        licence=licence,
        stored=source.stored,
        template=tokenizer.template is not None,
    )


def _plan(source: Source, dtype: str) -> tuple[list[str], list[TensorSpec]]:
    """Hold a source's tensors against its config.

    Returns: the tensors to read, and what to write for each.
    """
    model_type = source.config["model_type"]
    prefix = _missing_prefix(source, model_type)
    there = {prefix + spec.name: spec.shape for spec in source.specs.values()}
    stored = check_fit(source.shape, model_type, there, source.path)
    names = [item.name.removeprefix(prefix) for item in stored]
    if source.kind == "gguf":  # streams in an order of its own
        wanted = set(names)
        names = [name for name in source.specs if name in wanted]
    found = [source.specs[name] for name in names]
    specs = [
        TensorSpec(prefix + spec.name, spec.shape, DTYPES.get(dtype, spec.dtype)) for spec in found
    ]
    return names, specs


def _check_files(source: Source, folder: Path) -> Tokenizer:
    """Read the small files as whoever uses the checkpoint will, and name the source if they fail.

    Raises: CheckpointError for a damaged one, or a tokenizer of more tokens than the model has.
    """
    try:
        sample_defaults(folder)
        tokenizer = load_tokenizer(folder)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(folder), str(source.path))) from None
    if tokenizer.vocab_size > source.shape.vocab_size:
        raise CheckpointError(
            f"{source.path}: the tokenizer has {tokenizer.vocab_size} tokens, the model only"
            f" {source.shape.vocab_size}"
        )
    return tokenizer


def _missing_prefix(source: Source, model_type: str) -> str:
    """Return `model.` or `transformer.` if a checkpoint of the bare decoder leaves it out."""
    if model_type not in FAMILIES:
        return ""
    prefix = next(iter(FAMILIES[model_type].tensors)).split(".")[0] + "."
    bare = not any(name.startswith(prefix) for name in source.specs)
    return prefix if bare else ""


def _write_files(source: Source, folder: Path, dtype: torch.dtype) -> None:
    """Write everything but the weights."""
    config = {key: value for key, value in source.config.items() if key != "torch_dtype"}
    config["dtype"] = str(dtype).removeprefix("torch.")
    text = json.dumps(config, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    for name, content in source.files.items():
        if isinstance(content, Path):
            shutil.copyfile(content, folder / name)
        else:
            (folder / name).write_text(content, encoding="utf-8")


def _lineage(source: Source, origin: str, licence: str) -> dict[str, Any]:
    """Say where a model comes from, so that it can be found and compared again."""
    return {
        "origin": origin,
        "format": source.kind,
        "stored": source.stored,
        "licence": licence,
        "files": {file.name: {"sha256": sha256(file)} for file in source.inputs},
    }
