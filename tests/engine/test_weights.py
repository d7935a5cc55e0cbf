"""Tensors on disk: what is written is what is read, and a hostile file is one clear error."""

import errno
import json
import random
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine import weights
from engine.errors import CheckpointError, ResourceError
from engine.tensors import FLOATS, INDEX, SINGLE
from engine.weights import DTYPES, TensorSpec, Weights, check_room, write_weights

SHAPES = [(3, 4), (), (0,), (5, 0, 2), (1,), (7,), (2, 3, 4), (16, 16)]


def tensors_of(dtype: torch.dtype, shapes=SHAPES) -> dict[str, torch.Tensor]:
    """Numbers of any size, with infinities and NaNs among them: bits count, not values."""
    made = {}
    for index, shape in enumerate(shapes):
        generator = torch.Generator().manual_seed(index)
        size = (*shape, dtype.itemsize)
        raw = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        made[f"layer.{index}.weight"] = raw.view(dtype).reshape(shape)
    return made


def write(folder: Path, tensors: dict[str, torch.Tensor], **options) -> list[TensorSpec]:
    specs = [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    assert list(write_weights(folder, specs, iter(tensors.values()), **options)) == specs
    return specs


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


@pytest.mark.parametrize("shard_bytes", [10**9, 200, 1])
@pytest.mark.parametrize("kind", FLOATS)
def test_what_is_written_is_what_is_read(kind, shard_bytes, tmp_path):
    """Bit for bit: by this reader, and by the library's own."""
    tensors = tensors_of(DTYPES[kind])
    specs = write(tmp_path, tensors, shard_bytes=shard_bytes)
    read = Weights(tmp_path)
    assert read.specs == {spec.name: spec for spec in specs}
    assert all(same_bits(read.read(name), tensor) for name, tensor in tensors.items())
    theirs: dict[str, torch.Tensor] = {}
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes < 10**9)
    for file in files:
        theirs |= safetensors.torch.load_file(file)
    assert set(theirs) == set(tensors)
    assert all(same_bits(theirs[name], tensor) for name, tensor in tensors.items())


def test_tensors_begin_where_they_can_be_mapped(tmp_path):
    write(tmp_path, tensors_of(torch.float32))
    length = struct.unpack("<Q", (tmp_path / SINGLE).read_bytes()[:8])[0]
    assert (8 + length) % 64 == 0


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8), limit=st.integers(1, 60))
def test_a_shard_holds_what_fits_and_at_least_one(sizes, limit, tmp_path_factory):
    """The limit is broken only by a tensor that is larger than it; no shard could take the next."""
    folder = tmp_path_factory.mktemp("shards")
    tensors = {f"t{i}": torch.zeros(size) for i, size in enumerate(sizes)}
    specs = {spec.name: spec for spec in write(folder, tensors, shard_bytes=limit)}
    shards = [[name for name in specs]]
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text())
        assert index["metadata"]["total_size"] == 4 * sum(sizes)
        assert list(index["weight_map"]) == list(specs)
        names = sorted(set(index["weight_map"].values()))
        assert names == sorted(path.name for path in folder.glob("*.safetensors"))
        assert names[-1] == f"model-{len(names):05}-of-{len(names):05}.safetensors"
        shards = [[n for n, f in index["weight_map"].items() if f == file] for file in names]
    weight = [sum(specs[name].bytes for name in shard) for shard in shards]
    assert all(len(s) == 1 or w <= limit for s, w in zip(shards, weight, strict=True))
    for held, following in zip(weight, shards[1:], strict=False):
        assert held + specs[following[0]].bytes > limit
    assert set(Weights(folder).specs) == set(specs)


def test_numbers_are_converted_to_the_dtype_asked_for(tmp_path):
    tensor = torch.randn(5, 6)
    specs = [TensorSpec("a", (6, 5), torch.bfloat16)]
    assert list(write_weights(tmp_path, specs, [tensor.t()])) == specs
    assert torch.equal(Weights(tmp_path).read("a"), tensor.t().bfloat16())


def test_one_tensor_at_a_time(tmp_path):
    """A model larger than memory can be written: nothing is asked for before its turn."""
    asked = []

    def stream():
        for i in range(4):
            asked.append(i)
            yield torch.full((3,), float(i))

    specs = [TensorSpec(f"t{i}", (3,), torch.float32) for i in range(4)]
    for done, spec in enumerate(write_weights(tmp_path, specs, stream(), shard_bytes=24)):
        assert spec == specs[done]
        assert asked == list(range(done + 1))


