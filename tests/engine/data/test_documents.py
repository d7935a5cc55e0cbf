"""Reading documents: text, JSONL and parquet, plain or gzipped, and every way they can be wrong."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data import documents
from engine.data.documents import NotText, read_documents
from engine.errors import DataError

TEXT = "plain\nhéllo wörld €\n\n日本語 😀 text\r\nold mac\rend"


def read(path, format="auto", column="text"):
    return list(read_documents(path.name, path, format, column))


def whole(path, **options):
    """The documents of a file, put together again: (name, text) each."""
    found, text = [], ""
    for piece in read(path, **options):
        text += piece.text
        if piece.end:
            found.append((piece.document, text))
            text = ""
    assert not text
    return found


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 64, 1 << 20])
def test_a_text_file_is_one_document_however_it_is_cut(tmp_path, monkeypatch, size):
    """Characters of two to four bytes straddle the blocks; line ends come through untouched."""
    monkeypatch.setattr(documents, "PIECE", size)
    file = tmp_path / "a.txt"
    file.write_bytes(("\ufeff" + TEXT * 5).encode())
    pieces = read(file)
    assert "".join(piece.text for piece in pieces) == "\ufeff" + TEXT * 5
    assert [piece.end for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert {piece.document for piece in pieces} == {"a.txt"}
    assert len(pieces) > 3 or size > 64


def test_long_text_is_cut_after_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 100)
    file = tmp_path / "a.txt"
    file.write_text("a line of some length é\n" * 200 + "the last")
    pieces = read(file)
    assert len(pieces) > 40
    assert all(piece.text.endswith("\n") for piece in pieces[:-1])
    assert pieces[-1].text.endswith("the last")


def test_an_endless_line_is_cut_anyway(tmp_path, monkeypatch):
    """Or the whole file would sit in memory."""
    monkeypatch.setattr(documents, "PIECE", 8)
    file = tmp_path / "a.txt"
    file.write_text("0123456789" * 100)
    pieces = read(file)
    assert "".join(piece.text for piece in pieces) == "0123456789" * 100
    assert max(len(piece.text) for piece in pieces) <= 5 * 8


def test_an_empty_file_is_an_empty_document(tmp_path):
    (tmp_path / "empty.txt").touch()
    assert whole(tmp_path / "empty.txt") == [("empty.txt", "")]


@pytest.mark.parametrize("name", ["a.txt.gz", "a.gz", "a.TXT.GZ"])
def test_gzipped_text_reads_like_plain(tmp_path, monkeypatch, name):
    monkeypatch.setattr(documents, "PIECE", 10)
    (tmp_path / name).write_bytes(gzip.compress(TEXT.encode()))
    assert whole(tmp_path / name) == [(name, TEXT)]


def test_gzipped_jsonl_reads_like_plain(tmp_path):
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    assert whole(file) == [("rows.jsonl.gz:1", "one"), ("rows.jsonl.gz:2", "two")]


def _flipped(data):
    return data[:40] + bytes(byte ^ 0xFF for byte in data[40:60]) + data[60:]


@pytest.mark.parametrize(
    "damage",
    [lambda _: b"no gzip at all", lambda data: data[:-20], _flipped],
    ids=["not gzip", "cut short", "bits flipped"],
)
@pytest.mark.parametrize("format", ["text", "jsonl"])
def test_a_corrupt_gzip_is_named(tmp_path, damage, format):
    file = tmp_path / "a.gz"
    rows = "".join(json.dumps({"text": f"row {i} {i * i}"}) + "\n" for i in range(500))
    file.write_bytes(damage(gzip.compress(rows.encode())))
    with pytest.raises(DataError, match=r"a\.gz: cannot be read: .+"):
        read(file, format=format)


def test_a_missing_file_is_named(tmp_path):
    for name in ("a.txt", "a.jsonl", "a.parquet", "a.gz"):
        with pytest.raises(DataError, match=rf"{name}: cannot be read: .*No such file"):
            read(tmp_path / name)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson", "rows.JSONL"])
def test_jsonl_rows_are_documents_named_by_line(tmp_path, name):
    """Only a line feed ends a row: U+2028, U+0085 and form feeds occur inside strings."""
    texts = ["one", "two\nlines", "odd \u2028 \x85 \x0c ends", "", "\ud800"]
    lines = [json.dumps({"id": 1, "text": text}, ensure_ascii=text == "\ud800") for text in texts]
    (tmp_path / name).write_bytes("\n".join(lines).encode())
    assert whole(tmp_path / name) == [(f"{name}:{i}", text) for i, text in enumerate(texts, 1)]


def test_blank_lines_are_skipped_but_counted(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('\n{"text": "a"}\n \t\r\n\n{"text": "b"}\r\n\n')
    assert whole(file) == [("rows.jsonl:2", "a"), ("rows.jsonl:5", "b")]


def test_the_column_can_be_chosen(tmp_path):
    file = tmp_path / "rows.jsonl"
    write_rows(file, [{"text": "no", "body": "yes"}])
    assert whole(file, column="body") == [("rows.jsonl:1", "yes")]


def test_the_format_overrides_the_ending(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n')
    assert whole(file, format="text") == [("rows.jsonl", '{"text": "a"}\n')]
    other = file.rename(tmp_path / "rows.txt")
    assert whole(other, format="jsonl") == [("rows.txt:1", "a")]


def test_bad_json_is_named_by_line(tmp_path):
    """Rows before it are read; a user with a million rows needs the line."""
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": f"row {i}"}) for i in range(1, 301)]
    lines[216] = '{"text": "cut sho'
    file.write_text("\n".join(lines))
    stream = read_documents("rows.jsonl", file, "auto", "text")
    assert [next(stream).text for _ in range(216)] == [f"row {i}" for i in range(1, 217)]
    with pytest.raises(DataError, match=r"^rows\.jsonl:217: not valid JSON: "):
        next(stream)


@pytest.mark.parametrize(
    "line",
    [
        b"{'text': 'python'}",
        b'{"text": "a"} {"text": "b"}',
        b'{"text": "\xff"}',
        b'{"text": "a", "n": ' + b"1" * 5000 + b"}",
        b'{"text": "a", "n": ' + b"[" * 200_000,
    ],
    ids=["quotes", "two rows", "not UTF-8", "huge number", "deep nesting"],
)
def test_no_bad_row_escapes_as_another_error(tmp_path, line):
    """json raises ValueError for a number of 5,000 digits, RecursionError for deep nesting."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=r"^rows\.jsonl:2: not valid JSON"):
        read(file)


