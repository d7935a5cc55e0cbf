"""Metadata of a GGUF file, whole and broken: what is read, and what is refused in one line."""

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer

from engine.errors import CheckpointError
from engine.interop.gguf import vocabulary
from engine.interop.gguf.tokenizer import tokenizer_from_gguf
from engine.interop.gguf.vocabulary import FAMILIES, PRES, merges_from_scores, read_vocabulary

GPT2 = {
    "general.architecture": "llama",
    "llama.context_length": 64,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["<s>", "a", "b", "ab", "[PAD4]", "[PAD5]"],
    "tokenizer.ggml.token_type": [3, 1, 1, 1, 5, 5],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 0,
}
LLAMA = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a", "b", "ab", "▁"],
    "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1],
    "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -2.0, -3.0, -1.0, -4.0],
}
T5 = LLAMA | {
    "tokenizer.ggml.model": "t5",
    "tokenizer.ggml.tokens": ["<pad>", "</s>", "<unk>", "a", "b", "ab", "▁"],
    "tokenizer.ggml.token_type": [3, 3, 2, 1, 1, 1, 1],
}
KEY = "tokenizer.ggml."


def test_arrays_may_be_lists_or_numpy():
    arrays = {
        key: np.array(value) if isinstance(value, list) else value for key, value in GPT2.items()
    }
    scalars = {key: np.uint32(v) if isinstance(v, int) else v for key, v in arrays.items()}
    assert read_vocabulary(scalars, "x") == read_vocabulary(GPT2, "x")
    numbers = LLAMA | {KEY + "scores": np.array(LLAMA[KEY + "scores"], np.float32)}
    assert tokenizer_from_gguf(numbers, "x") == tokenizer_from_gguf(LLAMA, "x")


def test_what_a_file_does_not_say_is_what_llama_cpp_takes():
    llama = read_vocabulary(LLAMA, "x")
    assert llama.roles == {"bos_token": 1, "eos_token": 2, "unk_token": 0}
    assert llama.flags["add_bos_token"]
    assert llama.flags["add_space_prefix"]
    t5 = read_vocabulary(T5, "x")
    assert t5.roles == {"eos_token": 1, "unk_token": 2, "pad_token": 0}
    assert (t5.flags["add_bos_token"], t5.flags["add_eos_token"]) == (False, True)
    bare = {k: v for k, v in GPT2.items() if not k.endswith((".pre", "_type", "_id"))}
    assert read_vocabulary(bare, "x").pre == PRES["default"]
    assert read_vocabulary(bare, "x").roles == {}
    assert read_vocabulary(GPT2 | {KEY + "pre": "llama-bpe"}, "x").flags["add_bos_token"]


def test_rows_that_only_pad_the_embedding_are_no_tokens():
    assert read_vocabulary(GPT2, "x").tokens == ["<s>", "a", "b", "ab"]
    named = GPT2 | {KEY + "eos_token_id": 4}
    assert read_vocabulary(named, "x").tokens[-1] == "[PAD4]"
    normal = GPT2 | {KEY + "token_type": [3, 1, 1, 1, 5, 1]}
    assert len(read_vocabulary(normal, "x").tokens) == 6


def test_an_ordinary_token_named_as_padding_stays_ordinary():
    odd = GPT2 | {KEY + "padding_token_id": 1, KEY + "unknown_token_id": 2}
    assert read_vocabulary(odd, "x").roles == {"bos_token": 0}
    own = FastTokenizer.from_str(tokenizer_from_gguf(odd, "x")[0])
    assert own.encode("aab").tokens == ["a", "ab"]


def test_merges_come_best_first_and_every_way():
    tokens = ["a", "b", "c", "ab", "bc", "abc", "</s>", "s>"]
    scores = [-9.0, -9.0, -9.0, -1.0, -3.0, -2.0, 0.0, 0.0]
    want = [("a", "b"), ("ab", "c"), ("a", "bc"), ("b", "c")]
    assert merges_from_scores(tokens, scores, [1] * 6 + [3, 1]) == want


def test_names_are_unique():
    names = [name for row, _ in FAMILIES for name in row.split()]
    assert len(names) == len(set(names)) == len(PRES)


