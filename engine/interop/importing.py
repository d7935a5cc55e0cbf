"""Bringing a published model in: checked, then streamed into a checkpoint folder of ours.

What is written is again a Hugging Face folder, with the weights under the same names, so that
transformers reads it too. Nothing is written before everything that can be checked was checked, and
the folder appears under its name only when it is whole.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint import check_fit
from engine.config import ModelConfig
from engine.errors import CheckpointError, RecipeError, ResourceError
from engine.files import sha256
from engine.interop.source import Source
from engine.manifest import write_manifest
from engine.model.config_json import from_config_json
from engine.model.families import FAMILIES
from engine.model.transformer import Transformer
from engine.text.tokenizer import load_tokenizer
from engine.weights import TensorSpec, check_room, write_weights

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes of weights written so far."""

    done: int
    total: int


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
    if out.exists() or out.is_symlink():
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
    where = str(source.path)
    licence = source.licence or licence or "not stated"
    config = from_config_json(source.config, f"{where}/config.json")
    model_type = source.config["model_type"]
    with torch.device("meta"):
        state = Transformer(config).state_dict()
    prefix = _missing_prefix(source, model_type)
    there = {prefix + name: spec for name, spec in source.specs.items()}
    stored = check_fit(state, config, model_type, _renamed(there), where)
    names = [item.name.removeprefix(prefix) for item in stored]
    if source.kind == "gguf":  # streams in an order of its own
        wanted = set(names)
        names = [name for name in source.specs if name in wanted]
    specs = [
        TensorSpec(prefix + name, source.specs[name].shape, _target(source.specs[name], dtype))
        for name in names
    ]
    total = sum(spec.bytes for spec in specs)
    check_room(out, total + 50_000_000)
    temporary = out.parent / f".{out.name}.importing"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write_files(source, temporary, specs[0].dtype)
        tokenizer = load_tokenizer(temporary)
        if tokenizer.vocab_size > config.vocab_size:
            raise CheckpointError(
                f"{where}: the tokenizer has {tokenizer.vocab_size} tokens, the model only"
                f" {config.vocab_size}"
            )
        done = 0
        for spec in write_weights(temporary, specs, source.read(names)):
            done += spec.bytes
            yield Progress(done, total)
        write_manifest(temporary, {"step": 0, "source": _lineage(source, origin, licence)})
        os.replace(temporary, out)
    except OSError as error:
        raise ResourceError(f"{out}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    parameters = sum(state[part].numel() for item in stored for part in item.parts)
    yield Imported(
        folder=out,
        config=config,
        model_type=model_type,
        parameters=parameters,
        bytes=total,
        licence=licence,
        stored=source.stored,
        template=tokenizer.template is not None,
    )


def _missing_prefix(source: Source, model_type: str) -> str:
    """Return `model.` or `transformer.` if a checkpoint of the bare decoder leaves it out."""
    if model_type not in FAMILIES:
        return ""
    prefix = next(iter(FAMILIES[model_type].tensors)).split(".")[0] + "."
    bare = not any(name.startswith(prefix) for name in source.specs)
    return prefix if bare else ""


def _renamed(specs: dict[str, TensorSpec]) -> list[TensorSpec]:
    return [TensorSpec(name, spec.shape, spec.dtype) for name, spec in specs.items()]


def _target(spec: TensorSpec, dtype: str) -> torch.dtype:
    return spec.dtype if dtype == "auto" else DTYPES[dtype]


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
