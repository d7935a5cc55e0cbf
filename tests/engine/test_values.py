"""What a setting takes: types, choices, ranges, and the name that was probably meant."""

import dataclasses

import pytest

from engine.config import ModelConfig, RopeScaling, SampleConfig
from engine.values import convert, nearest

FIELDS = {
    field.name: field
    for kind in (ModelConfig, RopeScaling, SampleConfig)
    for field in dataclasses.fields(kind)
}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("top_k", 3.0, 3),
        ("top_p", 1, 1.0),
        ("norm", "layernorm", "layernorm"),
        ("attention_bias", True, True),
        ("short_factors", [1, 2], (1.0, 2.0)),
    ],
)
def test_a_value_becomes_what_the_field_holds(name, value, expected):
    found = convert(value, FIELDS[name])
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("top_k", 2.5, "must be a whole number"),
        ("top_k", True, "must be a whole number"),
        ("top_k", -1, "must be at least 0"),
        ("top_p", 1.5, "must be from 0 to 1"),
        ("top_p", "much", "must be a number"),
        ("top_p", float("nan"), "must be finite"),
        ("norm", "layer_norm", "one of rmsnorm, layernorm; did you mean layernorm"),
        ("attention_bias", 1, "true or false"),
        ("short_factors", 1.0, "a list of numbers"),
    ],
)
def test_a_value_that_does_not_fit_is_told_what_would(name, value, problem):
    with pytest.raises(ValueError, match=problem):
        convert(value, FIELDS[name])


def test_only_what_is_alike_is_suggested():
    known = ["train.optim.lr", "train.steps"]
    assert nearest("trian.steps", known) == "; did you mean train.steps?"
    assert nearest("lr", known) == "; did you mean train.optim.lr?"
    assert nearest("zzz", known) == nearest("steps", []) == ""
