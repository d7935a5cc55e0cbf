"""The gradient of a batch: shares of it add up to it, whoever draws the dropout."""

import torch

from engine.config import ModelConfig
from engine.model.transformer import Transformer, initialise
from engine.train.gradient import Share, Sums, hash_seed
from engine.train.loss import next_token_loss
from tests.engine.train.test_loop import ragged, split


def loss(model, batch):
    return next_token_loss(model, batch, 64)


def gradients(parts: int, ranks: tuple[int, ...], of: int) -> tuple[list[torch.Tensor], Sums]:
    """Work out some shares of batch 3 one after the other; return the gradient and its sums."""
    sizes = {"vocab_size": 400, "d_model": 32, "n_layers": 2, "max_seq_len": 64}
    model = Transformer(ModelConfig(**sizes, tie_embeddings=True), dropout=0.3)
    initialise(model, torch.Generator().manual_seed(0))
    sums = Sums(nats=0.0, targets=0, tokens=0)
    for rank in ranks:
        share = Share(
            model=model,
            batches=lambda step: split(ragged(step), parts),
            loss=loss,
            seed=5,
            dtype=torch.float32,
            rank=rank,
            of=of,
        )
        sums += share(3)
    return [p.grad for p in model.parameters() if p.grad is not None], sums


def test_shares_add_up_to_the_whole_with_the_same_dropout():
    """In any order: a part's masks follow from its number, not from what was drawn before it."""
    whole, sums = gradients(8, (0,), 1)
    for ranks in ((0, 1, 2), (2, 1, 0)):
        shared, theirs = gradients(8, ranks, 3)
        assert (theirs.targets, theirs.tokens) == (sums.targets, sums.tokens) == (64, 128)
        assert abs(theirs.nats - sums.nats) < 1e-3
        torch.testing.assert_close(shared, whole, atol=1e-4, rtol=0)
    lacking, theirs = gradients(8, (0, 1), 3)  # the control
    assert theirs.targets < 64
    assert (lacking[0] - whole[0]).abs().max() > 0.1


def test_more_processes_than_parts_leave_some_without_work():
    gone, sums = gradients(2, (4,), 5)
    assert not gone and sums == Sums(nats=0.0, targets=0, tokens=0)


def test_seeds_follow_from_all_the_numbers_and_their_order():
    seeds = {hash_seed(*numbers) for numbers in ((1, 1), (1, 2), (2, 1), (1, 1, 0), (1, 0, 1))}
    assert len(seeds) == 5
    many = {hash_seed(0, step, part) for step in range(300) for part in range(30)}
    assert len(many) == 9000 and all(0 <= seed < 1 << 63 for seed in many)
