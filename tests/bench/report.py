"""What a row found, as a line of a table and as a line of JSON."""

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from engine.machine import describe
from tests.bench.pairs import Ratio, Rounds, ratio, spread

NOISY = 0.05  # a spread above it is marked
SCHEMA = "lm/make-bench/1"
PEERS = ("transformers", "accelerate", "llama_cpp_python", "pyppmd")


class Missing(Exception):
    """A row, or one side of it, cannot be run here; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the rows need to know of the command line."""

    model: Path  # SmolLM2 as `lm import` left it
    gguf: Path  # the Q4_1 file it came from
    llama_python: str  # an interpreter that has llama-cpp-python
    rounds: Rounds
    overrides: tuple[str, ...] = ()  # for the row that runs lm train stdlib


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One line: our figure, a peer's, and how many times better ours is."""

    ours: str
    peer: str = ""
    unit: str = ""
    value: float | None = None
    other: float | None = None
    ratio: Ratio | None = None
    spread: float = 0.0  # the larger of both sides'
    note: str = ""
    raw: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def noted(self, note: str) -> "Result":
        """Return the same with a note."""
        return dataclasses.replace(self, note=note)


def versus(
    times: Mapping[str, Sequence[float]], ours: str, peer: str, work: float, unit: str = "tok/s"
) -> Result:
    """Compare two sides that did `work` in these seconds; one that is not there says so."""
    for name in (ours, peer):
        if name not in times:
            return Result(ours=ours, peer=peer, note=f"skipped: {name} did not run here")
    a, b = times[ours], times[peer]
    return Result(
        ours=ours,
        peer=peer,
        unit=unit,
        value=work / statistics.median(a),
        other=work / statistics.median(b),
        ratio=ratio(a, b),
        spread=max(spread(a), spread(b)),
        raw={ours: a, peer: b},
    )


def line(row: str, result: Result, asked: str) -> str:
    """Lay a result out as a line of the table."""
    sides = f"{result.ours} / {result.peer}" if result.peer else result.ours
    cells = [f"{row:<20} {sides:<44}"]
    if result.value is not None:
        other = "" if result.other is None else f" / {_figure(result.other)}"
        cells.append(f"{_figure(result.value) + other:>15} {result.unit:<8}")
    if result.ratio:
        found = result.ratio
        sure = found.low is not None and found.high is not None
        interval = f"[{found.low:.2f} … {found.high:.2f}]" if sure else "[measured once]"
        cells.append(f"{found.value:>5.2f}× {interval}")
        noise = f"±{result.spread:.0%}" + (" noisy" if result.spread > NOISY else "")
        cells += [noise] if sure else []
    cells += [f"asked {asked}"] if asked and result.value is not None else []
    return "  ".join([*cells, result.note]).rstrip()


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def record(row: str, result: Result, asked: str) -> str:
    """Lay a result out as a line of JSON, every repetition with it."""
    return json.dumps({"row": row, "asked": asked, **dataclasses.asdict(result)})


def machine() -> dict[str, Any]:
    """Describe what all figures of a file were measured on."""
    versions = dict.fromkeys(PEERS, "")
    for name in PEERS:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {"schema": SCHEMA, "machine": dataclasses.asdict(describe()), "peers": versions}
