"""Sending a checkpoint out: one GGUF file for llama.cpp, or a plain Hugging Face folder."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.adapter_config import MERGE, is_adapter
from engine.errors import CheckpointError
from engine.files import whole_folder
from engine.interop.gguf.folder import Written, write
from engine.interop.gguf.tokenizer import tokenizer_to_gguf
from engine.interop.importing import DTYPES, NO_LICENCE, check_free
from engine.manifest import read_config, read_json, read_manifest, write_json
from engine.matrices import refuse_quantized
from engine.model.shapes import check_fit
from engine.text.tokenizer import load_tokenizer
from engine.weights import TensorSpec, Weights, check_room, write_weights

GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
# What a folder for other programs has beside the weights; the run's own state stays at home.
PLAIN = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "LICENSE*",
    "NOTICE*",
    "README.md",
)


def to_gguf(folder: Path, out: Path, dtype: str, name: str) -> Written:
    """Write a checkpoint as a GGUF file, with tokenizer and chat template inside.

    Raises: CheckpointError if the model or tokenizer has no place in such a file; RecipeError if
    `out` exists; ResourceError if the disk refuses.
    """
    check_free(out)
    _refuse(folder)
    manifest = read_manifest(folder)
    tokenizer = load_tokenizer(folder)
    raw = read_json(folder / "config.json")
    settings = tokenizer.settings
    metadata = tokenizer_to_gguf(
        json.loads(tokenizer.to_json()), settings, raw["vocab_size"], tokenizer.template
    )
    extra: dict[str, Any] = {"name": name}
    if (licence := licence_of(manifest)) != NO_LICENCE:
        extra["license"] = licence
    stream = ((item, tensor.float()) for item, tensor in _tensors(folder))
    return write(out, raw, stream, metadata, dtype, extra)


def to_folder(folder: Path, out: Path, dtype: str) -> int:
    """Write a checkpoint as a plain Hugging Face folder; return the bytes of its weights.

    Raises: RecipeError if `out` exists; ResourceError if the disk refuses.
    """
    check_free(out)
    _refuse(folder)
    manifest = read_manifest(folder)
    weights = Weights(folder)
    specs = [
        TensorSpec(spec.name, spec.shape, DTYPES.get(dtype, spec.dtype))
        for spec in weights.specs.values()
    ]
    total = sum(spec.bytes for spec in specs)
    check_room(out, total)
    with whole_folder(out) as made:
        for pattern in PLAIN:
            for file in folder.glob(pattern):
                shutil.copyfile(file, made / file.name)
        config = read_json(folder / "config.json")
        config["dtype"] = str(specs[0].dtype).removeprefix("torch.")
        write_json(made / "config.json", config)
        licence = licence_of(manifest)
        if licence != NO_LICENCE and not any(made.glob("README.md")):
            # The card of a model, where hubs and `lm import` look for its licence.
            (made / "README.md").write_text(f"---\nlicense: {licence}\n---\n", encoding="utf-8")
        for _ in write_weights(made, specs, map(weights.read, weights.specs)):
            pass
    return total


def _refuse(folder: Path) -> None:
    """Raise CheckpointError if a folder holds no whole model, or one that was rounded."""
    if is_adapter(folder):
        raise CheckpointError(f"{folder}: is an adapter, not a whole model; {MERGE.format(folder)}")
    refuse_quantized(folder, "be exported")


def licence_of(manifest: Mapping[str, Any]) -> str:
    """Return the licence that a checkpoint came with."""
    source = manifest.get("source")
    return str(source.get("licence", NO_LICENCE)) if isinstance(source, Mapping) else NO_LICENCE


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield a checkpoint's tensors under their names on disk, held against its config first."""
    weights, config = Weights(folder), read_config(folder)
    model_type = read_json(folder / "config.json")["model_type"]
    for item in check_fit(config, model_type, weights.shapes, folder):
        yield item.name, weights.read(item.name)
