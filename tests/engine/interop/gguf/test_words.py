"""What GGUF has no word for: a tokenizer is refused by name, never written as something near it."""

import json

import pytest
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors

from engine.config import TokenizerConfig
from engine.errors import CheckpointError
from engine.interop.gguf.tokenizer import tokenizer_from_gguf, tokenizer_to_gguf
from engine.text.tokenizer import learn
from tests.engine.interop.gguf.test_tokenizer import CORPUS, byte_level, sentencepiece


@pytest.mark.parametrize("split", ["line", "none"])
def test_a_split_without_a_name_is_refused(split):
    own = learn(CORPUS[:1], TokenizerConfig(vocab_size=400, split=split))
    with pytest.raises(CheckpointError, match="which GGUF has no word for; keep the model"):
        tokenizer_to_gguf(json.loads(own.to_json()), {}, 400, None)


def test_merges_that_scores_cannot_say_are_refused():
    """BPE learned merge by merge knows one way to make each token; SentencePiece takes any."""
    metadata, _ = sentencepiece(False)
    text, settings = tokenizer_from_gguf(metadata, "x.gguf")
    count = len(metadata["tokenizer.ggml.tokens"])
    fewer = json.loads(text)
    made = {}
    for left, right in fewer["model"]["merges"]:
        made.setdefault(left + right, [left, right])
    assert len(made) < len(fewer["model"]["merges"])
    fewer["model"]["merges"] = list(made.values())
    mixed = json.loads(text)
    mixed["model"]["merges"].sort()
    for spec in (fewer, mixed):
        with pytest.raises(CheckpointError, match="all the ways"):
            tokenizer_to_gguf(spec, settings, count, None)


def test_a_tokenizer_too_large_for_its_model_is_refused():
    spec = json.loads(byte_level("gpt-2").to_str())
    with pytest.raises(CheckpointError, match="1500 tokens for an embedding of 1499 rows"):
        tokenizer_to_gguf(spec, {}, 1499, None)
    with pytest.raises(CheckpointError, match="bos_token 'nobody' is not in the vocabulary"):
        tokenizer_to_gguf(spec, {"bos_token": "nobody"}, 1500, None)
    with pytest.raises(CheckpointError, match="add_bos_token is set without bos_token"):
        tokenizer_to_gguf(spec, {"add_bos_token": True}, 1500, None)
    for odd in ([], 7, {"content": ["a"]}):
        with pytest.raises(CheckpointError, match="is not in the vocabulary"):
            tokenizer_to_gguf(spec, {"eos_token": odd}, 1500, None)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (lambda t: setattr(t, "normalizer", normalizers.Lowercase()), "Lowercase"),
        (lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(True)), "add_prefix_space"),
        (lambda t: setattr(t, "model", models.WordPiece({"a": 0}, unk_token="a")), "WordPiece"),
        (lambda t: setattr(t.model, "end_of_word_suffix", "</w>"), "end_of_word_suffix"),
        (lambda t: t.add_tokens([AddedToken("<x>", lstrip=True, normalized=False)]), "'<x>'"),
        (lambda t: setattr(t, "normalizer", normalizers.NFC()), "without ignore_merges, NFC"),
        (
            lambda t: setattr(
                t, "post_processor", processors.RobertaProcessing(("a", 5), ("b", 6))
            ),
            "RobertaProcessing",
        ),
        (
            lambda t: setattr(
                t,
                "post_processor",
                processors.TemplateProcessing("a $A", special_tokens=[("a", 5)]),
            ),
            "it puts a around a text, not its bos_token",
        ),
    ],
)
def test_what_gguf_cannot_say_is_refused_by_name(changed, named):
    inner = byte_level("smaug-bpe")
    changed(inner)
    with pytest.raises(CheckpointError) as caught:
        tokenizer_to_gguf(json.loads(inner.to_str()), {}, 1600, None)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_tokenizer_is_refused():
    for spec in ({}, {"model": 1}, {"version": "1.0", "model": {"type": "BPE"}}):
        with pytest.raises(CheckpointError, match="cannot be read"):
            tokenizer_to_gguf(spec, {}, 10, None)
