"""Checkpoints: a Hugging Face folder that other engines read, plus what an exact resume needs.

    checkpoints/NAME/                a run
      recipe.yaml  metrics.jsonl     the resolved recipe; one line per step and evaluation
      last -> step-000500            the newest checkpoint; what --resume continues
      best -> step-000500            the lowest held-out loss; what -m NAME loads
      step-000500/                   a checkpoint:
        config.json model.safetensors tokenizer.json tokenizer_config.json generation_config.json
        recipe.yaml manifest.json    sha256 of every file, data and versions it came from
        state/                       optimizer.safetensors, state.json

A checkpoint is written under a temporary name, flushed to disk and renamed, then the links are
swapped: whatever happens, the previous one stays whole. Nothing is pickled.
"""

import dataclasses
import json
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

from engine.config import ModelConfig, SampleConfig
from engine.errors import CheckpointError, ResourceError
from engine.files import flush, point, sha256
from engine.model.families import family_of, from_config_json, tensor_name, to_config_json
from engine.model.transformer import Transformer
from engine.runs import tidy
from engine.text.tokenizer import Tokenizer, load_tokenizer


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
    model = snapshot.model
    family = family_of(model.config)
    # A tied head is the embedding itself: stored once, as other engines expect.
    tied = "lm_head.weight" if model.config.tie_embeddings else ""
    weights = {
        tensor_name(name, family): tensor.detach().contiguous().cpu()
        for name, tensor in model.state_dict().items()
        if name != tied
    }
    metadata = {"format": "pt"}
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata=metadata)
    optimizer = {name: tensor.contiguous().cpu() for name, tensor in snapshot.optimizer.items()}
    safetensors.torch.save_file(optimizer, folder / "state" / "optimizer.safetensors")
    end = snapshot.tokenizer.end_of_text
    ends = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    _write_json(folder / "config.json", to_config_json(model.config) | ends)
    sample = snapshot.sample
    _write_json(
        folder / "generation_config.json",
        ends
        | {
            "do_sample": sample.temperature > 0,
            "temperature": sample.temperature or 1.0,
            "top_k": sample.top_k,
            "top_p": sample.top_p,
            "min_p": sample.min_p,
            "repetition_penalty": sample.repetition_penalty,
            "max_new_tokens": sample.max_tokens,
        },
    )
    snapshot.tokenizer.save(folder, model.config.max_seq_len)
    (folder / "recipe.yaml").write_text(snapshot.recipe_yaml, encoding="utf-8")
    _write_json(folder / "state" / "state.json", dict(snapshot.state))
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    _write_json(
        folder / "manifest.json",
        {"schema": "lm/checkpoint/1", "step": snapshot.step}
        | dict(snapshot.facts)
        | {
            "files": {
                file.relative_to(folder).as_posix(): {
                    "bytes": file.stat().st_size,
                    "sha256": sha256(file),
                }
                for file in files
            }
        },
    )
    for path in (*files, folder / "manifest.json", folder / "state", folder):
        flush(path)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path, verify: bool = True) -> dict[str, Any]:
    """Read a checkpoint's manifest and, unless told otherwise, hash every file against it.

    Raises: CheckpointError naming the file that is missing, cut short or changed.
    """
    manifest = read_json(folder / "manifest.json")
    if not isinstance(manifest, dict) or "step" not in manifest or not manifest.get("files"):
        raise CheckpointError(f"{folder}/manifest.json: not a manifest; use another checkpoint")
    for name, expected in manifest.get("files", {}).items() if verify else ():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{folder}: {name} is missing; the checkpoint is incomplete")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(
                f"{file}: {size} bytes instead of {expected['bytes']}; the file is cut short or"
                " changed, use another checkpoint"
            )
        if sha256(file) != expected["sha256"]:
            raise CheckpointError(
                f"{file}: its sha256 differs from manifest.json; the file is corrupt or changed,"
                " use another checkpoint"
            )
    return manifest


def read_json(path: Path) -> Any:
    """Read a JSON file of a checkpoint. Raises: CheckpointError if missing or malformed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None


def read_config(folder: Path) -> ModelConfig:
    """Read the shape of a checkpoint's model."""
    return from_config_json(read_json(folder / "config.json"), str(folder / "config.json"))


def load_model(
    folder: Path, device: torch.device | str = "cpu", dropout: float = 0.0
) -> tuple[Transformer, Tokenizer]:
    """Load weights and tokenizer, verified against the manifest; the model is in eval mode.

    Raises: CheckpointError if anything is missing, corrupt or does not fit together.
    """
    read_manifest(folder)
    config = read_config(folder)
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model only"
            f" {config.vocab_size}"
        )
    weights = load_tensors(folder / "model.safetensors", device)
    with torch.device("meta"):
        model = Transformer(config, dropout)
    family = family_of(config)
    state = {}
    for name in model.state_dict():
        theirs = tensor_name(name, family)
        if name == "lm_head.weight" and config.tie_embeddings:
            theirs = tensor_name("embed_tokens.weight", family)
        if theirs not in weights:
            raise CheckpointError(f"{folder}: model.safetensors lacks {theirs}")
        state[name] = weights[theirs]
    model = model.to_empty(device=device)
    try:
        model.load_state_dict(state)
        if config.tie_embeddings:  # to_empty gave the head storage of its own
            model.lm_head.weight = model.embed_tokens.weight
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: the weights do not fit config.json: {error}") from None
    model.fill_tables()
    return model.eval(), tokenizer


def load_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file. Raises: CheckpointError if it is missing or malformed."""
    try:
        return safetensors.torch.load_file(path, device=str(device))
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


def sample_defaults(folder: Path) -> SampleConfig:
    """Return the sampling settings that a checkpoint was saved with."""
    raw = read_json(folder / "generation_config.json")
    return dataclasses.replace(
        SampleConfig(),
        temperature=raw["temperature"] if raw.get("do_sample", True) else 0.0,
        top_k=raw.get("top_k", 0),
        top_p=raw.get("top_p", 1.0),
        min_p=raw.get("min_p") or 0.0,
        repetition_penalty=raw.get("repetition_penalty", 1.0),
        max_tokens=raw.get("max_new_tokens", SampleConfig().max_tokens),
    )
