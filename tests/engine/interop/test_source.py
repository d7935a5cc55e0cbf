"""Sources: what a folder or a file holds, and that nothing in it leads outside or does harm."""

import json
import os
import re
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch

from engine.errors import CheckpointError
from engine.interop import source as module
from engine.interop.source import open_source
from engine.model.config_json import from_config_json
from tests.engine.interop.folders import CHATML, write_folder, write_gguf


@pytest.fixture
def folder(tmp_path, tokenizer):
    return write_folder(tmp_path / "model", tokenizer)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory, tokenizer):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tokenizer)


def refused(path: Path, *words: str) -> None:
    """Expect one line that begins with a path and holds some words."""
    with pytest.raises(CheckpointError) as caught:
        open_source(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and message.isprintable(), message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shard_bytes", [10**9, 5000])
def test_a_folder(tmp_path, tokenizer, dtype, shard_bytes):
    folder = write_folder(tmp_path / "m", tokenizer, dtype=dtype, shard_bytes=shard_bytes)
    source = open_source(folder)
    raw = json.loads((folder / "config.json").read_text())
    assert (source.kind, source.config) == ("folder", raw)
    assert source.shape == from_config_json(raw, "")
    assert source.licence == "apache-2.0"
    assert source.stored == str(dtype).removeprefix("torch.")
    names = list(source.specs)[::-1]
    for name, tensor in zip(names, source.read(names), strict=True):
        assert tuple(tensor.shape) == source.specs[name].shape and tensor.dtype == dtype
    weights = sorted(file.name for file in folder.glob("*.safetensors"))
    assert (len(weights) > 1) == (shard_bytes < 10**9)
    assert {file.name for file in source.inputs} == {"config.json", *weights, *source.files}


def test_a_file_says_the_same_as_the_folder_it_was_made_of(gguf, folder, tokenizer):
    source, other = open_source(gguf), open_source(folder)
    assert source.kind == "gguf" and source.inputs == [gguf]
    assert source.shape == other.shape and source.licence == other.licence
    assert source.specs.keys() == other.specs.keys()
    names = list(source.specs)
    for tensor, expected in zip(source.read(names), other.read(names), strict=True):
        assert torch.equal(tensor, expected)
    assert source.files["chat_template.jinja"] == CHATML
    end = json.loads(str(source.files["generation_config.json"]))["eos_token_id"]
    assert end == tokenizer.end_of_text
    assert source.stored == "F32"


def test_only_known_files_come_along(folder):
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04pickle")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "LICENSE-MODEL").write_text("licence")
    known = {"README.md", "chat_template.jinja", "generation_config.json", "LICENSE-MODEL"}
    assert set(open_source(folder).files) == {"tokenizer.json", "tokenizer_config.json", *known}


LICENCES = {
    "---\nlicense: mit\n---\n": "mit",
    "---\nlicence: 'apache-2.0'\n---\n": "apache-2.0",
    '---\nlanguage: en\nlicense: "gemma"\ntags: []\n---\nlicense: wrong\n': "gemma",
    "---\nlicense: [bold]red[/bold]\n---\n": "[bold]red[/bold]",
    "---\nlicense: a\x1b[2Jb\x07\tc\n---\n": "a [2Jb c",
    "---\nlicense: " + "x" * 5000 + "\n---\n": "x" * 100,
    "license: none\n": "",
    "---\nlicense:\n---\n": "",
    "": "",
}


@pytest.mark.parametrize("card", LICENCES, ids=range(len(LICENCES)))
def test_the_licence_of_a_card_is_one_printable_line(folder, card):
    (folder / "README.md").write_text(card)
    assert open_source(folder).licence == LICENCES[card]


def test_without_a_card_the_first_line_of_a_licence_file_counts(folder):
    (folder / "README.md").unlink()
    assert open_source(folder).licence == ""
    (folder / "LICENSE").write_bytes(b"\xef\xbb\xbf\n\n   Apache License \x1b[1m\n  Version 2.0\n")
    assert open_source(folder).licence == "Apache License [1m"


def test_an_import_of_ours_keeps_its_licence(folder):
    (folder / "README.md").unlink()
    for text, licence in (('{"source": {"licence": "mit"}}', "mit"), ("[]", ""), ('{"a": 1}', "")):
        (folder / "manifest.json").write_text(text)
        assert open_source(folder).licence == licence


def test_places_that_are_nothing(tmp_path):
    refused(tmp_path / "nowhere", "no such file or folder", "pypi:NAME or hf:ORG/NAME")
    refused(tmp_path / ("x" * 300), "no such file or folder")
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path / "notes.txt", "not a .gguf file")
    refused(tmp_path, "config.json", "No such file")
    (tmp_path / "folder.gguf").mkdir()
    refused(tmp_path / "folder.gguf", "config.json", "No such file")
    os.mkfifo(tmp_path / "pipe.gguf")
    refused(tmp_path / "pipe.gguf", "not a .gguf file")