# Indices that must not be followed, and words of the refusal.
INDICES = {
    "up": ({"weight_map": {"a": "../x.safetensors"}}, "../x.safetensors"),
    "absolute": ({"weight_map": {"a": "/etc/passwd"}}, "/etc/passwd"),
    "below": ({"weight_map": {"a": "b/x.safetensors"}}, "b/x.safetensors"),
    "empty": ({"weight_map": {"a": ""}}, "''"),
    "dot": ({"weight_map": {"a": "."}}, "'.'"),
    "dots": ({"weight_map": {"a": ".."}}, "'..'"),
    "number": ({"weight_map": {"a": 7}}, "7"),
    "null": ({"weight_map": {"a": None}}, "None"),
    "list": ({"weight_map": {"a": ["x"]}}, "'x'"),
    "NUL": ({"weight_map": {"a": "x\0y"}}, ""),
    "long": ({"weight_map": {"a": "x" * 5000}}, ""),
    "missing shard": ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors"),
    "a folder": ({"weight_map": {"a": "folder"}}, "folder"),
    "not weights": ({"weight_map": {"a": INDEX}}, INDEX),
    "absent tensor": ({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}, "lacks b"),
    "no tensors": ({"weight_map": {}}, "no weights"),
    "no map": ({}, INDEX),
    "a list for a map": ({"weight_map": ["a"]}, INDEX),
    "a word for a map": ({"weight_map": "a"}, INDEX),
    "a list": ([], INDEX),
    "null for all": (None, INDEX),
    "not JSON": ("{", INDEX),
    "deep": ("[" * 100_000, INDEX),
    "not UTF-8": (b"\xff\xfe{}", INDEX),
}


@pytest.mark.parametrize("case", INDICES)
def test_an_index_that_leads_astray_is_refused(case, tmp_path):
    value, word = INDICES[case]
    (tmp_path / "folder").mkdir()
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path.parent / "x.safetensors")
    text = value if isinstance(value, (str, bytes)) else json.dumps(value)
    (tmp_path / INDEX).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError) as caught:
        Weights(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tensor_counts_where_the_index_places_it(tmp_path):
    """A shard may hold a namesake that the index does not mean."""
    safetensors.torch.save_file(
        {"a": torch.ones(2), "b": torch.ones(1)}, tmp_path / "1.safetensors"
    )
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "2.safetensors")
    placed = {"a": "2.safetensors", "b": "1.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": placed}))
    read = Weights(tmp_path)
    assert sorted(read.specs) == ["a", "b"]
    assert torch.equal(read.read("a"), torch.zeros(2))


@pytest.mark.parametrize(
    "make",
    [lambda path: None, Path.mkdir, Path.touch],
    ids=["nothing", "a folder", "an empty file"],
)
def test_no_weights_are_one_clear_error(make, tmp_path):
    make(tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        Weights(tmp_path)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.float8_e4m3fn]
)
def test_integers_are_refused_by_name(dtype, tmp_path):
    """Quantized weights read as numbers would be noise."""
    tensors = {"w.weight": torch.ones(2), "w.qweight": torch.ones(2).to(dtype)}
    safetensors.torch.save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"w\.qweight is stored as .*unquantized"):
        Weights(tmp_path)


def test_causal_masks_of_old_checkpoints_are_passed_over(tmp_path):
    masks = {"h.0.attn.bias": torch.ones(2, 2, dtype=torch.bool), "wte.weight": torch.ones(2)}
    safetensors.torch.save_file(masks, tmp_path / SINGLE)
    assert set(Weights(tmp_path).specs) == {"wte.weight"}


