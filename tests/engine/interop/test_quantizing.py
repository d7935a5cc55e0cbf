"""A checkpoint rounded to fewer bits: what is written, what is refused, what a disk may do."""

import errno
import json

import numpy as np
import pytest
import safetensors.torch
import torch

from engine.calibrate import calibrate, perplexity
from engine.checkpoint import load_model
from engine.data.corpora import Corpus
from engine.data.passages import gather
from engine.errors import CheckpointError, RecipeError, ResourceError
from engine.interop.importing import Progress
from engine.interop.quantizing import Quantized, quantize
from engine.manifest import read_config, read_json, read_manifest, write_manifest
from engine.matrices import read_matrices
from engine.quantize import Matrix, format_of, pack, unpack
from engine.tensors import SINGLE
from tests.engine.model.test_families import CASES
from tests.engine.test_matrices import make, sign

WORDS = [Corpus(name="words", texts=[("a", " ".join(f"word {n} and" for n in range(5000)))])]


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A small Llama with tokenizer and settings."""
    return made(tmp_path / "model", tokenizer, "SmolLM2")


def made(folder, tokenizer, case, stored="f32"):
    make(folder, CASES[case], stored)
    tokenizer.save(folder, 96)
    (folder / "generation_config.json").write_text('{"temperature": 0.3}')
    (folder / "LICENSE").write_text("free")
    sign(folder)
    return folder


def result(*arguments, **options) -> Quantized:
    *_, last = quantize(*arguments, **options)
    assert isinstance(last, Quantized)
    return last


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("case", ["SmolLM2", "gpt2", "Phi-3-mini-4k", "Gemma-2", "Qwen2.5"])
def test_what_is_written_is_what_packing_gives(case, format, tmp_path, tokenizer):
    """On disk, for C, and widened for torch; fused, transposed and tied ones too."""
    folder = made(tmp_path / "model", tokenizer, case, "bf16")
    said = result(folder, tmp_path / "out", format)
    config = read_config(folder)
    assert read_config(tmp_path / "out") == config
    on_the_fly = read_matrices(folder, config, format)
    stored = read_matrices(tmp_path / "out", config, None)
    model, _ = load_model(tmp_path / "out")
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    errors = {}
    assert set(stored) == set(on_the_fly)
    for name, matrix in stored.items():
        other = on_the_fly[name]
        if not isinstance(matrix, Matrix):
            assert np.array_equal(matrix, other) and np.array_equal(matrix, state[name])
            continue
        assert isinstance(other, Matrix) and matrix.scale is not None and other.scale is not None
        assert matrix.format == other.format == format_of(name, format)
        assert np.array_equal(matrix.data, other.data)
        assert np.array_equal(matrix.scale, other.scale)
        assert np.array_equal(state[name], unpack(matrix))
        original = unpack(read_matrices(folder, config, "f32")[name])
        errors[name] = np.linalg.norm(state[name] - original) / np.linalg.norm(original)
    assert said.matrices == len(errors)
    assert said.mean_error == pytest.approx(np.mean(list(errors.values())), rel=1e-4)
    assert said.largest_error == pytest.approx(errors[said.largest], rel=1e-4)
    assert said.largest_error == pytest.approx(max(errors.values()), rel=1e-4)


@pytest.mark.parametrize("case", ["SmolLM2", "gpt2", "Gemma-2", "Qwen2.5"])
def test_what_is_calibrated_is_written_and_read_back(case, tmp_path, tokenizer):
    """Each matrix as calibrating the model in memory gives it; for C, and widened for torch."""
    folder = made(tmp_path / "model", tokenizer, case, "bf16")
    config = read_config(folder)
    text = gather(WORDS, tokenizer, config.max_seq_len, 12)
    *progress, said = quantize(folder, tmp_path / "out", "int4", corpora=WORDS, windows=12)
    assert {e.doing for e in progress if isinstance(e, Progress)} == {"calibrating", "writing"}
    assert isinstance(said, Quantized) and said.calibration
    model, _ = load_model(folder)
    assert said.calibration["perplexity_before"] == perplexity(model, torch.tensor(text.held))
    expected = dict(calibrate(model, torch.tensor(text.learned)))
    assert said.calibration["perplexity"] == perplexity(model, torch.tensor(text.held))
    stored = read_matrices(tmp_path / "out", config, None)
    assert set(expected) == {name for name, found in stored.items() if isinstance(found, Matrix)}
    state = load_model(tmp_path / "out")[0].state_dict()
    for name, matrix in expected.items():
        found = stored[name]
        assert isinstance(found, Matrix) and found.format == matrix.format
        assert np.array_equal(found.data, matrix.data), name
        assert found.scale is not None and matrix.scale is not None
        assert np.array_equal(found.scale, matrix.scale), name
        assert torch.equal(state[name], model.state_dict()[name])
    made_of = read_manifest(tmp_path / "out")["quantized"]["calibration"]
    assert made_of == said.calibration and made_of["digest"] == text.digest


@pytest.mark.parametrize("corpora", [(), WORDS], ids=["rounded", "calibrated"])
def test_more_may_keep_8_bits(corpora, folder, tmp_path):
    few = result(folder, tmp_path / "few", "int4", corpora=corpora, windows=4)
    more = result(folder, tmp_path / "more", "int4", corpora=corpora, windows=4, fine=["down_proj"])
    assert few.bits_per_weight < more.bits_per_weight and few.bytes < more.bytes
    config = read_config(folder)
    for place, expected in (("few", "int4"), ("more", "int8")):
        stored = read_matrices(tmp_path / place, config, None)
        found = [x for n, x in stored.items() if "down_proj" in n and isinstance(x, Matrix)]
        assert {matrix.format for matrix in found} == {expected}
        load_model(tmp_path / place)


def test_a_context_of_one_token_cannot_be_calibrated(folder, tmp_path):
    facts = read_manifest(folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"max_position_embeddings": 1}))
    (folder / "manifest.json").unlink()
    write_manifest(folder, {key: facts[key] for key in facts.keys() - {"schema", "files"}})
    with pytest.raises(RecipeError, match="has a context of 1 token; use --calibrate none"):
        result(folder, tmp_path / "out", "int4", corpora=WORDS)
    assert result(folder, tmp_path / "out", "int4").bytes


def test_an_interruption_of_calibrating_leaves_nothing(folder, tmp_path):
    events = quantize(folder, tmp_path / "out", "int4", corpora=WORDS)
    for _ in range(5):
        event = next(events)
        assert isinstance(event, Progress) and event.doing == "calibrating"
    events.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_int4_of_before_values_had_8_bits_is_still_read(folder, tmp_path, monkeypatch):
    new = result(folder, tmp_path / "new", "int4")
    monkeypatch.setattr("engine.quantize.FINE", ("embed_", "lm_head"))
    old = result(folder, tmp_path / "old", "int4")
    monkeypatch.undo()
    assert old.bytes < new.bytes
    config = read_config(folder)
    for place, format in (("old", "int4"), ("new", "int8")):
        found = read_matrices(tmp_path / place, config, None)["blocks.0.attention.v_proj.weight"]
        assert isinstance(found, Matrix) and found.format == format
        load_model(tmp_path / place)


def test_int8_is_the_model_rounded_by_another_reckoning(folder, tmp_path):
    """Each 64 of a row to 127 steps of a scale in f16, by torch, from the original's weights."""
    result(folder, tmp_path / "out", "int8")
    before, after = (load_model(place)[0].state_dict() for place in (folder, tmp_path / "out"))
    for name, weight in before.items():
        expected = weight
        if weight.ndim == 2:
            groups = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 64)).unflatten(
                1, (-1, 64)
            )
            scale = (groups.abs().amax(-1, keepdim=True) / 127).half().float()
            rounded = (groups / scale).round().clamp(-127, 127) * scale
            expected = rounded.flatten(1)[:, : weight.shape[1]]
        assert torch.equal(after[name], expected), name


