"""Imports: exact, in little memory, all or nothing, and unimpressed by thousands of bad files."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from engine import files, manifest
from engine.checkpoint import load_model
from engine.config import TokenizerConfig
from engine.errors import CheckpointError, RecipeError, ResourceError
from engine.files import sha256
from engine.interop import importing
from engine.interop.exporting import to_gguf
from engine.interop.importing import Progress, bring_in, check_free
from engine.interop.source import open_source
from engine.manifest import read_manifest
from engine.sampling_defaults import sample_defaults
from engine.text.tokenizer import learn
from engine.weights import Weights
from tests.conftest import TEXT, command_environment, make_model
from tests.engine.interop import damage
from tests.engine.interop.folders import (
    CHATML,
    imported,
    leftovers,
    result_of,
    write_folder,
    write_gguf,
)

TOKENS = torch.tensor([[5, 300, 17, 256, 99, 3]])


@pytest.fixture(scope="module")
def gguf(tmp_path_factory, tokenizer):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tokenizer)


SHAPES = {
    "qwen3": {},
    "tied": {"tie_embeddings": True},
    "llama": {"qk_norm": "none"},
    "gpt2": {
        "qk_norm": "none", "norm": "layernorm", "position": "learned", "activation": "gelu_tanh",
        "attention_bias": True, "output_bias": True, "mlp_bias": True, "tie_embeddings": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("shard_bytes", [10**9, 9000])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_imported_folder_computes_the_same(shape, shard_bytes, tmp_path, tokenizer):
    folder = write_folder(tmp_path / "m", tokenizer, shard_bytes=shard_bytes, **SHAPES[shape])
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard_bytes < 10**9)
    model, own = load_model(imported(folder, tmp_path / "out"))
    expected = make_model(**SHAPES[shape])
    assert model.config == expected.config
    assert torch.equal(model(TOKENS), expected(TOKENS))
    assert own.to_json() == tokenizer.to_json() and own.template == CHATML
    assert sample_defaults(tmp_path / "out").temperature == 0.7


def test_an_imported_tokenizer_loads_fast(tmp_path, tokenizer):
    """Published ones hold merges as pairs today, which take twice as long to read."""
    folder = write_folder(tmp_path / "m", tokenizer)
    (folder / "tokenizer.json").write_text(tokenizer.inner.to_str(), encoding="utf-8")
    pairs, texts = (
        json.loads((place / "tokenizer.json").read_bytes())["model"]["merges"]
        for place in (folder, imported(folder, tmp_path / "out"))
    )
    assert isinstance(pairs[0], list) and texts == [" ".join(pair) for pair in pairs]


def test_what_comes_of_it_is_told(tmp_path, tokenizer):
    folder = write_folder(tmp_path / "m", tokenizer)
    *steps, result = bring_in(open_source(folder), tmp_path / "out", "hf:org/name")
    model = make_model()
    assert result.parameters == sum(p.numel() for p in model.parameters())
    assert result.bytes == 4 * result.parameters
    assert result.licence == "apache-2.0" and result.template and result.model_type == "qwen3"
    assert all(isinstance(step, Progress) and step.total == result.bytes for step in steps)
    done = [step.done for step in steps]
    assert done == sorted(done) and done[-1] == result.bytes
    source = read_manifest(tmp_path / "out")["source"]
    assert (source["origin"], source["licence"]) == ("hf:org/name", "apache-2.0")
    assert source["files"]["model.safetensors"]["sha256"] == sha256(folder / "model.safetensors")
    assert set(source["files"]) == {file.name for file in folder.iterdir()}
    assert leftovers(tmp_path / "out") == sorted([*source["files"], "manifest.json"])


def test_a_licence_is_the_source_s_or_the_package_s_or_not_stated(tmp_path, tokenizer):
    folder = write_folder(tmp_path / "m", tokenizer)
    for number, (card, package, expected) in enumerate(
        [(True, "mit", "apache-2.0"), (False, "mit", "mit"), (False, "", "not stated")]
    ):
        if not card:
            (folder / "README.md").unlink(missing_ok=True)
        events = bring_in(open_source(folder), tmp_path / str(number), "x", licence=package)
        assert result_of(events).licence == expected
        assert read_manifest(tmp_path / str(number))["source"]["licence"] == expected


@pytest.mark.parametrize("dtype", importing.DTYPES)
def test_weights_are_stored_as_asked(tmp_path, tokenizer, gguf, dtype):
    kind = importing.DTYPES[dtype]
    for source in (write_folder(tmp_path / "m", tokenizer), gguf):
        folder = imported(source, tmp_path / f"out-{source.name}", dtype=dtype)
        weights, expected = Weights(folder), open_source(source)
        names = list(expected.specs)
        for name, tensor in zip(names, expected.read(names), strict=True):
            assert torch.equal(weights.read(name), tensor.to(kind))
        assert json.loads((folder / "config.json").read_text())["dtype"] == str(kind)[6:]


def test_a_quantized_file_is_widened_exactly(tmp_path, tokenizer):
    path = write_gguf(tmp_path / "q.gguf", tokenizer, dtype="q8_0", d_model=64)
    model, _ = load_model(imported(path, tmp_path / "out"))
    weights, source = Weights(tmp_path / "out"), open_source(path)
    assert source.stored == "Q8_0"
    for name, tensor in zip(source.specs, source.read(list(source.specs)), strict=True):
        assert tensor.dtype == torch.float32 and torch.equal(weights.read(name), tensor)
    exact = make_model(d_model=64)(TOKENS)
    assert not torch.equal(model(TOKENS), exact)
    torch.testing.assert_close(model(TOKENS), exact, atol=0.1, rtol=0.1)


def test_a_decoder_without_its_prefix_gets_it(tmp_path, tokenizer):
    """Checkpoints of AutoModel leave out `model.`, and the head where it is tied."""
    folder = write_folder(tmp_path / "m", tokenizer, tie_embeddings=True)
    read = Weights(folder)
    bare = {name.removeprefix("model."): read.read(name).clone() for name in read.specs}
    import safetensors.torch

    safetensors.torch.save_file(bare, folder / "model.safetensors")
    model, _ = load_model(imported(folder, tmp_path / "out"))
    assert torch.equal(model(TOKENS), make_model(tie_embeddings=True)(TOKENS))
    assert set(Weights(tmp_path / "out").specs) == set(read.specs)


def test_nothing_is_written_over(tmp_path, tokenizer):
    source = open_source(write_folder(tmp_path / "m", tokenizer))
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("gone")
    before = leftovers(tmp_path)
    for name in ("folder", "file", "link"):
        with pytest.raises(RecipeError, match=f"{name} exists; remove it"):
            next(bring_in(source, tmp_path / name, "x"))
    assert leftovers(tmp_path) == before
    check_free(tmp_path / ("x" * 5000))  # no such file can be


def test_a_full_disk_is_found_before_the_first_byte(tmp_path, tokenizer, monkeypatch):
    source = open_source(write_folder(tmp_path / "m", tokenizer))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 0))
    monkeypatch.setattr(files.Path, "mkdir", lambda *_, **__: pytest.fail("has begun"))
    with pytest.raises(ResourceError, match=r"0\.1 GB are needed and 0\.0 GB are free"):
        next(bring_in(source, tmp_path / "a" / "b" / "out", "x"))


PLACES = ["file/out", "/proc/out", "/dev/full/out", "x" * 300]


@pytest.mark.parametrize("place", PLACES)
def test_where_nothing_can_be_written(place, tmp_path, tokenizer):
    (tmp_path / "file").write_text("")
    source = open_source(write_folder(tmp_path / "m", tokenizer))
    before = leftovers(tmp_path)
    with pytest.raises(ResourceError, match="with -o"):
        list(bring_in(source, tmp_path / place, "x"))
    assert leftovers(tmp_path) == before


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_gives_out_leaves_nothing(call, tmp_path, tokenizer, monkeypatch):
    source = open_source(write_folder(tmp_path / "m", tokenizer))
    before = leftovers(tmp_path)

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, call, refuse)
        with pytest.raises(ResourceError, match="No space left on device"):
            list(bring_in(source, tmp_path / "some" / "where" / "out", "x"))
    assert leftovers(tmp_path) == before, "not even the folders on the way"
    assert result_of(bring_in(source, tmp_path / "some" / "where" / "out", "x")).folder.is_dir()


def test_an_interruption_leaves_nothing(tmp_path, tokenizer):
    source = open_source(write_folder(tmp_path / "m", tokenizer))
    before = leftovers(tmp_path)
    events = bring_in(source, tmp_path / "out", "x")
    next(events)
    assert list(tmp_path.glob(".out.*.tmp"))
    with pytest.raises(KeyboardInterrupt):
        events.throw(KeyboardInterrupt())
    assert leftovers(tmp_path) == before


def import_in_a_process(source: Path, out: str, folder: Path, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "cli.main", "import", str(source), "-o", out],
        cwd=folder,
        env=command_environment(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture(scope="module")
def large(tmp_path_factory, tokenizer):
    """A folder of 270 MB, 102 of them one tensor: long enough to be interrupted, or measured."""
    folder = tmp_path_factory.mktemp("large") / "m"
    shape = {"vocab_size": 12_500, "d_model": 2048, "n_layers": 1, "n_heads": 4, "d_ff": 64}
    return write_folder(folder, tokenizer, **shape)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill"])
def test_stopped_in_the_middle_then_again(number, tmp_path, large):
    """Nothing has the final name; Ctrl-C clears up, and after a kill the next import does."""
    process = import_in_a_process(large, "out", tmp_path)
    deadline = time.monotonic() + 60
    half = tmp_path / f".out.{process.pid}.tmp" / "model.safetensors"
    while not half.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL), err
    assert out == err == ""
    assert leftovers(tmp_path)[:1] == ([] if number == signal.SIGINT else [half.parent.name])
    again = import_in_a_process(large, "out", tmp_path)
    again.communicate(timeout=60)
    assert again.returncode == 0 and read_manifest(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


PROBE = """
import ctypes, json, sys, torch
from pathlib import Path
from engine.checkpoint import load_model
from engine.interop.importing import bring_in
from engine.interop.source import open_source
def memory(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(kind)).split()[1])
def work(kind, source, *rest):
    if kind == "load":
        model, _ = load_model(Path(source))
        return model, sum(float(p.sum()) for p in model.parameters())
    out, dtype = rest
    return list(bring_in(open_source(Path(source)), Path(out), "x", dtype=dtype))
