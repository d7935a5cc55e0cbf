"""The works do what the commands do, and cost no more for being watched."""

import time
from pathlib import Path
from statistics import median

import pytest
import torch

from engine.bench.cases import Case
from engine.bench.subject import from_recipe
from engine.bench.work import decoding, training, weight_bytes
from engine.clock import Clock
from engine.config import SampleConfig
from engine.generate.decode import generate, prefill
from engine.generate.reference import TorchDecoder
from tests.conftest import make_model
from tests.engine.bench.test_subject import CACHE, RECIPE


def case(what, **changes):
    return Case(**({"what": what, "model": "m", "dtype": "fp32", "threads": 1} | changes))


def test_weights_that_a_token_reads():
    """An embedding is read one row at a time, unless it is the head too."""
    untied, tied = make_model(), make_model(tie_embeddings=True)
    every = sum(parameter.numel() for parameter in untied.parameters())
    assert weight_bytes(untied) == 4 * (every - 400 * 32)
    assert weight_bytes(tied) == 4 * sum(parameter.numel() for parameter in tied.parameters())
    assert weight_bytes(tied) == weight_bytes(untied)
    assert weight_bytes(untied.bfloat16()) == 2 * (every - 400 * 32)


def test_decoding_is_generate_itself(monkeypatch):
    """The same tokens as `lm generate` would make of this prompt, with its settings and seed."""
    from engine.bench import work

    made = []
    write = work._write
    monkeypatch.setattr(work, "_write", lambda s, c: write((made.append(t.id) or t for t in s), c))
    subject = from_recipe(RECIPE, CACHE)
    model = subject.loaded("fp32")
    doing = decoding(case("decode", depth=9, tokens=12), subject, model, Clock())
    assert doing.do().tokens == 11
    (ids,) = work.random_ids(subject, model[1], 1, 9)
    settings = SampleConfig(max_tokens=12)
    decoder = TorchDecoder(model[0])
    start = prefill(decoder, ids, decoder.cache(40))
    expected = generate(decoder, model[1], start, settings, seed=0)
    assert made == [token.id for token in expected]


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
    model = subject.loaded("fp32")
    clock = Clock()
    doing = decoding(case("decode", depth=9, tokens=100), subject, model, clock)
    decoder = TorchDecoder(model[0])
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
