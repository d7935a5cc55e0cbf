"""Checkpoints: a Hugging Face folder that other engines read, plus what an exact resume needs.

    checkpoints/NAME/                a run
      recipe.yaml  metrics.jsonl     the resolved recipe; one line per step and evaluation
      last -> step-000500            the newest checkpoint; what --resume continues
      best -> step-000500            the lowest held-out loss; what -m NAME loads
      step-000500/                   a checkpoint:
        config.json model.safetensors tokenizer.json tokenizer_config.json generation_config.json
        recipe.yaml manifest.json    sha256 of every file, data and versions it came from
        state/                       optimizer.safetensors, state.json

A model with LoRA is saved as an adapter (`engine/adapter.py`): its two files take the place of
model.safetensors, and loading it begins with the base that they name.

A checkpoint is written under a temporary name, flushed to disk and renamed, then the links are
swapped: whatever happens, the previous one stays whole. Nothing is pickled.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from engine.adapter import base_facts, read_adapter, write_adapter
from engine.adapter_config import find_base, holder, is_adapter
from engine.config import ModelConfig, SampleConfig
from engine.errors import CheckpointError, ResourceError
from engine.files import point
from engine.manifest import read_json, read_manifest, write_json, write_manifest
from engine.matrices import read_matrices, tokenizer_of
from engine.model.config_json import (
    Stored,
    from_config_json,
    is_quantized,
    stored_tensors,
    to_config_json,
)
from engine.model.int8 import quantize_linears
from engine.model.shapes import check_fit, parameter_shapes, stored_shape
from engine.model.transformer import Transformer
from engine.quantize import Matrix, unpack
from engine.runs import tidy
from engine.sampling_defaults import SAMPLING
from engine.text.tokenizer import Tokenizer
from engine.weights import TensorSpec, Weights, write_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All that a checkpoint holds."""

    step: int
    model: Transformer
    tokenizer: Tokenizer
    recipe_yaml: str
    sample: SampleConfig
    facts: Mapping[str, Any]  # lineage for the manifest: data, versions, figures
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]
    base: Path | None = None  # what a model with LoRA was trained beside, and is saved without


def save(run: Path, snapshot: Snapshot, best: bool) -> Path:
    """Write a checkpoint into the folder of a run and point `last`, and perhaps `best`, to it.

    Raises: ResourceError if it cannot be written; what was there before is untouched.
    """
    folder = run / f"step-{snapshot.step:06d}"
    temporary = run / f".{folder.name}.tmp"
    try:
        if not _is_whole(folder):
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / "state").mkdir(parents=True)
            _write_files(temporary, snapshot)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
        point(run / "last", folder.name)
        if best:
            point(run / "best", folder.name)
        tidy(run)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise ResourceError(
            f"{folder}: cannot save: {reason}; earlier checkpoints are untouched, make room or"
            " choose another folder with -o, then --resume"
        ) from None
    return folder


def _is_whole(folder: Path) -> bool:
    """Tell whether a folder is a finished checkpoint: it is renamed only when complete."""
    return (folder / "manifest.json").is_file()


def _write_files(folder: Path, snapshot: Snapshot) -> None:
    """Write every file of a checkpoint, the manifest with their hashes last, and flush to disk."""
    model, facts = snapshot.model, {"step": snapshot.step} | dict(snapshot.facts)
    if snapshot.base:
        config = read_json(snapshot.base / "config.json")
        write_adapter(folder, model, snapshot.base, config["model_type"])
        facts["base"] = base_facts(model, snapshot.base)
    else:
        config = to_config_json(model.config)
        write_model(folder, model, config["model_type"])
    optimizer = {name: tensor.contiguous().cpu() for name, tensor in snapshot.optimizer.items()}
    safetensors.torch.save_file(optimizer, folder / "state" / "optimizer.safetensors")
    tokenizer = snapshot.tokenizer
    end, first = tokenizer.end_of_text, tokenizer.bos
    stops = sorted(tokenizer.ends)
    ends = {
        "bos_token_id": end if first is None else first,
        "eos_token_id": stops if len(stops) > 1 else end,
        "pad_token_id": end,
    }
    write_json(folder / "config.json", config | ends)
    sample = snapshot.sample
    write_json(
        folder / "generation_config.json",
        ends
        | {"do_sample": sample.temperature > 0}
        | {theirs: getattr(sample, ours) for ours, theirs in SAMPLING.items()}
        | {"temperature": sample.temperature or 1.0},
    )
    tokenizer.save(folder, model.config.max_seq_len)
    (folder / "recipe.yaml").write_text(snapshot.recipe_yaml, encoding="utf-8")
    write_json(folder / "state" / "state.json", dict(snapshot.state))
    write_manifest(folder, facts)


