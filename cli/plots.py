"""Curves: in the terminal as braille dots, to PNG or SVG through matplotlib.

One list of `Curve`s feeds both, so what is on the screen is what is in the file.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import RecipeError, ResourceError

COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A named line of (x, y) points."""

    name: str
    points: Sequence[tuple[float, float]]


def smooth(points: Sequence[tuple[float, float]], over: float = 0.02) -> list[tuple[float, float]]:
    """Average each point with those before it, exponentially, over a share of the length."""
    weight = 1 / max(1.0, over * len(points))
    smoothed: list[tuple[float, float]] = []
    level = 0.0
    for index, (x, y) in enumerate(points):
        level = y if not index else level + weight * (y - level)
        smoothed.append((x, level))
    return smoothed


def draw(curves: Sequence[Curve], width: int, height: int) -> list[str]:
    """Draw curves as rows of rich markup, `width` columns by `height` rows, with axis labels.

    A character holds 2 × 4 dots; where curves meet, the later one gives the colour.
    """
    points = [p for curve in curves for p in curve.points if all(map(math.isfinite, p))]
    if not points:
        return ["(nothing to draw yet)"]
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high = min(y for _, y in points), max(y for _, y in points)
    if y_high == y_low:
        y_low, y_high = y_low - 0.5, y_high + 0.5
    label = max(len(f"{y:.2f}") for y in (y_low, y_high))
    columns = max(10, width - label - 2)
    dots = [[0] * columns for _ in range(height)]
    owner = [[0] * columns for _ in range(height)]
    for number, curve in enumerate(curves):
        previous = None
        for x, y in curve.points:
            if not (math.isfinite(x) and math.isfinite(y)):
                continue
            px = round((x - x_low) / ((x_high - x_low) or 1) * (2 * columns - 1))
            py = round((y_high - y) / (y_high - y_low) * (4 * height - 1))
            for qx, qy in _line(previous or (px, py), (px, py)):
                column, row = qx // 2, qy // 4
                dots[row][column] |= _DOTS[qy % 4][qx % 2]
                owner[row][column] = number
            previous = (px, py)
    rows = []
    for row in range(height):
        y = {0: y_high, height - 1: y_low}.get(row)
        text = f"{y:>{label}.2f} " if y is not None else " " * (label + 1)
        cells = zip(dots[row], owner[row], strict=True)
        text += "│" + "".join(_cell(bits, COLOURS[who % len(COLOURS)]) for bits, who in cells)
        rows.append(text)
    left, right = f"{x_low:,.0f}", f"{x_high:,.0f}"
    rows.append(" " * (label + 2) + left + right.rjust(columns - len(left)))
    return rows


_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def _cell(bits: int, colour: str) -> str:
    return f"[{colour}]{chr(0x2800 + bits)}[/]" if bits else " "


def _line(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the dots from start to end."""
    steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    return [
        (
            round(start[0] + (end[0] - start[0]) * i / steps),
            round(start[1] + (end[1] - start[1]) * i / steps),
        )
        for i in range(steps + 1)
    ]


def write_picture(curves: Sequence[Curve], path: Path, x_label: str, y_label: str) -> None:
    """Write curves to a .png or .svg file.

    Raises: RecipeError for another ending; ResourceError without matplotlib or disk.
    """
    if path.suffix not in (".png", ".svg"):
        raise RecipeError(f"{path}: a picture must end in .png or .svg")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ResourceError(
            "drawing a picture needs matplotlib; pip install 'lm-workbench[plot]'"
        ) from None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for curve in curves:
        marker = "o" if len(curve.points) < 40 else None
        x, y = zip(*curve.points, strict=True)
        axes.plot(x, y, label=curve.name, linewidth=1.5, marker=marker, markersize=4)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ResourceError(f"{path}: cannot be written: {error.strerror or error}") from None
