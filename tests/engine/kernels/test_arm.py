"""The C decoder on ARM, run by an emulator where a cross-compiler and qemu are installed.

The tests are those of the decoder itself: `Emulated` takes the place of the library that they call.
"""

import ctypes
import shutil
import subprocess
from ctypes import Structure, c_int64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.generate import native, native_cache
from engine.generate.decoder import Run
from engine.kernels.compile import FLAGS as COMMON
from engine.kernels.compile import NATIVE
from engine.kernels.decoder import FLAGS, SOURCES
from tests.engine.generate import test_native as tests

PLACE = 0x10_0000_0000  # where the program maps its arguments to
CROSS = "aarch64-linux-gnu"
COMPILERS = {"gcc": [f"{CROSS}-gcc", "-fopenmp"], "clang": ["clang", f"--target={CROSS}"]}
AARCH64 = 183  # in an ELF file
DLOPEN = "warning: Using 'dlopen'"  # of OpenMP's, linked statically
PROCESSORS = {"dotprod": "armv8.2-a+dotprod", "plain": "armv8-a"}


class Call(Structure):
    """What `emulated.c` reads first."""

    _names = "model cache batch logits place size room blocks threads"
    _fields_ = [(name, c_int64) for name in _names.split()]


class Emulated:
    """A library whose functions are a program for another processor, run by an emulator."""

    def __init__(self, program: Path) -> None:
        self.program = program
        self._known: dict[int, np.ndarray] = {}  # by address
        self._blob = bytearray()
        self._placed: dict[int, int] = {}

    def at(self, array: np.ndarray | None) -> int | None:
        """Return where an array lies, and remember it."""
        if array is None:
            return None
        assert array.flags.c_contiguous
        self._known[array.ctypes.data] = array
        return array.ctypes.data

    def workspace_bytes(self, *_) -> int:
        """Return little: the program has its own."""
        return 64

    def forward(self, model, cache, batch, work, room, blocks, logits, threads) -> None:
        """Write all arguments to a file, run the program on it, read back what it wrote."""
        self._blob, self._placed = bytearray(ctypes.sizeof(Call)), {}
        layers = model.L
        call = Call(
            model=self._put(self._moved(model, layers)),
            cache=self._put(self._moved(cache, layers)),
            batch=self._put(self._moved(batch, layers)),
            logits=self._put_array(logits),
            place=PLACE,
            size=len(self._blob),
            room=room,
            blocks=blocks,
            threads=threads,
        )
        self._blob[: ctypes.sizeof(call)] = bytes(call)
        file = self.program.with_suffix(".call")
        file.write_bytes(self._blob)
        subprocess.run(["qemu-aarch64", "-cpu", "max", self.program, file], check=True)
        after = np.fromfile(file, np.uint8)
        for address, place in self._placed.items():
            array = self._known[address]
            if array.flags.writeable:
                array.reshape(-1).view(np.uint8)[:] = after[place - PLACE :][: array.nbytes]

    def _put(self, data) -> int:
        """Add bytes to the file; return where they will be."""
        self._blob += bytes(-len(self._blob) % 64)
        place = PLACE + len(self._blob)
        self._blob += bytes(data)
        return place

    def _put_array(self, address: int | None) -> int | None:
        if address is None:
            return None
        if address not in self._placed:
            self._placed[address] = self._put(self._known[address].tobytes())
        return self._placed[address]

    def _moved(self, value, layers: int):
        """Copy a struct, or an array of them, with all that it points to put into the file."""
        if value is None or isinstance(value, int):
            return self._put_array(value)
        copy = type(value)()
        if isinstance(value, ctypes.Array):
            copy[:] = [self._moved(item, layers) for item in value]
            return copy
        for name, kind in value._fields_:
            field = getattr(value, name)
            if isinstance(field, ctypes._Pointer):  # to one item a layer
                items = (kind._type_ * layers)(*field[:layers])
                moved = items if kind._type_ is c_int64 else self._moved(items, layers)
                field = ctypes.cast(self._put(moved), kind)
            elif kind is c_void_p or isinstance(field, Structure | ctypes.Array):
                field = self._moved(field, layers)
            setattr(copy, name, field)
        return copy


def build(compiler: str, processor: str, folder: Path) -> Emulated:
    """Compile the program; skip the test where there is nothing to do so, or to run it."""
    command = list(COMPILERS[compiler])
    for needed in (command[0], f"{CROSS}-gcc", "qemu-aarch64"):
        if not shutil.which(needed):
            pytest.skip(f"needs {needed}")
    march = f"-march={PROCESSORS[processor]}"
    flags = [march if flag == NATIVE else flag for flag in [*COMMON, *FLAGS]]
    sources = [
        next(s for s in SOURCES if s.name == "matrix.c"),
        Path(__file__).parent / "emulated.c",
    ]
    program = folder / f"{compiler}-{processor}"
    command += [*flags, "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-static"]
    command += [*map(str, sources), "-o", str(program), "-lm"]
    if not program.is_file():
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 and "warning: " not in done.stderr.replace(DLOPEN, ""), done
    assert program.read_bytes()[18] == AARCH64
    return Emulated(program)


@pytest.fixture
def arm(request, tmp_path_factory, monkeypatch) -> Any:
    """The library for a compiler and a processor, on ARM."""
    folder = tmp_path_factory.getbasetemp() / "arm"
    folder.mkdir(exist_ok=True)
    compiler, processor = request.param
    made = build(compiler, processor, folder)
    for module in (native, native_cache):
        monkeypatch.setattr(module, "address", made.at)
    return made


GIVEN = [("gcc", "dotprod"), ("gcc", "plain"), ("clang", "dotprod"), ("clang", "plain")]
SLOW = [pytest.param(both, marks=pytest.mark.slow) for both in GIVEN]
everywhere = pytest.mark.parametrize("arm", [GIVEN[0], *SLOW[1:]], ids="-".join, indirect=True)
slowly = pytest.mark.parametrize("arm", SLOW, ids="-".join, indirect=True)


@everywhere
@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
def test_logits_are_those_of_this_machine(format, arm, library):
    """Integers are added exactly; sums of fp32 are grouped and fused in other ways.

    Past the first token, a number between two bytes may so be rounded to the other one.
    """
    model, ids = tests.random_model(3, **tests.SHAPES["odd"]), tests.some_ids(70)
    found = []
    for either in (arm, library):
        decoder = tests.native(model, either, format, kv="fp32")
        found.append(decoder.forward(decoder.cache(70), [Run(0, ids, 70)]))
    off = np.abs(found[0] - found[1]) / np.abs(found[1]).max()
    assert off[0].max() < 1e-5 and off.max() < (1e-5 if format == "bf16" else 0.02)


@everywhere
@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
def test_however_tokens_are_cut_the_bits_are_the_same(format, arm):
    tests.test_however_tokens_are_cut_and_batched_the_bits_are_the_same("odd", format, "fp16", arm)


@slowly
@pytest.mark.parametrize("format", tests.FORMATS)
@pytest.mark.parametrize("name", tests.SHAPES)
def test_logits_are_those_of_torch(name, format, arm):
    tests.test_logits_are_those_of_torch(name, format, arm)


@slowly
@pytest.mark.parametrize("kv", ["fp32", "fp16", "int8"])
def test_windows_and_keys_of_any_format(kv, arm):
    tests.test_however_tokens_are_cut_and_batched_the_bits_are_the_same("gemma", "int8", kv, arm)
