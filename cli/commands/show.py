"""`lm show`: what a checkpoint is, where it comes from, what it costs."""

from pathlib import Path
from typing import Annotated

import typer

from cli.options import Json


def show(
    model: Annotated[str, typer.Argument(help="Checkpoint: folder, or name under checkpoints/.")],
    as_json: Json = False,
) -> None:
    """Show a checkpoint: shape, parameters, lineage.

    \b
    lm show stdlib
    lm show checkpoints/stdlib/last --json | jq .parameters
    """
    import dataclasses

    from cli.options import CHECKPOINTS
    from cli.render import console, count, emit_json, size
    from engine.checkpoint import read_config, read_manifest
    from engine.cost import kv_bytes_per_token, parameters, train_flops
    from engine.model.config_json import family_of
    from engine.runs import find

    folder = find(model, CHECKPOINTS)
    manifest = read_manifest(folder)
    config = read_config(folder)
    groups = parameters(config)
    if as_json:
        emit_json(
            "show",
            {
                "folder": str(folder),
                "family": family_of(config),
                "parameters": groups | {"total": sum(groups.values())},
                "config": dataclasses.asdict(config),
                "kv_bytes_per_token": kv_bytes_per_token(config),
                "manifest": manifest,
            },
        )
        return
    out = console()
    total = sum(groups.values())
    out.print(f"[bold]{folder}[/]  {family_of(config)}, every file matches its sha256")
    out.print(
        f"shape      {config.n_layers} layers × {config.d_model}, {config.n_heads} heads of"
        f" {config.head_dim}, {config.n_kv_heads} kv heads, mlp {config.d_ff} {config.activation}"
    )
    out.print(f"context    {config.max_seq_len:,} tokens, vocabulary {config.vocab_size:,}")
    out.print(f"parameters {total:,}")
    for name, number in groups.items():
        out.print(f"  {name:<10} {number:>12,}  {number / total:6.1%}")
    out.print(
        f"cost       {count(train_flops(config, config.max_seq_len))}FLOP to train a token,"
        f" {size(kv_bytes_per_token(config))} of cache per token"
    )
    data = manifest.get("data", {})
    if data:
        out.print(
            f"data       {data['source']}: {data['train']['tokens']:,} tokens of"
            f" {data['train']['documents']:,} documents, digest {data['digest'][:12]}"
        )
        out.print(f"held out   {data['held_out']}")
    out.print(
        f"trained    step {manifest['step']:,}, {manifest.get('tokens_seen') or 0:,} tokens,"
        f" {manifest.get('train_seconds') or 0:,.0f} s"
    )
    if manifest.get("valid_bpb"):
        out.print(f"held-out   {manifest['valid_bpb']:.4f} bits per byte, as scored on the way")
    for key, value in _differences(folder):
        out.print(f"recipe     {key} = {value}")
    parent = manifest.get("parent")
    out.print(f"lineage    {parent or 'trained from nothing'}")
    versions = manifest.get("versions", {})
    out.print("made with  " + ", ".join(f"{name} {value}" for name, value in versions.items()))


def _differences(folder: Path) -> list[tuple[str, object]]:
    """Return the recipe fields that are not at their default, the model's shape aside.

    Read as plain YAML: a recipe of another version may have fields that this one has not.
    """
    import yaml

    from engine.config import Recipe
    from engine.recipe import flatten, to_dict

    file = folder / "recipe.yaml"
    tree = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    defaults = flatten(to_dict(Recipe()))
    return sorted(
        (key, value)
        for key, value in flatten(tree or {}).items()
        if defaults.get(key) != value and not key.startswith("model.")
    )