def test_progress_ends_with_all_and_the_figures_are_those_of_the_files(folder, tmp_path):
    *progress, last = quantize(folder, tmp_path / "out", "int8")
    assert isinstance(last, Quantized)
    steps = [event.done for event in progress if isinstance(event, Progress)]
    assert steps == sorted(steps) and len(steps) == len(progress) and steps[-1] == last.bytes
    size = (tmp_path / "out" / SINGLE).stat().st_size
    assert last.bytes < size < last.bytes + 20_000
    assert last.bytes_before == (folder / SINGLE).stat().st_size


def test_small_files_come_along_and_the_manifest_says_where_from(folder, tmp_path):
    result(folder, tmp_path / "out", "int4")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    manifest = read_manifest(tmp_path / "out")
    assert manifest["quantized"]["folder"] == str(folder.resolve())
    assert manifest["quantized"]["format"] == "int4" and len(manifest["quantized"]["weights"]) == 64
    assert set(manifest["files"]) == {file.name for file in (tmp_path / "out").iterdir()} - {
        "manifest.json"
    }
    raw = read_json(tmp_path / "out" / "config.json")
    assert raw.pop("quantization_config") == {
        "quant_method": "lm-workbench",
        "format": "int4",
        "version": 1,
    }
    assert raw == read_json(folder / "config.json")


