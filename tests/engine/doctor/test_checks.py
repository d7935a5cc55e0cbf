"""Every check holds on a sound engine, and each one fails when just its piece is broken."""

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from engine.checkpoint import load_model
from engine.config import RunConfig
from engine.doctor import checks
from engine.doctor.checks import CHECKS, Check, Subject, drift, examine, farthest, random_subject
from engine.errors import LimitError, ResourceError
from engine.model.transformer import Transformer
from tests.conftest import make_model

CPU = torch.device("cpu")
NAMES = [question.name for question in CHECKS] + ["bf16 drifts from fp32", "compiled = eager"]


@pytest.fixture
def subject(tokenizer) -> Subject:
    model = make_model(sliding_window=8, full_every=2, n_kv_heads=2)
    return Subject(model=model, tokenizer=tokenizer)


def answers(subject: Subject, **how) -> dict[str, Check]:
    return {check.name: check for check in examine(subject, **how)}


def failing(subject: Subject, **how) -> set[str]:
    return {name for name, check in answers(subject, **how).items() if check.ok is False}


def test_a_sound_engine_passes_them_all(kernels, library):
    subject = replace(random_subject(CPU), kernels=kernels, library=library)
    torch.set_num_threads(2)
    found = answers(subject, compiler="c++")
    assert set(NAMES) <= set(found)
    for name, check in found.items():
        if name != "compiled = eager":
            assert check.ok and check.value is not None, check
            assert check.value <= check.limit
            assert check.limit == 0 or check.value < check.limit / 1.3, "far from its limit"
    assert found["compiled = eager"].ok is None, "too slow to be done unasked"
    assert torch.get_num_threads() == 2
    assert all(p.grad is None for p in subject.model.parameters()) and not subject.model.training


def broken(subject: Subject, forward) -> Subject:
    """The same model, its hidden states computed by `forward(model, tokens, cache, lengths)`."""

    class Broken(Transformer):
        def hidden(self, tokens_BT, cache=None, *, lengths=(), **rest) -> Tensor:
            def right(tokens_BT: Tensor, **changes) -> Tensor:
                return Transformer.hidden(
                    self, tokens_BT, **{"cache": cache, "lengths": lengths} | changes
                )

            return forward(right, tokens_BT, cache, lengths)

    subject.model.__class__ = Broken
    return subject


