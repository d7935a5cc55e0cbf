"""Making a checkpoint smaller: its matrices rounded to int8 or int4, streamed into a new folder.

One matrix is held at a time; to calibrate, the whole model in fp32 beside the rounded one. What is
written is a checkpoint of ours, under our names and in the layout that our C maps
(`engine/matrices.py`); no other program reads it.
"""

import contextlib
import math
import os
import shutil
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.adapter_config import MERGE, is_adapter, weights_digest
from engine.calibrate import calibrate, perplexity
from engine.checkpoint import load_model
from engine.config import ModelConfig
from engine.data.corpora import Corpus
from engine.data.passages import Passages, gather
from engine.errors import CheckpointError, RecipeError
from engine.files import whole_folder
from engine.interop.exporting import PLAIN
from engine.interop.importing import Progress, check_free
from engine.manifest import read_config, read_json, read_manifest, write_json, write_manifest
from engine.matrices import (
    pack_parameter,
    plain_parameters,
    quantization,
    quantized_layout,
    stored_format,
)
from engine.model.config_json import QUANTIZATION
from engine.model.shapes import parameter_shapes
from engine.quantize import Format, Matrix, format_of, relative_error, widen
from engine.text.library import shorten
from engine.text.tokenizer import load_tokenizer
from engine.weights import DTYPES, TensorSpec, check_room, write_weights

LENGTH = 512  # tokens of a window to calibrate by


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """What came of it, the last thing that `quantize` yields."""

    folder: Path
    format: Format
    matrices: int
    bytes_before: int
    bytes: int
    mean_error: float  # of all matrices: ‖W - W'‖ / ‖W‖
    largest_error: float
    largest: str  # which matrix has that
    bits_per_weight: float
    calibration: dict[str, Any] | None = None  # by what text, and perplexity on other text


def quantize(
    folder: Path,
    out: Path,
    format: Format,
    *,
    force: bool = False,
    corpora: Sequence[Corpus] = (),
    windows: int = 32,
    fine: Sequence[str] = (),
) -> Iterator[Progress | Quantized]:
    """Write a checkpoint with its matrices rounded; yields progress, then the result.

    With corpora, int4 is calibrated by about this many windows of them. Matrices with one of the
    words `fine` in their name keep int8.

    Raises: CheckpointError if it is no whole, unrounded model; DataError if there is too little
    text; RecipeError if `out` exists, with `force` if that is not an earlier outcome and nothing
    else, or a word fits no matrix; ResourceError if the disk refuses.
    """
    _check_out(folder, out, force)
    if is_adapter(folder):
        raise CheckpointError(f"{folder}: is an adapter, not a whole model; {MERGE.format(folder)}")
    manifest = read_manifest(folder)
    if already := stored_format(folder):
        raise CheckpointError(f"{folder}: is quantized already, to {already}; take its original")
    config = read_config(folder)
    for word in fine:
        if not word or not any(
            word in name for name, shape in parameter_shapes(config).items() if shape[1:]
        ):
            raise RecipeError(f"{word!r}: no matrix of {folder} has a name with that")
    tokenizer = load_tokenizer(folder)
    specs = _plan(folder, config, format, fine)
    total = sum(spec.bytes for spec in specs)
    check_room(out, total + 50_000_000)
    ready: dict[str, Matrix] = {}
    calibration = None
    if corpora and format == "int4":
        if config.max_seq_len < 2:
            raise RecipeError(f"{folder}: has a context of 1 token; use --calibrate none")
        passages = gather(corpora, tokenizer, min(LENGTH, config.max_seq_len), windows)
        calibration = yield from _calibrate(folder, passages, ready, fine)
    errors: dict[str, float] = {}
    done = 0
    with whole_folder(out, replace=force) as made:
        tensors = _tensors(folder, config, format, ready, errors, fine)
        for spec in write_weights(made, specs, tensors):
            done += spec.bytes
            yield Progress(done, total)
        worst = max(errors, key=lambda name: errors[name])
        result = Quantized(
            folder=out,
            format=format,
            matrices=len(errors),
            bytes_before=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
            bytes=total,
            mean_error=sum(errors.values()) / len(errors),
            largest_error=errors[worst],
            largest=worst,
            bits_per_weight=8 * total / sum(map(math.prod, parameter_shapes(config).values())),
            calibration=calibration,
        )
        _write_small(folder, made, format)
        write_manifest(made, _lineage(folder, manifest, result))
    yield result


