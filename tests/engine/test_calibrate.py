"""Rounding by what a matrix is multiplied by: against plain rounding, and against brute force."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from engine.calibrate import DAMP, calibrate, feedback, perplexity, round_columns
from engine.config import ModelConfig
from engine.model.transformer import Transformer, initialise
from engine.quantize import GROUP, Matrix, format_of, lay, pack, unpack


def correlated(n, count, seed=0):
    """Inputs of which a few directions carry most."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, generator=generator) * torch.logspace(0, -2, n)[:, None]
    return torch.randn(count, n, generator=generator) @ mixing


def rounded(weight, x):
    q, scale, minimum = round_columns(weight, feedback(x.T @ x))
    return torch.from_numpy(unpack(lay(q.numpy(), scale.numpy(), minimum.numpy())))


def plainly(weight):
    return torch.from_numpy(unpack(pack(weight.numpy(), "int4")))


def cost(weight, other, x):
    """Mean squared error of the outputs."""
    return float(((weight - other) @ x.T).square().mean())


@pytest.mark.parametrize("columns", [32, 96, 80, 20])
def test_outputs_are_nearer_than_by_rounding_each_number(columns):
    weight = torch.randn(48, columns, generator=torch.Generator().manual_seed(3))
    x, fresh = correlated(columns, 2000).split(1000)
    found = rounded(weight, x)
    for text in (x, fresh):  # also on what it was not calibrated by
        assert cost(weight, found, text) < 0.6 * cost(weight, plainly(weight), text)
    # Control: the numbers themselves are not nearer; that is what it is paid with.
    assert (found - weight).norm() > (plainly(weight) - weight).norm()


def test_inputs_that_have_nothing_in_common_leave_plain_rounding():
    """With H = 1 there is nothing to feed back: each number goes to its nearest step."""
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(3))
    q, scale, minimum = round_columns(weight, feedback(torch.eye(96)))
    groups = weight.view(48, 3, GROUP)
    steps, low = scale.float()[..., None], minimum.float()[..., None]
    nearest = ((groups - low) / steps).round().clamp(0, 15).view(48, 96)
    # fp32 works H⁻¹ out, so a number halfway between two steps may fall either way.
    assert ((nearest - q).abs() > 0).float().mean() < 0.002
    found = (q.view(48, 3, GROUP) * steps + low).view(48, 96)
    assert (found - weight).norm() <= 1.01 * (plainly(weight) - weight).norm()


def test_feeding_back_is_what_solving_again_after_each_column_gives():
    """An oracle in fp64: fix one column, solve for the best others, fix the next of those."""
    columns, rows = 8, 5
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(5))
    x = correlated(columns, 300)
    q, scale, minimum = round_columns(weight, feedback(x.T @ x))
    second = (x.T @ x).double().numpy()
    second = second + DAMP * np.trace(second) / columns * np.eye(columns)
    for row in range(rows):
        step, low = float(scale[row, 0]), float(minimum[row, 0])
        aimed = weight[row].double().numpy()
        fixed: list[float] = []
        for j in range(columns):
            # Given what is fixed, the free ones that minimise (w - aimed) H (w - aimed).
            error = np.array(fixed) - aimed[:j]
            free = aimed[j:] - np.linalg.solve(second[j:, j:], second[j:, :j] @ error)
            steps = np.clip(np.rint((free[0] - low) / step), 0, 15)
            assert steps == int(q[row, j]), (row, j)
            fixed.append(steps * step + low)


def test_the_line_of_a_group_is_the_best_for_its_steps():
    """No scale and minimum nearby, as f16 has them, cost less for the steps that were chosen."""
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(6))
    x = correlated(32, 500)
    q, scale, minimum = round_columns(weight, feedback(x.T @ x))
    second = (x.T @ x).double()
    second.diagonal().add_(DAMP * second.diagonal().mean())

    def costs(scale, minimum):
        error = q.double() * scale.double() + minimum.double() - weight.double()
        return ((error @ second) * error).sum(1)

    best = costs(scale, minimum)
    for up, right in itertools.product((0.97, 1, 1.03), (-0.03, 0, 0.03)):
        assert (costs(scale * up, minimum + right * scale) >= best * 0.9).all()