def test_every_matrix_begins_at_a_cache_line(folder, tmp_path):
    result(folder, tmp_path / "out", "int4")
    data = (tmp_path / "out" / SINGLE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    matrices = [entry for entry in header.values() if entry.get("dtype") == "U8"]
    assert len(matrices) > 10
    assert all((8 + length + entry["data_offsets"][0]) % 64 == 0 for entry in matrices)


def test_what_is_there_is_replaced_only_by_force_and_only_if_it_is_ours(folder, tmp_path):
    out = tmp_path / "out"
    result(folder, out, "int8")
    with pytest.raises(RecipeError, match="exists"):
        result(folder, out, "int4")
    assert read_json(out / "config.json")["quantization_config"]["format"] == "int8"
    result(folder, out, "int4", force=True)
    assert read_json(out / "config.json")["quantization_config"]["format"] == "int4"
    for other in (made_plain(tmp_path / "plain"), made_link(tmp_path / "link", out)):
        with pytest.raises(RecipeError, match="is no quantized checkpoint"):
            result(folder, other, "int8", force=True)
    assert (tmp_path / "plain" / "thesis.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "model", "out", "plain"]


def made_plain(folder):
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    return folder


def made_link(link, target):
    link.symlink_to(target)
    return link


@pytest.mark.parametrize("force", [False, True])
def test_a_model_is_not_written_over_itself(force, folder):
    before = (folder / SINGLE).read_bytes()
    for out in (folder, folder.parent):
        with pytest.raises(RecipeError, match="holds the model itself"):
            result(folder, out, "int8", force=force)
    assert (folder / SINGLE).read_bytes() == before


def test_a_quantized_model_is_not_rounded_again(folder, tmp_path):
    result(folder, tmp_path / "out", "int8")
    with pytest.raises(CheckpointError, match="is quantized already, to int8"):
        result(tmp_path / "out", tmp_path / "again", "int4")


def test_weights_that_are_no_numbers_make_nothing(folder, tmp_path):
    tensors = safetensors.torch.load_file(folder / SINGLE)
    tensors["model.layers.1.mlp.up_proj.weight"][2, 2] = float("inf")
    safetensors.torch.save_file(tensors, folder / SINGLE)
    sign(folder)
    with pytest.raises(CheckpointError, match=r"blocks\.1\.mlp\.up_proj\.weight holds NaN"):
        result(folder, tmp_path / "out", "int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("force", [False, True])
def test_a_full_disk_leaves_what_was_there(force, folder, tmp_path, monkeypatch):
    if force:
        result(folder, tmp_path / "out", "int8")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("engine.weights._write_tensor", full)
    with pytest.raises(ResourceError, match="No space left"):
        result(folder, tmp_path / "out", "int4", force=force)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", *["out"] * force]
    if force:
        assert (
            read_json(tmp_path / "out" / "config.json")["quantization_config"]["format"] == "int8"
        )
        read_manifest(tmp_path / "out")


def test_an_interruption_leaves_nothing(folder, tmp_path):
    events = quantize(folder, tmp_path / "out", "int8")
    next(events)
    events.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_packing_is_what_decides(folder, tmp_path):
    """Control: the numbers of another format are others."""
    config = read_config(folder)
    original = read_matrices(folder, config, "f32")["blocks.0.mlp.up_proj.weight"]
    assert isinstance(original, Matrix)
    eight, four = (unpack(pack(original.data, format)) for format in ("int8", "int4"))
    assert not np.array_equal(eight, four)
