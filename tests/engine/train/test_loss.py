"""The chunked loss equals the plain one, forward and backward, and masks what it must."""

import math

import pytest
import torch

from engine.data.batches import IGNORE, Batch
from engine.train.loss import ChunkedCrossEntropy, cross_entropy, next_token_loss
from tests.conftest import make_model


def inputs(n: int, d: int, v: int, ignored: int = 0):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=random, requires_grad=True)
    weight = torch.randn(v, d, generator=random, requires_grad=True)
    targets = torch.randint(0, v, (n,), generator=random)
    targets[:ignored] = IGNORE
    return x, weight, targets


@pytest.mark.parametrize("chunk", [1, 6, 10, 25, 100])
@pytest.mark.parametrize("ignored", [0, 7])
@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_chunks_make_no_difference(chunk, ignored, cap):
    x, weight, targets = inputs(25, 8, 11, ignored)
    logits = x @ weight.T
    logits = cap * torch.tanh(logits / cap) if cap else logits
    plain, count = cross_entropy(logits, targets)
    plain.backward()
    expected = [x.grad.clone(), weight.grad.clone()]
    x.grad = weight.grad = None
    chunked = ChunkedCrossEntropy.apply(x, weight, targets, chunk, cap)
    (3 * chunked).backward()
    assert count == 25 - ignored
    torch.testing.assert_close(chunked, plain)
    torch.testing.assert_close(x.grad / 3, expected[0])
    torch.testing.assert_close(weight.grad / 3, expected[1])


def test_everything_masked_is_zero_over_zero_targets_not_nan():
    x, weight, targets = inputs(4, 3, 5, ignored=4)
    total = ChunkedCrossEntropy.apply(x, weight, targets, 2, 0.0)
    total.backward()
    assert total == 0 and x.grad.abs().sum() == 0 and cross_entropy(x @ weight.T, targets)[1] == 0


def test_uniform_logits_cost_ln_v():
    x, weight, targets = torch.zeros(9, 4), torch.zeros(13, 4), torch.arange(9)
    total = ChunkedCrossEntropy.apply(x, weight, targets, 4, 0.0)
    assert total.item() / 9 == pytest.approx(math.log(13), abs=1e-5)


def test_parts_of_a_batch_add_up_to_the_batch():
    """1 × 8 equals 8 × 1 with ragged masks: sums and counts add, means would not."""
    model = make_model()
    random = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 400, (8, 17), generator=random)
    targets = rows[:, 1:].clone()
    for row in range(8):
        targets[row, : 2 * row] = IGNORE

    def gradient(parts: int) -> torch.Tensor:
        model.zero_grad()
        count = 0
        for tokens, wanted in zip(rows[:, :-1].chunk(parts), targets.chunk(parts), strict=True):
            total, n = next_token_loss(model, Batch(tokens_BT=tokens, targets_BT=wanted), 5)
            total.backward()
            count += int(n)
        return torch.cat([p.grad.flatten() for p in model.parameters()]) / count

    whole = gradient(1)
    torch.testing.assert_close(gradient(8), whole, rtol=1e-4, atol=1e-6 * whole.abs().max().item())


def test_a_prompt_carries_no_gradient():
    """What is not learned has no logits: its targets cannot matter, whatever they would be."""
    model = make_model()
    tokens = torch.arange(12)[None] * 7
    targets = tokens.clone()
    targets[:, :7] = IGNORE
    batch = Batch(tokens_BT=tokens, targets_BT=targets, lengths=(4, 8))
    loss, count = next_token_loss(model, batch, 3)
    assert count == 5
    with torch.no_grad():
        logits = model.head(model.hidden(tokens, lengths=(4, 8)))
    torch.testing.assert_close(loss, cross_entropy(logits, targets)[0])
    x = model.hidden(tokens, lengths=(4, 8))
    x.retain_grad()
    cross_entropy(model.head(x), targets)[0].backward()
    assert x.grad is not None
    assert not x.grad[:, :7].any() and x.grad[:, 7:].any(dim=-1).all()


def test_a_frozen_head_gets_no_gradient():
    x = torch.randn(6, 4, requires_grad=True)
    weight = torch.randn(9, 4)
    found = []
    for learns in (True, False):
        head = weight.clone().requires_grad_(learns)
        x.grad = None
        ChunkedCrossEntropy.apply(x, head, torch.arange(6), 4, 0.0).backward()
        assert (head.grad is not None) == learns and x.grad is not None
        found.append(x.grad.clone())
    assert torch.equal(*found)
