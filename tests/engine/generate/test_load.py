"""Loading to generate with: what was asked for, whole, or one clear error."""

import os

import numpy as np
import pytest

from engine import manifest
from engine.checkpoint import Snapshot, save
from engine.config import SampleConfig
from engine.cost import parameters
from engine.errors import CheckpointError, RecipeError, ResourceError
from engine.generate import load, native
from engine.generate.decode import generate, prefill
from engine.generate.decoder import Run
from engine.generate.load import load_decoder
from engine.generate.reference import TorchDecoder
from engine.kernels import compile
from engine.pages import Arena, Mapping, mapping_of
from engine.quantize import Matrix
from tests.conftest import make_model

GREEDY = SampleConfig(temperature=0, max_tokens=8)


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A checkpoint of a tiny model."""
    snapshot = Snapshot(
        step=1,
        model=make_model(),
        tokenizer=tokenizer,
        recipe_yaml="",
        sample=SampleConfig(),
        facts={},
        optimizer={},
        state={},
    )
    return save(tmp_path / "run", snapshot, best=True)


def said(decoder, tokenizer) -> list[int]:
    start = prefill(decoder, [5, 17, 300], decoder.cache(32))
    return [token.id for token in generate(decoder, tokenizer, start, GREEDY, seed=0)]


def test_it_says_what_the_saved_model_says(folder, tmp_path, tokenizer):
    loaded = load_decoder(folder, kernels="torch", cache=tmp_path)
    assert said(*loaded) == said(TorchDecoder(make_model()), tokenizer)
    assert said(*loaded) != said(TorchDecoder(make_model(1)), tokenizer)  # the control


def test_a_decoder_is_named_by_what_it_computes_in(folder, tmp_path):
    names = {}
    for dtype in ("auto", "fp32", "bf16"):
        decoder, _ = load_decoder(folder, dtype=dtype, kernels="torch", cache=tmp_path)
        names[dtype] = decoder.name
    assert names == {"auto": "torch fp32", "fp32": "torch fp32", "bf16": "torch bf16"}


def test_an_identity_is_that_of_weights_and_precision(folder, tmp_path):
    def identity(**how: str) -> str:
        return load_decoder(folder, kernels="torch", cache=tmp_path, **how)[0].identity

    assert identity() == identity(dtype="fp32") != identity(dtype="bf16")
    assert len(identity()) == 64


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_weights_changed_in_place_are_others(folder, library, tmp_path, monkeypatch, kernels):
    """Regression: the digest in the manifest stayed, so keys kept of the old weights were used."""
    file, right = folder / "model.safetensors", manifest.sha256
    known = right(file)  # which is not worked out again for large files
    monkeypatch.setattr(manifest, "sha256", lambda path: known if path == file else right(path))

    def identity() -> str:
        how = {"device": "cpu", "kernels": kernels, "cache": tmp_path}
        return load_decoder(folder, **how)[0].identity

    before = identity()
    assert identity() == before
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    stamp = file.stat().st_mtime_ns
    file.write_bytes(data)
    os.utime(file, ns=(stamp + 1, stamp + 1))
    assert identity() != before


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_torch_says_why_it_stands_in_unless_it_was_asked_for(
    folder, tmp_path, monkeypatch, kernels
):
    monkeypatch.setattr(compile, "_find_compiler", lambda: None)
    how = {"device": "cpu", "kernels": kernels, "cache": tmp_path}
    decoder, _ = load_decoder(folder, **how)
    assert decoder.name == "torch fp32"
    assert decoder.instead == {"auto": "no C compiler (cc) was found", "torch": ""}[kernels]
    with pytest.raises({"auto": ResourceError, "torch": RecipeError}[kernels]):
        load_decoder(folder, dtype="int8", **how)


@pytest.mark.parametrize("how", [{"dtype": "int8"}, {"dtype": "int4"}, {"kv": "int8"}], ids=str)
def test_torch_refuses_what_only_our_kernels_can(folder, tmp_path, how):
    with pytest.raises(RecipeError, match="needs our own kernels"):
        load_decoder(folder, kernels="torch", cache=tmp_path, **how)


def test_what_is_no_checkpoint_is_one_clear_error(tmp_path):
    with pytest.raises(CheckpointError):
        load_decoder(tmp_path, kernels="torch", cache=tmp_path)


def test_it_is_said_that_our_own_c_is_built_first(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "unbuilt", lambda cache: "cc")
    where = folder, "cpu"
    assert load.first_build(*where, "auto", tmp_path) == "building the decoder with cc, once"
    assert load.first_build(*where, "torch", tmp_path) == ""
    assert load.first_build(folder, "cuda", "auto", tmp_path) == ""
    monkeypatch.setattr(load, "unbuilt", lambda cache: "")
    assert load.first_build(*where, "auto", tmp_path) == ""


@pytest.mark.parametrize("dtype", ["auto", "bf16", "int8", "int4"])
def test_parameters_in_memory_decode_as_those_of_a_file(folder, library, tmp_path, dtype):
    model = make_model()
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    packed = load.pack_decoder(model.config, weights, library, dtype=dtype)
    loaded, _ = load_decoder(folder, device="cpu", dtype=dtype, cache=tmp_path)
    assert packed.name == loaded.name and packed.bytes == loaded.bytes
    one, other = (d.forward(d.cache(9), [Run(0, [5, 17, 300], 3)]) for d in (packed, loaded))
    assert np.array_equal(one, other)


def test_a_draft_is_weighed_by_its_own_layers(folder, library, tmp_path):
    """It is given the weights of all, and reads those of some."""
    how = {"device": "cpu", "cache": tmp_path}
    for kernels in ("auto", "torch"):
        whole, _ = load_decoder(folder, kernels=kernels, **how)
        draft, _ = load_decoder(folder, kernels=kernels, layers=1, **how)
        block = parameters(whole.config)["attention"] + parameters(whole.config)["mlp"]
        norms = 2 * 32 + 2 * 8
        assert whole.bytes - draft.bytes == 4 * (block // 2 + norms)
        assert whole.bytes_read(0) - draft.bytes_read(0) == 4 * (block // 2 + norms)


@pytest.mark.parametrize("short", [False, True], ids=["moved", "no-memory"])
def test_weights_move_to_large_pages_while_a_model_answers(
    short, folder, library, tmp_path, monkeypatch
):
    """Block by block, between passes; the answers stay the same to the bit."""

    def run(moves: bool) -> tuple[list[np.ndarray], set[bool]]:
        monkeypatch.setattr(native, "worth_copying", lambda size: moves)
        decoder, _ = load_decoder(folder, device="cpu", cache=tmp_path)
        cache, arrays = decoder.cache(9), []
        for token in (5, 17, 300, 4, 9):
            arrays.append(decoder.forward(cache, [Run(0, [token])]))
        found = [m.data for m in decoder.weights.values() if isinstance(m, Matrix)]
        return arrays, {isinstance(mapping_of(data), Mapping) for data in found}

    monkeypatch.setattr(native, "MOVED", 1)  # one block in each pass
    mapped, where = run(False)
    assert where == {True}
    if short:
        monkeypatch.setattr(native, "move", fails)
    moved, where = run(True)
    assert where == {short}
    assert all(np.array_equal(one, other) for one, other in zip(mapped, moved, strict=True))


def fails(array: np.ndarray, arena: Arena) -> np.ndarray:
    """Have no memory."""
    raise ResourceError("no memory")
