"""What `lm doctor` finds: the machine, its fast paths and the checks, on one screen or as JSON."""

import dataclasses
import math
import os
import sys
import textwrap
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cli.render import console, count, emit_json, say, size
from engine.adapter_config import is_adapter
from engine.checkpoint import load_model
from engine.doctor.checks import Check, Subject, examine, random_subject
from engine.doctor.paths import FastPath, builds_openmp, fast_paths
from engine.errors import CheckFailed
from engine.hardware import pick_device, use_threads
from engine.kernels import decoder
from engine.kernels.build import load_kernels, unbuilt
from engine.machine import (
    OPTIONAL,
    Machine,
    describe,
    find_compiler,
    matmul_peaks,
    memory_bandwidth,
    stream_bytes,
)
from engine.matrices import stored_format

WIDTH = 67  # of what stands beside a label


def diagnose(
    folder: Path | None, cache: Path, device: str, *, slow: bool, as_json: bool, quiet: bool
) -> None:
    """Examine machine and engine, on the model in `folder` if there is one.

    Our kernels are looked for, and built, below `cache`.

    Raises: CheckFailed if a check does not hold.
    """
    began, load = time.perf_counter(), os.getloadavg()[0]
    place = pick_device(device)
    threads = use_threads(0)
    out = _nowhere if as_json else partial(console().print, markup=False, emoji=False)

    cc = os.environ.get("CC") or "cc"
    machine = describe(cc)
    cxx = find_compiler(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))
    openmp = bool(machine.compiler) and builds_openmp(cc)
    _print_machine(out, machine, openmp)
    streamed = stream_bytes()
    bandwidth = memory_bandwidth(threads)
    cached = " (it fits the cache: memory is slower)" if streamed < 2 * machine.cache else ""
    _row(out, "reads", f"{bandwidth / 1e9:.1f} GB/s, over {size(streamed)} of memory{cached}")
    peaks = matmul_peaks(place)
    speeds = ", ".join(f"{name} {peak / 1e12:.2f}" for name, peak in peaks.items())
    _row(out, "multiplies", f"{speeds} TFLOP/s on {place}")
    if load > machine.cores / 2:
        _row(out, "busy", f"load {load:.1f} before this began; an idle machine is faster")
    if compiler := unbuilt(cache):
        say(f"building kernels with {compiler}, once …", quiet)
    kernels = load_kernels(cache)
    if compiler := decoder.unbuilt(cache):
        say(f"building the decoder with {compiler}, once …", quiet)
    library = decoder.load_library(cache)
    paths = fast_paths(machine, place, cxx, kernels, library)
    _print_paths(out, paths)

    subject, name = _subject(folder, place)
    subject = dataclasses.replace(subject, kernels=kernels, library=library)
    total = sum(parameter.numel() for parameter in subject.model.parameters())
    stored = stored_format(folder) if folder and not is_adapter(folder) else None
    held = f"in {stored}, computed in fp32" if stored else "in fp32"
    out(f"\nchecks on {name}, {count(total)} parameters {held}", style="bold")
    checks = []
    for check in examine(subject, compiler=cxx, slow=slow):
        checks.append(check)
        _print_check(out, check)
    seconds = time.perf_counter() - began
    failed = [check.name for check in checks if check.ok is False]
    if as_json:
        facts = {
            "machine": dataclasses.asdict(machine) | {"compiler_openmp": openmp, "cxx": cxx},
            "device": str(place),
            "memory_bandwidth": {"bytes_per_second": bandwidth, "buffer_bytes": streamed},
            "matmul_flops_per_second": peaks,
            "load": load,
            "fast_paths": [dataclasses.asdict(path) for path in paths],
            "model": name,
            "checks": [_finite(check) for check in checks],
        }
        emit_json("doctor", facts | {"ok": not failed, "seconds": round(seconds, 2)})
    held, skipped = (sum(check.ok is answer for check in checks) for answer in (True, None))
    say(f"{held} checks hold, {skipped} skipped, {len(failed)} fail · {seconds:.1f} s", quiet)
    if failed:
        raise CheckFailed(
            f"{len(failed)} of {len(checks)} checks fail on {place}: {', '.join(failed)}; do not"
            " trust its results: try OMP_NUM_THREADS=1, --device cpu or another version of torch"
        )


