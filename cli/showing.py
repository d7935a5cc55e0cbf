"""What `lm show` says about a checkpoint, or about a model that is not imported yet."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cli.render import console, count, percent, size
from engine.adapter_config import find_base, holder, is_adapter
from engine.config import ModelConfig, Recipe
from engine.cost import kv_bytes_per_token, kv_fixed_bytes, parameters, train_flops
from engine.errors import CheckpointError
from engine.manifest import read_config, read_json, read_manifest
from engine.matrices import stored_format
from engine.recipe import flatten, to_dict

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes of a number
# Bytes beside weights, cache and logits: code, libraries, vectors of a prompt while it is read.
PROGRAM = {"native": 100_000_000, "torch": 300_000_000}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A model as far as headers and small files tell."""

    folder: Path
    family: str
    config: ModelConfig
    weight_bytes: int
    manifest: Mapping[str, Any]
    stored: str = ""  # how the weights lie on disk
    adapter: Mapping[str, Any] | None = None  # what it is, and its base
    imported: bool = True


def look(folder: Path) -> Shown:
    """Read a checkpoint's small files. Raises: CheckpointError if they are missing or damaged."""
    adapter = look_at_adapter(folder) if is_adapter(folder) else None
    bare = adapter and not (folder / "manifest.json").exists()  # as PEFT leaves it
    manifest = {} if bare else read_manifest(folder)
    home = holder(folder, "config.json")
    raw = read_json(home / "config.json")
    return Shown(
        folder=folder,
        family=raw["model_type"],
        config=read_config(home),
        weight_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        manifest=manifest,
        stored="float32" if adapter else stored_format(home) or str(raw.get("dtype", "")),
        adapter=adapter,
    )


def look_at_adapter(folder: Path) -> dict[str, Any]:
    """Describe an adapter, and say whether its base is there and the one that it needs."""
    from engine.adapter import describe

    try:
        known, problem = find_base(folder).known, ""
    except CheckpointError as error:
        known, problem = False, str(error)
    return describe(folder) | {"base_known": known, "problem": problem}


