"""Generation equals running the model again and again, and its text is exactly that of its ids."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.config import SampleConfig
from engine.errors import DataError, LimitError
from engine.generate.decode import Prefilled, fit_prompt, generate, prefill
from engine.generate.reference import TorchDecoder
from engine.generate.sampler import penalize
from engine.generate.writer import Token
from engine.model.transformer import Transformer
from engine.text.tokenizer import Tokenizer
from tests.conftest import make_model

PROMPT = [5, 17, 300, 42, 42, 7]
GREEDY = SampleConfig(temperature=0, max_tokens=20)
HOT = SampleConfig(temperature=1.5, max_tokens=25)


def read(model, prompt: list[int], capacity: int, rows: int = 1) -> tuple[TorchDecoder, Prefilled]:
    decoder = TorchDecoder(model)
    return decoder, prefill(decoder, prompt, decoder.cache(capacity, rows))


def run(model, tokenizer, config, prompt=PROMPT, seed=0, **options) -> list[Token]:
    decoder, start = read(model, prompt, len(prompt) + config.max_tokens)
    return list(generate(decoder, tokenizer, start, config, seed=seed, **options))


def ids_of(tokens: list[Token]) -> list[int]:
    return [token.id for token in tokens]


def text_of(tokens: list[Token]) -> str:
    return "".join(token.text for token in tokens)


def uncached(model: Transformer, ids: list[int]) -> torch.Tensor:
    """The logits of what follows, from the whole sequence at once."""
    with torch.no_grad():
        return model(torch.tensor([ids]))[0, -1]


def naive_greedy(model: Transformer, end: int, count: int, penalty: float = 1.0) -> list[int]:
    """What follows PROMPT, one argmax at a time, up to the token `end`."""
    ids = list(PROMPT)
    while len(ids) < len(PROMPT) + count and ids[-1] != end:
        ids.append(int(penalize(uncached(model, ids).numpy(), ids, penalty).argmax()))
    return ids[len(PROMPT) :]


def reciting(tokenizer: Tokenizer, data: bytes, end: bool) -> tuple[Transformer, list[int]]:
    """A model that says `data`, bytes all different, after the prompt `!`; then perhaps ends.

    Its embedding is one-hot, its blocks add nothing, and its head is the table of what comes next.
    """
    ids = [tokenizer.byte_ids[byte] for byte in b"!" + data]
    ids += [tokenizer.end_of_text] if end else []
    assert len(set(ids)) == len(ids)
    model = make_model(d_model=400, n_layers=1, d_ff=32)
    with torch.no_grad():
        model.embed_tokens.weight.copy_(torch.eye(400))
        model.norm.weight.fill_(1)
        model.blocks[0].attention.o_proj.weight.zero_()
        model.blocks[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for now, following in itertools.pairwise(ids):
            model.lm_head.weight[following, now] = 10
    return model, ids[:1]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": 2, "tie_embeddings": True},
        {"sliding_window": 4},
        {"sliding_window": 6, "full_every": 2},
        {"position": "learned", "norm": "layernorm"},
        {"position": "none", "logit_softcap": 5.0},
    ],
    ids=str,
)
def test_greedy_equals_argmax_without_a_cache(changes, tokenizer):
    lengths = []
    for seed in range(4):
        model = make_model(seed, **changes)
        expected = naive_greedy(model, tokenizer.end_of_text, GREEDY.max_tokens)
        assert ids_of(run(model, tokenizer, GREEDY)) == expected
        lengths.append(len(expected))
    assert max(lengths) == GREEDY.max_tokens


def test_repetition_penalty_counts_prompt_and_answer(tokenizer):
    model = make_model()
    config = SampleConfig(temperature=0, max_tokens=20, repetition_penalty=1.7)
    expected = naive_greedy(model, tokenizer.end_of_text, 20, penalty=1.7)
    assert expected != naive_greedy(model, tokenizer.end_of_text, 20)
    assert ids_of(run(model, tokenizer, config)) == expected


@pytest.mark.parametrize("count", [1, 2, 8, 9])
def test_max_tokens_is_exact(count, tokenizer):
    """Also where the end-of-text token would have come next, and where it just fits."""
    model, prompt = reciting(tokenizer, b"abcdefgh", end=True)
    tokens = run(model, tokenizer, SampleConfig(temperature=0, max_tokens=count), prompt)
    assert len(tokens) == count
    last = "end" if count == 9 else "length"
    assert [token.finish_reason for token in tokens] == [None] * (count - 1) + [last]


def test_no_tokens_asked_none_given(tokenizer):
    assert run(make_model(), tokenizer, SampleConfig(max_tokens=0)) == []


def test_an_empty_prompt_is_refused():
    with pytest.raises(DataError, match="empty"):
        read(make_model(), [], 10)


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 4}, {"position": "learned"}], ids=str)
def test_the_context_can_be_filled_to_its_last_token(changes, tokenizer):
    model, count = make_model(1, max_seq_len=16, **changes), 16 - len(PROMPT)
    tokens = run(model, tokenizer, SampleConfig(temperature=0, max_tokens=count))
    assert len(tokens) == count
    assert ids_of(tokens) == naive_greedy(model, tokenizer.end_of_text, count)


def test_the_same_seed_says_the_same_and_others_do_not(tokenizer):
    """Whatever the global generator does."""
    model = make_model()
    np.random.seed(1)
    first = ids_of(run(model, tokenizer, HOT, seed=3))
    np.random.seed(2)
    assert ids_of(run(model, tokenizer, HOT, seed=3)) == first
    others = [ids_of(run(model, tokenizer, HOT, seed=seed)) for seed in range(4, 9)]
    assert all(other != first for other in others)


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 4}], ids=str)
def test_many_continuations_start_from_one_prompt(changes, tokenizer):
    """Also interleaved, and after one that was given up half-way."""
    model = make_model(**changes)
    decoder, start = read(model, PROMPT, 64, rows=4)
    expected = [ids_of(run(model, tokenizer, HOT, seed=seed)) for seed in (0, 1)]
    given_up = generate(decoder, tokenizer, start.copied(1), HOT, seed=9)
    next(given_up), next(given_up)
    given_up.close()
    streams = [
        generate(decoder, tokenizer, start.copied(row), HOT, seed=seed)
        for row, seed in ((1, 0), (2, 1), (3, 0))
    ]
    together = list(zip(*streams, strict=False))
    for stream, wanted in zip(zip(*together, strict=True), [*expected, expected[0]], strict=True):
        assert ids_of(stream) == wanted[: len(stream)]
    assert len(together) > 5
    assert start.cache.lengths[0] == len(PROMPT)
    assert start.prompt == PROMPT


def test_a_single_continuation_is_written_where_the_prompt_is(tokenizer):
    """Nothing is copied: the row holds the prompt and all tokens but the last."""
    decoder, start = read(make_model(), PROMPT, 64)
    made = ids_of(list(generate(decoder, tokenizer, start, HOT, seed=1)))
    assert start.cache.lengths == [len(PROMPT) + len(made) - 1]
    again = prefill(decoder, [*PROMPT, *made], start.cache)
    expected = uncached(decoder.model, [*PROMPT, *made]).numpy()
    np.testing.assert_allclose(again.logits_V, expected, atol=1e-4)


def test_a_prompt_of_which_a_row_holds_the_beginning_is_read_on(tokenizer):
    decoder, start = read(make_model(), PROMPT[:3], 64, rows=2)
    fed, forward = [], decoder.forward
    decoder.forward = lambda cache, runs: fed.extend(runs) or forward(cache, runs)
    on = prefill(decoder, PROMPT, start.cache)
    assert [list(run.tokens) for run in fed] == [PROMPT[3:]]
    np.testing.assert_allclose(on.logits_V, read(make_model(), PROMPT, 64)[1].logits_V, atol=1e-5)
    with pytest.raises(ValueError, match="6 of 6"):
        prefill(decoder, PROMPT, start.cache)


def test_prefill_scores_what_comes_next():
    model = make_model()
    _, start = read(model, PROMPT, 32)
    assert (start.cache.lengths, start.cache.capacity) == ([len(PROMPT)], 32)
    expected = uncached(model, PROMPT).numpy()
    np.testing.assert_allclose(start.logits_V, expected, atol=1e-5, rtol=1e-5)


def test_logprobs_are_the_models_own(tokenizer):
    """Log-softmax of the uncached logits, whatever temperature, filter and penalty chose by."""
    model = make_model()
    config = SampleConfig(temperature=1.5, top_k=50, repetition_penalty=1.5, max_tokens=12)
    ids = list(PROMPT)
    for token in run(model, tokenizer, config, logprobs=4):
        log_probs = uncached(model, ids).log_softmax(-1)
        assert token.logprob == pytest.approx(log_probs[token.id].item(), abs=1e-4)
        best = log_probs.topk(4)
        assert [one for one, _ in token.top] == best.indices.tolist()
        assert [value for _, value in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert math.fsum(math.exp(value) for _, value in token.top) <= 1
        ids.append(token.id)


def test_logprobs_only_if_asked(tokenizer):
    model = make_model()
    without = run(model, tokenizer, GREEDY)
    zero = run(model, tokenizer, GREEDY, logprobs=0)
    every = run(model, tokenizer, GREEDY, logprobs=1000)
    assert ids_of(without) == ids_of(zero) == ids_of(every)
    assert all(token.logprob is None and token.top == [] for token in without)
    assert all(token.logprob is not None and token.top == [] for token in zero)
    assert all(len(token.top) == 400 for token in every)
    assert all(math.isclose(sum(math.exp(v) for _, v in t.top), 1, abs_tol=1e-4) for t in every)


def test_text_is_that_of_the_ids(tokenizer):
    """A random model speaks mostly broken UTF-8, so pieces of characters are everywhere."""
    model, ended = make_model(), 0
    for seed in range(12):
        tokens = run(model, tokenizer, SampleConfig(temperature=2.0, max_tokens=40), seed=seed)
        ids = ids_of(tokens)
        assert tokenizer.end_of_text not in ids[:-1]
        if tokens[-1].finish_reason == "end":
            assert ids.pop() == tokenizer.end_of_text
            ended += 1
        assert text_of(tokens) == tokenizer.decode(ids)
    assert ended < 12


def test_ending_by_itself(tokenizer):
    """The end-of-text token is reported but has no text."""
    model, prompt = reciting(tokenizer, b"abcde", end=True)
    tokens = run(model, tokenizer, GREEDY, prompt)
    assert [token.text for token in tokens] == ["a", "b", "c", "d", "e", ""]
    assert [token.finish_reason for token in tokens] == [None] * 5 + ["end"]
    assert tokens[-1].id == tokenizer.end_of_text


@pytest.mark.parametrize(
    "stops, text, count, reason",
    [
        (["def"], "abc", 6, "stop"),  # across three tokens
        (["b"], "a", 2, "stop"),
        (["a"], "", 1, "stop"),
        (["xyz", "cd", "bcx"], "ab", 4, "stop"),
        (["bcx"], "abcdefgh", 9, "end"),  # a false alarm is released
        (["hx"], "abcdefgh", 9, "end"),  # also by the end
        (["gh"], "abcdef", 8, "stop"),
        (["!"], "abcdefgh", 9, "end"),  # the prompt is not searched
        (["<|endoftext|>"], "abcdefgh", 9, "end"),  # nor the name of a special token
    ],
    ids=str,
)
def test_stop_strings(stops, text, count, reason, tokenizer):
    """Nothing of a stop string is shown, and generation ends with the token that completes it."""
    model, prompt = reciting(tokenizer, b"abcdefgh", end=True)
    tokens = run(model, tokenizer, GREEDY, prompt, stops=stops)
    assert (text_of(tokens), len(tokens)) == (text, count)
    assert [token.finish_reason for token in tokens] == [None] * (count - 1) + [reason]


def test_the_last_token_brings_what_was_held_back(tokenizer):
    """Cut off by max_tokens inside a possible stop string, which then was none."""
    model, prompt = reciting(tokenizer, b"abcdefgh", end=True)
    config = SampleConfig(temperature=0, max_tokens=4)
    tokens = run(model, tokenizer, config, prompt, stops=["cdX"])
    assert [token.text for token in tokens] == ["a", "b", "", "cd"]
    assert tokens[-1].finish_reason == "length"


def test_a_character_is_never_split(tokenizer):
    """Four tokens make one emoji; cut off in its middle, it shows as U+FFFD, once."""
    model, prompt = reciting(tokenizer, "a😀b".encode(), end=True)
    tokens = run(model, tokenizer, GREEDY, prompt)
    assert [token.text for token in tokens] == ["a", "", "", "", "😀", "b", ""]
    config = SampleConfig(temperature=0, max_tokens=3)
    tokens = run(model, tokenizer, config, prompt)
    assert [token.text for token in tokens] == ["a", "", "\ufffd"]
    assert tokens[-1].finish_reason == "length"
    tokens = run(model, tokenizer, config, prompt, stops=["\ufffd"])
    assert text_of(tokens) == "a"
    assert tokens[-1].finish_reason == "stop"


def test_time_goes_forward(tokenizer):
    times = [token.time for token in run(make_model(), tokenizer, GREEDY)]
    assert all(a < b for a, b in itertools.pairwise(times))


def test_padding_of_the_vocabulary_is_never_said(tokenizer):
    """A model may have more rows than its tokenizer has tokens; those ids have no text."""
    model = make_model(vocab_size=448)
    for seed in range(5):
        tokens = run(model, tokenizer, HOT, seed=seed)
        assert max(ids_of(tokens)) < tokenizer.vocab_size


@pytest.mark.parametrize(
    "policy, expected",
    [
        ("left", [4, 5, 6, 7, 8]),
        ("right", [0, 1, 2, 3, 4]),
        ("middle", [0, 1, 6, 7, 8]),
    ],
)
def test_an_overflowing_prompt_is_cut_as_chosen(policy, expected):
    assert fit_prompt(list(range(9)), 3, 8, policy) == expected


def test_an_overflowing_prompt_is_an_error_unless_told():
    with pytest.raises(LimitError, match=r"9 tokens .* 3 > context 8"):
        fit_prompt(list(range(9)), 3, 8, "error")
    with pytest.raises(LimitError, match=r"1 token \+ --max-tokens 8 > context 8"):
        fit_prompt([0], 8, 8, "error")


@pytest.mark.parametrize("policy", ["left", "middle", "right"])
@pytest.mark.parametrize("max_tokens", [8, 9])
def test_an_answer_that_fills_the_context_is_an_error(policy, max_tokens):
    with pytest.raises(LimitError, match="no room"):
        fit_prompt([1, 2], max_tokens, 8, policy)


@given(
    length=st.integers(1, 20),
    max_tokens=st.integers(0, 12),
    context=st.integers(1, 20),
    policy=st.sampled_from(["error", "left", "middle", "right"]),
)
def test_a_fitted_prompt_fits_and_loses_nothing_needlessly(length, max_tokens, context, policy):
    prompt = list(range(length))
    try:
        fitted = fit_prompt(prompt, max_tokens, context, policy)
    except LimitError:
        assert length + max_tokens > context
        assert policy == "error" or max_tokens >= context
        return
    assert len(fitted) == min(length, context - max_tokens)
    assert fitted == sorted(set(fitted))
    assert policy != "error" or fitted == prompt
    assert policy not in ("right", "middle") or len(fitted) == 1 or fitted[0] == 0
    assert policy not in ("left", "middle") or fitted[-1] == length - 1
