"""Rows to examples: what a row means."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """What one row gives to learn from; which fields hold it is said by `kind`."""

    where: str
    kind: Literal["text", "prompt", "messages", "tokens"]
    text: str = ""
    prompt: str = ""
    completion: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    learned: tuple[bool | None, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    ids: tuple[int, ...] = ()
    mask: tuple[bool, ...] = ()

    @property
    def digest(self) -> str:
        """Identify the content, wherever it stands."""
        content = [self.kind, self.text, self.prompt, self.completion, self.messages]
        content += [self.learned, self.tools, self.ids, self.mask]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()
