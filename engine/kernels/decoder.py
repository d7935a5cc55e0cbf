"""The C decoder seen from Python: its structs, filled in with addresses, and its two functions.

Nothing here imports torch. The fields are those of `decoder.c` and `matrix.h`, in their order.
"""

import ctypes
from ctypes import POINTER, Structure, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

from engine.kernels.compile import Unavailable, build, compiler_for

SOURCES = [Path(__file__).with_name(name) for name in ("matrix.c", "decoder.c")]
INCLUDED = [Path(__file__).with_name(name) for name in ("matrix.h", "vector.h")]
FLAGS = ["-O2"]
FORMATS = {"f32": 0, "f16": 1, "bf16": 2, "int8": 3, "int4": 4}
ACTIVATIONS = ("swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "relu2")


def _fields(**names: type) -> list[tuple[str, type]]:
    """Declare the fields of a C struct: under each key, its type or several of one type."""
    return list(names.items())


def _many(kind: type, names: str) -> dict[str, type]:
    """Give several fields one type."""
    return dict.fromkeys(names.split(), kind)


class CMatrix(Structure):
    """Weights in one of FORMATS, and a bias."""

    _fields_ = _fields(
        **_many(c_int64, "format rows columns"), **_many(c_void_p, "data scale bias")
    )


class CNorm(Structure):
    """A norm's weight and bias; without a weight there is none."""

    _fields_ = _fields(**_many(c_void_p, "weight bias"))


class CLayer(Structure):
    """A block."""

    _fields_ = _fields(
        **_many(CNorm, "attention_in attention_out mlp_in mlp_out query key"),
        **_many(CMatrix, "q k v o gate up down"),
        **_many(c_int64, "window rotation"),
    )


class CModel(Structure):
    """A model: sizes, switches, weights."""

    _fields_ = _fields(
        **_many(c_int64, "D L N K H F V rotary activation centred whole"),
        **_many(c_float, "eps scale softcap logit_cap embedding_scale"),
        layers=POINTER(CLayer),
        **_many(CMatrix, "embedding head positions"),
        final=CNorm,
    )


class CCache(Structure):
    """Keys and values of all layers, and the angles of positions."""

    _fields_ = _fields(
        format=c_int64,
        **_many(c_void_p * 2, "cosine sine"),
        **_many(POINTER(c_void_p), "keys values key_scales value_scales"),
        blocks=POINTER(c_int64),
    )


class CBatch(Structure):
    """The tokens of a call, where they stand, and whose logits are wanted."""

    _fields_ = _fields(
        **_many(c_int64, "many wanted"), **_many(c_void_p, "token position row which")
    )


class Library:
    """The loaded library."""

    def __init__(self, path: Path) -> None:
        self.path = path
        library = ctypes.CDLL(str(path))
        self.workspace_bytes = library.workspace_bytes
        self.workspace_bytes.argtypes = [POINTER(CModel), c_int64, c_int64, c_int]
        self.workspace_bytes.restype = c_size_t
        self.forward = library.forward
        self.forward.argtypes = [
            *(POINTER(CModel), POINTER(CCache), POINTER(CBatch)),
            *(c_void_p, c_int64, c_int64, c_void_p, c_int),
        ]
        self.forward.restype = None


def load_library(cache: Path) -> Library | Unavailable:
    """Load the decoder from below `cache`, building it first if this machine never did."""
    path = build(SOURCES, INCLUDED, FLAGS, cache)
    if isinstance(path, Unavailable):
        return path
    try:
        return Library(path)
    except (OSError, AttributeError) as error:
        path.unlink(missing_ok=True)  # whatever made it, the next one may be better
        return Unavailable(f"{path} does not load: {error}")


def unbuilt(cache: Path) -> str:
    """Name the compiler that loading the decoder would start; nothing if it would not."""
    return compiler_for(SOURCES, INCLUDED, FLAGS, cache)
