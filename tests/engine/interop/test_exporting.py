"""Exports: what other programs read is what we have, and what they cannot hold is refused."""

import json
import os
import re

import gguf as library
import pytest
import torch

from engine.checkpoint import load_model
from engine.config import TokenizerConfig
from engine.errors import CheckpointError, RecipeError, ResourceError
from engine.interop.exporting import GGUF_TYPES, licence_of, to_folder, to_gguf
from engine.interop.importing import DTYPES
from engine.interop.source import open_source
from engine.manifest import read_config, read_manifest
from engine.text.tokenizer import learn, load_tokenizer
from engine.weights import Weights
from tests.conftest import TEXT, make_model
from tests.engine.interop.folders import CHATML, imported, leftovers, write_folder
from tests.engine.text.published import hostile

TOKENS = torch.tensor([[5, 300, 17, 256, 99, 3]])


@pytest.fixture
def made(tmp_path, tokenizer):
    """Write and import a tiny model; return the checkpoint."""

    def make(own=tokenizer, **options):
        return imported(write_folder(tmp_path / "source", own, **options), tmp_path / "checkpoint")

    return make


def test_a_file_read_back_says_the_same_of_everything(made, tmp_path, tokenizer):
    folder = made()
    to_gguf(folder, tmp_path / "m.gguf", "f32", "my name")
    back = imported(tmp_path / "m.gguf", tmp_path / "back")
    assert read_config(back) == read_config(folder)
    first, second = Weights(folder), Weights(back)
    assert first.specs == {name: second.specs[name] for name in first.specs}
    assert all(torch.equal(first.read(name), second.read(name)) for name in first.specs)
    model, own = load_model(back)
    assert torch.equal(model(TOKENS), make_model()(TOKENS))
    for text in hostile(500):
        assert own.encode(text) == tokenizer.encode(text), repr(text)
        assert own.encode_template(text) == tokenizer.encode_template(text), repr(text)
    assert own.template == CHATML
    before = load_tokenizer(folder)
    assert (own.ends, own.bos, own.add_bos) == (before.ends, before.bos, before.add_bos)
    assert licence_of(read_manifest(back)) == "apache-2.0"


def test_the_library_reads_name_licence_and_weights(made, tmp_path):
    folder = made()
    written = to_gguf(folder, tmp_path / "m.gguf", "f32", "my name")
    assert written.bytes == (tmp_path / "m.gguf").stat().st_size
    reader = library.GGUFReader(tmp_path / "m.gguf")
    assert reader.fields["general.name"].contents() == "my name"
    assert reader.fields["general.license"].contents() == "apache-2.0"
    embedding = next(t for t in reader.tensors if t.name == "token_embd.weight")
    expected = Weights(folder).read("model.embed_tokens.weight")
    assert torch.equal(torch.from_numpy(embedding.data.copy()), expected)


