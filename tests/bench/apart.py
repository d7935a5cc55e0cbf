"""Sides that need a process each: for their memory, their threads, or an interpreter of their own.

Each round starts every side once, one after the other, so that no two are in memory together. A
side is a command whose last line of output is a JSON object, with its timings after a warm-up.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench.report import Missing
from tests.conftest import ROOT

Command = Sequence[str | Path]


def own(module: str, *words: object) -> list[str]:
    """Return the command that runs a module of this folder."""
    return [sys.executable, "-m", f"tests.bench.{module}", *map(str, words)]


def turn(command: Command) -> dict[str, Any]:
    """Run a side once. Raises: Missing with the last thing it said if it fails."""
    try:
        ended = subprocess.run(
            [str(word) for word in command],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    except OSError as error:
        raise Missing(f"{command[0]}: {error.strerror}") from None
    if ended.returncode:
        said = ended.stderr.strip().splitlines() or ["nothing"]
        raise Missing(f"ended with {ended.returncode}: {said[-1][:200]}")
    return json.loads(ended.stdout.strip().splitlines()[-1])


def turns(
    sides: Mapping[str, Command], rounds: int, once: Container[str] = ()
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """Return what each side said, by round, and why others could not run.

    Sides in `once` take so long that the first round has to do.
    """
    said: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    failed: dict[str, str] = {}
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            if name not in failed and not (number and name in once):
                try:
                    said[name].append(turn(sides[name]))
                except Missing as error:
                    failed[name] = str(error)
    return {name: all_ for name, all_ in said.items() if name not in failed}, failed


def medians(said: Mapping[str, Sequence[Mapping[str, Any]]], key: str) -> dict[str, list[float]]:
    """Return each turn's median of what was timed under `key`."""
    return {name: [statistics.median(turn[key]) for turn in all_] for name, all_ in said.items()}