def write_model(folder: Path, model: Transformer, model_type: str) -> None:
    """Write all weights of a model in fp32, under the names of a family."""
    state = model.state_dict()
    stored = list(stored_tensors(state, model.config, model_type))
    placed = {part for item in stored for part in item.parts} | {"lm_head.weight"}
    assert placed >= set(state), "a LoRA or 8-bit matrix has no place in a whole model"
    shapes = parameter_shapes(model.config)
    specs = [TensorSpec(item.name, stored_shape(item, shapes), torch.float32) for item in stored]
    for _ in write_weights(folder, specs, (_joined(item, state) for item in stored)):
        pass


def _joined(item: Stored, state: Mapping[str, Tensor]) -> Tensor:
    """Put our parameters together as they lie on disk."""
    parts = [state[part].detach() for part in item.parts]
    tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    return tensor.t() if item.transposed else tensor


def load_model(
    folder: Path,
    device: torch.device | str = "cpu",
    dropout: float = 0.0,
    dtype: torch.dtype | None = torch.float32,
) -> tuple[Transformer, Tokenizer]:
    """Load weights and tokenizer; the model is in eval mode.

    Weights stay mapped from disk where they lie in `dtype` (None: as stored) and on the CPU;
    quantized ones are widened (None: to fp32). Of an adapter, the base is loaded and held as it was
    in training, and the adapter put on.

    Raises: CheckpointError if anything is missing, corrupt or does not fit together.
    """
    if is_adapter(folder):
        return load_adapted(folder, device, dropout, dtype)
    read_manifest(folder)
    raw = read_json(folder / "config.json")
    config = from_config_json(raw, str(folder / "config.json"))
    tokenizer = tokenizer_of(folder, config)
    if is_quantized(raw):
        state = _widened(folder, config, device, dtype)
    else:
        state = _mapped(folder, config, raw["model_type"], device, dtype)
    with torch.device("meta"):
        model = Transformer(config, dropout)
    if config.tie_embeddings:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    if config.tie_embeddings:  # one parameter, not two over the same memory
        model.lm_head.weight = model.embed_tokens.weight
    return model.eval(), tokenizer


def _mapped(
    folder: Path,
    config: ModelConfig,
    model_type: str,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """Read the parameters of a checkpoint under our names."""
    weights, shapes = Weights(folder), parameter_shapes(config)
    state: dict[str, Tensor] = {}
    for item in check_fit(config, model_type, weights.shapes, folder):
        tensor = weights.read(item.name).to(device=device, dtype=dtype)
        tensor = tensor.t().contiguous() if item.transposed else tensor
        parts = tensor.split([shapes[part][0] for part in item.parts])
        state |= zip(item.parts, parts, strict=True)
    return state


def _widened(
    folder: Path, config: ModelConfig, device: torch.device | str, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Read the parameters of a quantized checkpoint as the numbers that they stand for."""
    return {
        name: torch.from_numpy(unpack(found) if isinstance(found, Matrix) else found).to(
            device=device, dtype=dtype
        )
        for name, found in read_matrices(folder, config, None).items()
    }


def load_adapted(
    folder: Path,
    device: torch.device | str = "cpu",
    dropout: float = 0.0,
    dtype: torch.dtype | None = torch.float32,
    *,
    as_trained: bool = True,
) -> tuple[Transformer, Tokenizer]:
    """Load the base of an adapter and put the adapter on; only `a` and `b` can be trained.

    With as_trained=False a base that was held in 8 bits is left at the precision of its file.

    Raises: CheckpointError, also if the base is gone or another one by now.
    """
    base = find_base(folder)
    int8 = as_trained and base.int8
    # Round what training rounded: the weights in fp32.
    model, _ = load_model(base.folder, device, dropout, torch.float32 if int8 else dtype)
    if int8:
        quantize_linears(model)
        for parameter in model.parameters():  # the scales are none, and stay in fp32
            parameter.data = parameter.data.to(dtype or parameter.dtype)
    read_adapter(folder, model, base.family)
    return model.eval(), tokenizer_of(holder(folder, "tokenizer.json"), model.config)


def load_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file. Raises: CheckpointError if it is missing or malformed."""
    try:
        return safetensors.torch.load_file(path, device=str(device))
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