def test_a_folder_of_gguf_files_asks_for_one(tmp_path, gguf):
    shutil.copy(gguf, tmp_path / "b.gguf")
    refused(tmp_path, "name one, like", "b.gguf")


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json"])
def test_an_older_tokenizer_is_named_with_its_remedy(folder, name):
    (folder / "tokenizer.json").unlink()
    refused(folder, "no tokenizer.json", "save_pretrained")
    (folder / name).write_text("{}")
    refused(folder, f"beside {name}, an older form", "save_pretrained")


COMPANIONS = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md"]


@pytest.mark.parametrize("name", [*COMPANIONS, "generation_config.json", "LICENSE"])
def test_companions_that_are_no_files(folder, name, monkeypatch):
    file = folder / name
    file.unlink(missing_ok=True)
    file.mkdir()
    refused(folder, name)
    file.rmdir()
    for target in ("/dev/zero", str(folder / "gone")):
        file.symlink_to(target)
        refused(folder, name)
        file.unlink()
    os.mkfifo(file)
    refused(folder, name)


@pytest.mark.parametrize("name", [*COMPANIONS, "config.json", "model.safetensors.index.json"])
def test_small_files_that_are_huge(folder, name):
    """A sparse file costs nothing to make; reading it would cost its size, several times."""
    if name.endswith("index.json"):
        (folder / "model.safetensors").unlink()
    with (folder / name).open("ab") as file:
        file.truncate(3 * 10**9)
    tracemalloc.start()
    refused(folder, name, "bytes")
    assert tracemalloc.get_traced_memory()[1] < 30e6
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_the_files_that_matter_most_are_no_files(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(folder, name, "not a file")
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    refused(folder, name, "not a file")


def test_links_into_a_store_of_files_are_followed(folder, tmp_path):
    """So do the folders of the hub's own cache look."""
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.move(file, tmp_path / "blobs" / str(number))
        file.symlink_to(Path("..") / "blobs" / str(number))
    assert open_source(folder).licence == "apache-2.0"


CONFIGS = {
    "a list": "[]",
    "null": "null",
    "a number": "7",
    "deep": "[" * 200_000,
    "deep objects": '{"a":' * 50_000,
    "no type": "{}",
    "a type that is none": '{"model_type": ["llama"]}',
    "an unknown type": '{"model_type": "mamba\\u001b[2J\\nerror: x"}',
    "a million layers": '{"model_type": "llama", "num_hidden_layers": 1000000}',
    "a long key": json.dumps({"model_type": "llama", "k" * 10**6: 1}),
    "not UTF-8": b"\xff\xfe{}",
    "UTF-16": '{"model_type": "llama"}'.encode("utf-16"),
    "with NaN": '{"model_type": "llama", "rms_norm_eps": NaN}',
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_is_none(folder, case):
    text = CONFIGS[case]
    (folder / "config.json").write_bytes(text.encode() if isinstance(text, str) else text)
    refused(folder, "config.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 1025),
        ("vocab_size", 10**12),
        ("hidden_size", 2**62),
        ("head_dim", 10**9),
        ("num_attention_heads", -4),
        ("max_position_embeddings", 10**15),
        ("rms_norm_eps", float("inf")),
        ("rms_norm_eps", "small"),
        ("num_experts", 8),
    ],
)
def test_absurd_numbers_are_refused_by_name(folder, key, value):
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(raw | {key: value}))
    with pytest.raises(CheckpointError, match=re.escape(f"{folder}/config.json: ")):
        open_source(folder)


def test_an_index_that_climbs_out(tmp_path, tokenizer):
    folder = write_folder(tmp_path / "m", tokenizer, shard_bytes=5000)
    index = folder / "model.safetensors.index.json"
    shard = sorted(folder.glob("*.safetensors"))[0]
    shutil.move(shard, tmp_path / "outside.safetensors")
    text = index.read_text()
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "\\ud800"):
        index.write_text(text.replace(shard.name, name))
        refused(folder)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"\0" * 100, b"GGML" * 30, os.urandom(4096)])
def test_a_gguf_that_is_none(tmp_path, content):
    (tmp_path / "x.gguf").write_bytes(content)
    refused(tmp_path / "x.gguf")


def test_a_sparse_gigabyte_costs_nothing(tmp_path, gguf):
    file = tmp_path / "x.gguf"
    with file.open("wb") as sparse:
        sparse.truncate(10**9)
    tracemalloc.start()
    refused(file, "is not a GGUF file")
    file.write_bytes(gguf.read_bytes())
    with file.open("r+b") as sparse:
        sparse.truncate(10**9)
    open_source(file)
    assert tracemalloc.get_traced_memory()[1] < 30e6
    tracemalloc.stop()


def test_the_limits_leave_room_for_what_is_published():
    """Gemma's tokenizer.json has 35 MB, its tokenizer_config.json 1.2 MB."""
    assert module.LARGEST_TOKENIZER > 5 * 35e6 and module.LARGEST_COMPANION > 5 * 1.2e6
