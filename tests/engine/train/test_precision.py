"""What a run multiplies in: what is asked for, else the fastest that is right; never in silence."""

import pytest
import torch

from engine.config import RunConfig
from engine.errors import ResourceError
from engine.kernels.native import Kernels
from engine.train import precision
from engine.train.precision import choose_precision, first_build
from tests.conftest import make_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_native_bf16(monkeypatch):
    monkeypatch.setattr("engine.hardware.has_fast_bf16", lambda device: False)


def test_auto_takes_8_bits_from_nothing_and_fp32_from_a_base(kernels: Kernels, tmp_path):
    cache = tmp_path / "cache"
    ours = choose_precision(RunConfig(), CPU, cache, finetune=False)
    assert (ours.name, bool(ours.kernels)) == ("int8", True)
    tuned = choose_precision(RunConfig(), CPU, cache, finetune=True)
    assert (tuned.name, bool(tuned.kernels)) == ("float32", True)
    model = make_model()
    ours.prepare(model)
    assert model.eight_bits and model.blocks[0].mlp.kernels
    tuned.prepare(model)
    assert not model.eight_bits and model.blocks[0].mlp.kernels


def test_without_kernels_torch_does_it_and_the_reason_is_kept(tmp_path, monkeypatch):
    off = choose_precision(RunConfig(kernels="torch"), CPU, tmp_path, finetune=False)
    assert off.name == "float32" and off.kernels.reason == "run.kernels=torch was asked for"
    monkeypatch.setattr(precision, "load_kernels", lambda cache: precision.Unavailable("no cc"))
    assert choose_precision(RunConfig(), CPU, tmp_path, finetune=False).name == "float32"
    with pytest.raises(ResourceError, match="run.dtype=int8 .* no cc"):
        choose_precision(RunConfig(dtype="int8"), CPU, tmp_path, finetune=False)


def test_bf16_is_left_to_torch(kernels: Kernels, tmp_path, monkeypatch):
    asked = choose_precision(RunConfig(dtype="bf16"), CPU, tmp_path / "cache", finetune=False)
    assert asked.name == "bfloat16" and not asked.kernels
    monkeypatch.setattr(precision, "load_kernels", None)  # nor are they looked for, and built
    monkeypatch.setattr("engine.hardware.has_fast_bf16", lambda device: True)
    native = choose_precision(RunConfig(), CPU, tmp_path / "cache", finetune=False)
    assert native.name == "bfloat16"


@pytest.mark.parametrize(
    "wish, said",
    [
        ({}, "building kernels with gcc, once"),
        ({"dtype": "fp32"}, "building kernels with gcc, once"),
        ({"dtype": "bf16"}, ""),
        ({"kernels": "torch"}, ""),
    ],
    ids=str,
)
def test_a_build_is_said_where_it_will_be(monkeypatch, tmp_path, wish, said):
    monkeypatch.setattr(precision, "unbuilt", lambda cache: "gcc")
    assert first_build(RunConfig(**wish), CPU, tmp_path) == said
    monkeypatch.setattr(precision, "unbuilt", lambda cache: "")
    assert first_build(RunConfig(**wish), CPU, tmp_path) == ""
