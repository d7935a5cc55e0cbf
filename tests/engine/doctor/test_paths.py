"""What is said of fast paths follows from the machine, and a compiler is tried, not believed."""

import dataclasses

import pytest
import torch

from engine.doctor import paths
from engine.doctor.paths import builds_openmp, fast_paths
from engine.hardware import has_fast_bf16
from engine.machine import Machine, describe, find_compiler

CPU = torch.device("cpu")


def rows(device: torch.device = CPU, cxx: str = "", **changes) -> dict[str, tuple[bool, str]]:
    machine: Machine = dataclasses.replace(describe("none"), **changes)
    return {path.name: (path.on, path.why) for path in fast_paths(machine, device, cxx)}


def test_bf16_is_on_where_training_takes_it(monkeypatch):
    assert rows()["bf16"][0] == has_fast_bf16(CPU)
    monkeypatch.setattr(paths, "has_fast_bf16", lambda device: False)
    assert "needs amx_bf16 or avx512_bf16;" in rows(isa=("avx2",))["bf16"][1]
    assert "needs bf16;" in rows(isa=("neon",))["bf16"][1]
    assert rows(torch.device("mps"))["bf16"] == (False, "mps does not multiply it; fp32 is faster")
    monkeypatch.setattr(paths, "has_fast_bf16", lambda device: True)
    assert rows()["bf16"][0]


def test_our_decoder_is_on_where_it_was_built(library):
    decoder = {path.name: path for path in fast_paths(describe("none"), CPU, library=library)}
    assert decoder["our decoder"].on and "8-bit products by" in decoder["our decoder"].why
    assert rows()["our decoder"] == (False, "it was not asked for")
    away = fast_paths(describe("none"), torch.device("mps"), library=library)
    assert "mps answers by torch" in {path.name: path.why for path in away}["our decoder"]


def test_threads_fewer_or_more_than_cores_are_told():
    assert rows(threads=4, cores=4)["all cores"] == (True, "threads 4, cores 4")
    for threads in (2, 8):
        on, why = rows(threads=threads, cores=4)["all cores"]
        assert not on and f"threads {threads}, cores 4; OMP_NUM_THREADS=4" in why


def test_an_accelerator_is_on_if_it_is_used():
    assert rows(accelerators=("Some GPU",))["accelerator"] == (
        False,
        "there is one; --device cpu was asked for",
    )
    assert rows(torch.device("cuda"), accelerators=("Some GPU",))["accelerator"][0]
    assert not rows(accelerators=())["accelerator"][0]


def test_what_is_missing_says_how_to_get_it():
    packages = describe("none").packages
    on, why = rows(packages=packages | {"tiktoken": ""})["tiktoken"]
    assert not on and "pip install 'lm-workbench[fast]'" in why
    assert rows(packages=packages | {"tiktoken": "0.14"})["tiktoken"][0]
    assert rows()["torch.compile"] == (False, "needs a C++ compiler")
    assert rows(cxx="g++ 12.2.0")["torch.compile"][0]


def test_openmp_is_found_by_building_with_it(tmp_path, monkeypatch):
    assert not builds_openmp("no-such-compiler") and not builds_openmp("false")
    assert builds_openmp("true"), "a compiler is believed when it says that all went well"
    if not find_compiler("cc"):
        pytest.skip("no compiler here")
    before = builds_openmp("cc")
    monkeypatch.setattr(paths, "SOURCE", "#include <no-such-header.h>\n")
    assert before and not builds_openmp("cc"), "the control"
