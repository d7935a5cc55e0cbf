"""Repetitions on disk: JSONL, a line each, which says all that is needed to understand it later.

A line is added by one write to a file open for appending, so whatever stops a run leaves whole
lines, and several runs may share a file.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.bench.cases import Case
from engine.bench.result import Repetition
from engine.errors import DataError, ResourceError

if TYPE_CHECKING:  # it brings torch, which comparing does without
    from engine.machine import Machine

SCHEMA = "lm/bench/repetition/1"


class Recorder:
    """Adds lines to a file of records."""

    def __init__(self, path: Path, machine: "Machine") -> None:
        """Open the file. Raises: ResourceError if it cannot be written."""
        self.path = path
        self.facts = {
            "machine": dataclasses.asdict(machine),
            "version": metadata.version("lm-workbench"),
        }
        try:
            self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise self._refused(error) from None

    def write(self, repetition: Repetition) -> None:
        """Add a line. Raises: ResourceError if the disk refuses."""
        row = {"schema": SCHEMA} | dataclasses.asdict(repetition) | self.facts
        line = json.dumps(row).encode("utf-8") + b"\n"
        try:
            before = os.fstat(self.file).st_size
            if os.write(self.file, line) < len(line):
                os.ftruncate(self.file, before)  # half a line would spoil the next
                raise OSError(0, "no room for a whole line")
        except OSError as error:
            raise self._refused(error) from None

    def close(self) -> None:
        """Close the file."""
        os.close(self.file)

    def _refused(self, error: OSError) -> ResourceError:
        return ResourceError(
            f"{self.path}: cannot be written: {error.strerror or error}; choose another --record"
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What comparing needs of a line."""

    case: Case
    rate: float
    machine: Mapping[str, Any]


def read_records(path: Path) -> list[Recorded]:
    """Read a file of records.

    Raises: DataError naming the line that is none.
    """
    try:
        text = path.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise DataError(f"{path}: cannot be read: {reason}; lm bench --record writes one") from None
    if not text:
        raise DataError(f"{path}: holds no record; lm bench --record {path} adds some")
    return [_read(line, f"{path}:{number}") for number, line in enumerate(text.split("\n"), 1)]


def _read(line: str, place: str) -> Recorded:
    """Read one line. Raises: DataError."""
    try:
        row = json.loads(line)
        if row["schema"] != SCHEMA:
            raise ValueError
        case, rate = Case(**row["case"]), float(row["rate"])
        kinds = {field.name: type(getattr(case, field.name)) for field in dataclasses.fields(Case)}
        words = ("what", "model", "dtype", "kernels", "kv", "settings")
        usual = dict.fromkeys(words, str) | {"cache": bool}
        if any(kinds[name] is not usual.get(name, int) for name in kinds):
            raise ValueError
        if not 0 < rate < float("inf") or not isinstance(row["machine"], dict):
            raise ValueError
        case.name  # noqa: B018  a work that nobody knows has none
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise DataError(
            f"{place}: not a record of {SCHEMA}: {line[:60]!r}; remove the line, or record anew"
        ) from None
    return Recorded(case=case, rate=rate, machine=row["machine"])