BROKEN: list[tuple[dict, dict, str]] = [
    (GPT2, {"model": None}, "tokenizer.ggml.model is missing"),
    (GPT2, {"model": "bert"}, "kind 'bert' is not supported; only gpt2, llama, t5 are"),
    (GPT2, {"model": 3}, "tokenizer.ggml.model should be str, not int"),
    (GPT2, {"pre": "kimi-k2"}, "pre-tokenizer 'kimi-k2' is not supported; only a.x-4.0, "),
    (GPT2, {"tokens": None}, "tokens has 0 entries"),
    (GPT2, {"tokens": 7}, "tokens should be an array, not int"),
    (GPT2, {"tokens": "abc"}, "tokens should be an array, not str"),
    (GPT2, {"tokens": np.zeros((2, 2))}, "tokens should be an array, not ndarray"),
    (GPT2, {"tokens": [1, 2]}, "tokens should not hold int"),
    (GPT2, {"tokens": ["a", "b", "a", "ab", "x", "y"]}, "token 2 'a' is there twice"),
    (GPT2, {"tokens": ["<s>", "a", "b", "ab", "x", "\udc80"]}, "tokens is not UTF-8"),
    (GPT2, {"tokens": ["<s>", "a", "b", "ab", "x", "y" * 2000]}, "absurdly long: up to 2000"),
    (GPT2, {"token_type": [1]}, "token_type has 1 entries for 6 tokens"),
    (GPT2, {"token_type": ["1"] * 6}, "token_type should not hold str"),
    (GPT2, {"token_type": [True] * 6}, "token_type should not hold bool"),
    (GPT2, {"merges": None}, "tokenizer.ggml.merges is missing"),
    (GPT2, {"merges": ["ab"]}, "merge 'ab' does not join two tokens into a third"),
    (GPT2, {"merges": ["a c"]}, "merge 'a c' does not join"),
    (GPT2, {"merges": ["b a"]}, "merge 'b a' does not join"),
    (GPT2, {"bos_token_id": 6}, "bos_token_id 6 is outside 0 … 5"),
    (GPT2, {"eos_token_id": -1}, "eos_token_id -1 is outside 0 … 5"),
    (GPT2, {"eot_token_id": 2**32 - 1}, "eot_token_id 4294967295 is outside"),
    (GPT2, {"eos_token_id": True}, "eos_token_id should be int, not bool"),
    (GPT2, {"add_bos_token": 1}, "add_bos_token should be bool, not int"),
    (GPT2, {"add_eos_token": True}, "should get a eos token, but eos_token_id is missing"),
    (LLAMA, {"scores": None}, "tokenizer.ggml.scores is missing"),
    (LLAMA, {"scores": [0.0] * 6}, "scores has 6 entries for 7 tokens"),
    (LLAMA, {"scores": [0.0] * 6 + [float("nan")]}, "not a finite number"),
    (LLAMA, {"scores": [0] * 6 + [10**400]}, "not a finite number"),
    (LLAMA, {"token_type": [1] * 7}, "no token for characters outside the vocabulary"),
    (T5, {"precompiled_charsmap": [256]}, "does not hold bytes"),
    (T5, {"precompiled_charsmap": [1, 2]}, "is cut short"),
    (T5, {"precompiled_charsmap": list(b"\4\0\0\0\0\0\0\0a\0")}, "points outside itself"),
]


@pytest.mark.parametrize(("metadata", "change", "said"), BROKEN)
def test_broken_metadata_is_refused_in_one_line(metadata, change, said):
    broken = metadata | {KEY + name: value for name, value in change.items()}
    broken = {key: value for key, value in broken.items() if value is not None}
    with pytest.raises(CheckpointError) as caught:
        tokenizer_from_gguf(broken, "m.gguf")
    assert str(caught.value).startswith("m.gguf: ")
    assert said in str(caught.value)
    assert "; " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_absurd_sizes_are_refused(monkeypatch):
    monkeypatch.setattr(vocabulary, "MAX_TOKENS", 5)
    with pytest.raises(CheckpointError, match="6 entries, not 1 … 5"):
        read_vocabulary(GPT2, "x")
    monkeypatch.undo()
    monkeypatch.setattr(vocabulary, "MAX_CHARACTERS", 9)
    with pytest.raises(CheckpointError, match="together"):
        read_vocabulary(GPT2, "x")


def charsmap(unit: int, strings: bytes = b"x\0") -> list[int]:
    """A double array whose every `a` becomes the first string; `unit` is the node of `a`."""
    units = [0] * 256
    units[0] = 0  # the root: its children are at 0 ^ byte
    units[ord("a")] = unit
    return list(struct.pack("<I256I", 1024, *units) + strings)


def test_a_charsmap_replaces_and_a_hostile_one_is_refused():
    leaf = ord("a") | 1 << 8 | 3 << 10  # its value is at ord("a") ^ 3
    units = bytearray(charsmap(leaf))
    struct.pack_into("<I", units, 4 + 4 * (ord("a") ^ 3), 1 << 31)
    good = T5 | {KEY + "precompiled_charsmap": list(units), KEY + "add_space_prefix": True}
    text, _ = tokenizer_from_gguf(good, "x")
    inner = FastTokenizer.from_str(text)
    assert inner.normalizer.normalize_str("bab") == "bxb"
    signed = good | {KEY + "precompiled_charsmap": np.frombuffer(bytes(units), np.int8)}
    assert tokenizer_from_gguf(signed, "x")[0] == text
    struct.pack_into("<I", units, 4 + 4 * (ord("a") ^ 3), 1 << 31 | 9)  # beyond the strings
    for bad in (list(units), charsmap(1000 << 10), charsmap(leaf, b"\xff\0")):
        with pytest.raises(CheckpointError, match="points outside itself"):
            read_vocabulary(T5 | {KEY + "precompiled_charsmap": bad}, "x")


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.text(max_size=2), max_size=8),
    st.lists(st.integers(-1, 7), max_size=8),
    st.lists(st.floats(), max_size=8),
    st.lists(st.sampled_from(["a b", "a  b", " a", "b a", "ab ab", "a"]), max_size=3),
)


@given(
    metadata=st.sampled_from([GPT2, LLAMA, T5]),
    changes=st.dictionaries(
        st.sampled_from(
            [
                *["model", "pre", "tokens", "token_type", "scores", "merges", "bos_token_id"],
                *["eos_token_id", "eot_token_id", "unknown_token_id", "padding_token_id"],
                *["add_bos_token", "add_eos_token", "add_space_prefix"],
                *["remove_extra_whitespaces", "precompiled_charsmap"],
            ]
        ),
        ANYTHING,
        max_size=3,
    ),
)
def test_any_metadata_loads_or_is_refused(metadata: dict[str, Any], changes: dict[str, Any]):
    try:
        text, _ = tokenizer_from_gguf(metadata | {KEY + k: v for k, v in changes.items()}, "x")
    except CheckpointError:
        return
    inner = FastTokenizer.from_str(text)
    inner.decode(inner.encode("ab <s> é\0").ids)