@pytest.mark.parametrize(
    "row, has",
    [
        ({"id": 1, "body": "x"}, r"the row has 'id', 'body'; set data\.column"),
        ({"text": 5}, "the row has 'text'"),
        ({"text": None, "body": "x"}, "the row has 'text', 'body'"),
        (["text"], "the row has a list"),
        ("text", "the row has a str"),
    ],
)
def test_a_row_without_text_lists_what_it_has(tmp_path, row, has):
    file = tmp_path / "rows.jsonl"
    write_rows(file, [{"text": "good"}, row])
    with pytest.raises(DataError, match=rf"^rows\.jsonl:2: no text in field 'text', {has}"):
        read(file)


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def test_parquet_rows_are_documents_named_by_row(tmp_path):
    """More rows than are read at a time: the count goes on."""
    texts = [f"row {i} é😀" for i in range(1, 2101)]
    file = tmp_path / "rows.parquet"
    write_parquet(file, id=list(range(2100)), text=texts)
    assert whole(file) == [(f"rows.parquet:{i}", text) for i, text in enumerate(texts, 1)]


def test_a_missing_parquet_column_lists_those_there(tmp_path):
    file = tmp_path / "rows.parquet"
    write_parquet(file, id=[1], body=["x"])
    assert whole(file, column="body") == [("rows.parquet:1", "x")]
    with pytest.raises(DataError, match=r"^rows\.parquet: no column 'text', it has id, body; "):
        read(file)


def test_a_parquet_row_without_text_is_named(tmp_path):
    file = tmp_path / "rows.parquet"
    write_parquet(file, text=["good", None, "good"])
    with pytest.raises(DataError, match=r"^rows\.parquet:2: column 'text' holds None"):
        read(file)


@pytest.mark.parametrize("content", [b"", b"not parquet", b"PAR1" + b"x" * 50 + b"PAR1"])
def test_a_file_that_is_not_parquet_is_named(tmp_path, content):
    file = tmp_path / "rows.parquet"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.parquet"):
        read(file)


@pytest.mark.parametrize("where", [0, 7, 8, 9, 1000])
def test_a_nul_makes_a_file_binary(tmp_path, monkeypatch, where):
    """The offset is right across the borders of the blocks."""
    monkeypatch.setattr(documents, "PIECE", 8)
    file = tmp_path / "a.bin"
    file.write_bytes(b"line\n" * (where // 5) + b"x" * (where % 5) + b"\0 more \0")
    with pytest.raises(NotText, match=rf"^a\.bin: a binary file \(NUL at byte {where}\)") as caught:
        read(file)
    assert caught.value.kind == "binary"


@pytest.mark.parametrize("bad", [b"\xff", b"\xf0\x9f\x98", b"\xf0\x9f\x98 cut", b"\xed\xa0\x80"])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_byte_that_is_not_utf8_is_named_wherever_it_is(tmp_path, monkeypatch, bad, size):
    """Whole characters of one to four bytes come first, so blocks end inside characters."""
    monkeypatch.setattr(documents, "PIECE", size)
    file = tmp_path / "a.txt"
    for characters in range(30):
        good = ("aé€😀\n" * 6)[:characters].encode()
        file.write_bytes(good + bad)
        with pytest.raises(NotText, match=rf"not UTF-8 at byte {len(good)};") as caught:
            read(file)
        assert caught.value.kind == "not UTF-8"


CONTENT = st.lists(
    st.one_of(st.text().map(str.encode), st.binary(max_size=5).map(lambda b: b.replace(b"\0", b"")))
).map(lambda parts: b"".join(parts).replace(b"\0", b""))


@given(data=CONTENT, size=st.integers(1, 9))
def test_any_bytes_read_as_python_would_decode_them(tmp_path_factory, data, size):
    """The oracle is one `bytes.decode` of the whole: the same text, or the same offset."""
    file = tmp_path_factory.mktemp("any") / "a.txt"
    file.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE", size)
        try:
            expected = data.decode()
        except UnicodeDecodeError as error:
            with pytest.raises(NotText, match=rf"not UTF-8 at byte {error.start};"):
                read(file)
        else:
            assert whole(file) == [("a.txt", expected)]