torch.set_num_threads(1)
kept = work(*sys.argv[1].split())  # of no size: what the program itself needs
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before = memory("VmRSS"), memory("RssAnon")
kept = work(*sys.argv[2].split())
if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
    libc.malloc_trim(0)  # what is freed and only kept for later use is nobody's
print(json.dumps([memory("VmHWM") - before[0], memory("RssAnon") - before[1]]))
"""


def measure(small: str, large: str) -> tuple[int, int]:
    """Return the peak of memory with mapped files, and the memory of its own in the end."""
    process = subprocess.run(
        [sys.executable, "-c", PROBE, small, large],
        capture_output=True,
        text=True,
        env=command_environment(Path.cwd()),
        check=True,
        timeout=120,
    )
    peak, own = json.loads(process.stdout)
    return peak, own


needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["auto", "bf16"])
@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_an_import_needs_little_more_memory_than_its_largest_tensor(
    form, dtype, tmp_path, large, tokenizer
):
    """Beside the pages of the files, which the system takes back when it likes."""
    small = write_folder(tmp_path / "small", tokenizer)
    if form == "gguf":
        large, small = to_gguf_file(large), to_gguf_file(small)
    specs = open_source(large).specs.values()
    largest, whole = max(spec.bytes for spec in specs), sum(spec.bytes for spec in specs)
    words = (f"import {small} {tmp_path / 'a'} {dtype}", f"import {large} {tmp_path / 'b'} {dtype}")
    peak, own = measure(*words)
    assert peak < 1.3 * largest + whole and own < 0.3 * largest, (peak, own, largest, whole)


def to_gguf_file(folder: Path) -> Path:
    out = folder.with_suffix(".gguf")
    if not out.exists():
        to_gguf(imported(folder, folder.with_suffix(".checkpoint")), out, "f32", "x")
    return out


@needs_proc
@pytest.mark.slow
def test_loading_maps_the_weights(tmp_path, large, tokenizer):
    small = imported(write_folder(tmp_path / "m", tokenizer), tmp_path / "small")
    folder = imported(large, tmp_path / "large")
    whole = sum(spec.bytes for spec in Weights(folder).specs.values())
    peak, own = measure(f"load {small}", f"load {folder}")
    assert own < 0.1 * whole, "the pages are the file's"
    assert 0.9 * whole < peak < 1.1 * whole, "and all of them were touched"


# What is damaged: form, file.
TARGETS = [
    ("single", "model.safetensors"),
    ("single", "config.json"),
    ("single", "tokenizer.json"),
    ("older", "tokenizer_config.json"),
    ("single", "generation_config.json"),
    ("single", "chat_template.jinja"),
    ("sharded", "model.safetensors.index.json"),
    ("tiny.gguf", ""),
]


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """The same tiny model in every form."""
    folder = tmp_path_factory.mktemp("forms")
    tokenizer = learn([TEXT], TokenizerConfig(vocab_size=300))
    shape = {"vocab_size": 304, "d_model": 16, "n_layers": 1, "n_heads": 2}
    write_folder(folder / "single", tokenizer, **shape)
    write_folder(folder / "sharded", tokenizer, shard_bytes=20_000, **shape)
    write_folder(folder / "older", tokenizer, template=None, **shape)
    file = folder / "older" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings |= {"chat_template": CHATML, "additional_special_tokens": ["<|im_end|>"]}
    file.write_text(json.dumps(settings))
    write_gguf(folder / "tiny.gguf", tokenizer, **shape)
    return folder


def fuzz(forms: Path, box: Path, target: tuple[str, str], count: int, seed: int) -> tuple[int, int]:
    """Import many damaged copies; what is imported must load, the rest is one line each."""
    name, file = target
    whole = (forms / name / file).read_bytes()
    draw = random.Random(f"{target} {seed}")
    good = bad = 0
    for _ in range(count):
        shutil.rmtree(box, ignore_errors=True)
        box.mkdir()
        if file:
            shutil.copytree(forms / name, box / name, copy_function=os.link)
            (box / name / file).unlink()
        structured = file.endswith(".json") and draw.random() < 0.7
        data = (damage.of_json if structured else damage.of_bytes)(draw, whole)
        (box / name / file).write_bytes(data)
        before = leftovers(box)
        try:
            imported(box / name, box / "out")
        except CheckpointError as error:
            message = str(error)
            assert message.startswith(str(box / name)) and message.isprintable(), message
            assert len(message) <= 1000 and ".out" not in message
            assert leftovers(box) == before
            bad += 1
        else:
            load_model(box / "out")
            sample_defaults(box / "out")
            good += 1
    return good, bad


@pytest.fixture
def no_flush(monkeypatch):
    """Waiting for the disk is most of a small import, and not what is tested."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(manifest, "flush", lambda _: None)


@pytest.mark.parametrize("target", TARGETS, ids="/".join)
def test_damaged_models_are_imported_or_refused(target, forms, tmp_path, no_flush):
    began = time.monotonic()
    good, bad = fuzz(forms, tmp_path / "box", target, 200, seed=0)
    assert good > 2 and bad > 20, "some damage hits only numbers, most does not"
    assert time.monotonic() - began < 60


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("target", TARGETS, ids="/".join)
def test_many_more_damaged_models(target, seed, forms, tmp_path, no_flush):
    """With the ones above, ten thousand."""
    good, bad = fuzz(forms, tmp_path / "box", target, 210, seed)
    assert good and bad
