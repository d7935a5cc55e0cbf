"""Matrices in fewer bits: numbers of f32, bf16 or f16 as they are, or rounded to int8 or int4.

    int8   each 64 of a row have a scale:   w ≈ q · scale              q in -127 … 127
    int4   each 32 of a row have two:       w ≈ q · scale + minimum    q in 0 … 15

Both are stored as our C reads them: 16 rows side by side, so that one load brings as many bytes of
each of them as one instruction multiplies; `docs/formats.md` has the layout. NumPy alone, because
generating by C does without torch.

One scale a row, as in Dettmers et al. 2022 (arXiv:2208.07339), would cost an embedding with a few
large columns most of its precision. That least squares between rounding and rounding again lower
the error is also what k-means and HQQ do (https://mobiusml.github.io/hqq_blog); the search over
narrower ranges is known from llama.cpp.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

Empty = Callable[[tuple[int, ...], type], np.ndarray]
Format = Literal["f32", "bf16", "f16", "int8", "int4"]

LANES = 16  # rows that lie side by side
GROUP = 32  # numbers of a row that share scale and minimum in int4
GROUP8 = 64  # and a scale in int8
NUMBERS = 1 << 16  # converted at once, so that what is between the steps stays in the cache
# How much of a group's range the 16 steps of int4 span before least squares; what lies outside
# moves to the end. The whole range comes first, so that the outcome is never worse than that.
SPANS = (1.0, 0.92, 0.82)
FARTHEST8 = 8_000_000  # so that the scale stays within f16
FARTHEST = 30_000  # so that minimum and 15 times the scale stay within f16

PLAIN = {"f32": np.float32, "bf16": np.uint16, "f16": np.float16}  # bf16 as its bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A matrix in one of the formats; `scale` is None for those that are not rounded."""

    format: Format
    rows: int
    columns: int
    data: np.ndarray
    scale: np.ndarray | None = None

    @property
    def bytes(self) -> int:
        """Memory held by numbers and scales."""
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)


def format_of(name: str, format: Format) -> Format:
    """Return what a matrix has in a model of a format: in int4, embedding and head have int8.

    They decide each token on their own, and rounding them further costs most.
    """
    rough = format == "int4" and name.startswith(("embed_", "lm_head"))
    return "int8" if rough else format


def packed_shapes(
    format: Format, rows: int, columns: int
) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Return the shapes of data and scale that a matrix has in a format."""
    panels = math.ceil(rows / LANES)
    if format == "int8":
        groups = math.ceil(columns / GROUP8)
        return (panels, math.ceil(columns / 4), LANES, 4), (panels, groups, LANES)
    if format == "int4":
        groups = math.ceil(columns / GROUP)
        return (panels, groups, 4, LANES, 4), (panels, groups, 2, LANES)
    return (rows, columns), None


def pack(values: np.ndarray, format: Format, empty: Empty = np.empty) -> Matrix:
    """Store a matrix in a format; `values` are floating-point numbers, or uint16, bits of bf16.

    `empty` makes the arrays that it is stored in.

    Raises: ValueError if a number is none, infinite, or beyond what the format holds.
    """
    rows, columns = values.shape
    shape, scale_shape = packed_shapes(format, rows, columns)
    if scale_shape is None:
        data = empty(shape, PLAIN[format])
        for part in _panels(rows, columns):
            same = values.dtype == data.dtype
            data[part] = values[part] if same else _narrow(widen(values[part]), format)
        return Matrix(format=format, rows=rows, columns=columns, data=data)
    data, scale = empty(shape, np.uint8), empty(scale_shape, np.float16)
    round_panels = {"int8": _int8, "int4": _int4}[format]
    for part in _panels(rows, columns):
        first, last = part.start // LANES, math.ceil(part.stop / LANES)
        wide = np.zeros(((last - first) * LANES, columns), np.float32)
        wide[: part.stop - part.start] = widen(values[part])
        data[first:last], scale[first:last] = round_panels(wide)
    return Matrix(format=format, rows=rows, columns=columns, data=data, scale=scale)


def unpack(matrix: Matrix) -> np.ndarray:
    """Return the numbers that a matrix stands for. Shapes: → fp32 (rows, columns)."""
    values = np.empty((matrix.rows, matrix.columns), np.float32)
    for part in _panels(matrix.rows, matrix.columns):
        values[part] = _unpack(matrix, part)
    return values


def relative_error(values: np.ndarray, matrix: Matrix) -> float:
    """Return ‖W - W'‖ / ‖W‖ of a matrix and what it was packed to; 0 for nothing but zeros."""
    off = whole = 0.0
    for part in _panels(matrix.rows, matrix.columns):
        wide = widen(values[part])
        whole += float(np.vdot(wide, wide))
        wide = wide - _unpack(matrix, part)
        off += float(np.vdot(wide, wide))
    return math.sqrt(off / whole) if whole else 0.0


