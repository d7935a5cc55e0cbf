"""A checkpoint's parameters without torch: every family, stored as it may be, in every format."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from engine.checkpoint import write_model
from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.manifest import read_config, write_json, write_manifest
from engine.matrices import quantization, quantized_layout, read_matrices, stored_format
from engine.model.config_json import from_config_json, to_config_json
from engine.model.shapes import parameter_shapes
from engine.model.transformer import Transformer
from engine.pages import LARGE, PIECE
from engine.quantize import Format, Matrix, format_of, pack, unpack
from engine.tensors import SINGLE
from engine.weights import TensorSpec, Weights, write_weights
from tests.engine.model.test_families import CASES

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
SMALL = ModelConfig(vocab_size=300, d_model=40, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=36)


def sign(folder: Path) -> None:
    """Write the manifest of what is there."""
    (folder / "manifest.json").unlink(missing_ok=True)
    write_manifest(folder, {"step": 0})


def fill(model: Transformer) -> None:
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random))


def make(folder: Path, raw: dict, kind: str = "f32", shard_bytes: int = 10**9) -> dict:
    """Write a model of noise under its family's names; return its state."""
    folder.mkdir(exist_ok=True)
    model = Transformer(from_config_json(raw, "x"))
    fill(model)
    write_model(folder, model, raw["model_type"])
    if kind != "f32" or shard_bytes < 10**9:
        whole = Weights(folder)
        tensors = {name: whole.read(name).clone() for name in whole.specs}
        (folder / SINGLE).unlink()
        specs = [TensorSpec(name, tuple(t.shape), DTYPES[kind]) for name, t in tensors.items()]
        for _ in write_weights(folder, specs, iter(tensors.values()), shard_bytes):
            pass
    write_json(folder / "config.json", raw)
    sign(folder)
    return {name: t.to(DTYPES[kind]).float().numpy() for name, t in model.state_dict().items()}


def wide(parameter: Matrix | np.ndarray) -> np.ndarray:
    return unpack(parameter) if isinstance(parameter, Matrix) else parameter


def assert_same(read: dict, state: dict, config: ModelConfig) -> None:
    """Every parameter, none left over, to the bit."""
    assert list(read) == [name for name in state if name in parameter_shapes(config)]
    for name, parameter in read.items():
        assert isinstance(parameter, Matrix) == (state[name].ndim == 2)
        assert wide(parameter).dtype == np.float32
        assert np.array_equal(wide(parameter), state[name]), name


@pytest.mark.parametrize("shard_bytes", [10**9, 5000])
@pytest.mark.parametrize("name", CASES)
def test_every_family_is_read_as_torch_reads_it(name, shard_bytes, tmp_path):
    """Fused and transposed tensors too, of one file and of shards."""
    state = make(tmp_path, CASES[name], shard_bytes=shard_bytes)
    assert (tmp_path / SINGLE).exists() == (shard_bytes == 10**9)
    config = read_config(tmp_path)
    read = read_matrices(tmp_path, config, None)
    assert sorted(read) == sorted(parameter_shapes(config))
    assert_same({name: read[name] for name in parameter_shapes(config)}, state, config)


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("format", [None, "f32", "bf16", "f16", "int8", "int4"])
@pytest.mark.parametrize("name", ["SmolLM2", "gpt2"])
def test_every_format_comes_of_every_stored_one(name, stored, format, tmp_path):
    state = make(tmp_path, CASES[name], stored)
    for parameter, found in read_matrices(tmp_path, read_config(tmp_path), format).items():
        if not isinstance(found, Matrix):
            assert found.dtype == np.float32 and np.array_equal(found, state[parameter])
            continue
        wanted = format_of(parameter, format or stored)
        assert found.format == wanted and found.data.flags.c_contiguous
        assert np.array_equal(unpack(found), unpack(pack(state[parameter], wanted))), parameter


