"""Finding a corpus, scanning it, and copying standard input."""

import errno
import hashlib
import io
import json
import os
import sysconfig
from pathlib import Path

import pytest

from engine.config import DataConfig
from engine.data import documents
from engine.data.corpora import held_out, open_corpus, scan, spool
from engine.data.pack import sides
from engine.errors import DataError, ResourceError


def write_files(folder, contents):
    for name, content in contents.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def opened(source, **options):
    return open_corpus(str(source), DataConfig(**options))


def names(corpus):
    return [name for name, _ in corpus.files]


def sha256_modulo(name, one_in):
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest(), "big") % one_in


STDLIB_LEAVES_OUT = {
    *("test", "tests", "idle_test", "site-packages", "lib2to3", "encodings", "pydoc_data"),
    *("idlelib", "turtledemo", "distutils", "ensurepip"),
}


@pytest.fixture(scope="module")
def stdlib():
    return scan(opened("stdlib"), 20)


def test_stdlib_is_the_library_without_tests_packages_and_tables(stdlib):
    root, expected = sysconfig.get_paths()["stdlib"], set()
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in STDLIB_LEAVES_OUT]
        found = [os.path.relpath(Path(folder, name), root) for name in files]
        expected |= {name for name in found if name.endswith(".py")}
    corpus, found = stdlib
    assert set(names(corpus)) == expected >= {"ast.py", "json/decoder.py", "asyncio/tasks.py"}
    assert found.documents == len(corpus.files) == len(expected)
    assert found.bytes == sum(Path(root, name).stat().st_size for name in expected)


def test_stdlib_is_split_by_the_hash_of_the_path(stdlib):
    """Computed here from nothing but the paths, as anyone else would to compare with us."""
    corpus, found = stdlib
    expected = {name for name in names(corpus) if sha256_modulo(name, 20) == 0}
    split = {"train": set(), "valid": set()}
    for side, piece in sides(stdlib, None, 20):
        split[side].add(piece.document)
    assert split == {"train": set(names(corpus)) - expected, "valid": expected}
    assert found.held_out == len(expected) > 10


def test_pydoc_is_the_manual():
    from pydoc_data.topics import topics

    corpus, found = scan(opened("pydoc"), 20)
    assert {piece.document: piece.text for piece in corpus.pieces()} == topics
    assert found.documents == len(topics)
    assert found.held_out == sum(sha256_modulo(name, 20) == 0 for name in topics)


def test_a_held_out_name_need_not_be_utf8():
    name = os.fsdecode(b"caf\xe9.txt")
    assert [held_out(name, n) for n in range(2, 40)] == [
        sha256_modulo(name, n) == 0 for n in range(2, 40)
    ]


def test_a_folder_is_read_without_hidden_and_binary_files(tmp_path):
    write_files(
        tmp_path,
        {
            "b.txt": "bé",
            "a/z.md": "az",
            ".hidden": "no",
            ".git/config": "no",
            "a/.cache/deep/x.txt": "no",
            "photo.png": b"\x89PNG\0\0",
            "photo2.png": b"\x89PNG\0\0",
            "latin.txt": b"caf\xe9",
            "a/trailing.txt": "fine for a megabyte\n" * 60_000 + "\0",
        },
    )
    corpus, found = scan(opened(tmp_path), 20)
    assert names(corpus) == ["a/z.md", "b.txt"]
    assert [(piece.document, piece.text) for piece in corpus.pieces()] == [
        ("a/z.md", "az"),
        ("b.txt", "bé"),
    ]
    assert found.dropped == {"binary": 3, "not UTF-8": 1}
    assert (found.documents, found.bytes) == (2, 5)


def test_a_folder_inside_a_hidden_one_is_read(tmp_path):
    """What is hidden is judged from the folder the user named, not from the root."""
    folder = write_files(tmp_path / ".data", {"a.txt": "a"})
    assert names(opened(folder)) == ["a.txt"]


def test_a_broken_row_in_a_folder_is_an_error(tmp_path):
    """Only files that are not text are left out; damaged data never is."""
    write_files(tmp_path, {"a.txt": "fine", "b.jsonl": "{"})
    with pytest.raises(DataError, match=r"b\.jsonl:1: not valid JSON"):
        scan(opened(tmp_path), 20)


@pytest.mark.parametrize("content, why", [(b"a\0b", "NUL at byte 1"), (b"a\xff", "not UTF-8")])
def test_a_binary_file_named_directly_is_an_error(tmp_path, content, why):
    file = write_files(tmp_path, {"photo.png": content}) / "photo.png"
    with pytest.raises(DataError, match=rf"photo\.png: .*{why}"):
        scan(opened(file), 20)


def test_a_file_is_read_by_its_format_and_column(tmp_path):
    write_files(tmp_path, {"rows.txt": '{"body": "a"}\n{"body": "bc"}\n'})
    file = tmp_path / "rows.txt"
    corpus, found = scan(opened(file, format="jsonl", column="body"), 20)
    assert [piece.text for piece in corpus.pieces()] == ["a", "bc"]
    assert (found.documents, found.bytes) == (2, 3)
    assert scan(opened(file), 20)[1].documents == 1


def test_a_glob_finds_files_in_a_fixed_order(tmp_path):
    files = {"b.txt": "b", "a.txt": "a", "c.md": "c", "sub/d.txt": "d", "e.txt": b"\0"}
    write_files(tmp_path, files)
    (tmp_path / "folder.txt").mkdir()
    flat, found = scan(opened(tmp_path / "*.txt"), 20)
    assert [piece.text for piece in flat.pieces()] == ["a", "b"]
    assert found.dropped == {"binary": 1}
    deep, _ = scan(opened(tmp_path / "**/*.txt"), 20)
    assert [piece.text for piece in deep.pieces()] == ["a", "b", "d"]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    write_files(tmp_path, {"a[1].txt": "right", "a1.txt": "wrong"})
    assert [piece.text for piece in opened(tmp_path / "a[1].txt").pieces()] == ["right"]