def _unpack(matrix: Matrix, part: slice) -> np.ndarray:
    """Return some rows of a matrix, from the beginning of a panel on."""
    if matrix.scale is None:
        return widen(matrix.data[part])
    first, last = part.start // LANES, math.ceil(part.stop / LANES)
    widen_panels = {"int8": _from_int8, "int4": _from_int4}[matrix.format]
    wide = widen_panels(matrix.data[first:last], matrix.scale[first:last])
    return wide[: part.stop - part.start, : matrix.columns]


def _panels(rows: int, columns: int) -> Iterator[slice]:
    """Cut rows into whole panels of about `NUMBERS`, so that no large temporary appears."""
    step = max(1, NUMBERS // max(1, columns * LANES)) * LANES
    for first in range(0, rows, step):
        yield slice(first, min(rows, first + step))


def widen(values: np.ndarray) -> np.ndarray:
    """Return numbers as fp32; uint16 are the upper halves of them, which bf16 is."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def _narrow(values: np.ndarray, format: Format) -> np.ndarray:
    """Round fp32 to a plain format, to the nearest, of two as near to the even one."""
    if format == "f16":
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if np.isinf(half).any() and np.isfinite(values).all():
            raise ValueError("holds numbers beyond ±65504, which f16 ends at")
        return half
    if format == "f32":
        return values
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _check_finite(extremes: np.ndarray) -> None:
    """Raise ValueError unless all are numbers; a maximum is none if any number is none."""
    if not np.isfinite(extremes).all():
        raise ValueError("holds NaN or infinity")


def _int8(wide: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round whole panels. Shapes: (16·P, columns) → data (P, S, 16, 4), scale fp16 (P, G, 16)."""
    count, columns = wide.shape
    groups, steps = math.ceil(columns / GROUP8), math.ceil(columns / 4)
    padded = np.zeros((count, groups, GROUP8), np.float32)
    padded.reshape(count, -1)[:, :columns] = wide
    most = np.maximum(padded.max(axis=2), -padded.min(axis=2)) + np.float32(0)  # no -0
    _check_finite(most)
    if most.max(initial=0) > FARTHEST8:
        raise ValueError(f"holds numbers beyond ±{FARTHEST8:,}, where int8 ends")
    scale = (most / np.float32(127)).astype(np.float16)
    padded /= np.where(scale > 0, scale, np.float16(1)).astype(np.float32)[:, :, None]
    np.rint(padded, out=padded)
    np.clip(padded, -127, 127, out=padded)
    padded += 128
    whole = padded.astype(np.uint8).reshape(count, -1)[:, : 4 * steps]
    fours = np.ascontiguousarray(whole).view(np.uint32).reshape(count // LANES, LANES, steps)
    data = np.ascontiguousarray(fours.transpose(0, 2, 1)).view(np.uint8)
    scale = scale.reshape(count // LANES, LANES, groups).transpose(0, 2, 1)
    return data.reshape(count // LANES, steps, LANES, 4), scale


def _from_int8(data: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Shapes: data (P, S, 16, 4), scale (P, G, 16) → (16·P, 4·S)."""
    panels, steps = data.shape[:2]
    wide = data.transpose(0, 2, 1, 3).astype(np.float32).reshape(panels * LANES, -1)
    wide -= 128
    by = scale.astype(np.float32).transpose(0, 2, 1).reshape(panels * LANES, -1)
    wide *= np.repeat(by, GROUP8, axis=1)[:, : 4 * steps]
    return wide


def _int4(wide: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round whole panels. Shapes: (16·P, columns) → data (P, G, 4, 16, 4), scale (P, G, 2, 16)."""
    count, columns = wide.shape
    panels, groups, whole = count // LANES, math.ceil(columns / GROUP), columns // GROUP
    q = np.zeros((GROUP, count, groups), np.uint8)
    pair = np.zeros((2, count, groups), np.float16)
    # The numbers of a group along the first axis: sums over them are then sums of long rows.
    w = np.ascontiguousarray(wide[:, : whole * GROUP].reshape(count * whole, GROUP).T)
    fitted, *lines = _fit(w)
    q[:, :, :whole] = fitted.reshape(GROUP, count, whole)
    pair[:, :, :whole] = np.reshape(lines, (2, count, whole))
    if rest := columns - whole * GROUP:
        q[:rest, :, whole], *lines = _fit(np.ascontiguousarray(wide[:, whole * GROUP :].T))
        pair[:, :, whole] = lines
    halves = q.reshape(4, 2, 4, panels, LANES, groups)
    data = (halves[:, 0] | halves[:, 1] << 4).transpose(2, 4, 0, 3, 1)
    return data, pair.reshape(2, panels, LANES, groups).transpose(1, 3, 0, 2)


def _fit(w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Choose scale and minimum of each group, then round by them.

    The smallest squared error wins among the whole range cut into 15, narrower ranges, and the
    least squares line through what each of them rounds to.

    Shapes: (k, n), overwritten → q uint8 (k, n), fp16 scale (n), fp16 minimum (n).
    """
    low, high = w.min(axis=0), w.max(axis=0)
    _check_finite(low + high)
    if max(high.max(initial=0), -low.min(initial=0)) > FARTHEST:
        raise ValueError(f"holds numbers beyond ±{FARTHEST:,}, where int4 ends")
    size = len(w)
    w -= low  # small numbers: no digits are lost in the sums below
    total, squares = w.sum(axis=0), (w * w).sum(axis=0)
    best = np.full_like(low, np.inf), low, low  # error, scale, minimum

    def consider(scale: np.ndarray, minimum: np.ndarray, sums: tuple[np.ndarray, ...]) -> None:
        """Keep a line where its error, worked out from sums over q, is the smallest so far."""
        nonlocal best
        q, qq, qw = sums
        error = squares + scale * (scale * qq + 2 * (minimum * q - qw))
        error += minimum * (size * minimum - 2 * total)
        better = error < best[0]
        found = (error, scale, minimum)
        best = tuple(np.where(better, x, y) for x, y in zip(found, best, strict=True))

    for span in (*SPANS, 0.0):
        scale, minimum = best[1:]  # for the last turn, the best so far
        if span:
            narrow = span * (high - low)
            scale, minimum = _halves(narrow / 15, (high - low - narrow) / 2, low)
        q = _round(w, scale, minimum)
        sums = q.sum(axis=0), (q * q).sum(axis=0), (q * w).sum(axis=0)
        consider(scale, minimum, sums)
        spread = size * sums[1] - sums[0] * sums[0]
        slope = np.maximum((size * sums[2] - sums[0] * total) / np.maximum(spread, 1), 0)
        consider(*_halves(slope, (total - slope * sums[0]) / size, low), sums)
    _, scale, minimum = best
    q = _round(w, scale, minimum).astype(np.uint8)
    zero = np.float16(0)  # added, it makes 0 of -0
    return q, scale.astype(np.float16) + zero, (minimum + low).astype(np.float16) + zero


def _halves(
    scale: np.ndarray, minimum: np.ndarray, low: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Round scale and minimum, which is counted from `low`, to what is stored of them."""
    minimum = (minimum + low).astype(np.float16).astype(np.float32) - low
    return scale.astype(np.float16).astype(np.float32), minimum


def _round(w: np.ndarray, scale: np.ndarray, minimum: np.ndarray) -> np.ndarray:
    """Return the nearest of the 16 steps. Shapes: (k, n) → the same, whole numbers in fp32."""
    q = w - minimum
    q /= np.maximum(scale, np.float32(1e-30))
    np.rint(q, out=q)
    return np.clip(q, 0, 15, out=q)


def _from_int4(data: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Shapes: data (P, G, 4, 16, 4), scale (P, G, 2, 16) → (16·P, 32·G)."""
    panels, groups = data.shape[:2]
    halves = np.stack([data & 15, data >> 4], axis=3)  # P G 4 2 16 4
    q = halves.transpose(0, 4, 1, 2, 3, 5).astype(np.float32)  # P 16 G 4 2 4
    q = q.reshape(panels, LANES, groups, GROUP)
    step, minimum = scale.astype(np.float32).transpose(2, 0, 3, 1)[..., None]  # P 16 G 1
    return (q * step + minimum).reshape(panels * LANES, groups * GROUP)
