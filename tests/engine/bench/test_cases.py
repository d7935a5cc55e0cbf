"""Grids: ranges as documented, every case once, and nothing beyond the context."""

import pytest

from engine.bench.cases import Grid, expand, read_numbers, read_whats
from engine.errors import LimitError, RecipeError


@pytest.mark.parametrize(
    "text, numbers",
    [
        ("128", (128,)),
        ("512,128,128", (128, 512)),
        ("128..2048x2", (128, 256, 512, 1024, 2048)),
        ("100..1000x3", (100, 300, 900)),
        ("0..512+256, 100", (0, 100, 256, 512)),
        ("1..4", (1, 2, 3, 4)),
    ],
)
def test_numbers_and_ranges(text, numbers):
    assert read_numbers(text, "--depth", low=0) == numbers


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "4..1", "0..8x2", "1..8x1", "1..8+0", "1..1000", "1,,2", "1..8*2"]
)
def test_what_is_no_range_is_refused_by_name(text):
    with pytest.raises(RecipeError, match="--prompt .*128..2048x2"):
        read_numbers(text, "--prompt", low=0)


def test_zero_is_no_prompt():
    with pytest.raises(RecipeError, match="from 1"):
        read_numbers("0,5", "--prompt")


def test_works_come_in_their_own_order_and_the_nearest_is_named():
    assert read_whats("kv,prefill") == ["prefill", "kv"]
    with pytest.raises(RecipeError, match="did you mean decode"):
        read_whats("prefill,decod")


def names(what, grid, context=4096):
    return [case.name for case in expand(what, grid, "m", context)[0]]


def test_each_work_takes_the_lists_that_concern_it():
    grid = Grid(prompt=(5, 9), depth=(0, 64), batch=(1, 2), tokens=8)
    assert names("prefill", grid) == ["5 tokens", "9 tokens"]
    assert names("decode", grid) == ["at 0", "at 64"]
    assert names("batch", grid) == ["1 row at 128", "2 rows at 128"]
    assert names("kv", grid) == ["at 64", "at 64, no cache"]
    assert names("load", grid) == ["weights"]


def test_precisions_and_threads_multiply():
    cases, _ = expand("prefill", Grid(prompt=(5,), dtype=("fp32", "bf16"), threads=(1, 2)), "m", 99)
    seen = [(case.dtype, case.threads) for case in cases]
    assert seen == [("fp32", 1), ("fp32", 2), ("bf16", 1), ("bf16", 2)]


def test_torch_leaves_out_what_only_our_own_c_can():
    grid = Grid(depth=(8,), dtype=("auto", "int4"), kernels=("auto", "torch"), kv=("auto", "int8"))
    ways = {case.how[:3] for case in expand("decode", grid, "m", 64)[0]}
    ours = {(dtype, "auto", kv) for dtype in ("auto", "int4") for kv in ("auto", "int8")}
    assert ways == ours | {("auto", "torch", "auto")}
    loads = expand("load", grid, "m", 64)[0]  # which makes no keys and values
    assert [case.how[:2] for case in loads] == [
        ("auto", "auto"),
        ("auto", "torch"),
        ("int4", "auto"),
    ]


def test_usual_lengths_shrink_to_the_context_and_say_so():
    cases, notes = expand("decode", Grid(tokens=10), "m", 600)
    assert [case.depth for case in cases] == [0, 512, 590]
    assert notes == ["decode: 590 tokens, all that fit, instead of 2,048"]


def test_given_lengths_beyond_the_context_are_refused():
    with pytest.raises(LimitError, match="decode: 600 tokens and 10 more .* --depth 590 or less"):
        expand("decode", Grid(depth=(0, 600), tokens=10), "m", 600)
    with pytest.raises(LimitError, match="--tokens 600 leave no room"):
        expand("batch", Grid(tokens=600), "m", 600)
