"""generation_config.json: how a checkpoint wishes its tokens to be chosen. Needs no torch."""

import dataclasses
from pathlib import Path

from engine.adapter_config import holder
from engine.config import SampleConfig
from engine.errors import CheckpointError
from engine.manifest import read_json
from engine.values import convert

ANSWER = 2048  # most tokens of an answer, where nobody said otherwise and the context has room
# Our sampling settings ↔ the keys of generation_config.json.
SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_tokens": "max_new_tokens",
}


def sample_defaults(folder: Path) -> SampleConfig:
    """Return the sampling settings that a checkpoint came with; ours where it has no opinion.

    Raises: CheckpointError naming a setting of the wrong type or out of range.
    """
    file = holder(folder, "generation_config.json") / "generation_config.json"
    raw = read_json(file) if file.is_file() else {}
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file}: not a JSON object; use another copy")
    values = {}
    for field in dataclasses.fields(SampleConfig):
        key = SAMPLING[field.name]
        try:
            if raw.get(key) is not None:
                values[field.name] = convert(raw[key], field)
        except (ValueError, OverflowError) as error:
            raise CheckpointError(f"{file}: {key}={raw[key]!r:.40} {error}") from None
    if raw.get("do_sample") is False:
        values["temperature"] = 0.0
    return SampleConfig(**values)