def test_the_home_folder_may_be_a_tilde(tmp_path, monkeypatch):
    write_files(tmp_path, {"texts/a.txt": "a"})
    monkeypatch.setenv("HOME", str(tmp_path))
    assert names(opened("~/texts")) == ["a.txt"]


@pytest.mark.parametrize(
    "source",
    ["nowhere", "nowhere/*.txt", "stdlib2", "x" * 5000, "~nosuchuser/x"],
    ids=["file", "glob", "corpus", "too long a name", "no such user"],
)
def test_a_missing_source_is_an_error(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"no such file, folder or pattern.* stdlib and pydoc"):
        opened(source)


@pytest.mark.parametrize("files", [{}, {".hidden": "text"}, {"a.txt": "", "b.txt": ""}])
def test_a_corpus_without_text_is_an_error(tmp_path, files):
    with pytest.raises(DataError, match=r"no text to read$"):
        scan(opened(write_files(tmp_path, files)), 20)


def test_a_corpus_of_binaries_says_what_was_left_out(tmp_path):
    write_files(tmp_path, {"a.png": b"\0", "b.png": b"\0", "c.txt": b"\xff"})
    with pytest.raises(DataError, match=r"left out: 2 binary, 1 not UTF-8"):
        scan(opened(tmp_path), 20)


def test_scan_counts_rows_as_documents(tmp_path):
    rows = [f"text {i}" for i in range(200)]
    write_files(tmp_path, {"rows.jsonl": "".join(f"{json.dumps({'text': r})}\n" for r in rows)})
    _, found = scan(opened(tmp_path / "rows.jsonl"), 7)
    assert (found.documents, found.bytes) == (200, len("".join(rows)))
    expected = sum(sha256_modulo(f"rows.jsonl:{i}", 7) == 0 for i in range(1, 201))
    assert found.held_out == expected > 0


FILES = {"a.txt": "first text\n", "b.txt": "second\n", "sub/c.txt": "third"}


def test_the_digest_is_of_names_and_text_alone(tmp_path, monkeypatch):
    """Not of place, time, files left out, or the size of the blocks it is read in."""
    first = scan(opened(write_files(tmp_path / "one", FILES)), 20)[1].digest
    other = write_files(tmp_path / "two", FILES | {"x.png": b"\0", ".hidden": "h"})
    os.utime(other / "a.txt", (1, 1))
    assert scan(opened(other), 7)[1].digest == first
    monkeypatch.setattr(documents, "PIECE", 3)
    assert scan(opened(other), 20)[1].digest == first


@pytest.mark.parametrize(
    "changed",
    [
        FILES | {"b.txt": "sEcond\n"},
        FILES | {"d.txt": ""},
        {"a.txt": FILES["a.txt"], "b2.txt": FILES["b.txt"], "sub/c.txt": FILES["sub/c.txt"]},
        FILES | {"a.txt": FILES["b.txt"], "b.txt": FILES["a.txt"]},
        FILES | {"a.txt": "first text\nsec", "b.txt": "ond\n"},
        {"a.txt": FILES["a.txt"], "b.txt": FILES["b.txt"]},
    ],
    ids=["byte", "one more", "name", "swapped", "border moved", "one less"],
)
def test_the_digest_changes_with_the_text(tmp_path, changed):
    one = scan(opened(write_files(tmp_path / "one", FILES)), 20)[1].digest
    two = scan(opened(write_files(tmp_path / "two", changed)), 20)[1].digest
    assert one != two


class Unreadable(io.BytesIO):
    """A standard input that must not be read, or fails when it is."""

    def read(self, *_):
        raise OSError(errno.ENOSPC, "No space left on device")


class Terminal(io.BytesIO):
    """A standard input at which a person sits."""

    def isatty(self):
        return True


def test_spool_copies_standard_input_once(tmp_path):
    """A resumed run has no standard input any more; its copy stands in."""
    data = os.urandom(3 << 20)
    copy = spool(io.BytesIO(data), tmp_path / "stdin.txt")
    assert copy.read_bytes() == data
    for again in (Unreadable(), None, Terminal(), io.BytesIO(b"other")):
        assert spool(again, copy).read_bytes() == data
    assert [file.name for file in tmp_path.iterdir()] == ["stdin.txt"]


@pytest.mark.parametrize("stdin", [None, Terminal(b"text")])
def test_spool_wants_something_piped_in(tmp_path, stdin):
    with pytest.raises(DataError, match="nothing is piped in"):
        spool(stdin, tmp_path / "stdin.txt")
    assert not list(tmp_path.iterdir())


def test_spool_that_fails_leaves_nothing_behind(tmp_path):
    """Half a copy would be taken for the whole the next time."""
    with pytest.raises(ResourceError, match=r"stdin\.txt: cannot be written: No space left"):
        spool(Unreadable(), tmp_path / "stdin.txt")
    assert not list(tmp_path.iterdir())


def test_a_dash_is_the_copy_of_standard_input(tmp_path):
    copy = spool(io.BytesIO(b'{"text": "a"}\n{"text": "b"}\n'), tmp_path / "copy")
    corpus = open_corpus("-", DataConfig(), copy)
    assert {piece.document for piece in corpus.pieces()} == {"stdin"}
    assert "".join(piece.text for piece in corpus.pieces()) == copy.read_text()
    rows = open_corpus("-", DataConfig(format="jsonl"), copy)
    assert [piece.text for piece in rows.pieces()] == ["a", "b"]
