"""Values from a file of JSON lines, or from one of a single JSON value, each with its place."""

import json
from collections.abc import Iterator
from typing import Any

from cli.inputs import Source, printable, unreadable
from engine.errors import DataError
from engine.text.usage import no_duplicates

# Lines of a stream of events that hold no value.
EVENT = (b"event:", b"id:", b"retry:", b":")


def read_values(source: Source) -> Iterator[tuple[str, int, Any]]:
    """Yield place, bytes and value of each line that is not empty, or of the one value.

    A stream of events is taken as it came over the wire: lines that begin with `data:`.

    Raises: DataError that names the line; also if a key stands twice in an object.
    """
    name = printable(source.name)
    with source.open() as stream:
        first = True
        try:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                where = f"{name}:{number}"
                if line.startswith(b"data:"):
                    line, first = line[5:], False
                if line.startswith(EVENT) or line.strip() == b"[DONE]":
                    continue
                try:
                    value = json.loads(line, object_pairs_hook=no_duplicates)
                except DataError as error:
                    raise DataError(f"{where}: {error}") from None
                except (ValueError, RecursionError) as error:
                    if not first:
                        raise DataError(f"{where}: not valid JSON: {error}") from None
                    line += stream.read()  # it may be one value over several lines
                    value = _parse(line, where)
                first = False
                yield where, len(line), value
        except OSError as error:
            raise unreadable(source.name, error) from None


def _parse(data: bytes, where: str) -> Any:
    try:
        return json.loads(data, object_pairs_hook=no_duplicates)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: not valid JSON, neither this line nor the whole: {error}"
        ) from None
