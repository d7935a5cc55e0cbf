"""The torch-free reader of safetensors; hostile files and indices are in `test_weights.py`."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from engine.errors import CheckpointError
from engine.tensors import KINDS, SINGLE, Tensors
from tests.conftest import ROOT

ARRAYS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.arange(5, dtype=np.float16),
    "c": np.arange(7, dtype=np.uint8),
    "d": np.arange(3, dtype=np.float64),
    "e": np.zeros((0, 4), np.float32),
    "f": np.array(3, np.float32),
}


def test_what_the_formats_own_library_writes_is_read(tmp_path):
    safetensors.numpy.save_file(ARRAYS, tmp_path / SINGLE)
    read = Tensors(tmp_path, kinds=tuple(KINDS))
    assert sorted(read.shapes) == sorted(ARRAYS) and read.files == [tmp_path / SINGLE]
    for name, array in ARRAYS.items():
        found = read.read(name)
        assert found.dtype == array.dtype and found.shape == array.shape == read.shapes[name]
        assert np.array_equal(found, array)


def test_bf16_comes_as_its_bits(tmp_path):
    values = torch.randn(4, 5).bfloat16()
    safetensors.torch.save_file({"a": values}, tmp_path / SINGLE)
    bits = Tensors(tmp_path).read("a")
    assert bits.dtype == np.uint16
    assert np.array_equal(bits, values.view(torch.uint16).numpy())


def askew(folder: Path) -> None:
    """Write a header of odd length, as the format allows."""
    safetensors.numpy.save_file({"a": ARRAYS["a"]}, folder / SINGLE)
    data = (folder / SINGLE).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    data = struct.pack("<Q", length + 1) + data[8 : 8 + length] + b" " + data[8 + length :]
    (folder / SINGLE).write_bytes(data)


def test_what_lies_askew_is_read_from_a_copy(tmp_path):
    """Our C loads numbers where numbers may lie."""
    askew(tmp_path)
    found = Tensors(tmp_path).read("a")
    assert found.flags.aligned and found.ctypes.data % 4 == 0
    assert np.array_equal(found, ARRAYS["a"])


def test_writing_leaves_the_file_alone_and_others_too(tmp_path):
    safetensors.numpy.save_file(ARRAYS, tmp_path / SINGLE)
    first, second = (Tensors(tmp_path, kinds=tuple(KINDS)).read("a") for _ in range(2))
    first += 1
    assert np.array_equal(first, ARRAYS["a"] + 1) and np.array_equal(second, ARRAYS["a"])


@pytest.mark.parametrize("kinds", [("F32",), ("F64", "F32", "F16", "BF16")])
def test_only_the_wanted_kinds_are_read(kinds, tmp_path):
    safetensors.numpy.save_file(ARRAYS, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"is stored as \w+; only F"):
        Tensors(tmp_path, kinds=kinds)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_what_is_given_back_costs_nothing_and_is_there_again(tmp_path):
    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("RssFile")).split()[1])

    size = 40_000_000
    safetensors.numpy.save_file({"a": np.ones(size // 4, np.float32)}, tmp_path / SINGLE)
    read, before = Tensors(tmp_path), resident()
    array = read.read("a")
    assert array.sum() == size / 4
    assert resident() - before > 0.9 * size, "else what follows shows nothing"
    read.release("a")
    assert resident() - before < 0.1 * size
    assert array.sum() == size / 4


def test_no_torch_is_needed():
    code = "import sys, engine.matrices; print('torch' in sys.modules)"
    process = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout.strip() == "False"
