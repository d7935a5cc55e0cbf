"""Adapters on disk, in the layout of PEFT: what LoRA learned, and the name of the model it needs.

    adapter_config.json            rank, alpha, which matrices, where the base lies
    adapter_model.safetensors      base_model.model.<stored module>.lora_A.weight, …lora_B.weight

A family may store several of our matrices as one (q, k and v of GPT-2 and Phi-3). Their adapters
become one too: the A of each on top of each other, the B of each on the diagonal, so the rank is
the sum of theirs. The other way round, an adapter of such a matrix that is not of this form gives
every part the whole A.

`PeftModel.from_pretrained(base, folder)` reads what is written here. What PEFT wrote is read if it
is plain LoRA; a setting that is not understood is refused by name.
"""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from engine.adapter_config import (
    CONFIG,
    read_adapter_config,
    recorded,
    wanted_base,
    weights_digest,
)
from engine.errors import CheckpointError
from engine.manifest import write_json
from engine.model.config_json import Stored, stored_tensors
from engine.model.int8 import Int8Linear
from engine.model.lora import LoraLinear, projections
from engine.model.transformer import Transformer
from engine.weights import TensorSpec, Weights

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


def describe(folder: Path) -> dict[str, Any]:
    """Say what an adapter is, from small files and headers; its base may be gone."""
    facts, config = recorded(folder), read_adapter_config(folder)
    specs = Weights(folder, WEIGHTS).specs
    modules = {name.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for name in specs}
    return {
        "base": str(wanted_base(folder)),
        "base_weights": facts.get("weights"),
        "held": facts.get("held"),
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "targets": sorted({module.rsplit(".", 1)[-1] for module in modules}),
        "parameters": facts.get("trained") or sum(math.prod(s.shape) for s in specs.values()),
    }


def base_facts(model: Transformer, base: Path) -> dict[str, Any]:
    """Say for the manifest which weights an adapter was trained beside."""
    int8 = any(isinstance(module, Int8Linear) for module in model.modules())
    trained = [p.numel() for name, p in model.named_parameters() if name.endswith((".a", ".b"))]
    held = "int8" if int8 else "fp32"
    return {"weights": weights_digest(base), "held": held, "trained": sum(trained)}


def write_adapter(folder: Path, model: Transformer, base: Path, family: str) -> None:
    """Write the LoRA of a model; `family` is the model type in the base's config.json."""
    tensors: dict[str, Tensor] = {}
    suffixes, ranks, alphas = set(), {}, {}
    rank, alpha, dropout = 0, 0.0, 0.0
    for item in _stored(model, family):
        layers = [model.get_submodule(part.removesuffix(".weight")) for part in item.parts]
        lora = [layer for layer in layers if isinstance(layer, LoraLinear)]
        if not lora:
            continue
        module = item.name.removesuffix(".weight")
        tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.cat([x.a.detach() for x in lora]).cpu()
        wide = torch.block_diag(*(x.b.detach() for x in lora)).cpu()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = wide
        suffixes.add(suffix := ".".join(module.split(".")[-2:]))
        rank, alpha, dropout = lora[0].a.shape[0], lora[0].alpha, lora[0].dropout.p
        if len(lora) > 1:
            ranks[suffix], alphas[suffix] = len(lora) * rank, len(lora) * alpha
    transposed = any(item.transposed for item in _stored(model, family))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": os.path.relpath(base.resolve(), folder.resolve()),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": sorted(suffixes),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "fan_in_fan_out": transposed,
        "bias": "none",
        "inference_mode": True,
    }
    write_json(folder / CONFIG, config)
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def read_adapter(folder: Path, model: Transformer, family: str) -> None:
    """Freeze a model and put the adapter of a folder on it.

    Raises: CheckpointError if the keys match nothing, some are left over, shapes differ, or it is
    more than plain LoRA.
    """
    config, weights = read_adapter_config(folder), Weights(folder, WEIGHTS)
    left = dict(weights.specs)
    stored = {item.name.removesuffix(".weight"): item for item in _stored(model, family)}
    model.requires_grad_(False)
    for module, item in stored.items():
        names = [f"{PREFIX}{module}.lora_{side}.weight" for side in "AB"]
        specs = [left.pop(name, None) for name in names]
        if specs == [None, None]:
            continue
        rank, alpha = _strength(config, module)
        _check_shapes(folder, model, item, specs, names, rank)
        a, b = (weights.read(name) for name in names)
        _put_on(model, item, a, b, alpha, config["lora_dropout"])
    if left and len(left) == len(weights.specs):
        raise CheckpointError(
            f"{folder}: none of its {len(left)} keys fits this {family} model, for example"
            f" {min(left)}; it was made for another base"
        )
    if left or not weights.specs:
        raise CheckpointError(
            f"{folder}/{WEIGHTS}: {len(left)} keys have no place beside the blocks' matrices:"
            f" {min(left, default='it is empty')}"
        )
    for name in (*config["rank_pattern"], *config["alpha_pattern"]):
        if not any(_matches(name, module) for module in stored):
            raise CheckpointError(f"{folder}/{CONFIG}: pattern {name!r:.80} fits no matrix")


