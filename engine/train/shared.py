"""Tensors in memory that several processes see, so that a model of many readers is there once.

The memory is a file without a name: it goes when the last process that has it open ends, however
that ends.
"""

import copy
import mmap
import os
import sys
import tempfile
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from engine.errors import ResourceError
from engine.model.transformer import Transformer

LINE = 64  # bytes of a cache line; where a tensor begins can show in the last bit of a product


class Shared:
    """A piece of memory, cut into tensors."""

    def __init__(self, like: Sequence[Tensor], file: int | None = None) -> None:
        """Cut new memory, or that of an open `file`, into tensors shaped like these.

        Raises: ResourceError if there is no more memory to be had.
        """
        sizes = [-(-tensor.nbytes // LINE) * LINE for tensor in like]
        starts = [0, *accumulate(sizes)]
        try:
            self.file = _nameless(starts[-1]) if file is None else file
            memory = torch.frombuffer(mmap.mmap(self.file, starts[-1]), dtype=torch.uint8)
        except OSError as error:
            raise ResourceError(
                f"no {starts[-1] / 1e9:.2f} GB of memory for processes to share: {error.strerror};"
                " set train.processes=1"
            ) from None
        self.tensors = [
            memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for start, tensor in zip(starts, like, strict=False)
        ]

    def close(self) -> None:
        """Close the file once all who need it have it; the tensors stay."""
        os.close(self.file)


def _nameless(size: int) -> int:
    """Open a file that has no name, in memory where the system can."""
    if sys.platform == "linux":
        file = os.memfd_create("lm")
    else:
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
    os.ftruncate(file, size)
    return file


def numbers(model: Transformer) -> list[Tensor]:
    """Return all that a model computes with, each tensor once, tied or not."""
    return [*model.parameters(), *model.buffers()]


@torch.no_grad()
def move(model: Transformer) -> Shared:
    """Move a model's numbers to shared memory; its tensors stay the same objects."""
    shared = Shared(numbers(model))
    for tensor, place in zip(numbers(model), shared.tensors, strict=True):
        place.copy_(tensor)
        tensor.data = place
    return shared


def with_numbers(model: Transformer, tensors: Sequence[Tensor]) -> Transformer:
    """Return a copy of a model that computes with these numbers in place of its own."""
    memo: dict[int, Tensor] = {}  # what `deepcopy` finds here it does not copy
    for old, new in zip(numbers(model), tensors, strict=True):
        is_parameter = isinstance(old, nn.Parameter)
        memo[id(old)] = nn.Parameter(new, old.requires_grad) if is_parameter else new
    return copy.deepcopy(model, memo)


def without_numbers(model: Transformer) -> Transformer:
    """Return a copy of a model that is all shapes: small enough to be sent."""
    return with_numbers(model, [tensor.detach().to("meta") for tensor in numbers(model)])