def _check_out(folder: Path, out: Path, force: bool) -> None:
    """Raise RecipeError if `out` is not free to be written."""
    if os.path.lexists(out) and out.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise RecipeError(f"{out} holds the model itself; choose another place with -o")
    if not os.path.lexists(out):
        return
    ours = False
    if not out.is_symlink():
        with contextlib.suppress(CheckpointError):
            ours = stored_format(out) is not None
    if not force:
        if ours:
            raise RecipeError(
                f"{out} exists; replace it with --force, or choose another place with -o"
            )
        check_free(out)
    if not ours:
        raise RecipeError(
            f"{out} exists and is no quantized checkpoint, the only thing that --force"
            " replaces; choose another place with -o"
        )
    if stray := _stray(out):
        raise RecipeError(
            f"{stray} is no part of the quantized checkpoint that --force would replace; move it"
            " away, or choose another place with -o"
        )


def _stray(folder: Path) -> Path | None:
    """Return a file of a checkpoint's folder that its manifest does not name, if there is one."""
    manifest = read_json(folder / "manifest.json") if (folder / "manifest.json").exists() else {}
    files = manifest.get("files") if isinstance(manifest, dict) else None
    known = {"manifest.json", *(files if isinstance(files, dict) else ())}
    for path in sorted(folder.rglob("*")):
        own = path.relative_to(folder).as_posix() in known
        if not own and (path.is_symlink() or not path.is_dir()):
            return path
    return None


def _plan(
    folder: Path, config: ModelConfig, format: Format, fine: Sequence[str]
) -> list[TensorSpec]:
    """List what is to be written: matrices in the order in which they are read, scales, vectors."""
    shapes = parameter_shapes(config)
    ordered = {name: shapes[name] for name, _ in plain_parameters(folder, config)}
    layout = quantized_layout(ordered, {name: format_of(name, format, fine) for name in ordered})
    return [TensorSpec(name, shape, DTYPES[kind]) for name, (kind, shape) in layout.items()]


def _calibrate(
    folder: Path, passages: Passages, ready: dict[str, Matrix], fine: Sequence[str]
) -> Generator[Progress, None, dict[str, Any]]:
    """Fill in all matrices, rounded with an eye on text; yields progress, returns what to tell.

    Raises: CheckpointError if a number cannot be rounded.
    """
    model, _ = load_model(folder)
    held, learned = (torch.from_numpy(each) for each in (passages.held, passages.learned))
    before = perplexity(model, held)
    total = sum(math.prod(s) for s in parameter_shapes(model.config).values() if len(s) == 2)
    done = 0
    try:
        for name, matrix in calibrate(model, learned, fine):
            ready[name] = matrix
            done += matrix.rows * matrix.columns
            yield Progress(4 * done, 4 * total, "calibrating")
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    return {
        "text": list(passages.sources),
        "digest": passages.digest,
        "tokens": learned.numel(),
        "held_out_bytes": passages.held_bytes,
        "perplexity_before": before,
        "perplexity": perplexity(model, held),
    }


def _tensors(
    folder: Path,
    config: ModelConfig,
    format: Format,
    ready: dict[str, Matrix],
    errors: dict[str, float],
    fine: Sequence[str],
) -> Iterator[Tensor]:
    """Yield what `_plan` lists, and note the error of each matrix; some are ready."""
    scales, vectors = [], []
    for name, values in plain_parameters(folder, config):
        if values.ndim == 1:
            vectors.append(torch.from_numpy(np.array(widen(values))))
            continue
        matrix = ready.pop(name, None)
        if matrix is None:
            matrix = pack_parameter(name, values, format_of(name, format, fine), folder)
        errors[name] = relative_error(values, matrix)
        assert matrix.scale is not None
        yield torch.from_numpy(matrix.data)
        scales.append(torch.from_numpy(matrix.scale))
    yield from scales
    yield from vectors


def _write_small(folder: Path, made: Path, format: Format) -> None:
    """Bring along everything but the weights, and say in config.json how those lie."""
    for pattern in (*PLAIN, "recipe.yaml"):
        for file in folder.glob(pattern):
            shutil.copyfile(file, made / file.name)
    shorten(made / "tokenizer.json")
    raw = read_json(folder / "config.json")
    write_json(made / "config.json", raw | {QUANTIZATION: quantization(format)})


def _lineage(folder: Path, manifest: dict[str, Any], result: Quantized) -> dict[str, Any]:
    """Keep what the original's manifest says of its making, and say what was done to it."""
    facts = {key: value for key, value in manifest.items() if key not in ("schema", "files")}
    made = {
        "folder": str(folder.resolve()),
        "weights": weights_digest(folder),
        "format": result.format,
        "mean_error": result.mean_error,
        "largest_error": {result.largest: result.largest_error},
    }
    if result.calibration:
        made["calibration"] = result.calibration
    assert math.isfinite(result.mean_error)
    return facts | {"quantized": made}
