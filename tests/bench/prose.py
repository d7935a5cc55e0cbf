"""One megabyte of prose that every machine with Python has: docstrings of its standard library.

Of each module in order of name, every docstring of at least 200 ASCII characters, once, up to
1,000,000 bytes. The last tenth, from a line's beginning on, is held out. Being ASCII, it has as
many characters as bytes: a model of characters needs no conversion. Python 3.11 and 3.13 differ in
some of it, so figures carry its digest.
"""

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.data.corpora import stdlib
from tests.bench.report import Missing

SIZE, LEAST = 1_000_000, 200
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prose:
    """A text in two parts."""

    train: str
    valid: str

    @property
    def digest(self) -> str:
        """Which text it is."""
        return hashlib.sha256((self.train + "\0" + self.valid).encode("ascii")).hexdigest()[:12]

    def save(self, folder: Path) -> tuple[Path, Path]:
        """Write both parts to files, and return these."""
        files = folder / "train.txt", folder / "valid.txt"
        for file, text in zip(files, (self.train, self.valid), strict=True):
            file.write_text(text, encoding="ascii")
        return files


def docstrings(source: str) -> Iterator[str]:
    """Yield the docstrings of a module that are long enough, in order of their place."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, DOCUMENTED)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        text = ast.get_docstring(node)
        if text and len(text) >= LEAST and text.isascii():
            yield text


def prose(size: int = SIZE) -> Prose:
    """Collect the text. Raises: Missing if this interpreter has too little of it."""
    seen: dict[str, None] = {}
    for _, file in stdlib().files:
        seen |= dict.fromkeys(docstrings(file.read_text(encoding="utf-8", errors="replace")))
    text = "\n\n".join(seen)
    if len(text) < size:
        raise Missing(f"this Python's docstrings are {len(text):,} bytes, and {size:,} are needed")
    cut = text.index("\n", size - size // 10) + 1
    return Prose(train=text[:cut], valid=text[cut:size])
