"""Writing: types that other programs expect, and a disk that refuses."""

import errno

import gguf as library
import numpy as np
import pytest
import torch

from engine.errors import ResourceError
from engine.interop.gguf import writer
from engine.interop.gguf.reader import read
from engine.interop.gguf.writer import store

KIND = library.GGUFValueType


def put(path, metadata, **tensors):
    shapes = {name: (tuple(tensor.shape), "F32") for name, tensor in tensors.items()}
    return store(path, metadata, shapes, tensors.items())


@pytest.mark.parametrize(
    ("value", "types"),
    [
        (True, [KIND.BOOL]),
        (7, [KIND.UINT32]),
        (-7, [KIND.INT32]),
        (1 << 32, [KIND.UINT64]),
        (-(1 << 40), [KIND.INT64]),
        (0.5, [KIND.FLOAT32]),
        (np.float32(0.5), [KIND.FLOAT32]),
        ("é", [KIND.STRING]),
        (["a", "b"], [KIND.ARRAY, KIND.STRING]),
        ([1, 2], [KIND.ARRAY, KIND.INT32]),
        ([0.5], [KIND.ARRAY, KIND.FLOAT32]),
        ([True], [KIND.ARRAY, KIND.BOOL]),
        (np.array([1, 2], np.uint32), [KIND.ARRAY, KIND.UINT32]),
        (np.array([1, 2], np.int64), [KIND.ARRAY, KIND.INT64]),
        (np.array([0.5], np.float64), [KIND.ARRAY, KIND.FLOAT64]),
    ],
)
def test_a_value_has_the_type_that_others_expect(value, types, tmp_path):
    put(tmp_path / "m.gguf", {"general.architecture": "llama", "k": value}, a=torch.ones(3))
    field = library.GGUFReader(tmp_path / "m.gguf").fields["k"]
    assert field.types == types
    assert np.array_equal(field.contents(), value)
    assert np.array_equal(read(tmp_path / "m.gguf").metadata["k"], value)


def test_an_empty_list_is_written(tmp_path):
    put(tmp_path / "m.gguf", {"general.architecture": "llama", "k": []}, a=torch.ones(3))
    assert len(read(tmp_path / "m.gguf").metadata["k"]) == 0


def test_tensors_may_come_in_any_order_and_any_layout(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7), "c": torch.randn(4, 6).T}
    shapes = {name: (tuple(tensor.shape), "F32") for name, tensor in tensors.items()}
    size = store(tmp_path / "m.gguf", {}, shapes, reversed(tensors.items()))
    assert size == (tmp_path / "m.gguf").stat().st_size
    found = read(tmp_path / "m.gguf")
    assert list(found.tensors) == ["a", "b", "c"]
    for name, tensor in tensors.items():
        assert torch.equal(found.tensor(name), tensor)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    put(path, {}, a=torch.ones(3))
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "flush", full)
    with pytest.raises(ResourceError, match=r"m\.gguf: cannot be written: No space left"):
        put(path, {}, a=torch.zeros(3))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_missing_is_an_error_of_one_line(tmp_path):
    with pytest.raises(ResourceError, match="cannot be written: No such file"):
        put(tmp_path / "none" / "m.gguf", {}, a=torch.ones(3))


def test_an_interruption_leaves_nothing(tmp_path):
    def weights():
        yield "a", torch.ones(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store(tmp_path / "m.gguf", {}, {"a": ((3,), "F32"), "b": ((3,), "F32")}, weights())
    assert list(tmp_path.iterdir()) == []
