"""The peer does the work that our engine does: as many parameters, and the same loss."""

import math

import pytest
import torch

from engine.cost import parameters
from engine.data.batches import Batch
from engine.model.transformer import Transformer
from engine.train.loss import next_token_loss
from tests.bench.plain import SHAPE, Plain, trainer

NAMES = {
    "embed": "embed_tokens",
    "attention_norm": "input_norm",
    "out": "attention.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "head": "lm_head",
}


def copied(plain: Plain) -> Transformer:
    """Our model with the peer's weights."""
    state = {}
    for name, tensor in plain.state_dict().items():
        *block, part, _ = name.split(".") if "." in name else (name, "")
        if part == "qkv":
            for letter, piece in zip("qkv", tensor.chunk(3), strict=True):
                state[".".join([*block, f"attention.{letter}_proj.weight"])] = piece
        elif part not in ("cos", "sin"):
            state[".".join([*block, NAMES.get(part, part), "weight"])] = tensor
    model = Transformer(SHAPE)
    model.load_state_dict(state)
    return model


@pytest.fixture(scope="module")
def plain() -> Plain:
    """The peer, with random weights everywhere."""
    torch.manual_seed(1)
    model = Plain(SHAPE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return model


def random_batch() -> Batch:
    rows = torch.randint(0, SHAPE.vocab_size, (2, 33), generator=torch.Generator().manual_seed(2))
    return Batch(tokens_BT=rows[:, :-1], targets_BT=rows[:, 1:])


def test_the_peer_has_13_8_million_parameters(plain):
    own = sum(parameter.numel() for parameter in plain.parameters())
    assert own == sum(parameters(SHAPE).values()) == 13_767_552
    # 8192 × 384 + 6 × (4 × 384² + 3 × 384 × 1024 + 2 × 384) + 384
    assert own == 3_145_728 + 6 * (589_824 + 1_179_648 + 768) + 384


def test_both_sides_find_the_same_loss_and_gradient(plain):
    batch, model = random_batch(), copied(plain)
    theirs = plain(batch.tokens_BT, batch.targets_BT)
    total, count = next_token_loss(model, batch, 16)
    ours = total / count
    assert abs(ours.item() - theirs.item()) < 1e-4
    assert (
        abs(ours.item() - math.log(SHAPE.vocab_size)) > 0.01
    )  # weights that say nothing agree too
    theirs.backward(), ours.backward()
    for mine, other in ((model.embed_tokens, plain.embed), (model.norm, plain.norm)):
        torch.testing.assert_close(mine.weight.grad, other.weight.grad, atol=1e-5, rtol=1e-3)


def test_another_weight_would_be_seen(plain):
    """The control: what the equality above is blind to is nothing."""
    batch, model = random_batch(), copied(plain)
    with torch.no_grad():
        model.blocks[3].attention.k_proj.weight.mul_(1.5)
        total, count = next_token_loss(model, batch, 16)
        theirs = plain(batch.tokens_BT, batch.targets_BT)
    assert abs((total / count).item() - theirs.item()) > 1e-4


def test_the_peer_learns():
    batch = random_batch()
    step = trainer(batch.tokens_BT, batch.targets_BT)
    losses = [step().item() for _ in range(12)]
    assert losses[-1] < losses[0] - 1  # one batch, learned by heart
