"""Ask a GGUF file for the keys of its architecture, once each, so that what nobody asked shows."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from engine.errors import CheckpointError
from engine.interop.gguf.names import ARCHITECTURES
from engine.interop.gguf.reader import TensorInfo, shown

# Keys of an architecture that change nothing as long as they have one of these values.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "rope.scaling.finetuned": (True, False),
    "tensor_data_layout": ("Meta AI original pth",),
}
_REQUIRED: Any = object()
_LARGEST = 1e38  # what float32 holds


class Source(Protocol):
    """What a description of a model is read from: an open file, or one about to be written."""

    @property
    def path(self) -> Path:
        """Where it is, for messages."""
        ...

    @property
    def metadata(self) -> dict[str, Any]:
        """Its keys."""
        ...

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Its tensors."""
        ...

    def tensor(self, name: str) -> Tensor:
        """Read one tensor."""
        ...


class Keys:
    """The keys `ARCHITECTURE.*` of a file; each question says which type of answer is right."""

    def __init__(self, source: Source) -> None:
        self.source = source
        name = source.metadata.get("general.architecture")
        if not isinstance(name, str) or name not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise self.error(f"is of the architecture {shown(name)}", f"known are {known}")
        self.architecture: str = name
        kind = source.metadata.get("general.type", "model")
        if not isinstance(kind, str) or kind != "model":
            raise self.error(
                f"holds {shown(kind)}, not a model", "use the file of the model itself"
            )
        self.asked: set[str] = set()

    def error(self, what: str, fix: str = "this file cannot be imported") -> CheckpointError:
        """Return the refusal of this file, to be raised."""
        return CheckpointError(f"{self.source.path}: {what}; {fix}")

    def _ask(self, name: str, default: Any) -> Any:
        key = f"{self.architecture}.{name}"
        self.asked.add(key)
        value = self.source.metadata.get(key, default)
        if value is _REQUIRED:
            raise self.error(f"lacks the key {key}")
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and len(value):
            if (value != value[0]).any():
                raise self.error(f"{key} differs from layer to layer, which is not supported")
            return int(value[0])
        return value

    def whole(self, name: str, default: Any = _REQUIRED) -> Any:
        """Return a number ≥ 0 that fits in 31 bits."""
        value = self._ask(name, default)
        if value is not default and not (type(value) is int and 0 <= value < 1 << 31):
            raise self.error(f"{self.architecture}.{name} is {shown(value)}")
        return value

    def size(self, name: str, default: Any = _REQUIRED) -> Any:
        """Return a number ≥ 1."""
        value = self.whole(name, default)
        if value == 0:
            raise self.error(f"{self.architecture}.{name} is 0")
        return value

    def real(self, name: str, default: Any = _REQUIRED) -> Any:
        """Return a number ≥ 0, read as the shortest decimal that gives the stored one."""
        value = self._ask(name, default)
        if value is default:
            return value
        if type(value) not in (int, float) or not 0 <= value < _LARGEST:
            raise self.error(f"{self.architecture}.{name} is {shown(value)}")
        return self.decimal(value)

    def text(self, name: str, default: Any = _REQUIRED) -> Any:
        """Return a string."""
        value = self._ask(name, default)
        if not isinstance(value, str):
            raise self.error(f"{self.architecture}.{name} is {shown(value)}")
        return value

    def flags(self, name: str, count: int) -> list[bool] | int | None:
        """Return one truth value per layer, or the period of a pattern, or nothing."""
        key = f"{self.architecture}.{name}"
        value = self.source.metadata.get(key)
        if isinstance(value, np.ndarray) and value.dtype.kind == "b" and len(value) >= count:
            self.asked.add(key)
            return value[:count].tolist()
        return self.size(name, None)

    @staticmethod
    def decimal(value: Any) -> float:
        """Undo the rounding to float32: 9.999999747e-06 was written as 1e-05."""
        return float(str(np.float32(float(value))))

    def has(self, tensor: str) -> bool:
        """Tell whether the file holds a tensor."""
        return tensor in self.source.tensors

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a small tensor, which must have this shape and hold finite numbers."""
        if not self.has(name):
            raise self.error(f"lacks the tensor {name}")
        if self.source.tensors[name].shape != shape:
            raise self.error(f"{name} has the shape {self.source.tensors[name].shape}, not {shape}")
        tensor = self.source.tensor(name)
        if not tensor.isfinite().all():
            raise self.error(f"{name} has numbers that are not finite")
        return tensor

    def finish(self) -> None:
        """Refuse keys that nobody asked about, unless they change nothing."""
        for key, value in self.source.metadata.items():
            if key.startswith(f"{self.architecture}.") and key not in self.asked:
                name = key.removeprefix(f"{self.architecture}.")
                neutral = _NEUTRAL.get(name, ())
                if isinstance(value, np.ndarray | list) or value not in neutral:
                    raise self.error(f"the key {shown(key)} = {shown(value)} is not understood")
