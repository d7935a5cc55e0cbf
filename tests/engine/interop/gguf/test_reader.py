"""The container: values against the package gguf, refusals by hand and by thousand accidents."""

import random
import struct
import sys
import time
import tracemalloc

import gguf as library
import numpy as np
import pytest
import torch

from engine.errors import CheckpointError, ResourceError
from engine.interop.gguf.folder import hf_tensors, to_hf
from engine.interop.gguf.reader import TYPES, read
from engine.interop.gguf.writer import store
from tests.engine.interop.gguf.tiny import write_case

METADATA = {
    "general.architecture": "llama",
    "text": "grüße 🙂",
    "truth": True,
    "count": 7,
    "below": -7,
    "large": 1 << 40,
    "real": 1e-5,
    "words": ["a", "", "über"],
    "flags": np.array([True, False]),
    "halves": np.array([0.5, -1.5], np.float32),
    "bytes": np.arange(5, dtype=np.uint8),
    "long": np.array([-(1 << 40)], np.int64),
}


@pytest.fixture
def small(tmp_path):
    """A file of two small tensors and every kind of value; returns its path."""
    path = tmp_path / "small.gguf"
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(5)}
    shapes = {name: (tuple(tensor.shape), "F32") for name, tensor in tensors.items()}
    store(path, METADATA, shapes, tensors.items())
    return path


def test_values_are_read_as_the_library_reads_them(small):
    found, theirs = read(small), library.GGUFReader(small)
    for key, value in METADATA.items():
        ours, expected = found.metadata[key], theirs.fields[key].contents()
        assert np.array_equal(ours, expected)
        assert np.array_equal(ours, np.float32(value) if key == "real" else value)
    assert found.tensors["a"].shape == (2, 3)
    assert torch.equal(found.tensor("a"), torch.arange(6.0).view(2, 3))


def test_version_2_is_the_same_and_others_are_refused_by_name(small):
    content = bytearray(small.read_bytes())
    content[4:8] = struct.pack("<I", 2)
    small.write_bytes(content)
    assert read(small).metadata["count"] == 7
    for version, name in [(1, "version 1"), (4, "version 4"), (3 << 24, "big endian")]:
        content[4:8] = struct.pack("<I", version)
        small.write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            read(small)


def of_type(path, name, blocks=300):
    """A file with one tensor of random bytes of a type."""
    _, block, size = TYPES[name]
    data = np.random.default_rng(0).integers(0, 256, (blocks, size), np.uint8)
    writer = library.GGUFWriter(path, "llama")
    kind = library.GGMLQuantizationType[name]
    if name in ("F32", "F16"):  # the writer of the library wants these as numbers
        writer.add_tensor("x", data.view({"F32": np.float32, "F16": np.float16}[name]))
    else:
        writer.add_tensor("x", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with np.errstate(all="ignore"):
        expected = library.dequantize(data.reshape(blocks, size), kind)
    return torch.from_numpy(np.array(expected, np.float32).reshape(blocks, block))


@pytest.mark.parametrize("name", TYPES)
def test_every_type_is_what_the_library_makes_of_it(name, tmp_path):
    expected = of_type(tmp_path / "x.gguf", name)
    found = read(tmp_path / "x.gguf").tensor("x")
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_the_table_of_types_is_the_library_s():
    for name, (number, block, size) in TYPES.items():
        kind = library.GGMLQuantizationType[name]
        assert (int(kind), *library.GGML_QUANT_SIZES[kind]) == (number, block, size)


def test_reading_a_large_tensor_needs_little_beside_it(tmp_path):
    of_type(tmp_path / "x.gguf", "Q4_0", blocks=200_000)
    found = read(tmp_path / "x.gguf")
    tracemalloc.start()
    tensor = found.tensor("x", torch.float16)
    peak = tracemalloc.get_traced_memory()[1]  # torch's own memory, the result, is not in it
    tracemalloc.stop()
    # 21 MB of float32 pass through; a chunk is 4 MB and the library holds a few copies of it.
    assert tensor.numel() == 6_400_000 and peak < 20e6


def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch):
    of_type(tmp_path / "q.gguf", "Q8_0")
    of_type(tmp_path / "b.gguf", "BF16")
    monkeypatch.setitem(sys.modules, "gguf", None)
    read(tmp_path / "b.gguf").tensor("x")
    with pytest.raises(ResourceError, match=r"pip install 'lm-workbench\[gguf\]'"):
        read(tmp_path / "q.gguf").tensor("x")


def text(value):
    return struct.pack("<Q", len(value)) + value


def key(name, kind, value):
    return text(name) + struct.pack("<I", kind) + value


def tensor(name=b"t", shape=(4,), kind=0, offset=0):
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def built(keys=(), tensors=(), counts=None, data=b"\0" * 4096):
    """A file put together by hand."""
    n_tensors, n_keys = counts or (len(tensors), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_keys) + b"".join((*keys, *tensors))
    return head + bytes(-len(head) % 32) + data