@pytest.mark.parametrize("kind", ["dead columns", "no input", "zeros", "constant", "huge", "tiny"])
def test_what_is_degenerate_stays_finite(kind):
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(8))
    x = correlated(64, 200)
    if kind == "dead columns":
        x[:, 5:40] = 0
    elif kind == "no input":
        x.zero_()
    elif kind == "zeros":
        weight.zero_()
    elif kind == "constant":
        weight[:] = 0.7
    else:
        x *= {"huge": 1e4, "tiny": 1e-6}[kind]
    found = rounded(weight, x)
    assert torch.isfinite(found).all()
    assert (found - weight).norm() <= 0.2 * weight.norm()
    if kind in ("zeros", "constant"):
        assert (found - weight).abs().max() < 1e-3


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("name", ["blocks.1.mlp.up_proj", "blocks.0.attention.v_proj"])
def test_numbers_that_cannot_be_rounded_are_named(name, wrong):
    model = Transformer(SMALL)
    initialise(model, torch.Generator().manual_seed(1))
    model.get_submodule(name).weight.data[3, 3] = wrong  # pyright: ignore
    with pytest.raises(ValueError, match=r"^blocks\.\d\.\w+\.\w+\.weight (holds|is given) "):
        list(calibrate(model.eval(), torch.randint(0, 64, (4, 24))))


def test_perplexity_is_that_of_the_formula():
    model = Transformer(SMALL)
    initialise(model, torch.Generator().manual_seed(1))
    tokens = torch.randint(0, 64, (3, 20), generator=torch.Generator().manual_seed(2))
    chances = model(tokens).detach().softmax(-1)
    surprise = [-chances[b, t, tokens[b, t + 1]].log() for b in range(3) for t in range(19)]
    assert perplexity(model, tokens) == pytest.approx(float(torch.stack(surprise).mean().exp()))


def test_perplexity_of_a_model_that_is_sure_of_what_is_wrong_is_a_number():
    model = Transformer(SMALL)
    with torch.no_grad():
        model.embed_tokens.weight.mul_(0).add_(1e6 * torch.randn(64, 32))
    assert math.isfinite(perplexity(model, torch.randint(0, 64, (3, 20))))


SMALL = ModelConfig(
    vocab_size=64, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=96, max_seq_len=64
)


def learnt(config=SMALL, steps=150):
    """A model that learnt a rule: a token follows from the one before, most of the time."""
    generator = torch.Generator().manual_seed(1)
    model = Transformer(config)
    initialise(model, generator)
    after = torch.randint(0, 64, (64, 3), generator=generator)

    def text(rows):
        tokens = [torch.randint(0, 64, (rows,), generator=generator)]
        for _ in range(48):
            pick = (torch.rand(rows, generator=generator) ** 3 * 3).long()
            tokens.append(after[tokens[-1], pick])
        return torch.stack(tokens, 1)

    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        tokens = text(16)
        logits = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), text(24), text(24)


def test_a_model_loses_less_than_by_rounding_on_text_that_nothing_saw():
    model, learned, held = learnt()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = model(held).detach().log_softmax(-1)

    def lost():
        """Nats by which a token's distribution is off, on text that nothing saw."""
        now = model(held).detach().log_softmax(-1)
        return float((before.exp() * (before - now)).sum(-1).mean())

    made = dict(calibrate(model, learned))
    calibrated = lost()
    for name, matrix in made.items():
        assert torch.equal(model.state_dict()[name], torch.from_numpy(unpack(matrix)))
        assert matrix.format == format_of(name, "int4")
    assert set(made) == {n for n, t in state.items() if t.ndim == 2 and n != "lm_head.weight"} | (
        set() if SMALL.tie_embeddings else {"lm_head.weight"}
    )
    for name in made:
        values = unpack(pack(state[name].numpy(), format_of(name, "int4")))
        state[name] = torch.from_numpy(values)
    if SMALL.tie_embeddings:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    model.load_state_dict(state)
    assert 0 < calibrated < 0.8 * lost()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation": "gelu", "norm": "layernorm", "position": "learned", "mlp_bias": True},
        {"norm_placement": "sandwich", "sliding_window": 16, "scale_embeddings": True},
        {"tie_embeddings": False, "attention_bias": True},
        {"d_model": 24, "d_ff": 40, "n_heads": 2, "n_kv_heads": 1},
    ],
    ids=["llama", "gpt2", "gemma", "untied", "odd"],
)
def test_every_matrix_of_any_shape_of_model_comes_once_and_the_same_again(changes):
    config = dataclasses.replace(SMALL, **changes)
    tokens = torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(0))
    made: list[dict[str, Matrix]] = []
    model = Transformer(config)
    for _ in range(2):
        model = Transformer(config)
        initialise(model, torch.Generator().manual_seed(1))
        pairs = list(calibrate(model.eval(), tokens))
        made.append(dict(pairs))
        assert len(pairs) == len(made[-1])
    names = {name for name, tensor in model.state_dict().items() if tensor.ndim == 2}
    assert set(made[0]) == names - ({"lm_head.weight"} if config.tie_embeddings else set())
    for name, matrix in made[0].items():
        again = made[1][name]
        assert np.array_equal(matrix.data, again.data), name
        assert matrix.scale is not None and again.scale is not None
        assert np.array_equal(matrix.scale, again.scale), name
        assert matrix.data.shape == pack(unpack(matrix), matrix.format).data.shape
