"""What to measure: a case is one work in one configuration, a grid is many cases.

128,512         these numbers
128..2048x2     128, 256, … 2048: each twice the one before
0..512+128      0, 128, … 512: each 128 more
1..4            1, 2, 3, 4
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, get_args

from engine.errors import LimitError, RecipeError
from engine.values import nearest

What = Literal["prefill", "decode", "batch", "kv", "train", "load"]
NATIVE = ("int8", "int4")  # precisions that only our own C generates in
MOST = 64  # numbers of a range
FEW = 4  # tokens of a kv case: each costs the whole text again without a cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One work in one configuration; the speeds of equal cases can be compared."""

    what: What
    model: str
    dtype: str
    threads: int
    prompt: int = 0  # tokens read: of the prompt, or of a training sequence
    depth: int = 0  # tokens before the first that is generated
    batch: int = 1  # rows at once
    tokens: int = 0  # generated per row
    cache: bool = True
    kernels: str = ""  # who computes: native or torch; of a training step ours or torch
    kv: str = ""  # how keys and values lie in memory
    settings: str = ""  # others that its speed depends on, where they are not as usual

    @property
    def how(self) -> tuple[str, str, str, int]:
        """What a model is loaded by: cases that share it can share the model."""
        return self.dtype, self.kernels or "auto", self.kv or "auto", self.threads

    @property
    def name(self) -> str:
        """Say what is special about this case within a run."""
        return {
            "prefill": f"{self.prompt} tokens",
            "decode": f"at {self.depth}",
            "batch": f"{self.batch} row{'s' * (self.batch > 1)} at {self.depth}",
            "kv": f"at {self.depth}{'' if self.cache else ', no cache'}",
            "train": f"{self.batch} × {self.prompt}",
            "load": "weights",
        }[self.what]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The values that cases take; None takes the usual ones that fit the model's context."""

    prompt: Sequence[int] | None = None
    depth: Sequence[int] | None = None
    batch: Sequence[int] = (1, 2, 4, 8)
    dtype: Sequence[str] = ("auto",)
    kernels: Sequence[str] = ("auto",)
    kv: Sequence[str] = ("auto",)
    threads: Sequence[int] = (1,)
    tokens: int = 32


USUAL = {"prompt": (128, 512), "depth": (0, 512, 2048)}


def read_whats(text: str) -> list[What]:
    """Read a comma list of works. Raises: RecipeError naming the nearest."""
    known = get_args(What)
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in known:
            raise RecipeError(
                f"--what {word!r} is not one of {', '.join(known)}{nearest(word, known)}"
            )
    return [what for what in known if what in words]


def read_numbers(text: str, option: str, low: int = 1) -> tuple[int, ...]:
    """Read a list of numbers and ranges: rising, each once. Raises: RecipeError."""
    found: set[int] = set()
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d{1,9})(?:\.\.(\d{1,9})(?:([x+])(\d{1,9}))?)?", part)
        numbers = list(_range(*match.groups())) if match else []
        if not numbers or numbers[0] < low or len(found | set(numbers)) > MOST:
            raise RecipeError(
                f"{option} {text}: {part!r} is not a number from {low}, or a range of {MOST} at"
                " most; write 128,512 or 128..2048x2 or 0..512+128"
            )
        found |= set(numbers)
    return tuple(sorted(found))


def _range(first: str, last: str | None, sign: str | None, by: str | None) -> Iterator[int]:
    """Yield the numbers of a range, or nothing if it has no end or too many."""
    number, step = int(first), int(by or 1)
    end = number if last is None else int(last)
    if (sign == "x" and (step < 2 or not number)) or not step:
        return
    for _ in range(MOST + 1):
        if number > end:
            return
        yield number
        number = number * step if sign == "x" else number + step


def expand(what: What, grid: Grid, model: str, context: int) -> tuple[list[Case], list[str]]:
    """Return every case of a work, but for training, and what has to be said of the usual ones.

    Where a usual length exceeds the context, the longest that fits takes its place.

    Raises: LimitError if a given prompt or depth exceeds the context.
    """
    notes: list[str] = []
    if what in ("decode", "batch") and grid.tokens >= context:
        raise LimitError(f"--tokens {grid.tokens:,} leave no room in a context of {context:,}")

    def fit(name: Literal["prompt", "depth"], more: int) -> list[int]:
        """Return the lengths that leave room for `more` tokens."""
        given = getattr(grid, name)
        wanted = USUAL[name] if given is None else given
        room = context - more
        beyond = [length for length in wanted if length > room]
        if beyond and (given is not None or room < 1):
            raise LimitError(
                f"{what}: {beyond[0]:,} tokens and {more} more exceed the context of {context:,};"
                f" give --{name} {max(0, room):,} or less, or fewer --tokens"
            )
        if beyond:
            instead = ", ".join(f"{length:,}" for length in beyond)
            notes.append(f"{what}: {room:,} tokens, all that fit, instead of {instead}")
        return sorted({min(length, room) for length in wanted})

    cases = [
        Case(model=model, **way, **shape)
        for way in _ways(what, grid)
        for shape in _shapes(what, grid, context, fit)
    ]
    return cases, list(dict.fromkeys(notes))


def _ways(what: What, grid: Grid) -> Iterator[dict[str, Any]]:
    """Yield how cases may be computed; torch leaves out what only our own C can."""
    for dtype, kernels, kv, threads in product(grid.dtype, grid.kernels, grid.kv, grid.threads):
        if kernels == "torch" and (dtype in NATIVE or kv != "auto"):
            continue
        if what == "load" and kv != grid.kv[0]:  # it makes no cache
            continue
        yield {"dtype": dtype, "kernels": kernels, "kv": kv, "threads": threads}


def _shapes(
    what: What, grid: Grid, context: int, fit: Callable[..., list[int]]
) -> Iterator[dict[str, Any]]:
    """Yield what the cases of one work differ in."""
    if what == "load":
        yield {"what": what}
    elif what == "prefill":
        for length in fit("prompt", 1):
            yield {"what": what, "prompt": length}
    elif what == "decode":
        for depth in fit("depth", grid.tokens):
            yield {"what": what, "depth": depth, "tokens": grid.tokens}
    elif what == "batch":
        depth = min(128, context - grid.tokens)
        for rows in grid.batch:
            yield {"what": what, "batch": rows, "depth": depth, "tokens": grid.tokens}
    elif what == "kv":
        for depth in filter(None, fit("depth", FEW)):
            yield {"what": what, "depth": depth, "tokens": FEW}
            yield {"what": what, "depth": depth, "tokens": FEW, "cache": False}