U32, STRING, ARRAY, BOOL = 4, 8, 9, 7
HUGE = (1 << 64) - 1
BAD = {
    "is empty": b"",
    "not a GGUF file": b"PK\x03\x04" + bytes(100),
    "ends at byte 12": b"GGUF" + struct.pack("<IQ", 3, 0)[:8],
    "claims .* tensors": built(counts=(HUGE, 0)),
    "claims .* keys": built(counts=(0, 1 << 40)),
    "ends at byte .* needs": built([key(b"k", STRING, struct.pack("<Q", HUGE))]),
    "a name .* bytes long": built([struct.pack("<Q", 70000) + b"x" * 70000]),
    "not UTF-8": built([key(b"k", STRING, text(b"\xff\xfe"))]),
    "string 1 .* not UTF-8": built(
        [key(b"k", ARRAY, struct.pack("<IQ", 8, 2) + text(b"a") + text(b"\xff"))]
    ),
    "'k' claims .* strings": built([key(b"k", ARRAY, struct.pack("<IQ", 8, HUGE))]),
    "inside a list of 9 strings": built([key(b"k", ARRAY, struct.pack("<IQQ", 8, 9, HUGE))]),
    "ends at byte .* inside": built([key(b"k", ARRAY, struct.pack("<IQ", 4, HUGE))]),
    "'k' is a list of type 9": built([key(b"k", ARRAY, struct.pack("<IQ", 9, 1))]),
    "'k' is of the unknown type 13": built([key(b"k", 13, b"")]),
    "the key 'k' twice": built([key(b"k", U32, bytes(4))] * 2),
    "a truth value .* is 2": built([key(b"k", BOOL, b"\x02")]),
    "neither 0 nor 1": built([key(b"k", ARRAY, struct.pack("<IQ", 7, 2) + b"\1\2")]),
    "general.alignment is 24": built([key(b"general.alignment", U32, struct.pack("<I", 24))]),
    "general.alignment is 0": built([key(b"general.alignment", U32, bytes(4))]),
    "general.alignment is 2147483648": built(
        [key(b"general.alignment", U32, struct.pack("<I", 1 << 31))]
    ),
    "general.alignment is 'x'": built([key(b"general.alignment", STRING, text(b"x"))]),
    "is one of 3 shards": built([key(b"split.count", 2, struct.pack("<H", 3))]),
    "the tensor 't' twice": built(tensors=[tensor(), tensor(offset=32)]),
    "has 0 dimensions": built(tensors=[tensor(shape=())]),
    "has 5 dimensions": built(tensors=[tensor(shape=(1, 1, 1, 1, 1))]),
    r"impossible shape \(0,\)": built(tensors=[tensor(shape=(0,))]),
    r"impossible shape \(33,\)": built(tensors=[tensor(shape=(33,), kind=8)]),
    "ends at byte": built(tensors=[tensor(shape=(HUGE, HUGE))]),
    "unknown type 99": built(tensors=[tensor(kind=99)]),
    "not aligned to 32": built(tensors=[tensor(offset=4)]),
    "'t' and 'u' overlap": built(tensors=[tensor(shape=(16,)), tensor(b"u", offset=32)]),
    "but the tensor 't' ends": built(tensors=[tensor(offset=8192)]),
    "a name at byte": built(tensors=[tensor(b"x" * 65)]),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_a_bad_file_is_refused_in_one_line(message, tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(BAD[message])
    with pytest.raises(CheckpointError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ") and "; " in str(caught.value)


def test_what_was_built_by_hand_is_good_without_its_fault(tmp_path):
    """The control of the test above."""
    path = tmp_path / "good.gguf"
    path.write_bytes(built([key(b"k", BOOL, b"\1")], [tensor(), tensor(b"u", (32,), 8, 32)]))
    found = read(path)
    assert found.metadata == {"k": True} and set(found.tensors) == {"t", "u"}


def test_a_missing_file_is_an_error_of_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read(tmp_path / "none.gguf")


def mutated(content, random):
    """Damage a file as disks, networks and people do."""
    content = bytearray(content)
    kind = random.randrange(4)
    # Most of the file is weights; what describes them comes first.
    at = random.randrange(len(content) if random.random() < 0.1 else 6000)
    if kind == 0:
        return content[: random.randrange(len(content))]
    if kind == 1:
        for _ in range(random.choice((1, 1, 8, 64))):
            content[random.randrange(6000)] ^= 1 << random.randrange(8)
    elif kind == 2:
        extreme = random.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, HUGE))
        content[at : at + 8] = struct.pack("<Q", extreme)
    else:
        start = random.randrange(6000)
        piece = content[start : start + random.randrange(200)]
        content[at : at + random.choice((0, len(piece)))] = piece
    return content


def fuzz(tmp_path, rounds):
    """Count damaged files that still import and those that are refused; nothing else may happen."""
    write_case(tmp_path / "good.gguf", "llama3.1", num_hidden_layers=1)
    good = (tmp_path / "good.gguf").read_bytes()
    path, outcomes = tmp_path / "bad.gguf", {True: 0, False: 0}
    rng = random.Random(0)
    tracemalloc.start()
    for k in range(rounds):
        path.write_bytes(mutated(good, rng))
        start = time.process_time()
        try:
            found = read(path)
            to_hf(found)
            for _, _ in hf_tensors(found):
                pass
            outcomes[True] += 1
        except CheckpointError as error:
            assert "\n" not in str(error) and len(str(error)) < 600 + len(str(path))
            outcomes[False] += 1
        assert time.process_time() - start < 1
        assert tracemalloc.get_traced_memory()[1] < 50e6
        if k == 400:  # watching is slow
            tracemalloc.stop()
    return outcomes


def test_damaged_files_are_refused_or_read_never_worse(tmp_path):
    outcomes = fuzz(tmp_path, 2000)
    assert outcomes[True] > 100 and outcomes[False] > 1000, outcomes


@pytest.mark.slow
def test_ten_thousand_damaged_files(tmp_path):
    outcomes = fuzz(tmp_path, 10_000)
    assert outcomes[True] > 500 and outcomes[False] > 5000, outcomes
