"""What systems say about processors is understood, and measurements measure."""

import re
import sys
import time
from pathlib import Path

import pytest
import torch

from engine import machine
from engine.machine import (
    OPTIONAL,
    describe,
    find_compiler,
    matmul_peak,
    matmul_peaks,
    memory_bandwidth,
    parse_cpuinfo,
    parse_quota,
    parse_size,
    parse_sysctl,
    parse_torch_build,
    stream_bytes,
)
from tests.conftest import ROOT

CPU = torch.device("cpu")


def processor(number: int, core: int, flags: str, package: int = 0) -> str:
    return (
        f"processor\t: {number}\nmodel name\t: Some Xeon @ 2.0: fast\nphysical id\t: {package}\n"
        f"core id\t\t: {core}\nflags\t\t: {flags}\n"
    )


def test_x86_threads_of_one_core_count_once():
    flags = "fpu avx2 avx512f avx512_vnni amx_bf16 amx_int8 amx_tile avx512_bf16"
    text = "\n".join(processor(n, n % 2, flags) for n in range(4))
    cpu = parse_cpuinfo(text, range(4))
    assert cpu.name == "Some Xeon @ 2.0: fast" and cpu.cores == 2
    expected = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    assert cpu.isa == expected
    assert parse_cpuinfo(text, {0, 2}).cores == 1  # both run on core 0
    two = processor(0, 0, "sse2") + "\n" + processor(1, 0, "sse2", package=1)
    assert parse_cpuinfo(two, {0, 1}).cores == 2  # core 0 of two packages
    assert parse_cpuinfo(two, {0, 1}).isa == ()


def test_arm_has_other_words_and_no_core_ids():
    block = "processor\t: {}\nBogoMIPS\t: 243.75\nFeatures\t: fp asimd asimddp i8mm bf16 sve\n"
    cpu = parse_cpuinfo("\n".join(block.format(n) for n in range(3)), {0, 1, 2})
    assert cpu.cores == 3 and cpu.isa == ("neon", "dotprod", "i8mm", "bf16") and cpu.name == ""
    old = "\n".join(block.format(n).replace(" i8mm bf16", "") for n in range(3))
    assert parse_cpuinfo(old, {0}).isa == ("neon", "dotprod")


def test_macos_says_it_through_sysctl():
    apple = (
        "hw.physicalcpu: 8\nhw.logicalcpu: 8\nhw.optional.neon: 1\n"
        "hw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_I8MM: 0\n"
        "hw.optional.arm.FEAT_BF16: 1\nmachdep.cpu.brand_string: Apple M1\n"
    )
    cpu = parse_sysctl(apple)
    assert (cpu.name, cpu.cores, cpu.isa) == ("Apple M1", 8, ("neon", "dotprod", "bf16"))
    intel = "hw.physicalcpu: 4\nhw.optional.avx2_0: 1\nhw.optional.avx512f: 0\n"
    assert parse_sysctl(intel).isa == ("avx2",)
    assert parse_sysctl("").cores >= 1 and parse_cpuinfo("", {0}).cores == 1


def test_small_readings():
    assert [
        parse_quota(text) for text in ("max 100000\n", "200000 100000\n", "150000 100000\n")
    ] == [
        0,
        2,
        2,
    ]
    assert [parse_size(text) for text in ("266240K\n", "2M", "512", "?", "")] == [
        272629760,
        2097152,
        512,
        0,
        0,
    ]
    build = (
        "  - Intel(R) oneAPI Math Kernel Library Version 2024.2-Product Build 20240605\n"
        "  - Intel(R) MKL-DNN v3.12.0 (Git Hash 80af)\n  - Build settings: BLAS_INFO=mkl, X=1\n"
    )
    assert parse_torch_build(build) == ("mkl 2024.2", "3.12.0")
    assert parse_torch_build("BLAS_INFO=accelerate, ") == ("accelerate", "")


def test_a_compiler_is_one_that_runs(tmp_path):
    assert find_compiler("no-such-compiler") == "" == find_compiler("") == find_compiler("false")
    for line, version in [
        ("cc (Debian 12.2.0-14) 12.2.0", "12.2.0"),
        ("gcc (GCC) 11.4.1 20231218 (Red Hat 11.4.1-3)", "11.4.1"),
        ("Apple clang version 15.0.0 (clang-1500.3.9.4)", "15.0.0"),
    ]:
        fake = tmp_path / "cc"
        fake.write_text(f"#!/bin/sh\necho '{line}'\n")
        fake.chmod(0o755)
        assert find_compiler(f"{fake} -m64") == f"{fake} -m64 {version}"


def test_a_description_is_quick_and_agrees_with_torch():
    describe()
    start = time.perf_counter()
    here = describe(cc="no-such-compiler")
    assert time.perf_counter() - start < 1  # some hundredths on an idle machine
    assert here.compiler == "" and here.threads == torch.get_num_threads()
    assert 0 < here.free <= here.memory and here.cores >= 1
    assert here.packages.keys() == OPTIONAL.keys()
    features = torch.cpu.get_capabilities()  # torch asks the processor itself
    if sys.platform == "linux" and features.get("architecture") == "x86_64":
        for ours, theirs in (("avx2", "avx2"), ("avx512f", "avx512_f"), ("amx_bf16", "amx_bf16")):
            assert (ours in here.isa) == bool(features[theirs]), ours


def test_every_optional_package_is_brought_by_its_extra():
    """The table is pyproject.toml's, but for what only developers need."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    found = {}
    for extra, packages in re.findall(r"^(\w+) = \[(.*?)\]", table, re.MULTILINE | re.DOTALL):
        if extra not in ("dev", "peers"):
            found |= {name: extra for name in re.findall(r'"([\w-]+)', packages)}
    assert found == {name: extra for name, (extra, _) in OPTIONAL.items()}


def test_the_matmul_peak_is_reached_by_a_matmul():
    """The yardstick cannot be far below what one plain multiplication reaches right after."""
    peak = matmul_peak(CPU, torch.float32, seconds=0.2)
    a = torch.randn(1024, 1024)
    best = min(_timed(a) for _ in range(5))
    assert 0.3 < peak / (2 * 1024**3 / best) < 3


def _timed(a: torch.Tensor) -> float:
    start = time.perf_counter()
    torch.mm(a, a)
    return time.perf_counter() - start


def test_a_precision_that_the_device_has_not_is_left_out(monkeypatch):
    def absent(a, b):
        raise RuntimeError("not implemented")

    monkeypatch.setattr(machine, "SHAPES", ((64, 64, 64),))
    assert matmul_peaks(CPU, seconds_each=0.01).keys() >= {"fp32", "bf16"}
    monkeypatch.setattr(torch, "_int_mm", absent)
    assert matmul_peaks(CPU, seconds_each=0.01).keys() == {"fp32", "bf16"}


def test_bandwidth_is_that_of_a_buffer_read_once(monkeypatch):
    """Bytes over time, and torch's threads are as before."""
    monkeypatch.setattr(machine, "STREAM", 1 << 26)
    assert stream_bytes() == 1 << 26
    torch.set_num_threads(2)
    measured = memory_bandwidth(1, seconds=0.2)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    block = torch.ones(1 << 24)
    best = min(_summed(block) for _ in range(5))
    assert 0.3 < measured / (block.nbytes / best) < 4


def _summed(block: torch.Tensor) -> float:
    start = time.perf_counter()
    block.sum()
    return time.perf_counter() - start


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux")
def test_this_processor_has_a_name_or_features():
    here = describe()
    assert here.cpu and here.isa
