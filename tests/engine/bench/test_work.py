"""The works do what the commands do, and cost no more for being watched."""

import time
from pathlib import Path
from statistics import median

import pytest
import torch

from engine.bench.cases import Case
from engine.bench.subject import from_recipe, random_ids
from engine.bench.work import batching, decoding, loading, prefilling, training
from engine.clock import Clock
from engine.config import SampleConfig
from engine.cost import parameters
from engine.generate.decode import generate, prefill
from engine.generate.decoder import Run
from tests.engine.bench.test_subject import CACHE, RECIPE


def case(what, **changes):
    return Case(**({"what": what, "model": "m", "dtype": "fp32", "threads": 1} | changes))


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_decoding_is_generate_itself(kernels, monkeypatch):
    """The same tokens as `lm generate` would make of this prompt, with its settings and seed."""
    from engine.bench import work

    made = []
    write = work._write
    monkeypatch.setattr(work, "_write", lambda s, c: write((made.append(t.id) or t for t in s), c))
    subject = from_recipe(RECIPE, CACHE)
    one = case("decode", depth=9, tokens=12, kernels=kernels)
    model = subject.loaded(one)
    doing = decoding(one, subject, model, Clock())
    assert doing.do().tokens == 11
    (ids,) = work.random_ids(subject, model[1], 1, 9)
    settings = SampleConfig(max_tokens=12)
    start = prefill(model[0], ids, model[0].cache(40))
    expected = generate(*model, start, settings, seed=0)
    assert made == [token.id for token in expected]


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_batch_is_its_rows_each_by_itself(kernels, cached, monkeypatch):
    """Every row gets the likeliest tokens that it would get alone, from one forward pass a step."""
    subject = from_recipe(RECIPE, CACHE)
    one = case("batch", depth=9, batch=3, tokens=6, kernels=kernels, cache=cached)
    loaded = decoder, tokenizer = subject.loaded(one)
    calls, forward = [], type(decoder).forward
    monkeypatch.setattr(
        type(decoder),
        "forward",
        lambda self, cache, runs: calls.append(runs) or forward(self, cache, runs),
    )
    assert batching(one, subject, loaded, Clock()).do().tokens == 3 * 5
    monkeypatch.undo()
    assert [[len(run.tokens) for run in runs] for runs in calls] == (
        [[9] * 3, *[[1] * 3] * 5] if cached else [[9 + step] * 3 for step in range(6)]
    )
    for row, ids in enumerate(random_ids(subject, tokenizer, 3, 9)):
        for runs in calls[1:]:
            logits = decoder.forward(decoder.cache(20), [Run(0, ids)])
            ids = [*ids, int(logits[0, : tokenizer.vocab_size].argmax())]
            assert ids[-1] == runs[row].tokens[-1]


def test_what_computes_is_named_and_costs_what_its_format_takes(library):
    """By hand: a row of 32 takes 34 bytes in int8 and 20 in int4, with its scales.

    In int4 the projections to values, `fine`, have int8 too.

    The head's 700 rows are padded to 704; of the embedding, one row counts. Beside it a token reads
    the keys and values of 65 others, in two layers; in int8 each 8 of them have a scale in fp32.
    """
    subject, read = from_recipe(RECIPE, CACHE), {}
    ways = [("fp32", "torch", ""), ("", "", ""), ("int8", "", ""), ("int8", "", "int8")]
    for dtype, kernels, kv in [*ways, ("int4", "", "")]:
        one = case("decode", depth=64, tokens=2, dtype=dtype or "auto", kernels=kernels, kv=kv)
        doing = decoding(one, subject, subject.loaded(one), Clock())
        read[f"{doing.kernels} {doing.dtype} {doing.kv}"] = doing.bytes
    rows, fine, vectors, kept = 2 * (4 * 32 + 2 * 96), 2 * 32, 5 * 32 + 4 * 8, 2 * 2 * 65 * 32
    assert read == {
        "torch fp32 fp32": 4 * (32 * (701 + rows) + 2 * 32 * 96 + vectors + kept),
        "native fp32 fp16": 4 * (32 * (701 + rows) + 2 * 32 * 96 + vectors) + 2 * kept,
        "native int8 fp16": 34 * (705 + rows) + 2 * 32 * (96 + 4) + 4 * vectors + 2 * kept,
        "native int8 int8": 34 * (705 + rows) + 2 * 32 * (96 + 4) + 4 * vectors + 1.5 * kept,
        "native int4 fp16": 34 * (705 + fine) + 20 * (rows + 192 - fine) + 4 * vectors + 2 * kept,
    }


