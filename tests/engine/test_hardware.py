"""What is decided about the machine, and that measurements measure."""

import pytest
import torch

from engine.errors import ResourceError
from engine.hardware import autocast, has_fast_bf16, keep_heap, pick_device, pick_dtype, use_threads

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


def test_threads_and_heap():
    keep_heap()
    assert use_threads(2) == 2 == torch.get_num_threads() == use_threads(0)
    assert use_threads(1) == 1
