"""The peer of the prose row: the model and settings of nanoGPT's README for a CPU, on characters.

    python -m tests.bench.nanogpt TRAIN VALID STARTED

4 layers, 4 heads, width 128, context 64, 12 rows a step, 2000 steps, no dropout, no biases; AdamW
at 1e-3 falling to 1e-4 by a cosine after 100 steps of rise, betas 0.9 and 0.99, decay 0.1 of
matrices, gradients clipped at 1; every 250 steps 20 batches of each side are scored. Written anew
from these facts. Source: github.com/karpathy/nanoGPT at 3adf61e, README, train.py, model.py and
config/train_shakespeare_char.py, which name 1.88 nats a character on Shakespeare for it.
"""

import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.train.evaluate import windows

LAYERS, HEADS, WIDTH, CONTEXT = 4, 4, 128, 64
ROWS, STEPS, WARM_UP, PEAK, FLOOR = 12, 2000, 100, 1e-3, 1e-4
EVERY, EVALUATED = 250, 20
STRIDE = CONTEXT // 4  # of the windows it is scored by, as ours at the end of a run


class Block(nn.Module):
    """Attention and a GELU MLP, four times as wide, each behind a LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH, bias=False)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp_norm = nn.LayerNorm(WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (batch, time, width) → the same."""
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, HEADS, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class Model(nn.Module):
    """Learned positions, tied embedding; 0.8 million parameters."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                writes = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * LAYERS if writes else 1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Shapes: (batch, time) → (batch, time, vocabulary)."""
        x = self.embed(tokens) + self.positions.weight[: tokens.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.embed.weight)


def rate(step: int) -> float:
    """Return the learning rate of a step, counted from 0."""
    if step < WARM_UP:
        return PEAK * (step + 1) / (WARM_UP + 1)
    done = (step - WARM_UP) / (STEPS - WARM_UP)
    return FLOOR + (PEAK - FLOOR) * (1 + math.cos(math.pi * done)) / 2


def batch(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Draw random windows: tokens, and those that follow them."""
    starts = torch.randint(len(tokens) - CONTEXT, (ROWS, 1))
    rows = tokens[starts + torch.arange(CONTEXT + 1)]
    return rows[:, :-1], rows[:, 1:]


def loss_of(model: Model, tokens: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats."""
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def train(model: Model, sides: tuple[Tensor, Tensor], steps: int) -> None:
    """Train as the README says, looking at both sides on the way."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.99), fused=True)
    for step in range(steps):
        if step % EVERY == 0:
            with torch.no_grad():
                for side in sides:
                    sum(loss_of(model, *batch(side)).item() for _ in range(EVALUATED))
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        loss_of(model, *batch(sides[0])).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def bits_per_character(model: Model, tokens: Tensor) -> float:
    """Score a text once, character by character, but for the first; see `evaluate.windows`."""
    nats = 0.0
    for start, first, end in windows(len(tokens) - 1, CONTEXT, STRIDE):
        logits = model(tokens[None, start:end])[0, first - start :]
        nats += F.cross_entropy(logits, tokens[first + 1 : end + 1], reduction="sum").item()
    return nats / (len(tokens) - 1) / math.log(2)


def main(train_file: str, valid_file: str, started: str, steps: int = STEPS) -> None:
    """Train, and say how long all of it took since `started`, and how good it got."""
    torch.manual_seed(1337)
    texts = [Path(file).read_text(encoding="ascii") for file in (train_file, valid_file)]
    number = {letter: index for index, letter in enumerate(sorted(set("".join(texts))))}
    learned, held = (torch.tensor([number[letter] for letter in text]) for text in texts)
    model = Model(len(number))
    train(model, (learned, held), steps)
    seconds = time.time() - float(started)
    print(json.dumps({"seconds": seconds, "bits_per_byte": bits_per_character(model, held)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
