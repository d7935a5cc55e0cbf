"""Tiny models on disk in every form that an import reads, and as a checkpoint of ours."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from engine.checkpoint import SAMPLING
from engine.interop.exporting import to_gguf
from engine.interop.importing import Imported, bring_in
from engine.interop.source import open_source
from engine.model.config_json import family_of, stored_tensors, to_config_json
from engine.text.tokenizer import Tokenizer
from engine.weights import TensorSpec, write_weights
from tests.conftest import make_model

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CARD = "---\nlanguage: en\nlicense: apache-2.0\n---\n# A tiny model\n"


def write_folder(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    template: str | None = CHATML,
    shard_bytes: int = 10**9,
    dtype: torch.dtype = torch.float32,
    **shape,
) -> Path:
    """Write a folder as it is published: weights, config, tokenizer, template, card."""
    folder.mkdir(parents=True)
    model = make_model(**shape)
    state = model.state_dict()
    stored = list(stored_tensors(state, model.config, family_of(model.config)))
    tensors = [torch.cat([state[part] for part in item.parts]) for item in stored]
    tensors = [t.t() if item.transposed else t for item, t in zip(stored, tensors, strict=True)]
    specs = [
        TensorSpec(item.name, tuple(tensor.shape), dtype)
        for item, tensor in zip(stored, tensors, strict=True)
    ]
    assert list(write_weights(folder, specs, tensors, shard_bytes)) == specs
    words = to_config_json(model.config) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    end = tokenizer.end_of_text
    sampling = {SAMPLING["temperature"]: 0.7, SAMPLING["top_k"]: 40, "eos_token_id": end}
    for name, value in {
        "config.json": words | {"eos_token_id": end},
        "generation_config.json": sampling,
    }.items():
        (folder / name).write_text(json.dumps(value))
    tokenizer.save(folder, model.config.max_seq_len)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    (folder / "README.md").write_text(CARD)
    return folder


def write_gguf(path: Path, tokenizer: Tokenizer, dtype: str = "f32", **options) -> Path:
    """Write the same as a GGUF file, by way of a checkpoint."""
    folder = write_folder(path.parent / f"{path.stem}-folder", tokenizer, **options)
    checkpoint = imported(folder, path.parent / f"{path.stem}-checkpoint")
    to_gguf(checkpoint, path, dtype, "tiny")
    return path


def imported(source: Path, out: Path, **options) -> Path:
    """Import what lies somewhere; return the checkpoint."""
    events = bring_in(open_source(source), out, str(source), **options)
    return result_of(events).folder


def result_of(events: Iterator) -> Imported:
    """Run an import to its end."""
    *_, last = events
    assert isinstance(last, Imported)
    return last


def leftovers(folder: Path) -> list[str]:
    """Name everything below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
