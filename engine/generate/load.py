"""The one place where what generates is chosen: our own C, or torch.

Torch is imported only where it is needed: that takes longer than an answer of a small model.
"""

import hashlib
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from engine.adapter_config import is_adapter, model_digest, weights_stamp
from engine.config import ModelConfig
from engine.errors import RecipeError, ResourceError
from engine.generate.decoder import Weighed
from engine.generate.native import NativeDecoder
from engine.kernels.compile import Unavailable
from engine.kernels.decoder import Library, load_library, unbuilt
from engine.manifest import read_config
from engine.matrices import read_matrices, tokenizer_of
from engine.pages import Arena
from engine.quantize import Format, format_of, pack
from engine.text.tokenizer import Tokenizer

FORMATS: dict[str, Format | None] = {
    "auto": None,
    "fp32": "f32",
    "bf16": "bf16",
    "int8": "int8",
    "int4": "int4",
}


def load_decoder(
    folder: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    kernels: str = "auto",
    kv: str = "auto",
    cache: Path,
    threads: int = 0,
    layers: int = 0,
) -> tuple[Weighed, Tokenizer]:
    """Load a checkpoint to generate with, or a draft of it: its first `layers`, norm and head.

    `dtype` auto computes in the precision of the file; `kernels` torch keeps to torch; `kv` is how
    keys and values lie in memory; `cache` is where libraries built for this machine are kept.

    Raises: CheckpointError if the checkpoint is not whole; RecipeError for what torch cannot do.
    """
    library = native_library(folder, device, kernels, cache)
    if not isinstance(library, Unavailable):
        return _native(folder, library, dtype, kv, threads, layers)
    check_torch(dtype, kv, library)
    from engine.generate.reference import load_reference

    decoder, tokenizer = load_reference(folder, device, dtype, threads, layers)
    decoder.instead = "" if library.wanted else library.reason
    return decoder, tokenizer


def native_library(
    folder: Path | None, device: str, kernels: str, cache: Path
) -> Library | Unavailable:
    """Return the library that runs this checkpoint, or any whole model, or why torch has to."""
    reason = _without(folder, device, kernels)
    return Unavailable(reason, wanted=True) if reason else load_library(cache)


def first_build(folder: Path | None, device: str, kernels: str, cache: Path) -> str:
    """Say that loading will build our own C first, which takes a moment; else nothing."""
    compiler = "" if _without(folder, device, kernels) else unbuilt(cache)
    return compiler and f"building the decoder with {compiler}, once"


def check_torch(dtype: str, kv: str, library: Unavailable) -> None:
    """Refuse what torch cannot do, which has to stand in for the library.

    Raises: RecipeError if somebody wanted it so; ResourceError if this machine does.
    """
    for option, value, usual in (("dtype", dtype, ("auto", "fp32", "bf16")), ("kv", kv, ("auto",))):
        if value not in usual:
            kind = RecipeError if library.wanted else ResourceError
            raise kind(
                f"--{option} {value} needs our own kernels, which are not in use here:"
                f" {library.reason}"
            )


def pack_decoder(
    config: ModelConfig,
    parameters: Mapping[str, np.ndarray],
    library: Library,
    *,
    dtype: str = "auto",
    kv: str = "auto",
    threads: int = 0,
) -> NativeDecoder:
    """Make a decoder of parameters in memory; `dtype` auto is fp32."""
    format, arena = FORMATS[dtype] or "f32", Arena()
    weights = {
        name: pack(values, format_of(name, format), arena.empty) if values.ndim == 2 else values
        for name, values in parameters.items()
    }
    kv = "fp16" if kv == "auto" else kv
    return NativeDecoder(config, weights, library, kv=kv, threads=threads)


def _without(folder: Path | None, device: str, kernels: str) -> str:
    """Say why our own C is not even looked for; nothing if it is."""
    if kernels == "torch":
        return "--kernels torch was asked for"
    if device not in ("auto", "cpu") or (device == "auto" and _has_accelerator()):
        return "they run on the CPU; add --device cpu"
    if folder and is_adapter(folder):
        return "adapters run by torch; `lm merge` makes one model of it and its base"
    return ""


def _has_accelerator() -> bool:
    """Tell whether torch may find a GPU, without asking torch."""
    return sys.platform == "darwin" or os.path.exists("/dev/nvidiactl")


def _native(
    folder: Path, library: Library, dtype: str, kv: str, threads: int, layers: int
) -> tuple[NativeDecoder, Tokenizer]:
    """Map the weights and hand them to our own C."""
    config = read_config(folder)
    tokenizer = tokenizer_of(folder, config)
    weights = read_matrices(folder, config, FORMATS[dtype])
    if layers:
        config = _shorter(config, layers)
    kv = "fp16" if kv == "auto" else kv
    # What keys and values are to the bit: of these weights, in this format, by this C.
    facts = (
        f"{model_digest(folder)} {weights_stamp(folder)} {dtype} {kv} {layers} {library.path.name}"
    )
    identity = hashlib.sha256(facts.encode()).hexdigest()
    decoder = NativeDecoder(config, weights, library, kv=kv, identity=identity, threads=threads)
    return decoder, tokenizer


def _shorter(config: ModelConfig, layers: int) -> ModelConfig:
    """Return the shape of a model that ends after its first `layers`."""
    if not 0 < layers <= config.n_layers:
        raise ValueError(f"cannot take {layers} of {config.n_layers} layers")
    return replace(config, n_layers=layers)