def with_header(header: bytes, data: bytes = b"\0" * 64, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(shape: list, offsets: list, dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


LIES = {
    "a header of exabytes": with_header(b"{}", length=2**62),
    "a header of all there is": with_header(b"{}", length=2**64 - 1),
    "a header longer than the file": with_header(b"{}", length=1000),
    "a header of a hundred megabytes": with_header(b"{}", length=100_000_000),
    "no header": with_header(b""),
    "nothing": b"",
    "seven bytes": b"\0" * 7,
    "not JSON": with_header(b"}" * 40),
    "deep": with_header(b"[" * 50_000),
    "a list": with_header(b"[]"),
    "not UTF-8": with_header(b'{"\xff":{}}'),
}
for _name, _value in {
    "a tensor of exabytes": entry([2**61], [0, 2**63]),
    "a shape whose product overflows": entry([2**40, 2**40], [0, 64]),
    "a shape of many ones": entry([1] * 3000 + [16], [0, 60]),
    "negative numbers": entry([-16], [0, 64]),
    "fractions": entry([16.0], [0, 64]),
    "offsets beyond the file": entry([32], [0, 128]),
    "offsets backwards": entry([16], [64, 0]),
    "offsets with a hole": entry([8], [32, 64]),
    "too few bytes": entry([15], [0, 64]),
    "an unknown type": entry([16], [0, 64], "F31"),
    "a type that is a number": entry([16], [0, 64], 7),
    "no type": {"shape": [16], "data_offsets": [0, 64]},
    "null": None,
}.items():
    LIES[_name] = with_header(json.dumps({"a": _value}).encode())
_one = json.dumps(entry([16], [0, 64]))
LIES["a name twice over other bytes"] = with_header(
    f'{{"a":{_one},"a":{json.dumps(entry([8], [0, 32]))}}}'.encode()
)
LIES["two tensors over the same bytes"] = with_header(f'{{"a":{_one},"b":{_one}}}'.encode())


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_is_one_clear_error(lie, tmp_path):
    (tmp_path / SINGLE).write_bytes(LIES[lie])
    with pytest.raises(CheckpointError) as caught:
        Weights(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / SINGLE}: ")
    assert "\n" not in str(caught.value)


def memory(kind: str = "RssAnon") -> int:
    """Return this process's resident memory, in bytes: RssAnon its own, RssFile mapped files'."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(kind)).split()[1])


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")


def fuzz(folder: Path, count: int, seed: int) -> tuple[int, int]:
    """Damage a small file in many ways; return how many were read and how many refused."""
    tensors = {"a.weight": torch.randn(4, 3), "b.bias": torch.randn(5).bfloat16()}
    write(folder, tensors)
    whole = (folder / SINGLE).read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    chance = random.Random(seed)
    read = refused = 0
    for _ in range(count):
        data = bytearray(whole)
        way = chance.randrange(5)
        if way == 0:
            del data[chance.randrange(len(data)) :]
        elif way == 1:  # mostly in the header, where it matters
            for _ in range(chance.randint(1, 4)):
                data[chance.randrange(header)] ^= 1 << chance.randrange(8)
        elif way == 2:
            data[:8] = struct.pack(
                "<Q", chance.choice((0, 1, 2**63, chance.getrandbits(64))) >> chance.randrange(64)
            )
        elif way == 3:
            place = chance.randrange(header)
            data[place:place] = chance.choice((b"9", b'"', b"-", b"e9", b"{", b",", b"\\u0000"))
        else:
            data[chance.randrange(len(data))] = chance.randrange(256)
        (folder / SINGLE).write_bytes(data)
        try:
            found = Weights(folder)
            for name, spec in found.specs.items():
                tensor = found.read(name)
                assert tuple(tensor.shape) == spec.shape
                assert tensor.dtype == spec.dtype
                assert spec.bytes <= len(data)
                tensor.float().sum()
            read += 1
        except CheckpointError as error:
            assert str(error).startswith(str(folder)), error
            assert "\n" not in str(error), error
            refused += 1
    return read, refused


def test_damaged_files_are_read_or_refused(tmp_path):
    read, refused = fuzz(tmp_path, 2000, 1)
    assert read > 50, "some damage hits only numbers or names"
    assert refused > 1000


@needs_proc
def test_lies_cost_no_memory(tmp_path):
    before = memory()
    fuzz(tmp_path, 200, 2)
    assert memory() - before < 50_000_000


@pytest.mark.slow
def test_many_more_damaged_files(tmp_path):
    read, refused = fuzz(tmp_path, 10_000, 3)
    assert read + refused == 10_000


@needs_proc
def test_weights_stay_on_disk_until_they_are_touched(tmp_path):
    size = 64_000_000
    write(tmp_path, {"a": torch.ones(size // 8), "b": torch.ones(size // 8)})
    before = memory("VmRSS")
    read = Weights(tmp_path)
    a, b = read.read("a"), read.read("b")
    assert memory("VmRSS") - before < size / 8
    assert float(a.sum() + b.sum()) == size / 4
    assert memory("RssAnon") - before < size / 8, "touched pages are the file's, not copies"
    assert memory("VmRSS") - before > size / 2, "else the figure above shows nothing"


def test_writing_to_a_mapped_tensor_leaves_the_file_alone(tmp_path):
    write(tmp_path, {"a": torch.ones(10_000), "b": torch.zeros(10)})
    before = (tmp_path / SINGLE).read_bytes()
    tensor = Weights(tmp_path).read("a")
    tensor.mul_(3).add_(1)
    assert torch.equal(tensor, torch.full((10_000,), 4.0))
    assert (tmp_path / SINGLE).read_bytes() == before
    assert torch.equal(Weights(tmp_path).read("a"), torch.ones(10_000))


class Full:
    """A file on a disk that is full after some bytes."""

    def __init__(self, file, room: int) -> None:
        self.file, self.room = file, room

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def write(self, data) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 300, 700])
def test_a_full_disk_is_one_clear_error(room, tmp_path, monkeypatch):
    """In the header, in the first tensor and in a later one."""
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode: Full(opened(path, mode), room))
    with pytest.raises(ResourceError, match="No space left on device; make room"):
        write(tmp_path, {"a": torch.ones(100), "b": torch.ones(100)})


def test_a_disk_that_fills_at_the_flush_is_one_clear_error(tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights.os, "fsync", full)
    with pytest.raises(ResourceError, match="No space left"):
        write(tmp_path, {"a": torch.ones(3)})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
@pytest.mark.parametrize("name", [SINGLE, "model-00002-of-00002.safetensors", INDEX])
def test_a_device_that_is_always_full(name, tmp_path):
    (tmp_path / name).symlink_to("/dev/full")
    shard_bytes = 10**9 if name == SINGLE else 4
    with pytest.raises(ResourceError, match="No space left"):
        write(tmp_path, {"a": torch.ones(3), "b": torch.ones(3)}, shard_bytes=shard_bytes)


def test_room_is_checked_before_the_first_byte(tmp_path):
    check_room(tmp_path / "not" / "yet", 1)
    with pytest.raises(ResourceError, match=r"1,000,000,000\.0 GB are needed"):
        check_room(tmp_path / "not" / "yet", 10**18)
    assert not list(tmp_path.iterdir())
