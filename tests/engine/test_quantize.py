"""Packing matrices: the layout number by number, the error, and what cannot be packed."""

import math

import numpy as np
import pytest
import torch

from engine.quantize import GROUP, LANES, Matrix, pack, packed_shapes, unpack

FORMATS = ("f32", "bf16", "f16", "int8", "int4")
SHAPES = ((1, 1), (3, 5), (16, 32), (17, 33), (40, 31), (5, 200), (257, 70))


def normal(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def scale_of(matrix: Matrix) -> np.ndarray:
    assert matrix.scale is not None
    return matrix.scale


def test_int8_lies_as_it_is_written_down():
    """Each number at its place, by the formula of the layout, one at a time."""
    w = normal(19, 70)
    matrix = pack(w, "int8")
    assert matrix.data.shape == (2, 18, 16, 4) and matrix.data.dtype == np.uint8
    assert scale_of(matrix).shape == (2, 2, 16) and scale_of(matrix).dtype == np.float16
    assert matrix.bytes == 2 * 18 * 16 * 4 + 2 * 2 * 16 * 2
    for row in range(32):
        for column in range(72):
            p, lane, g = row // 16, row % 16, column // 64
            group = w[row, 64 * g : 64 * g + 64] if row < 19 else np.zeros(1, np.float32)
            s = np.float16(abs(group).max() / np.float32(127))
            assert scale_of(matrix)[p, g, lane] == s
            there = row < 19 and column < 70
            q = np.clip(round(float(w[row, column] / np.float32(s))), -127, 127) if there else 0
            assert matrix.data[p, column // 4, lane, column % 4] == q + 128, (row, column)


def test_int4_lies_as_it_is_written_down():
    """Two numbers four columns apart share a byte, the first in its lower half."""
    w = normal(19, 45)
    matrix = pack(w, "int4")
    assert matrix.data.shape == (2, 2, 4, 16, 4) and matrix.data.dtype == np.uint8
    assert scale_of(matrix).shape == (2, 2, 2, 16) and scale_of(matrix).dtype == np.float16
    back = unpack(matrix)
    for row in range(32):
        for column in range(64):
            p, lane, g = row // 16, row % 16, column // 32
            c, half, i = column % 32 // 8, column % 8 // 4, column % 4
            q = int(matrix.data[p, g, c, lane, i]) >> 4 * half & 15
            scale, minimum = (float(x) for x in scale_of(matrix)[p, g, :, lane])
            if row < 19 and column < 45:
                ideal = np.clip((w[row, column] - minimum) / scale, 0, 15)
                assert abs(q - ideal) <= 0.5 + 1e-4, (row, column)
                assert back[row, column] == pytest.approx(q * scale + minimum, abs=1e-6)
            else:
                assert q == 0, (row, column)
                assert row < 19 or scale == minimum == 0


def test_int4_of_numbers_that_it_can_say_exactly():
    """Sixteen even steps from -4: every one is kept."""
    w = np.tile(np.arange(16, dtype=np.float32) * 0.5 - 4, (2, 2))
    matrix = pack(w, "int4")
    assert scale_of(matrix)[0, 0, 0, 0] == 0.5 and scale_of(matrix)[0, 0, 1, 0] == -4
    assert np.array_equal(unpack(matrix), w)
    # Columns 0 … 3 hold steps 0 … 3, and share their bytes with columns 4 … 7.
    assert matrix.data[0, 0, 0, 0].tolist() == [0x40, 0x51, 0x62, 0x73]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_are_as_said(format, shape):
    matrix = pack(normal(*shape), format)
    data, scale = packed_shapes(format, *shape)
    assert matrix.data.shape == data and matrix.data.flags.c_contiguous
    assert (matrix.scale is None) == (scale is None)
    assert scale is None or (
        scale_of(matrix).shape == scale and scale_of(matrix).flags.c_contiguous
    )
    assert (matrix.rows, matrix.columns, matrix.format) == (*shape, format)
    assert unpack(matrix).shape == shape and unpack(matrix).dtype == np.float32


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_number_moves_by_more_than_half_a_step_of_int8(shape):
    w = normal(*shape)
    steps = [abs(w[:, g : g + 64]).max(axis=1) / 127 for g in range(0, w.shape[1], 64)]
    step = np.repeat(np.stack(steps, axis=1), 64, axis=1)[:, : w.shape[1]]
    # The scale is rounded to f16, so the largest number of a group may lie beyond 127 of its steps.
    assert (abs(unpack(pack(w, "int8")) - w) <= step * (0.5 + 127 / 2048)).all()


def plain_int4(w: np.ndarray) -> np.ndarray:
    """Cut the range of each group into 15, one group at a time, without any search."""
    out = np.empty_like(w)
    for row in range(w.shape[0]):
        for first in range(0, w.shape[1], GROUP):
            group = w[row, first : first + GROUP]
            minimum = np.float32(np.float16(group.min()))
            scale = np.float32(np.float16((group.max() - group.min()) / 15))
            q = np.clip(np.rint((group - minimum) / max(scale, np.float32(1e-30))), 0, 15)
            out[row, first : first + GROUP] = q * scale + minimum
    return out


@pytest.mark.parametrize("seed", range(20))
def test_int4_is_no_worse_than_plain_rounding(seed):
    """In every group of any kind of numbers; and whatever their size."""
    random = np.random.default_rng(seed)
    rows, columns = (int(n) for n in random.integers(1, 70, 2))
    w = normal(rows, columns, seed) ** random.choice([1, 3]) * random.choice([1e-3, 1, 50])
    w += np.float32(random.choice([0, 3]))
    error, plain = (np.square(x - w) for x in (unpack(pack(w, "int4")), plain_int4(w)))
    edges = range(0, columns, GROUP)
    error, plain = (np.add.reduceat(x.astype(np.float64), edges, axis=1) for x in (error, plain))
    # Sums in fp32 decide; where two outcomes are as good as equal they may err.
    slack = (
        1e-5 * np.add.reduceat(np.square(w - w.mean()), edges, axis=1) + 1e-9 * np.square(w).max()
    )
    assert (error <= plain + slack).all()


def test_the_search_of_int4_is_worth_its_while():
    w = normal(64, 512)
    error, plain = (np.square(x - w).sum() for x in (unpack(pack(w, "int4")), plain_int4(w)))
    assert error < 0.9 * plain


@pytest.mark.parametrize("format", ["bf16", "f16"])
def test_halves_are_rounded_as_torch_rounds(format):
    w = normal(33, 65) * 100
    w[0, :4] = [np.inf, -np.inf, np.nan, -0.0]
    kind = {"bf16": torch.bfloat16, "f16": torch.float16}[format]
    expected = torch.from_numpy(w).to(kind).float().numpy()
    assert np.array_equal(unpack(pack(w, format)), expected, equal_nan=True)


@pytest.mark.parametrize("format", FORMATS)
def test_halves_are_read_as_what_they_are(format):
    """The source's own precision makes no difference but its rounding."""
    half = pack(normal(20, 40), "bf16")
    a, b = pack(half.data, format), pack(unpack(half), format)
    assert np.array_equal(a.data, b.data)
    assert a.scale is None or np.array_equal(a.scale, scale_of(b))


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_large_matrices_are_cut_without_a_seam(format):
    """Rows packed together or apart are the same."""
    w = normal(2000, 100)
    whole = unpack(pack(w, format))
    apart = np.concatenate([unpack(pack(w[i : i + 7], format)) for i in range(0, 2000, 7)])
    assert np.array_equal(whole, apart)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_what_lies_transposed_is_packed_as_it_reads(format):
    w = normal(50, 70)
    a, b = pack(w.T, format), pack(np.ascontiguousarray(w.T), format)
    assert np.array_equal(a.data, b.data)


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 1e-30, 1e-42])
def test_a_constant_matrix(format, value):
    w = np.full((18, 37), value, np.float32)
    half = 1 / 2048 if format == "int8" else 1e-6  # of f16, which the scale is rounded to
    assert abs(unpack(pack(w, format)) - w).max() <= max(half * abs(value), 4e-6)


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0), (17, 36), (18, 3)])
def test_what_is_no_number_is_refused(format, value, place):
    w = normal(19, 37)
    w[place] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        pack(w, format)


@pytest.mark.parametrize(
    ("format", "limit"), [("f16", "65504"), ("int8", "8,000,000"), ("int4", "30,000")]
)
def test_what_is_too_large_is_refused(format, limit):
    w = normal(3, 5)
    w[1, 1] = -1e7
    with pytest.raises(ValueError, match=limit):
        pack(w, format)


def test_int8_keeps_the_largest_numbers_it_takes():
    w = np.array([[8e6, -8e6, 1.0]], np.float32)
    assert unpack(pack(w, "int8"))[0].tolist() == pytest.approx([8e6, -8e6, 0.0], rel=1e-3)


def test_a_panel_is_as_wide_as_the_widest_register():
    """The C counts on it: 16 numbers of 32 bits are 512."""
    assert LANES * 32 == 512


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_the_scale_of_zeros_is_no_negative_zero(format):
    signs = np.random.default_rng(1).integers(0, 2, (64, 256)).astype(bool)
    for zeros in (np.zeros((64, 256)), -np.zeros((64, 256)), np.where(signs, -0.0, 0.0)):
        matrix = pack(zeros.astype(np.float32), format)
        assert matrix.scale is not None and not np.signbit(matrix.scale).any()
