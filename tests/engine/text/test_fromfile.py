"""A tokenizer of a file counts, cuts and splits like a published encoding."""

import pytest

from engine.errors import CheckpointError
from engine.text.cutting import fit, split
from engine.text.fromfile import FromFile

TEXT = "class Attention(nn.Module):  # 注意 🙂\n" * 30


@pytest.fixture
def source(tmp_path, tokenizer):
    tokenizer.save(tmp_path, 64)
    return FromFile(tmp_path)


def test_it_counts_what_its_tokenizer_encodes(source, tokenizer):
    ids = tokenizer.encode(TEXT)
    assert source.encode(TEXT) == ids and source.count(TEXT) == len(ids)
    assert source.count_stream(list(TEXT)) == len(ids)
    lengths = source.lengths(TEXT)
    assert lengths is not None and sum(lengths) == len(TEXT.encode())
    assert b"".join(map(source.piece, ids)) == TEXT.encode()
    assert set(source.special) == set(tokenizer.special.values())


def test_it_cuts_whether_or_not_lengths_are_known(source, monkeypatch):
    for _ in range(2):
        for strategy in ("head", "tail", "middle"):
            assert 48 <= source.count(fit(TEXT, 50, strategy, source)) <= 50
        chunks = list(split(TEXT, 40, 0, source))
        assert "".join(chunks) == TEXT and max(map(source.count, chunks)) <= 40
        monkeypatch.setattr(source, "lengths", lambda text: None)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no tokenizer"):
        FromFile(tmp_path)
