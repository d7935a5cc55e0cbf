"""A GGUF file as a Hugging Face folder and back: config.json and weights, one at a time."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.interop.gguf.config import architecture_of, check, complete, to_config, to_keys
from engine.interop.gguf.names import Slot, layout
from engine.interop.gguf.reader import GGUF, TYPES, TensorInfo
from engine.interop.gguf.rope import FREQS, LONG, SHORT
from engine.interop.gguf.writer import store

# dtype → (type of matrices, type of embedding and head, number of general.file_type). Five bits or
# fewer cost an embedding, which is often the head as well, more than they save.
DTYPES = {
    "f32": ("F32", "F32", 0),
    "f16": ("F16", "F16", 1),
    "bf16": ("BF16", "BF16", 32),
    "q8_0": ("Q8_0", "Q8_0", 7),
    "q4_0": ("Q4_0", "Q8_0", 2),
    "q4_1": ("Q4_1", "Q8_0", 3),
    "q5_0": ("Q5_0", "Q8_0", 8),
    "q5_1": ("Q5_1", "Q8_0", 9),
}
_SCALING = {"llama": {FREQS}, "phi3": {LONG, SHORT}}
# Buffers that old checkpoints hold beside their weights: masks, and frequencies that follow.
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


@dataclass(frozen=True, slots=True)
class Written:
    """What a file came to, and what its reader should know."""

    bytes: int
    tensors: int
    kept_f16: list[str]  # tensors whose rows no block of the type divides
    notes: list[str]


@dataclass(frozen=True, slots=True)
class _Draft:
    """A file that is about to be written, to be read back before it is."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    small: dict[str, Tensor]

    def tensor(self, name: str) -> Tensor:
        """Return a tensor that stands for rotary scaling."""
        return self.small[name]


def to_hf(gguf: GGUF) -> tuple[dict[str, Any], dict[str, str]]:
    """Describe a file in Hugging Face's words.

    Returns: config.json, and the name in the file of every weight by its name in a folder.
    Raises: CheckpointError naming a key or tensor that is missing, impossible or not understood.
    """
    config = to_config(gguf)
    slots = _slots(gguf, config)
    return config, {slot.hf: name for name, slot in slots.items()}


def hf_tensors(gguf: GGUF, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a folder one at a time, each changed back to what it was before.

    Raises: CheckpointError before the first, as `to_hf` does.
    """
    for name, slot in _slots(gguf, to_config(gguf)).items():
        exact = torch.float32 if slot.added else dtype
        yield slot.hf, slot.to_hf(gguf.tensor(name, exact)).to(dtype)


def _slots(gguf: GGUF, config: Mapping[str, Any]) -> dict[str, Slot]:
    """Hold the tensors of a file against those that its config asks for."""
    architecture = gguf.metadata["general.architecture"]
    slots = layout(architecture, config)
    for name, slot in slots.items():
        info = gguf.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{gguf.path}: lacks the tensor {name}; get a whole file")
        if info.shape != slot.shape:
            raise CheckpointError(
                f"{gguf.path}: {name} has the shape {info.shape}, its keys ask for {slot.shape};"
                " use another file"
            )
    for name in sorted(gguf.tensors.keys() - slots.keys() - _SCALING.get(architecture, set())):
        raise CheckpointError(
            f"{gguf.path}: the tensor {name!r} is not one of {architecture}'s; this file cannot be"
            " imported"
        )
    return slots


def write(
    path: Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer_metadata: Mapping[str, Any],
    dtype: str = "f16",
    extra: Mapping[str, Any] | None = None,
) -> Written:
    """Write a folder's config and weights (Hugging Face's names, any order) as one file.

    Matrices take `dtype`; vectors and learned positions stay f32, embedding and head at 8 bits or
    more, and f16 is for rows that a block does not divide. `extra` is for `general.*`: name, …

    Raises: CheckpointError if the model has no place in a GGUF file, or a weight is missing, double
        or misshapen; RecipeError if weights are too large for f16; ResourceError if the disk or an
        optional package fails.
    """
    full = complete(config)
    architecture = architecture_of(full)
    keys, small = to_keys(full)
    slots = layout(architecture, full)
    types = {name: _type(name, slot.shape, dtype) for name, slot in slots.items()}
    shapes = {name: (tuple(tensor.shape), "F32") for name, tensor in small.items()}
    shapes |= {name: (slot.shape, types[name]) for name, slot in slots.items()}
    metadata: dict[str, Any] = {"general.architecture": architecture, "general.type": "model"}
    for key, value in (extra or {}).items():
        metadata[key if "." in key else f"general.{key}"] = value
    metadata |= keys | {"general.file_type": DTYPES[dtype][2]}
    if dtype.startswith("q"):
        metadata["general.quantization_version"] = 2
    metadata |= tokenizer_metadata
    infos = {name: TensorInfo(name, shape, kind, 0, 0) for name, (shape, kind) in shapes.items()}
    check(full, to_config(_Draft(path, metadata, infos, small)))
    size = store(path, metadata, shapes, _renamed(tensors, slots, small, full))
    wanted = DTYPES[dtype][:2]
    kept = [name for name, kind in types.items() if kind == "F16" and "F16" not in wanted]
    notes = []
    if architecture in ("llama", "phi3") and full.get("sliding_window"):
        notes.append(
            f"llama.cpp ignores the attention window of {full['sliding_window']} in this family"
        )
    return Written(size, len(shapes), kept, notes)


def _type(name: str, shape: tuple[int, ...], dtype: str) -> str:
    """Choose how a tensor is stored."""
    matrix, ends, _ = DTYPES[dtype]
    if len(shape) == 1 or name == "position_embd.weight":
        return "F32"
    kind = ends if name in ("token_embd.weight", "output.weight") else matrix
    return "F16" if shape[-1] % TYPES[kind][1] else kind


def _renamed(
    tensors: Iterable[tuple[str, Tensor]],
    slots: Mapping[str, Slot],
    small: Mapping[str, Tensor],
    config: Mapping[str, Any],
) -> Iterator[tuple[str, Tensor]]:
    """Give the weights of a folder the names and the shape of a file; all of them, once each."""
    yield from small.items()
    places = {slot.hf: name for name, slot in slots.items()}
    given: set[str] = set()
    for hf, tensor in tensors:
        tied = hf == "lm_head.weight" and config["tie_word_embeddings"]
        if tied or hf.endswith(_BUFFERS):
            continue
        if hf not in places or hf in given:
            what = "is there twice" if hf in given else "is not one of this model"
            raise CheckpointError(f"the weight {hf} {what}; this folder cannot be written")
        slot = slots[places[hf]]
        shape = slot.shape[::-1] if slot.transposed else slot.shape
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"the weight {hf} has the shape {tuple(tensor.shape)}, config.json asks for {shape}"
            )
        given.add(hf)
        yield places[hf], slot.to_gguf(tensor)
    for hf in places:
        if hf not in given:
            raise CheckpointError(f"the weight {hf} is missing; this folder cannot be written")
