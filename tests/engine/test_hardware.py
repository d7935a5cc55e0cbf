"""What is decided about the machine, and that measurements measure."""

from pathlib import Path

import pytest
import torch

from engine.errors import ResourceError
from engine.hardware import autocast, has_fast_bf16, keep_heap, pick_device, pick_dtype, use_threads
from engine.peak import peak_memory

CPU = torch.device("cpu")


def test_a_device_that_is_not_there_is_refused():
    assert pick_device("cpu") == CPU
    if not torch.cuda.is_available():
        with pytest.raises(ResourceError, match="no cuda device; use run.device=auto"):
            pick_device("cuda")
        assert pick_device("auto").type in ("cpu", "mps")


def test_precision_follows_the_hardware_unless_told():
    assert pick_dtype("fp32", CPU) == torch.float32
    assert pick_dtype("bf16", CPU) == torch.bfloat16
    expected = torch.bfloat16 if has_fast_bf16(CPU) else torch.float32
    assert pick_dtype("auto", CPU) == expected


def test_autocast_multiplies_in_the_chosen_precision():
    a = torch.randn(4, 4)
    with autocast(CPU, torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
    with autocast(CPU, torch.float32):
        assert (a @ a).dtype == torch.float32


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="compares with Linux's figure")
def test_peak_memory_is_the_systems_own_figure():
    """In bytes: the units differ between systems."""
    block = torch.ones(50_000_000)
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    assert peak_memory() == pytest.approx(int(peak.split()[1]) * 1024, rel=0.1)
    assert peak_memory() > block.nbytes


def test_threads_and_heap():
    keep_heap()
    assert use_threads(2) == 2 == torch.get_num_threads() == use_threads(0)
    assert use_threads(1) == 1