BREAKS = {
    # A cache that is slightly off once it holds something.
    "cached = uncached": lambda right, tokens, cache, lengths: (
        right(tokens) * (1 + 0.01 * bool(cache and cache.length))
    ),
    # Rows that come out otherwise in company.
    "batch = single": lambda right, tokens, cache, lengths: (
        right(tokens) * (1.01 if len(tokens) == 3 else 1)
    ),
    # A pack whose texts see each other.
    "packed = alone": lambda right, tokens, cache, lengths: right(tokens, lengths=()),
    # Rows that count more in company.
    "1 × 8 = 8 × 1": lambda right, tokens, cache, lengths: (
        right(tokens) * (1.01 if len(tokens) == 8 else 1)
    ),
    # Work that is shared out badly.
    "1 thread = all": lambda right, tokens, cache, lengths: (
        right(tokens) * (1.01 if torch.get_num_threads() > 1 else 1)
    ),
    # A precision in which something overflows.
    "bf16 drifts from fp32": lambda right, tokens, cache, lengths: (
        right(tokens) * (1.1 if torch.is_autocast_enabled("cpu") else 1)
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_model_fails_its_check_and_no_other(subject, name):
    torch.set_num_threads(2)
    found = failing(broken(subject, BREAKS[name]))
    assert found == {name}


def test_a_model_of_no_numbers_fails(subject):
    """A figure that is no number is below no limit."""
    with torch.no_grad():
        subject.model.norm.weight[0] = math.nan
    found = answers(subject)
    assert found["cached = uncached"].ok is False
    assert math.isnan(found["cached = uncached"].value or 0)


def test_broken_pieces_beside_the_model(subject, monkeypatch):
    load, linear = load_model, checks.Int8Linear

    def altered(folder):
        model, tokenizer = load(folder)
        with torch.no_grad():
            model.norm.weight[0] = torch.nextafter(model.norm.weight[0], torch.tensor(9.0))
        return model, tokenizer

    def coarse(module):
        narrow = linear(module)
        narrow.scale *= 1.05
        return narrow

    with monkeypatch.context() as patch:
        patch.setattr(checks, "load_model", altered)
        found = answers(subject)
        assert found["saved = loaded"].value == 1 and not found["saved = loaded"].ok
    with monkeypatch.context() as patch:
        patch.setattr(checks, "Int8Linear", coarse)
        assert failing(subject) == {"int8 ≈ fp32"}
    assert 0.8 < answers(subject)["int8 ≈ fp32"].value < 1.2, "just what rounding explains"
    with monkeypatch.context() as patch:  # one that does not listen to the seed
        patch.setattr(
            checks, "sample", lambda logits, seen, config, random: int(torch.randint(9, ()))
        )
        assert failing(subject) == {"same seed = same draw"}
    with monkeypatch.context() as patch:  # or listens to nothing
        patch.setattr(checks, "sample", lambda logits, seen, config, random: int(logits.argmax()))
        assert failing(subject) == {"same seed = same draw"}
    assert failing(subject) == set()


def test_what_cannot_be_computed_fails_and_says_why(subject):
    def forward(right, tokens, cache, lengths):
        if lengths:
            raise RuntimeError("could not create a primitive\nand a long tale")
        return right(tokens)

    check = answers(broken(subject, forward))["packed = alone"]
    assert (check.ok, check.value, check.note) == (False, None, "could not create a primitive")


def test_what_cannot_be_tried_is_skipped_with_its_reason(subject, monkeypatch):
    def full(*arguments, **named):
        raise ResourceError("no room")

    monkeypatch.setattr(checks, "save", full)
    monkeypatch.setattr(checks, "check_memory", full)
    found = answers(replace(subject, adapter=False))
    assert found["saved = loaded"].ok is None and found["saved = loaded"].note == "no room"
    assert found["1 × 8 = 8 × 1"].note == "no room"
    assert found["1 thread = all"].note == "torch has one thread"
    assert found["compiled = eager"].note == "needs a C++ compiler"
    assert "adapter" in answers(replace(subject, adapter=True))["saved = loaded"].note
    assert found["C = torch"].note == "it was not asked for"
    assert failing(subject) == set()


def test_a_context_too_short_is_refused(tokenizer):
    small = Subject(model=make_model(max_seq_len=15), tokenizer=tokenizer)
    with pytest.raises(LimitError, match="15 tokens is too short to check; 16 will do"):
        answers(small)
    assert failing(Subject(model=make_model(max_seq_len=16), tokenizer=tokenizer)) == set()


def test_every_precision_of_a_recipe_is_asked_about(subject):
    names = set(get_args(RunConfig.__dataclass_fields__["dtype"].type)) - {"auto", "fp32"}
    assert "bf16" in names
    assert {f"{name} drifts from fp32" for name in names} <= set(answers(subject))


def test_differences_are_relative():
    """Worked by hand: expected (3, 4) has length 5 and root mean square √12.5."""
    expected, found = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    assert farthest(found, expected) == pytest.approx(0.5 / 12.5**0.5)
    assert drift([found], [expected]) == pytest.approx(0.1)
    assert farthest(1000 * found, 1000 * expected) == pytest.approx(0.5 / 12.5**0.5)
    assert drift([expected, found], [expected, expected]) == pytest.approx(0.5 / 50**0.5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_compiled_model_gives_the_same(subject):
    from engine.machine import find_compiler

    if not find_compiler("g++"):
        pytest.skip("no C++ compiler here")
    check = answers(subject, compiler="g++", slow=True)["compiled = eager"]
    assert check.ok and check.value is not None, check