def test_rows_share_a_pass_in_our_own_c_and_not_in_torch(library):
    """So weights cost a row of eight an eighth there; a prompt's tokens share them in both."""
    subject, read = from_recipe(RECIPE, CACHE), {}
    for kernels in ("", "torch"):
        for rows in (1, 8):
            kv = "" if kernels else "fp32"
            one = case("batch", depth=63, tokens=2, batch=rows, kernels=kernels, kv=kv)
            read[kernels, rows] = batching(one, subject, subject.loaded(one), Clock()).bytes
        one = case("prefill", prompt=100, kernels=kernels)
        decoder, _ = loaded = subject.loaded(one)
        assert prefilling(one, subject, loaded, Clock()).bytes == decoder.bytes_read(0) / 100
    keys = 4 * 2 * 2 * 64 * 32
    assert read["torch", 8] == read["torch", 1] == read["", 1] == decoder.bytes_read(0) + keys
    assert read["", 8] == decoder.bytes_read(0) / 8 + keys


def test_loading_counts_all_that_is_held(library):
    subject = from_recipe(RECIPE, CACHE)
    doing = loading(case("load", kernels="torch"), subject, Clock())
    total = sum(parameters(subject.config).values())
    assert (doing.kernels, doing.dtype, doing.kv) == ("torch", "fp32", "")
    assert doing.do().tokens == 4 * total
    assert loading(case("load"), subject, Clock()).do().tokens == 4 * total
    assert loading(case("load", dtype="int8"), subject, Clock()).do().tokens < 1.2 * total


def test_training_is_train_itself(monkeypatch):
    """Each repetition is one update of the recipe's model by its own optimizer."""
    from engine.bench import work

    built = []

    def build(*arguments):
        built.extend(work_build(*arguments))
        return tuple(built)

    work_build = work.build_model
    monkeypatch.setattr(work, "build_model", build)
    subject, seen = from_recipe(RECIPE, CACHE), []
    with training(case("train", batch=8, prompt=64), subject, Clock()) as doing:
        weight = built[0].blocks[0].mlp.up_proj.weight
        for _ in range(4):
            seen.append(weight.detach().clone())
            assert doing.do().tokens == 8 * 64
    # With a head and projections that begin at zero, the first updates reach only what follows.
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[3], weight)


@pytest.mark.slow
def test_measuring_costs_at_most_two_percent():
    """`lm bench` beside the plain loop of `lm generate`, in alternating pairs."""
    subject = from_recipe(RECIPE, CACHE)
    one, clock = case("decode", depth=9, tokens=100), Clock()
    model = decoder, _ = subject.loaded(one)
    doing = decoding(one, subject, model, clock)
    start = prefill(decoder, list(range(9)), decoder.cache(109, rows=2))
    settings = SampleConfig(max_tokens=100)
    pairs = []
    for _ in range(60):
        began = time.perf_counter()
        with Path("/dev/null").open("w", encoding="utf-8") as nowhere:
            for token in generate(decoder, model[1], start.copied(1), settings, seed=0):
                print(token.text, end="", file=nowhere, flush=True)
        plain = time.perf_counter() - began
        clock.start()
        began = time.perf_counter()
        doing.do()
        pairs.append((time.perf_counter() - began) / plain)
    assert median(pairs) < 1.02