def _put_on(
    model: Transformer, item: Stored, a: Tensor, b: Tensor, alpha: float, dropout: float
) -> None:
    """Give each of the matrices that lie in one tensor its share of that tensor's adapter."""
    parts = [part.removesuffix(".weight") for part in item.parts]
    bases: list[Any] = [model.get_submodule(part) for part in parts]
    n = len(parts)
    rows = b.split([base.out_features for base in bases])
    shares = [(a, share) for share in rows]
    if n > 1 and a.shape[0] % n == 0:
        pieces = [share.chunk(n, dim=1) for share in rows]
        if not any(pieces[i][j].any() for i in range(n) for j in range(n) if i != j):
            alpha /= n
            shares = [(a.chunk(n)[i], pieces[i][i]) for i in range(n)]
    like = model.embed_tokens.weight
    for part, base, (share_a, share_b) in zip(parts, bases, shares, strict=True):
        layer = LoraLinear(base, share_a.shape[0], alpha, dropout)
        for ours, theirs in ((layer.a, share_a), (layer.b, share_b)):
            ours.data = theirs.to(device=like.device, dtype=like.dtype).clone()
        model.set_submodule(part, layer.train(model.training))


def _check_shapes(
    folder: Path,
    model: Transformer,
    item: Stored,
    specs: list[TensorSpec | None],
    names: list[str],
    rank: int,
) -> None:
    """Compare A and B with the matrix that they belong to. Raises: CheckpointError."""
    bases: list[Any] = [model.get_submodule(part.removesuffix(".weight")) for part in item.parts]
    expected = [(rank, bases[0].in_features), (sum(base.out_features for base in bases), rank)]
    for name, spec, shape in zip(names, specs, expected, strict=True):
        if spec is None:
            raise CheckpointError(f"{folder}/{WEIGHTS}: {name} is missing")
        if spec.shape != shape:
            raise CheckpointError(
                f"{folder}/{WEIGHTS}: {name} is {' × '.join(map(str, spec.shape))}, but base and"
                f" rank ask for {' × '.join(map(str, shape))}"
            )


def _stored(model: Transformer, family: str) -> Iterator[Stored]:
    """List the tensors that hold the matrices of the blocks."""
    ours = [f"{name}.weight" for name, _ in projections(model)]
    return stored_tensors(ours, model.config, family)


def _matches(pattern: str, module: str) -> bool:
    return module == pattern or module.endswith(f".{pattern}")


def _strength(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Return rank and alpha of a module, where patterns may give it its own."""
    rank, alpha = (
        next((value for name, value in config[key].items() if _matches(name, module)), usual)
        for key, usual in (("rank_pattern", config["r"]), ("alpha_pattern", config["lora_alpha"]))
    )
    # Rank-stabilised: alpha / √rank. Source: Kalajdzievski 2023, arXiv:2312.03732.
    return rank, alpha * math.sqrt(rank) if config["use_rslora"] else alpha
