"""metrics.jsonl: one line per step and per evaluation, always written.

A step line is {"step", "loss", "lr", "grad_norm", "tokens", "seconds"}; an evaluation line is
{"step", "valid_bpb", "valid_loss", …}. `lm plot` and `lm runs` read it.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from engine.errors import DataError, ResourceError
from engine.files import write_whole


class MetricsLog:
    """Appends lines to a run's metrics.jsonl, handed to the system before the next step."""

    def __init__(self, path: Path, keep_until: int) -> None:
        """Open the log, dropping lines after step `keep_until`: a resumed run writes them anew."""
        try:
            kept = [
                row
                for row in read_metrics(path)
                if row["step"] <= keep_until and not row.get("final")
            ]
            write_whole(path, "".join(map(_line, kept)))
            self.file: IO[str] = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ResourceError(f"{path}: cannot be written: {error.strerror or error}") from None
        self.path = path

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one line. Raises: ResourceError if the disk refuses."""
        try:
            self.file.write(_line(row))
            self.file.flush()
        except OSError as error:
            raise ResourceError(
                f"{self.path}: cannot be written: {error.strerror or error}; the last checkpoint"
                " is whole, make room and --resume"
            ) from None

    def sync(self) -> None:
        """Make sure that what was written is on the disk itself."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the file; what could not be flushed was reported before."""
        try:
            self.file.close()
        except OSError:
            return


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row) + "\n"


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a metrics.jsonl; a last line cut short by a crash is left out.

    Raises: DataError if any other line is not JSON.
    """
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row["step"], int):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise DataError(f"{path}:{number}: not a metrics line: {line[:60]!r}") from None
            return
        yield row
