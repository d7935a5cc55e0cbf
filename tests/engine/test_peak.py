"""The peak is the system's own figure, and begins anew where it can."""

import mmap
from pathlib import Path

import numpy as np
import pytest

from engine.peak import forget_peak_memory, peak_memory


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="compares with Linux's figure")
def test_peak_memory_is_the_systems_own_figure():
    """In bytes: the units differ between systems."""
    block = np.ones(25_000_000)
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    assert peak_memory() == pytest.approx(int(peak.split()[1]) * 1024, rel=0.1)
    assert peak_memory() > block.nbytes


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can forget")
def test_a_peak_can_be_forgotten():
    with mmap.mmap(-1, 100_000_000) as block:
        block.write(bytes(100_000_000))
    before = peak_memory()
    forget_peak_memory()
    assert peak_memory() < before
