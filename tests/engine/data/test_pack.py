"""Packing: documents to token files, split, counted, cached and continued after an interruption."""

import contextlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer

from engine.config import DataConfig, TokenizerConfig
from engine.data import documents
from engine.data import pack as packing
from engine.data.corpora import Corpus, held_out, open_corpus, scan
from engine.data.pack import pack, sides
from engine.errors import DataError, ResourceError
from engine.text.tokenizer import SPECIAL_TOKENS, Tokenizer, learn
from tests.conftest import TEXT

DOCUMENTS = {
    f"part{i % 3}/{i:02}.txt": f"# {i}\nnaïve 日本 😀 <|endoftext|> {i * i}\n" * (i % 5)
    + f"end {i}"
    for i in range(60)
} | {"empty.txt": ""}


def in_memory(texts, one_in=20):
    return scan(Corpus(name="texts", texts=sorted(texts.items())), one_in)


def on_disk(folder, texts, one_in=20):
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return scan(open_corpus(str(folder), DataConfig()), one_in)


def drain(generator):
    """Run a packing to its end: the shards, and what it reported on the way."""
    reports = []
    while True:
        try:
            reports.append(next(generator))
        except StopIteration as end:
            return end.value, reports


def packed(*arguments):
    return drain(pack(*arguments))[0]


def decoded(shards, split, tokenizer):
    """The documents of one side, read back from its tokens."""
    tokens = shards.tokens(split).tolist()
    assert tokens[-1] == tokenizer.end_of_text
    texts, start = [], 0
    for position, token in enumerate(tokens):
        if token == tokenizer.end_of_text:
            texts.append(tokenizer.decode_bytes(tokens[start:position]))
            start = position + 1
    return texts


def contents(shards):
    return {side: (shards.folder / f"{side}.bin").read_bytes() for side in ("train", "valid")}


def test_tokens_decode_to_exactly_the_documents(tmp_path, tokenizer):
    """Each document once, on the side its name falls on, in order, an end-of-text after each."""
    corpus = on_disk(tmp_path / "texts", DOCUMENTS, 5)
    shards = packed(corpus, None, tokenizer, 5, tmp_path / "cache")
    expected = {"train": [], "valid": []}
    for name in sorted(DOCUMENTS):
        side = "valid" if held_out(name, 5) else "train"
        expected[side].append(DOCUMENTS[name].encode())
    assert min(map(len, expected.values())) > 5
    for side in expected:
        assert decoded(shards, side, tokenizer) == expected[side]
        split = getattr(shards, side)
        assert split.documents == len(expected[side])
        assert split.bytes == len(b"".join(expected[side]))
        assert split.tokens == len(shards.tokens(side)) > split.documents
    assert shards.rule == "documents whose name's sha256 is 0 modulo 5"
    assert not shards.cached


def test_a_document_in_many_pieces_ends_once(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 16)
    texts = {"a": "line é one\n" * 30, "b": "short", "c": "x" * 500}
    corpus, found = on_disk(tmp_path / "texts", texts)
    assert len(list(corpus.pieces())) > 10
    valid = in_memory({"v": "text"})
    shards = packed((corpus, found), valid, tokenizer, 20, tmp_path / "cache")
    assert decoded(shards, "train", tokenizer) == [text.encode() for text in texts.values()]
    assert (shards.train.documents, shards.train.bytes) == (3, found.bytes)


def test_validation_text_of_its_own_is_all_held_out(tmp_path, tokenizer):
    """Then nothing is held out of the training text, whatever its names hash to."""
    train = on_disk(tmp_path / "train", DOCUMENTS, 2)
    valid = on_disk(tmp_path / "valid", {"v1.txt": "one", "v2.txt": "two"}, 2)
    shards = packed(train, valid, tokenizer, 2, tmp_path / "cache")
    assert decoded(shards, "train", tokenizer) == [DOCUMENTS[n].encode() for n in sorted(DOCUMENTS)]
    assert decoded(shards, "valid", tokenizer) == [b"one", b"two"]
    assert shards.rule == f"all of {tmp_path / 'valid'}"


