"""This machine: what it is made of, read in an instant, and what it can do at most, measured.

    describe()             processor, memory, torch, compiler, packages: nothing is measured
    memory_bandwidth(…)    bytes a second that can be read from memory, the limit of decoding
    matmul_peaks(…)        FLOP a second per precision, the limit of training and of long prompts

`engine/hardware.py` decides what to use of it.
"""

import contextlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from engine.hardware import synchronize
from engine.pages import free_memory, large_memory

# Our name of an instruction set: what Linux calls it in /proc/cpuinfo, what macOS in sysctl.
INSTRUCTIONS = {
    "avx2": ("avx2", "hw.optional.avx2_0"),
    "avx512f": ("avx512f", "hw.optional.avx512f"),
    "avx_vnni": ("avx_vnni", ""),
    "avx512_vnni": ("avx512_vnni", "hw.optional.avx512vnni"),
    "avx512_bf16": ("avx512_bf16", ""),
    "amx_int8": ("amx_int8", ""),
    "amx_bf16": ("amx_bf16", ""),
    "neon": ("asimd", "hw.optional.neon"),
    "dotprod": ("asimddp", "hw.optional.arm.FEAT_DotProd"),
    "i8mm": ("i8mm", "hw.optional.arm.FEAT_I8MM"),
    "bf16": ("bf16", "hw.optional.arm.FEAT_BF16"),
}
# Package that is not required: the extra of ours that brings it, and what it is for.
OPTIONAL = {
    "tiktoken": ("fast", "counts OpenAI's tokens faster"),
    "huggingface_hub": ("hub", "imports models by name"),
    "gguf": ("gguf", "reads and writes GGUF files"),
    "pyarrow": ("parquet", "reads parquet files"),
    "matplotlib": ("plot", "draws curves"),
    "pyppmd": ("baselines", "the PPMd baseline"),
    "genai-prices": ("prices", "prices of requests"),
}

STREAM = 1 << 30  # bytes read to measure bandwidth; several times any usual cache
SHAPES = ((4096, 1024, 384), (1024, 1024, 1024))  # rows of text × width × width; and a square
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """A processor as its system describes it."""

    name: str
    cores: int  # physical ones that this process may use
    isa: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a machine is made of."""

    cpu: str
    cores: int  # physical ones that this process may use
    threads: int  # that torch computes with
    isa: tuple[str, ...]  # names of INSTRUCTIONS that the processor has
    cache: int  # bytes of the last-level cache; 0 if unknown
    memory: int  # bytes in all
    free: int  # bytes to be had without swapping
    system: str
    python: str
    torch: str
    blas: str  # the library of fp32 products, with its version
    onednn: str  # version of the library of bf16 and int8 products; empty if torch has none
    capability: str  # the instruction set that torch's own kernels chose
    openmp: bool  # torch shares work among threads by it
    compiler: str  # command and version; empty if there is none
    accelerators: tuple[str, ...]
    packages: dict[str, str]  # name in OPTIONAL → version; empty if it is not installed


def describe(cc: str = "cc") -> Machine:
    """Describe this machine; `cc` is the command of the C compiler to look for."""
    cpu = read_cpu()
    blas, onednn = parse_torch_build(torch.__config__.show())
    return Machine(
        cpu=cpu.name or platform.processor() or platform.machine(),
        cores=cpu.cores,
        threads=torch.get_num_threads(),
        isa=cpu.isa,
        cache=last_level_cache(),
        memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        free=free_memory(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        blas=blas,
        onednn=onednn,
        capability=torch.backends.cpu.get_cpu_capability(),
        openmp=torch.backends.openmp.is_available(),
        compiler=find_compiler(cc),
        accelerators=_accelerators(),
        packages={name: _version(name) for name in OPTIONAL},
    )


def read_cpu() -> Cpu:
    """Ask the system about its processor."""
    if sys.platform == "darwin":
        return parse_sysctl(_output(["sysctl", "hw", "machdep.cpu"]))
    try:
        usable = os.sched_getaffinity(0)
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except (OSError, AttributeError):
        return Cpu(name="", cores=os.cpu_count() or 1, isa=())
    cpu = parse_cpuinfo(text, usable)
    with contextlib.suppress(OSError):  # a container may be given less time than it sees cores
        quota = parse_quota(Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii"))
        return Cpu(name=cpu.name, cores=min(cpu.cores, quota or cpu.cores), isa=cpu.isa)
    return cpu


def parse_cpuinfo(text: str, usable: Container[int]) -> Cpu:
    """Read Linux's /proc/cpuinfo, of x86 or ARM; threads of one core count once."""
    name, words = "", set()
    threads, cores = 0, set()
    for block in text.split("\n\n"):
        pairs = (line.partition(":") for line in block.splitlines())
        facts = {key.strip(): value.strip() for key, _, value in pairs}
        name = name or facts.get("model name", "")
        words |= set((facts.get("flags") or facts.get("Features") or "").split())
        number = facts.get("processor", "")
        if number.isdigit() and int(number) in usable:
            threads += 1
            cores.add((facts.get("physical id", ""), facts.get("core id", number)))
    isa = tuple(ours for ours, (linux, _) in INSTRUCTIONS.items() if linux in words)
    return Cpu(name=name, cores=len(cores) or threads or 1, isa=isa)