def look_outside(path: Path) -> Shown:
    """Read the headers of a GGUF file or a Hugging Face folder that is not imported."""
    from engine.interop.importing import NO_LICENCE
    from engine.interop.source import open_source

    source = open_source(path)
    return Shown(
        folder=path,
        family=str(source.config.get("model_type")),
        config=source.shape,
        weight_bytes=sum(spec.bytes for spec in source.specs.values()),
        manifest={"source": {"origin": str(path), "licence": source.licence or NO_LICENCE}},
        stored=source.stored,
        imported=False,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What generates from a model if nothing is said, and how weights and cache then lie."""

    by: str  # native, our own C, or torch
    dtype: str
    weights: int  # bytes
    kv: str


def runs_by(shown: Shown) -> Run:
    """Say how `lm generate` would run a model: our own C takes weights as they lie."""
    from cli.options import cache_folder
    from engine.generate.load import first_build, native_library
    from engine.kernels.compile import Unavailable

    total, cache = sum(parameters(shown.config).values()), cache_folder()
    folder = shown.folder if shown.imported else None
    compiles = first_build(folder, "auto", "auto", cache)  # which showing leaves to generating
    if compiles or not isinstance(native_library(folder, "auto", "auto", cache), Unavailable):
        if dtype := SHORT.get(shown.stored):
            return Run(by="native", dtype=dtype, weights=WIDTH[dtype] * total, kv="fp16")
        # A GGUF file's weights are fp32 once it is imported, and `weight_bytes` says so.
        dtype = shown.stored if shown.imported else "fp32"
        return Run(by="native", dtype=dtype, weights=shown.weight_bytes, kv="fp16")
    from engine.hardware import has_fast_bf16, pick_device

    half = SHORT.get(shown.stored) in ("bf16", "fp16")
    dtype = "bf16" if half and has_fast_bf16(pick_device("auto")) else "fp32"
    return Run(by="torch", dtype=dtype, weights=WIDTH[dtype] * total, kv=dtype)


def as_json(shown: Shown) -> dict[str, Any]:
    """Return all of it for --json."""
    groups, run = parameters(shown.config), runs_by(shown)
    return {
        "folder": str(shown.folder),
        "family": shown.family,
        "parameters": groups | {"total": sum(groups.values())},
        "config": dataclasses.asdict(shown.config),
        "weight_bytes": shown.weight_bytes,
        "stored": shown.stored,
        "kv_bytes_per_token": kv_bytes_per_token(shown.config, WIDTH[run.kv]),
        "kv": run.kv,
        "tokenizer": tokenizer_facts(shown.folder),
        "manifest": dict(shown.manifest),
    } | ({"adapter": dict(shown.adapter)} if shown.adapter else {})


def print_shown(shown: Shown) -> None:
    """Write it for a person."""
    out, config, run = _plain(), shown.config, runs_by(shown)
    groups = parameters(config)
    total = sum(groups.values())
    out(f"{shown.folder}  {shown.family}", style="bold")
    if shown.adapter:
        _print_adapter(out, shown.adapter)
    out(
        f"shape      {config.n_layers} layers × {config.d_model}, {config.n_heads} heads of"
        f" {config.head_dim}, {config.n_kv_heads} kv heads, mlp {config.d_ff} {config.activation}"
    )
    out(f"details    {_details(config)}")
    out(f"context    {config.max_seq_len:,} tokens, vocabulary {config.vocab_size:,}")
    out(f"parameters {total:,}")
    for name, number in groups.items():
        out(f"  {name:<10} {number:>12,}  {number / total:6.1%}")
    out(f"weights    {size(shown.weight_bytes)}, {shown.stored}")
    out(
        f"cost       {count(train_flops(config, config.max_seq_len))} FLOP to train a token,"
        f" {size(kv_bytes_per_token(config, WIDTH[run.kv]))} of {run.kv} cache per token"
    )
    facts = tokenizer_facts(shown.folder)
    if facts:
        ends = ", ".join(facts["ends"]) or "none"
        out(f"tokenizer  {facts['tokens']:,} tokens, {facts['kind']}; ends with {ends}")
        out(f"template   {'chat template' if facts['template'] else 'none: a base model'}")
    _print_origin(out, shown)


def _plain() -> Callable[..., None]:
    """Return a function that prints a line as it is: names may hold what rich takes for markup."""
    return partial(console().print, markup=False, emoji=False)


def _print_origin(out: Callable[..., None], shown: Shown) -> None:
    """Say where a model comes from: its data and training, or the place it was imported from."""
    manifest = shown.manifest
    if source := manifest.get("source"):
        out(f"from       {source['origin']}")
        out(f"licence    {source['licence']}")
    elif "step" in manifest:
        _print_training(out, shown)
    if made := manifest.get("quantized"):
        out(f"quantized  to {made['format']} from {made['folder']}")
        out(f"           relative error {percent(made['mean_error'])} in the mean of all matrices")
    for name, entry in sorted(manifest.get("files", {}).items()):
        out(f"file       {entry['sha256'][:12]}  {entry['bytes']:>13,}  {name}")


def _print_adapter(out: Callable[..., None], adapter: Mapping[str, Any]) -> None:
    """Say what an adapter adds to which model."""
    out(
        f"adapter    LoRA of rank {adapter['rank']}, alpha {adapter['alpha']:g}, beside"
        f" {', '.join(adapter['targets'])}"
    )
    out(f"trained    {adapter['parameters']:,} parameters, beside matrices in {adapter['held']}")
    proof = "its weights are those it was trained beside"
    if not adapter["base_known"]:
        proof = adapter["problem"] or "unproved: nothing says which weights it was trained beside"
    out(f"base       {adapter['base']}")
    out(f"           {proof}")


def _print_training(out: Callable[..., None], shown: Shown) -> None:
    """Say what a model was trained on and how it came out."""
    manifest = shown.manifest
    if data := manifest.get("data", {}):
        side = data["train"]  # documents of a corpus, or rows that a model was tuned on
        units = f"{side['documents']:,} documents" if "documents" in side else f"{side['rows']:,}"
        units += "" if "documents" in side else f" rows, {side['learned']:,} learned"
        out(
            f"data       {data['source']}: {side['tokens']:,} tokens of {units}, digest"
            f" {data['digest'][:12]}"
        )
        out(f"held out   {data['held_out']}")
    out(
        f"trained    step {manifest['step']:,}, {manifest.get('tokens_seen') or 0:,} tokens,"
        f" {manifest.get('train_seconds') or 0:,.0f} s"
    )
    if manifest.get("valid_bpb"):
        out(f"held-out   {manifest['valid_bpb']:.4f} bits per byte, as scored on the way")
    for key, value in _differences(shown.folder):
        out(f"recipe     {key} = {value}")
    parent = manifest.get("parent")
    lineage = f"{parent['folder']}, weights {parent['weights'][:12]}" if parent else ""
    out(f"lineage    {lineage or 'trained from nothing'}")
    versions = manifest.get("machine", {})
    out("made with  " + ", ".join(f"{name} {value}" for name, value in versions.items()))


def _details(config: ModelConfig) -> str:
    """Name what sets this model apart from a plain one."""
    said = [config.norm_placement + "-" + config.norm]
    if config.position == "rope":
        said.append(f"rope θ {config.rope_theta:g}")
        if config.rope_scaling.kind != "none":
            said.append(f"{config.rope_scaling.kind} × {config.rope_scaling.factor:g}")
    else:
        said.append(f"positions {config.position}")
    if config.qk_norm != "none":
        said.append(f"q/k norm per {config.qk_norm}")
    if config.sliding_window:
        windowed = sum(config.window(layer) > 0 for layer in range(config.n_layers))
        said.append(f"window {config.sliding_window:,} in {windowed} layers")
    if config.logit_softcap or config.attention_softcap:
        said.append("soft caps")
    said.append("tied head" if config.tie_embeddings else "own head")
    return ", ".join(said)


def tokenizer_facts(folder: Path) -> dict[str, Any]:
    """Describe the tokenizer of a folder; nothing if it has none."""
    from engine.text.tokenizer import load_tokenizer

    folder = holder(folder, "tokenizer.json")
    if not (folder.is_dir() and (folder / "tokenizer.json").is_file()):
        return {}
    tokenizer = load_tokenizer(folder)
    return {
        "tokens": tokenizer.vocab_size,
        "kind": type(tokenizer.inner.model).__name__,
        "exact": tokenizer.exact,
        "ends": sorted(tokenizer.special.get(token, str(token)) for token in tokenizer.ends),
        "template": tokenizer.template is not None,
    }


def fit(shown: Shown) -> dict[str, Any]:
    """Say what running a model takes and how long a context fits this machine's free memory."""
    from engine.pages import free_memory

    config, run, free = shown.config, runs_by(shown), free_memory()
    per_token = kv_bytes_per_token(config, WIDTH[run.kv])
    fixed = kv_fixed_bytes(config, WIDTH[run.kv])
    scratch = 4 * config.vocab_size + PROGRAM[run.by]
    room = free - run.weights - fixed - scratch
    longest = config.max_seq_len if not per_token else room // per_token
    return {
        "free": free,
        "by": run.by,
        "weights": run.weights,
        "dtype": run.dtype,
        "kv": run.kv,
        "kv_per_token": per_token,
        "kv_windows": fixed,
        "scratch": scratch,
        "fits": room > 0,
        "largest_context": int(max(0, min(config.max_seq_len, longest))),
    }


def print_fit(shown: Shown) -> None:
    """Write the memory estimate for a person."""
    out, found, config = _plain(), fit(shown), shown.config
    out(f"free memory   {size(found['free'])}")
    out(f"weights       {size(found['weights'])} as {found['dtype']}")
    by = "our own C" if found["by"] == "native" else "torch"
    out(f"runtime       {size(found['scratch'])} for the program, by {by}, logits and scratch")
    cache = f"{size(found['kv_per_token'])} per token in {found['kv']}"
    if found["kv_windows"]:
        cache += f" + {size(found['kv_windows'])} for windows"
    whole = found["kv_per_token"] * config.max_seq_len + found["kv_windows"]
    out(f"kv cache      {cache}; {size(whole)} at {config.max_seq_len:,} tokens")
    if not found["fits"]:
        out("does not fit: the weights alone need more than is free", style="bold")
    elif found["largest_context"] == config.max_seq_len:
        out(f"fits          at its whole context of {config.max_seq_len:,} tokens")
    else:
        out(f"fits          up to a context of {found['largest_context']:,} tokens")


def _differences(folder: Path) -> list[tuple[str, object]]:
    """Return the recipe fields that are not at their default, the model's shape aside.

    Read as plain YAML: a recipe of another version may have fields that this one has not.
    """
    import yaml

    file = folder / "recipe.yaml"
    tree = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    defaults = flatten(to_dict(Recipe()))
    return sorted(
        (key, value)
        for key, value in flatten(tree or {}).items()
        if defaults.get(key) != value and not key.startswith("model.")
    )
