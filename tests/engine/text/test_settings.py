"""What stands beside a tokenizer.json: both forms of everything, and every wrong type."""

import json

import pytest

from engine.errors import CheckpointError
from engine.text.settings import Settings, read_settings


def folder(path, **files):
    """Write files; the name of each has `__` for the dot."""
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (path / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return path


def test_an_empty_folder_says_nothing(tmp_path):
    assert read_settings(tmp_path) == Settings()
    assert Settings().names() == set() and not Settings().add_bos


def test_tokens_are_named_bare_or_in_an_object(tmp_path):
    config = {
        "bos_token": {"content": "<s>", "lstrip": False},
        "eos_token": "</s>",
        "pad_token": None,
        "add_bos_token": True,
        "image_token": "<image>",
        "additional_special_tokens": ["<a>"],
        "model_max_length": 1e30,
    }
    settings = read_settings(folder(tmp_path, tokenizer_config__json=config))
    assert settings.raw == config
    assert [settings.name(f"{key}_token") for key in ("bos", "eos", "pad")] == ["<s>", "</s>", None]
    assert settings.names() == {"<s>", "</s>", "<image>"}
    assert settings.add_bos


@pytest.mark.parametrize(
    "template, expected",
    [
        ("{{ messages }}", "{{ messages }}"),
        ([{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "rag", "template": "r"}], None),
        (None, None),
    ],
)
def test_the_default_chat_template_counts(tmp_path, template, expected):
    folder(tmp_path, tokenizer_config__json={"chat_template": template})
    assert read_settings(tmp_path).template == expected
    folder(tmp_path, chat_template__jinja="{# newer #}\n")
    assert read_settings(tmp_path).template == "{# newer #}\n"


def test_all_ids_that_end_generation_are_collected(tmp_path):
    folder(
        tmp_path, generation_config__json={"eos_token_id": [7, 3]}, config__json={"eos_token_id": 2}
    )
    assert read_settings(tmp_path).ends == (7, 3, 2)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "config.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe\0", b"[]", b"3", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"],
)
def test_a_malformed_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{tmp_path / name}: "):
        read_settings(tmp_path)


@pytest.mark.parametrize(
    "setting",
    [
        {"bos_token": 3},
        {"eos_token": ["</s>"]},
        {"pad_token": {"content": 5}},
        {"add_bos_token": "yes"},
        {"image_token": [[]]},
        {"chat_template": 5},
        {"chat_template": ["default"]},
        {"chat_template": [{"name": "default", "template": 5}]},
    ],
)
def test_a_setting_of_the_wrong_type_is_named(tmp_path, setting):
    folder(tmp_path, tokenizer_config__json=setting)
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json: {next(iter(setting))} "):
        read_settings(tmp_path)


@pytest.mark.parametrize("ends", ["2", [2, "3"], -1, 1 << 40, True, {"id": 2}, 2.0])
def test_an_end_that_is_no_id_is_named(tmp_path, ends):
    folder(tmp_path, generation_config__json={"eos_token_id": ends})
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id is neither"):
        read_settings(tmp_path)


def test_a_template_that_is_not_text_is_named(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: cannot be read as text"):
        read_settings(tmp_path)