def tail_of(text, one_in):
    """The two sides of a corpus that is one document."""
    name = next(f"{i}.txt" for i in range(1000) if not held_out(f"{i}.txt", one_in))
    found = {"train": [], "valid": []}
    for side, piece in sides(in_memory({name: text}, one_in), None, one_in):
        found[side].append(piece)
    return found


def test_a_single_document_gives_up_its_tail(tmp_path, tokenizer):
    text = "".join(f"line {i} é\n" for i in range(1000))
    corpus = on_disk(tmp_path / "texts", {"only.txt": text})
    shards = packed(corpus, None, tokenizer, 20, tmp_path / "cache")
    (train,), (valid,) = (decoded(shards, side, tokenizer) for side in ("train", "valid"))
    assert train + valid == text.encode()
    assert train.endswith(b"\n")
    assert len(text.encode()) / 20 - 20 < len(valid) <= len(text.encode()) / 20
    assert (shards.train.bytes, shards.valid.bytes) == (len(train), len(valid))
    assert "last 1/20 of the text" in shards.rule


def test_a_single_document_is_cut_the_same_by_any_name(tmp_path, tokenizer):
    """Even if its name hashes to the held-out side: it must not be held out whole."""
    text = "a line\n" * 100
    name = next(f"{i}.txt" for i in range(1000) if held_out(f"{i}.txt", 20))
    shards = packed(in_memory({name: text}), None, tokenizer, 20, tmp_path)
    (train,), (valid,) = (decoded(shards, side, tokenizer) for side in ("train", "valid"))
    assert (train + valid).decode() == text and len(train) > 15 * len(valid)


@given(st.text(min_size=1), st.integers(2, 30))
def test_the_two_sides_of_a_cut_document_are_the_text(text, one_in):
    found = tail_of(text, one_in)
    both = [piece.text for side in ("train", "valid") for piece in found[side]]
    assert "".join(both) == text
    assert found["train"][-1].end
    assert not found["valid"] or found["valid"][-1].end


@pytest.mark.parametrize(
    "text, one_in",
    [
        ("short line\n" * 10 + "a long last line " * 10 + "\n", 20),
        ("one line " * 1000 + "\n", 20),
        ("😀" * 10, 30),
    ],
    ids=["long last line", "one line", "wide characters"],
)
def test_a_cut_document_leaves_text_on_both_sides(text, one_in):
    """A held-out side that is only an end-of-text token measures nothing; nor may it be most."""
    found = tail_of(text, one_in)
    sizes = {side: sum(len(piece.text) for piece in pieces) for side, pieces in found.items()}
    assert sizes["train"] > sizes["valid"] > 0


@pytest.mark.parametrize("size", [8, 16, 19, 32, 50, 1 << 20])
def test_a_cut_document_ends_once_on_each_side(tmp_path, tokenizer, monkeypatch, size):
    """With 8 bytes a piece the cut falls between two pieces: train must still end its document."""
    monkeypatch.setattr(documents, "PIECE", size)
    text = "1234567\n" * 100
    corpus = on_disk(tmp_path / "texts", {"only.txt": text})
    shards = packed(corpus, None, tokenizer, 20, tmp_path / "cache")
    (train,), (valid,) = (decoded(shards, side, tokenizer) for side in ("train", "valid"))
    assert (train + valid).decode() == text
    assert train.endswith(b"\n") and 40 - 8 <= len(valid) <= 40
    assert (shards.train.documents, shards.valid.documents) == (1, 1)


def test_a_few_documents_give_up_the_tail_of_the_last(tmp_path, tokenizer):
    texts = {f"d{i}": f"{i} line\n" * 40 for i in range(3)}
    one_in = next(n for n in range(10, 99) if not any(held_out(name, n) for name in texts))
    shards = packed(in_memory(texts, one_in), None, tokenizer, one_in, tmp_path)
    train, valid = (decoded(shards, side, tokenizer) for side in ("train", "valid"))
    assert train[:2] == [texts["d0"].encode(), texts["d1"].encode()]
    assert (train[2] + valid[0]).decode() == texts["d2"] and valid[0]


