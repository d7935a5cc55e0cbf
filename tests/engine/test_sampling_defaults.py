"""generation_config.json in others' words becomes our settings, or one clear error."""

import json

import pytest

from engine.config import SampleConfig
from engine.errors import CheckpointError
from engine.sampling_defaults import sample_defaults


def written(folder, content) -> SampleConfig:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "generation_config.json").write_text(text, encoding="utf-8")
    return sample_defaults(folder)


def test_without_a_file_ours_hold(tmp_path):
    assert sample_defaults(tmp_path) == SampleConfig()


@pytest.mark.parametrize(
    "content, expected",
    [
        ({}, {}),
        (
            {"temperature": 0.5, "top_k": 7, "max_new_tokens": 9},
            dict(temperature=0.5, top_k=7, max_tokens=9),
        ),
        (
            {"top_p": 1, "min_p": 0.1, "repetition_penalty": 1.1},
            dict(top_p=1.0, min_p=0.1, repetition_penalty=1.1),
        ),
        ({"temperature": 0.5, "do_sample": False}, {"temperature": 0.0}),
        ({"temperature": 0.5, "do_sample": True}, {"temperature": 0.5}),
        ({"temperature": None, "bos_token_id": 1, "unknown": "x"}, {}),
    ],
    ids=str,
)
def test_their_words_are_ours(content, expected, tmp_path):
    assert written(tmp_path, content) == SampleConfig(**expected)


@pytest.mark.parametrize(
    "content, said",
    [
        ("[]", "not a JSON object"),
        ("{", "not valid JSON"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": -1}, "top_k=-1"),
        ('{"max_new_tokens": 1e999}', "max_new_tokens"),
    ],
    ids=str,
)
def test_nonsense_is_refused_by_its_name(content, said, tmp_path):
    with pytest.raises(CheckpointError, match=r"generation_config\.json: ") as caught:
        written(tmp_path, content)
    assert said in str(caught.value)