def test_embedding_head_and_values_of_int4_are_int8(tmp_path):
    make(tmp_path, CASES["Qwen2.5"])
    read = read_matrices(tmp_path, read_config(tmp_path), "int4")
    kinds = {name: m.format for name, m in read.items() if isinstance(m, Matrix)}
    assert kinds.pop("embed_tokens.weight") == kinds.pop("lm_head.weight") == "int8"
    assert {kinds.pop(name) for name in list(kinds) if "v_proj" in name} == {"int8"}
    assert set(kinds.values()) == {"int4"}


def file_behind(array: np.ndarray) -> int:
    """Return the size of the mapping that an array lies in."""
    base = array
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    return len(memoryview(base).obj) if not isinstance(base, np.ndarray) else 0


def test_what_lies_as_it_is_wanted_stays_in_the_file(tmp_path):
    """What lies transposed, or in another type, cannot."""

    def mapped(name: str, format: Format | None) -> bool:
        found = read_matrices(tmp_path / name, read_config(tmp_path / name), format)
        matrix = found["blocks.1.attention.v_proj.weight"]
        assert isinstance(matrix, Matrix)
        size = (tmp_path / name / "model.safetensors").stat().st_size
        return file_behind(matrix.data) == size

    make(tmp_path / "phi", CASES["Phi-3-mini-4k"], "bf16")
    make(tmp_path / "gpt2", CASES["gpt2"])
    assert mapped("phi", None) and mapped("phi", "bf16")
    assert not mapped("phi", "f32") and not mapped("gpt2", None)


def test_what_is_made_lies_in_large_pages(tmp_path):
    make(tmp_path, CASES["Qwen2.5"], "bf16")
    for matrix in read_matrices(tmp_path, read_config(tmp_path), "int8").values():
        if isinstance(matrix, Matrix):
            assert file_behind(matrix.data) == file_behind(matrix.scale) == PIECE + LARGE


def write_quantized(folder: Path, format: Format) -> dict[str, np.ndarray]:
    """Write a quantized model of noise by the library of the file format; return it widened."""
    shapes, random = parameter_shapes(SMALL), np.random.default_rng(0)
    tensors, expected = {}, {}
    for name, shape in shapes.items():
        values = random.standard_normal(shape).astype(np.float32)
        if len(shape) == 2:
            matrix = pack(values, format_of(name, format))
            tensors |= {name: matrix.data, f"{name}.scale": matrix.scale}
            expected[name] = unpack(matrix)
        else:
            tensors[name] = expected[name] = values
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file(
        {name: torch.from_numpy(np.array(x)) for name, x in tensors.items()}, folder / SINGLE
    )
    raw = to_config_json(SMALL) | {"quantization_config": quantization(format)}
    write_json(folder / "config.json", raw)
    sign(folder)
    return expected


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_quantized_checkpoint_is_mapped_as_it_is(format, tmp_path):
    expected = write_quantized(tmp_path, format)
    assert stored_format(tmp_path) == format
    assert read_config(tmp_path) == SMALL
    for wanted in (None, format):
        read = read_matrices(tmp_path, SMALL, wanted)
        assert_same(read, expected, SMALL)
        base = read["blocks.0.mlp.up_proj.weight"].data
        while isinstance(base, np.ndarray) and base.base is not None:
            base = base.base
        assert not isinstance(base, np.ndarray), "copied"


@pytest.mark.parametrize("wanted", ["f32", "bf16", "int4"])
def test_a_quantized_checkpoint_becomes_nothing_else(wanted, tmp_path):
    write_quantized(tmp_path, "int8")
    with pytest.raises(CheckpointError, match=f"is stored as int8, which cannot become {wanted}"):
        read_matrices(tmp_path, SMALL, wanted)


@pytest.mark.parametrize(
    "scheme",
    [
        {"format": "int3"},
        *({"format": "int8", "version": version} for version in (2, 1.0, True, "1")),
        {"format": None},
        {"format": [1]},
        {},
    ],
    ids=str,
)
def test_a_scheme_of_another_kind_is_refused(scheme, tmp_path):
    write_quantized(tmp_path, "int8")
    raw = to_config_json(SMALL)
    raw["quantization_config"] = {"quant_method": "lm-workbench", "version": 1} | scheme
    write_json(tmp_path / "config.json", raw)
    with pytest.raises(CheckpointError, match="quantized as .*; known are int8 and int4"):
        stored_format(tmp_path)