def parse_sysctl(text: str) -> Cpu:
    """Read what macOS's `sysctl` prints."""
    pairs = (line.partition(":") for line in text.splitlines())
    facts = {key.strip(): value.strip() for key, _, value in pairs}
    isa = (ours for ours, (_, mac) in INSTRUCTIONS.items() if facts.get(mac) == "1")
    cores = facts.get("hw.physicalcpu", "")
    return Cpu(
        name=facts.get("machdep.cpu.brand_string", ""),
        cores=int(cores) if cores.isdigit() else os.cpu_count() or 1,
        isa=tuple(isa),
    )


def parse_quota(text: str) -> int:
    """Read cgroup's cpu.max, `200000 100000`, as whole cores, rounded up; 0 means no limit."""
    quota, _, period = text.partition(" ")
    if not quota.isdigit() or not period.strip().isdigit():
        return 0
    return -(-int(quota) // max(1, int(period)))


def last_level_cache() -> int:
    """Return the bytes of the largest cache of the first processor; 0 if nobody says."""
    if sys.platform == "darwin":
        text = _output(["sysctl", "hw.l3cachesize", "hw.perflevel0.l2cachesize", "hw.l2cachesize"])
        return max((int(size) for size in re.findall(r": (\d+)$", text, re.MULTILINE)), default=0)
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((parse_size(file.read_text(encoding="ascii")) for file in files), default=0)


def parse_size(text: str) -> int:
    """Read a size as Linux writes that of a cache, `266240K`; 0 if it is none."""
    found = re.fullmatch(r"(\d+)([KMG]?)", text.strip())
    return int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]] if found else 0


def parse_torch_build(text: str) -> tuple[str, str]:
    """Read torch.__config__.show(): the BLAS library with its version, and oneDNN's version."""
    blas = re.search(r"BLAS_INFO=(\w+)", text)
    mkl = re.search(r"Math Kernel Library Version (\S+?)-", text)
    onednn = re.search(r"MKL-DNN v([\d.]+)", text)
    name = blas[1] if blas else "unknown"
    return f"{name} {mkl[1]}" if mkl and name == "mkl" else name, onednn[1] if onednn else ""


def find_compiler(cc: str) -> str:
    """Return command and version of a C compiler, like `cc 12.2.0`; empty if it does not run."""
    words = shlex.split(cc)
    if not words or not shutil.which(words[0]):
        return ""
    lines = _output([*words, "--version"]).splitlines()
    if not lines:
        return ""
    version = re.search(r"\d+(\.\d+)+", re.sub(r"\(.*?\)", "", lines[0]))  # not the packager's
    return f"{cc} {version[0]}" if version else cc


def _version(package: str) -> str:
    """Return the version that is installed, or nothing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _accelerators() -> tuple[str, ...]:
    """Name the devices beside the processor."""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return (*names, *(["Apple GPU (mps)"] if torch.backends.mps.is_available() else []))


def _output(command: list[str]) -> str:
    """Return what a command prints; nothing if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace")


def stream_bytes() -> int:
    """Return how much memory `memory_bandwidth` reads at once; compare it with the cache."""
    return min(STREAM, free_memory() // 4)


def memory_bandwidth(threads: int, seconds: float = 0.5) -> float:
    """Measure the bytes a second that `threads` threads read from memory, the best of several.

    They read `stream_bytes()`, in large pages like our weights, as a product of a matrix and a
    vector, which is what decoding does, and as a sum.
    """
    width = 4096
    rows = max(1, stream_bytes() // (4 * width))
    matrix = torch.from_numpy(large_memory(rows * width * 4).view(np.float32)).view(rows, width)
    matrix.fill_(1)  # written, so really there
    vector = torch.ones(width)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        reads = (matrix.sum, partial(torch.mv, matrix, vector))
        fastest = min(_fastest(read, seconds / 2, matrix.device) for read in reads)
    finally:
        torch.set_num_threads(before)
    return matrix.nbytes / fastest


def matmul_peaks(device: torch.device, seconds_each: float = 0.3) -> dict[str, float]:
    """Measure the FLOP a second that matrix products reach, per precision that the device has."""
    peaks = {}
    for name, dtype in DTYPES.items():
        with contextlib.suppress(RuntimeError, TypeError):  # no such product on this device
            peaks[name] = matmul_peak(device, dtype, seconds_each)
    return peaks


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.4) -> float:
    """Measure the most FLOP a second that a matrix product reaches, the yardstick for MFU.

    It is the best over a few shapes: on some processors a square one understates it by half.

    Raises: RuntimeError if the device has no product of int8.
    """
    shapes = SHAPES if device.type == "cpu" else ((4096, 4096, 4096),)
    multiply = torch._int_mm if dtype == torch.int8 else torch.mm
    peak = 0.0
    for rows, inner, columns in shapes:
        # Numbers of every kind: some devices multiply equal ones faster, as they draw less power.
        a = (20 * torch.randn(rows, inner, device=device)).to(dtype)
        b = (20 * torch.randn(inner, columns, device=device)).to(dtype)
        fastest = _fastest(partial(multiply, a, b), seconds / len(shapes), device)
        peak = max(peak, 2 * rows * inner * columns / fastest)
    return peak


def _fastest(work: Callable[[], object], seconds: float, device: torch.device) -> float:
    """Return the shortest time that `work` took, tried for about `seconds` after a warm-up."""
    work()
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
