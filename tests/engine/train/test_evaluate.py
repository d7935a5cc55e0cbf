"""Bits per byte: every byte once, whatever the windows."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from engine.train.evaluate import documents, score, score_documents, windows
from tests.conftest import TEXT, make_model


@given(st.integers(1, 200), st.integers(1, 40), st.data())
def test_windows_score_every_position_once_with_enough_before_it(length, context, data):
    stride = data.draw(st.integers(1, context))
    covered = []
    for start, first, end in windows(length, context, stride):
        assert 0 <= start <= first < end <= length and end - start <= context
        if start:
            assert first - start >= context - stride
        covered += range(first, end)
    assert covered == list(range(length))


def test_documents_are_cut_at_their_ends():
    tokens = np.array([5, 6, 0, 0, 7, 0, 8], dtype=np.uint16)
    assert [list(part) for part in documents(tokens, 0)] == [[5, 6], [7], [8]]


def by_hand(model, tokenizer, texts: list[str]) -> float:
    """Sum the surprise of each document token by token, with all of its past as context."""
    nats = 0.0
    for text in texts:
        ids = [tokenizer.end_of_text, *tokenizer.encode(text)]
        with torch.inference_mode():
            logits = model(torch.tensor([ids[:-1]]))[0]
        nats += F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()
    return nats


def stream(tokenizer, texts: list[str]) -> np.ndarray:
    ids = [i for text in texts for i in [*tokenizer.encode(text), tokenizer.end_of_text]]
    return np.array(ids, dtype=np.uint16)


def test_score_equals_the_sum_by_hand(tokenizer):
    model, texts = make_model(), ["def f(x):\n    return x\n", "import os", "é ü 你好"]
    found = score(model, tokenizer, stream(tokenizer, texts), context=64, stride=64)
    size = sum(len(text.encode()) for text in texts)
    assert found.bytes == size
    assert found.tokens == sum(len(tokenizer.encode(text)) for text in texts)
    assert found.nats == pytest.approx(by_hand(model, tokenizer, texts), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(found.nats / math.log(2) / size)


def test_stride_one_sees_a_full_window_before_every_token(tokenizer):
    """The costliest setting, checked against one forward pass per token."""
    model, text, context = make_model(), TEXT[:120], 8
    found = score(model, tokenizer, stream(tokenizer, [text]), context=context, stride=1)
    ids = [tokenizer.end_of_text, *tokenizer.encode(text)]
    nats = 0.0
    for position in range(1, len(ids)):
        before = ids[max(0, position - context) : position]
        with torch.inference_mode():
            logits = model(torch.tensor([before]))[0, -1]
        nats -= logits.log_softmax(-1)[ids[position]].item()
    assert found.nats == pytest.approx(nats, rel=1e-5)


def test_max_bytes_takes_a_prefix_and_counts_it(tokenizer):
    texts = [TEXT[:200], TEXT[200:400]]
    tokens = stream(tokenizer, texts)
    part = score(make_model(), tokenizer, tokens, context=32, stride=32, max_bytes=250)
    whole = score(make_model(), tokenizer, tokens, context=32, stride=32)
    assert 240 <= part.bytes <= 250 < whole.bytes


def test_a_share_looks_at_every_document(tokenizer):
    texts = [TEXT[:2000], TEXT[2000:3000]]
    tokens = stream(tokenizer, texts)
    part = score(make_model(), tokenizer, tokens, context=64, stride=64, share=0.5)
    lengths = [math.ceil(len(tokenizer.encode(text)) / 2) for text in texts]
    assert part.tokens == sum(lengths)
    # Less than 64 tokens of a document say nothing: a tiny share takes these.
    assert score(make_model(), tokenizer, tokens, context=64, stride=64, share=1e-9).tokens == 128


def test_a_uniform_model_costs_log2_v_per_token(tokenizer):
    model = make_model()
    model.lm_head.weight.data.zero_()
    found = score(model, tokenizer, stream(tokenizer, [TEXT[:300]]), context=32, stride=32)
    expected = found.tokens * math.log2(400) / found.bytes
    assert found.bits_per_byte == pytest.approx(expected, rel=1e-5)


def test_each_document_gets_its_own_surprise(tokenizer):
    """Whatever windows share a batch, no nat of one document is booked on another."""
    model, texts = (
        make_model(),
        ["def f(x):\n    return x\n", TEXT[:400], "é ü 你好", TEXT[900:1000]],
    )
    chosen = [np.array(tokenizer.encode(text)) for text in texts]
    found = score_documents(model, tokenizer, chosen, context=128, stride=128)
    assert [one.bytes for one in found] == [len(text.encode()) for text in texts]
    assert [one.tokens for one in found] == [len(ids) for ids in chosen]
    for one, text, ids in zip(found, texts, chosen, strict=True):
        if len(ids) <= 128:  # one window
            assert one.nats == pytest.approx(by_hand(model, tokenizer, [text]), rel=1e-5)
    whole = score(model, tokenizer, stream(tokenizer, texts), context=128, stride=128)
    assert math.fsum(one.nats for one in found) == pytest.approx(whole.nats, rel=1e-12)