@pytest.mark.parametrize("scheme", [{"quant_method": "gptq"}, {}, [], 3], ids=str)
def test_the_schemes_of_others_are_refused_by_name(scheme, tmp_path):
    write_quantized(tmp_path, "int8")
    write_json(tmp_path / "config.json", to_config_json(SMALL) | {"quantization_config": scheme})
    with pytest.raises(CheckpointError, match="'quantization_config' is not understood"):
        read_config(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_scale_that_is_no_number_is_refused(format, value, tmp_path):
    write_quantized(tmp_path, format)
    tensors = safetensors.torch.load_file(tmp_path / SINGLE)
    name = "blocks.1.mlp.up_proj.weight.scale"
    tensors[name].view(-1)[-1] = value
    safetensors.torch.save_file(tensors, tmp_path / SINGLE)
    sign(tmp_path)
    with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity"):
        read_matrices(tmp_path, SMALL, None)


@pytest.mark.parametrize("broken", ["lacks", "shape", "kind", "extra"])
def test_a_quantized_checkpoint_that_does_not_fit_is_refused(broken, tmp_path):
    write_quantized(tmp_path, "int8")
    tensors = safetensors.torch.load_file(tmp_path / SINGLE)
    name = "blocks.1.mlp.up_proj.weight.scale"
    if broken == "lacks":
        del tensors[name]
    elif broken == "shape":
        tensors[name] = tensors[name][:1].clone()
    elif broken == "kind":
        tensors[name] = tensors[name].float()
    else:
        name = "more"
        tensors[name] = torch.ones(3)
    safetensors.torch.save_file(tensors, tmp_path / SINGLE)
    sign(tmp_path)
    with pytest.raises(CheckpointError, match=f"{name} is .*, but config.json asks for"):
        read_matrices(tmp_path, SMALL, None)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_the_layout_on_disk_keeps_matrices_at_cache_lines(format):
    sizes = {"U8": 1, "F32": 4, "F16": 2}
    begin, small = 0, False
    shapes = parameter_shapes(SMALL)
    formats = {name: format_of(name, format) for name in shapes}
    for name, (kind, shape) in quantized_layout(shapes, formats).items():
        small |= kind != "U8"
        assert small == (kind != "U8") and (small or begin % 64 == 0), name
        begin += int(np.prod(shape)) * sizes[kind]
    assert small


def test_a_number_that_is_none_names_its_matrix(tmp_path):
    make(tmp_path, CASES["SmolLM2"])
    tensors = safetensors.torch.load_file(tmp_path / SINGLE)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 3] = float("nan")
    safetensors.torch.save_file(tensors, tmp_path / SINGLE)
    sign(tmp_path)
    config = read_config(tmp_path)
    read_matrices(tmp_path, config, None)
    with pytest.raises(CheckpointError, match=r"blocks\.2\.mlp\.up_proj\.weight holds NaN"):
        read_matrices(tmp_path, config, "int8")


def test_a_file_that_changed_is_refused_before_it_is_read(tmp_path):
    make(tmp_path, CASES["SmolLM2"])
    data = bytearray((tmp_path / SINGLE).read_bytes())
    data[-1] ^= 1
    (tmp_path / SINGLE).write_bytes(data)
    with pytest.raises(CheckpointError, match="sha256 differs"):
        read_matrices(tmp_path, read_config(tmp_path), None)


def test_what_another_family_stores_is_refused(tmp_path):
    make(tmp_path, CASES["SmolLM2"])
    raw = json.loads((tmp_path / "config.json").read_text()) | {"num_hidden_layers": 5}
    write_json(tmp_path / "config.json", raw)
    sign(tmp_path)
    with pytest.raises(CheckpointError, match=r"the weights lack model\.layers\.4"):
        read_matrices(tmp_path, read_config(tmp_path), None)