@pytest.mark.parametrize("dtype", GGUF_TYPES)
def test_every_type_comes_back_as_near_as_it_can(made, tmp_path, dtype):
    to_gguf(made(d_model=64, d_ff=96), tmp_path / "m.gguf", dtype, "x")
    model, _ = load_model(imported(tmp_path / "m.gguf", tmp_path / "back"))
    state, expected = model.state_dict(), make_model(d_model=64, d_ff=96).state_dict()
    # A step of the type, as a share of the largest value.
    error = {"f32": 0, "f16": 5e-4, "bf16": 4e-3, "q8_0": 5e-3, "q5_1": 1 / 31}
    error |= {"q5_0": 1 / 15, "q4_1": 1 / 15, "q4_0": 1 / 7}
    limit = error[dtype]
    for name, tensor in expected.items():
        found = state[name]
        assert (found - tensor).abs().max() <= limit * tensor.abs().max(), name
    changed = any(not torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert changed == (dtype != "f32")


def test_a_licence_that_nobody_stated_is_not_made_up(made, tmp_path, tokenizer):
    write_folder(tmp_path / "plain", tokenizer)
    (tmp_path / "plain" / "README.md").unlink()
    folder = imported(tmp_path / "plain", tmp_path / "checkpoint")
    to_gguf(folder, tmp_path / "m.gguf", "f32", "x")
    assert "general.license" not in library.GGUFReader(tmp_path / "m.gguf").fields
    to_folder(folder, tmp_path / "hf", "auto")
    assert not (tmp_path / "hf" / "README.md").exists()


OWN = {"activation": "relu2", "position": "none", "qk_norm": "none"}


def test_what_a_file_cannot_say_is_refused(made, tmp_path, tokenizer):
    write_folder(tmp_path / "own", tokenizer, **OWN)
    folder = imported(tmp_path / "own", tmp_path / "own checkpoint")
    before = leftovers(tmp_path)
    with pytest.raises(CheckpointError, match="'lm-workbench' has no place in a GGUF file"):
        to_gguf(folder, tmp_path / "m.gguf", "f32", "x")
    assert leftovers(tmp_path) == before
    lines = learn([TEXT], TokenizerConfig(vocab_size=400, split="line"))
    write_folder(tmp_path / "lines", lines, vocab_size=lines.vocab_size)
    folder = imported(tmp_path / "lines", tmp_path / "lines checkpoint")
    before = leftovers(tmp_path)
    with pytest.raises(CheckpointError, match="splits text at") as caught:
        to_gguf(folder, tmp_path / "m.gguf", "f32", "x")
    assert str(caught.value).isprintable() and leftovers(tmp_path) == before


@pytest.mark.parametrize("dtype", ["auto", *DTYPES])
def test_a_folder_is_plain_and_complete(made, tmp_path, dtype):
    folder = made()
    size = to_folder(folder, tmp_path / "a b" / "hf", dtype)
    out = tmp_path / "a b" / "hf"
    assert leftovers(out) == [
        *("README.md", "chat_template.jinja", "config.json", "generation_config.json"),
        *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    ]
    kind = DTYPES.get(dtype, torch.float32)
    weights, expected = Weights(out), Weights(folder)
    assert sum(spec.bytes for spec in weights.specs.values()) == size
    for name in expected.specs:
        assert torch.equal(weights.read(name), expected.read(name).to(kind))
    assert json.loads((out / "config.json").read_text())["dtype"] == str(kind)[6:]
    assert open_source(out).licence == "apache-2.0"
    assert load_tokenizer(out).template == CHATML


def test_a_licence_from_elsewhere_goes_into_the_card(tmp_path, tokenizer):
    """A GGUF file has no card, only a key; the folder made of it has one."""
    write_folder(tmp_path / "m", tokenizer)
    (tmp_path / "m" / "README.md").unlink()
    folder = imported(tmp_path / "m", tmp_path / "checkpoint", licence="gemma")
    to_folder(folder, tmp_path / "hf", "auto")
    assert open_source(tmp_path / "hf").licence == "gemma"


@pytest.mark.parametrize(
    "send", [to_folder, lambda *words: to_gguf(*words, "x")], ids=["hf", "gguf"]
)
def test_nothing_is_written_over_and_nothing_half_written(send, made, tmp_path, monkeypatch):
    folder = made()
    (tmp_path / "there").write_text("mine")
    (tmp_path / "link").symlink_to("gone")
    before = leftovers(tmp_path)
    for name in ("there", "link"):
        with pytest.raises(RecipeError, match=f"{name} exists"):
            send(folder, tmp_path / name, "f32")
    with pytest.raises(ResourceError, match=re.escape(str(tmp_path / "there" / "x"))):
        send(folder, tmp_path / "there" / "x", "f32")
    assert leftovers(tmp_path) == before

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="No space left"):
        send(folder, tmp_path / "out", "f32")
    assert leftovers(tmp_path) == before


def test_a_checkpoint_that_changed_is_not_sent_out(made, tmp_path):
    folder = made()
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    for send in (to_folder, lambda *words: to_gguf(*words, "x")):
        with pytest.raises(CheckpointError, match=r"model\.safetensors: its sha256 differs"):
            send(folder, tmp_path / "out", "f32")