def test_too_little_text_to_hold_out_is_an_error_every_time(tmp_path, tokenizer):
    """Nothing half made may pass for finished the second time."""
    for _ in range(2):
        with pytest.raises(DataError, match=r"texts: no text left for the valid side \(the last"):
            packed(in_memory({"d": "tiny"}), None, tokenizer, 20, tmp_path)


def test_the_second_packing_is_the_first(tmp_path, tokenizer):
    corpus = on_disk(tmp_path / "texts", DOCUMENTS, 5)
    first, reports = drain(pack(corpus, None, tokenizer, 5, tmp_path / "cache"))
    assert reports
    times = {file: file.stat().st_mtime_ns for file in first.folder.iterdir()}
    second, reports = drain(pack(corpus, None, tokenizer, 5, tmp_path / "cache"))
    assert (first.cached, second.cached, reports) == (False, True, [])
    for name in ("folder", "digest", "dtype", "rule", "train", "valid"):
        assert getattr(first, name) == getattr(second, name)
    for side in ("train", "valid"):
        assert np.array_equal(first.tokens(side), second.tokens(side))
    assert {file: file.stat().st_mtime_ns for file in first.folder.iterdir()} == times
    assert {file.name for file in times} == {"train.bin", "valid.bin", "shards.json"}


def test_anything_that_changes_the_tokens_makes_shards_anew(tmp_path, tokenizer):
    corpus = in_memory(DOCUMENTS, 5)
    other_text = in_memory(DOCUMENTS | {"more.txt": "more"}, 5)
    other_tokenizer = learn([TEXT], TokenizerConfig(vocab_size=300))
    ways = [
        (corpus, None, tokenizer, 5),
        (other_text, None, tokenizer, 5),
        (corpus, other_text, tokenizer, 5),
        (corpus, in_memory({"v": "valid"}), tokenizer, 5),
        (corpus, None, other_tokenizer, 5),
        (in_memory(DOCUMENTS, 4), None, tokenizer, 4),
    ]
    made = [packed(*way, tmp_path) for way in ways]
    assert not any(shards.cached for shards in made)
    assert len({shards.folder for shards in made}) == len(ways)
    assert all(packed(*way, tmp_path).cached for way in ways)


def test_text_that_changed_after_the_scan_does_not_stay(tmp_path, tokenizer):
    """Packing may refuse it; kept under the scanned text's digest it would be stale for ever."""
    texts, valid = tmp_path / "texts", in_memory({"v": "valid"})
    scanned = on_disk(texts, {"a.txt": "as scanned\n" * 20})
    (texts / "a.txt").write_text("changed")
    with contextlib.suppress(DataError):
        packed(scanned, valid, tokenizer, 20, tmp_path / "cache")
    restored = on_disk(texts, {"a.txt": "as scanned\n" * 20})
    shards = packed(restored, valid, tokenizer, 20, tmp_path / "cache")
    assert decoded(shards, "train", tokenizer) == [b"as scanned\n" * 20]


