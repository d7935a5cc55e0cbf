"""adapter_config.json: what an adapter is, and which model it needs. Needs no torch.

{"peft_type": "LORA", "base_model_name_or_path": "../../smollm2", "r": 16, "lora_alpha": 32, …}

The layout is PEFT's. It names the base and does not prove it, so our manifest adds what does:
"base": {"weights": digest, "held": how they lay in memory, "trained": how many parameters}.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError
from engine.files import sha256
from engine.manifest import read_json, read_manifest

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MERGE = "merge it first: lm merge {} -o OUT"

# Settings that `engine/adapter.py` follows, or that change nothing in what an adapter does. Any
# other is refused, unless it is off.
FOLLOWED = {"peft_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "bias"}
FOLLOWED |= {"rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"}
HARMLESS = {"task_type", "inference_mode", "peft_version", "revision", "auto_mapping"}
HARMLESS |= {"fan_in_fan_out"}  # how the base lies in memory there
HARMLESS |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
HARMLESS |= {"megatron_core", "qalora_group_size", "runtime_config"}  # always there, unused
# Ways to begin that leave the base's weights as they are.
BEGINNINGS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The model that an adapter needs."""

    folder: Path
    family: str  # model_type of its config.json
    known: bool  # it is proved to be what the adapter was trained beside; else nothing says so
    int8: bool  # they were held in 8 bits


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder holds an adapter rather than a whole model."""
    return (folder / CONFIG).is_file()


def find_base(folder: Path) -> Base:
    """Find the model that an adapter needs, and compare its weights with what the manifest says.

    Raises: CheckpointError if it is gone, another one by now, or an adapter itself.
    """
    facts, path = recorded(folder), _base_folder(folder)
    if is_adapter(path):
        raise CheckpointError(f"{folder}: its base {path} is an adapter; {MERGE.format(path)}")
    digest, then = weights_digest(path), facts.get("weights")
    if then not in (None, digest):
        raise CheckpointError(
            f"{folder}: its base {path} has other weights than those it was trained beside (digest"
            f" {digest[:12]}, then {str(then)[:12]}); bring those back, or finetune anew"
        )
    family = read_json(path / "config.json").get("model_type")
    return Base(
        folder=path, family=family, known=then is not None, int8=facts.get("held") == "int8"
    )


def holder(folder: Path, name: str) -> Path:
    """Return the folder that holds a file of a model: this one, or the base of an adapter."""
    return _base_folder(folder) if is_adapter(folder) and not (folder / name).is_file() else folder


def weights_digest(folder: Path) -> str:
    """Return one sha256 for all the weight files of a checkpoint, from its manifest."""
    files = read_manifest(folder, hash_up_to=0)["files"]
    sums = sorted(
        entry["sha256"]
        for name, entry in files.items()
        if "/" not in name and name.endswith(".safetensors")
    )
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()


def weights_stamp(folder: Path) -> str:
    """Return size and time of the weight files: digests of the manifest only say what they were."""
    whole = find_base(folder).folder if is_adapter(folder) else folder
    files = sorted({*folder.glob("*.safetensors"), *whole.glob("*.safetensors")})
    return " ".join(f"{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files)


def model_digest(folder: Path) -> str:
    """Return one sha256 for all that a model computes by: weights, config, an adapter put on."""
    sums, whole = [], folder
    if is_adapter(folder):
        sums = [sha256(folder / name) for name in (CONFIG, WEIGHTS)]
        whole = find_base(folder).folder
    sums += [sha256(whole / "config.json"), weights_digest(whole)]
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json. Raises: CheckpointError naming what is not plain LoRA."""
    where = folder / CONFIG
    raw = read_json(where)
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        raise CheckpointError(f"{where}: not the config of a LoRA; other adapters are not read")
    plain = {"bias": ("none", None), "init_lora_weights": BEGINNINGS}
    for key, value in raw.items():
        known = key in FOLLOWED | HARMLESS and not (key in plain and value not in plain[key])
        if value and not known:
            raise CheckpointError(
                f"{where}: {key}={value!r:.80} is not supported, only plain LoRA is; merge it with"
                " the program that made it and import the result"
            )
    defaults = {"lora_dropout": 0.0, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    config: dict[str, Any] = {"r": None, "lora_alpha": None} | raw
    config |= {key: default for key, default in defaults.items() if config.get(key) is None}
    patterns = (config["rank_pattern"], config["alpha_pattern"])
    if not all(isinstance(pattern, dict) for pattern in patterns):
        raise CheckpointError(f"{where}: rank_pattern and alpha_pattern must be JSON objects")
    for rank in (config["r"], *patterns[0].values()):
        if type(rank) is not int or not 1 <= rank <= 1 << 20:
            raise CheckpointError(f"{where}: rank {rank!r:.40} must be a whole number above 0")
    for number in (config["lora_alpha"], *patterns[1].values()):
        if type(number) not in (int, float) or not abs(number) < 1e9:
            raise CheckpointError(f"{where}: lora_alpha {number!r:.40} must be a number")
    share = config["lora_dropout"]
    if type(share) not in (int, float) or not 0 <= share < 1:
        raise CheckpointError(f"{where}: lora_dropout {share!r:.40} must be a share below 1")
    return config


def recorded(folder: Path) -> Mapping[str, Any]:
    """Return what the manifest says of the base; nothing for an adapter that PEFT wrote."""
    if not (folder / "manifest.json").exists():
        return {}
    facts = read_manifest(folder).get("base")
    return facts if isinstance(facts, dict) else {}


def wanted_base(folder: Path) -> Path:
    """Return where an adapter says that its base lies: seen from the adapter, or from here."""
    name = read_adapter_config(folder).get("base_model_name_or_path")
    if not isinstance(name, str) or not name or "\0" in name:
        raise CheckpointError(f"{folder}/{CONFIG}: base_model_name_or_path names no base")
    seen = Path(os.path.normpath(folder.resolve() / name))
    # Unlike those of Path, this function takes names that no file can have.
    return Path(name) if not os.path.exists(seen) and os.path.exists(name) else seen


def _base_folder(folder: Path) -> Path:
    """Return where the base of an adapter lies. Raises: CheckpointError if it is not there."""
    path = wanted_base(folder)
    if os.path.isfile(path / "config.json"):
        return path
    if (folder / "manifest.json").exists():
        fix = f"bring it back, or say where it is now: ln -s NEW_PLACE {path}"
    else:
        fix = f"import it, and write its folder into base_model_name_or_path of {folder}/{CONFIG}"
    raise CheckpointError(f"{folder}: its base {path} is not there; {fix}")