def _nowhere(*words: object, **style: object) -> None:
    """Write nothing: --json has one object at the end."""


def _subject(folder: Path | None, device: torch.device) -> tuple[Subject, str]:
    """Return what is examined, and what to call it."""
    if folder is None:
        return random_subject(device), "a random model"
    model, tokenizer = load_model(folder, device)
    return Subject(model=model, tokenizer=tokenizer, adapter=is_adapter(folder)), str(folder)


def _row(out: Callable[..., None], label: str, text: str) -> None:
    """Write a label and what belongs to it, on as many lines as it takes."""
    for line in textwrap.wrap(text, WIDTH) or ["-"]:
        out(f"{label:<12} {line}")
        label = ""


def _print_machine(out: Callable[..., None], machine: Machine, openmp: bool) -> None:
    """Write what a machine is made of."""
    _row(out, "processor", f"{machine.cpu}, {machine.cores} cores")
    _row(out, "instructions", " ".join(machine.isa) or "none that matter here")
    cache = f", cache {size(machine.cache)}" if machine.cache else ""
    _row(out, "memory", f"{size(machine.memory)}, {size(machine.free)} free{cache}")
    _row(out, "system", f"{machine.system}, Python {machine.python}")
    onednn = f", onednn {machine.onednn}" if machine.onednn else ""
    shared = "OpenMP" if machine.openmp else "no OpenMP"
    built = f"{machine.capability}, {machine.blas}{onednn}, {shared}"
    _row(out, "torch", f"{machine.torch}, {machine.threads} threads, {built}")
    compiles = f"{machine.compiler}, {'builds' if openmp else 'does not build'} with OpenMP"
    _row(out, "compiler", compiles if machine.compiler else "none: no cc on PATH, and no CC set")
    _row(out, "accelerators", ", ".join(machine.accelerators) or "none")
    there = [f"{name} {version}" for name, version in machine.packages.items() if version]
    _row(out, "packages", ", ".join(there))
    absent = [f"{n} [{OPTIONAL[n][0]}]" for n, version in machine.packages.items() if not version]
    if absent:
        _row(out, "not here", f"{', '.join(absent)}: pip install 'lm-workbench[EXTRA]'")


def _print_paths(out: Callable[..., None], paths: list[FastPath]) -> None:
    """Write which fast paths are taken."""
    out("\nfast paths", style="bold")
    for path in paths:
        out(f"  {'on' if path.on else 'off':<4} {path.name:<14} {path.why}")


def _print_check(out: Callable[..., None], check: Check) -> None:
    """Write one check: how large the difference is, and how large it may be."""
    mark = {True: "ok", False: "FAIL", None: "-"}[check.ok]
    figure = f"{_short(check.value):>7} ≤ {_short(check.limit):<5}  {check.meaning}"
    if check.value is None:
        figure = f"{'skipped: ' if check.ok is None else ''}{check.note}"
    style = "bold red" if check.ok is False else None
    out(f"  {mark:<4} {check.name:<21} {figure}", style=style)


def _short(value: float | None) -> str:
    """Write a difference: 0, 3.1e-06, 0.015."""
    if value is None:
        return ""
    return f"{value:.1e}".replace(".0e", "e") if 0 < value < 1e-3 else f"{value:.2g}"


def _finite(check: Check) -> dict[str, Any]:
    """Return a check for JSON, which has no word for a figure that is not a number."""
    number = check.value is not None and math.isfinite(check.value)
    return dataclasses.asdict(check) | ({} if number else {"value": None})
