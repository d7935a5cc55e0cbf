"""What stands beside a tokenizer.json: which tokens begin and end a text, and the chat template.

    tokenizer_config.json     bos_token, eos_token, …: a name or {"content": name}; add_bos_token
    chat_template.jinja       the chat template; older folders have it in tokenizer_config.json
    generation_config.json    eos_token_id: one id or a list; config.json has the same key

Everything is optional, and nothing is trusted to be of the type it should be.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a folder says about its tokenizer."""

    raw: Mapping[str, Any] = field(default_factory=dict)  # tokenizer_config.json as found
    template: str | None = None
    ends: tuple[int, ...] = ()  # the ids that end generation, as the model's own files list them

    def name(self, key: str) -> str | None:
        """Return the token that `key` (`bos_token`, `eos_token`, …) names, None if it names none.

        Raises: CheckpointError if the setting is no name.
        """
        return _name(self.raw.get(key), key)

    def names(self) -> set[str]:
        """Return every token that the settings name, and so make special.

        Raises: CheckpointError if one of them is no name.
        """
        keys = [key for key in self.raw if key.endswith("_token") and not key.startswith("add_")]
        return {name for name in map(self.name, keys) if name}

    @property
    def add_bos(self) -> bool:
        """Tell whether a text should begin with the `bos_token`.

        Raises: CheckpointError if the setting is neither true nor false.
        """
        value = self.raw.get("add_bos_token")
        if not isinstance(value, (bool, type(None))):
            raise CheckpointError("add_bos_token is neither true nor false; write one of them")
        return bool(value)


def read_settings(folder: Path) -> Settings:
    """Read what a folder says about its tokenizer; files that are not there say nothing.

    Raises: CheckpointError naming the file that is malformed.
    """
    file, newer = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    raw = _read_object(file)
    ends = [_ends(folder / name) for name in ("generation_config.json", "config.json")]
    newest = _read_text(newer) if newer.is_file() else None
    try:
        template = _default(raw.get("chat_template")) if newest is None else newest
        settings = Settings(raw=raw, template=template, ends=(*ends[0], *ends[1]))
        _ = (
            settings.names(),
            settings.add_bos,
        )  # a wrong type is found here, where the file is known
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    return settings


def _name(value: Any, key: str) -> str | None:
    """Return a token's name, given bare or as {"content": name}."""
    name = value.get("content") if isinstance(value, dict) else value
    if name is not None and not isinstance(name, str):
        raise CheckpointError(f"{key} is not a token's name; write the text of the token")
    return name


def _default(found: Any) -> str | None:
    """Return the chat template of a tokenizer_config.json: the only one, or the default one."""
    match found:
        case None | str():
            return found
        case [*several] if all(isinstance(entry, dict) for entry in several):
            template = {str(entry.get("name")): entry.get("template") for entry in several}
            return _name(template.get("default"), "chat_template")
    raise CheckpointError("chat_template is neither text nor a list of names and templates")


def _ends(file: Path) -> list[int]:
    """Return the ids that end generation according to one file."""
    found = _read_object(file).get("eos_token_id")
    several = [] if found is None else found if isinstance(found, list) else [found]
    if not all(type(token_id) is int and 0 <= token_id < 1 << 32 for token_id in several):
        raise CheckpointError(f"{file}: eos_token_id is neither a token id nor a list of them")
    return several


def _read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object; a file that does not exist is an empty one."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(_read_text(file))
        json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON: {error}; use another copy") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: not a JSON object; use another copy")
    return found


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as text: {error}") from None