def test_progress_counts_every_byte(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(packing, "BATCH_BYTES", 300)
    corpus, found = in_memory(DOCUMENTS, 5)
    _, reports = drain(pack((corpus, found), None, tokenizer, 5, tmp_path))
    done = [report.done for report in reports]
    assert len(done) > 4 and done == sorted(done) and done[-1] == found.bytes
    assert {report.total for report in reports} == {found.bytes}
    valid = in_memory({"v": "valid"})
    _, reports = drain(pack((corpus, found), valid, tokenizer, 5, tmp_path))
    assert reports[-1].done == reports[-1].total == found.bytes + 5


@pytest.mark.parametrize("torn", [False, True], ids=["between batches", "inside a batch"])
def test_interrupted_packing_goes_on_where_it_was(tmp_path, tokenizer, monkeypatch, torn):
    """After any batch, even with half of the next one on disk already, as a power cut leaves it."""
    monkeypatch.setattr(packing, "BATCH_BYTES", 400)
    monkeypatch.setattr(documents, "PIECE", 50)
    corpus = on_disk(tmp_path / "texts", DOCUMENTS, 5)
    whole, reports = drain(pack(corpus, None, tokenizer, 5, tmp_path / "whole"))
    assert len(reports) > 5
    for stop in range(1, len(reports)):
        cache = tmp_path / f"stopped{stop}"
        interrupted = pack(corpus, None, tokenizer, 5, cache)
        assert [next(interrupted) for _ in range(stop)] == reports[:stop]
        interrupted.close()
        (folder,) = (path for path in cache.iterdir() if path.is_dir())
        assert not (folder / "shards.json").exists()
        if torn:
            for side in ("train", "valid"):
                with (folder / f"{side}.bin").open("ab") as file:
                    file.write(b"torn!")
        shards, rest = drain(pack(corpus, None, tokenizer, 5, cache))
        assert rest == reports[stop:]
        assert contents(shards) == contents(whole)
        assert (shards.train, shards.valid) == (whole.train, whole.valid)


def test_token_files_are_as_narrow_as_the_vocabulary_allows(tmp_path, tokenizer):
    corpus = in_memory(DOCUMENTS, 5)
    narrow = packed(corpus, None, tokenizer, 5, tmp_path)
    assert narrow.dtype == "uint16" and narrow.tokens("train").dtype == np.uint16
    assert len(contents(narrow)["train"]) == 2 * narrow.train.tokens


@pytest.mark.parametrize("size, dtype", [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_the_highest_token_id_survives(tmp_path, size, dtype):
    """A real tokenizer padded with tokens that nothing merges into; "ab" becomes the last id."""
    definition = json.loads(learn(["x"], TokenizerConfig(vocab_size=260)).to_json())
    model = definition["model"]
    letters = [token for token in model["vocab"] if token not in SPECIAL_TOKENS and len(token) == 1]
    padding = (a + b + "~" for a in letters for b in letters)
    tokens = [*SPECIAL_TOKENS, *letters]
    tokens += [next(padding) for _ in range(size - len(tokens) - 1)] + ["ab"]
    model["vocab"] = {token: i for i, token in enumerate(tokens)}
    model["merges"] = [["a", "b"]]
    tokenizer = Tokenizer(FastTokenizer.from_str(json.dumps(definition)))
    assert tokenizer.vocab_size == size and tokenizer.encode("ab") == [size - 1]
    shards = packed(in_memory({"t": "abc"}), in_memory({"v": "ab"}), tokenizer, 20, tmp_path)
    assert shards.dtype == dtype
    assert shards.tokens("valid").tolist() == [size - 1, tokenizer.end_of_text]
    assert decoded(shards, "train", tokenizer) == [b"abc"]


def test_a_row_with_a_lone_surrogate_is_packed(tmp_path, tokenizer):
    """JSON can spell one ("\\ud800"); scanned rows must not fail later, as tokens."""
    (tmp_path / "rows.jsonl").write_text('{"text": "a \\ud800 b"}\n{"text": "plain"}\n')
    corpus = scan(open_corpus(str(tmp_path / "rows.jsonl"), DataConfig()), 20)
    shards = packed(corpus, in_memory({"v": "valid"}), tokenizer, 20, tmp_path / "cache")
    assert decoded(shards, "train", tokenizer) == [b"a \xed\xa0\x80 b", b"plain"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path, tokenizer):
    (tmp_path / "cache").touch()
    with pytest.raises(ResourceError, match=r"cache.*: cannot write token shards: .*--cache"):
        packed(in_memory(DOCUMENTS, 5), None, tokenizer, 5, tmp_path / "cache")
