"""Rows of the stdlib recipe's shape, 3.3 M parameters, beside transformers, from one checkpoint."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from engine.checkpoint import Snapshot, load_model, save
from engine.config import ModelConfig, OptimConfig, Recipe, SampleConfig, TokenizerConfig
from engine.data.batches import Batch
from engine.generate.decode import generate, prefill
from engine.hardware import keep_heap
from engine.model.transformer import Transformer, initialise
from engine.text.tokenizer import learn
from engine.train.loss import next_token_loss
from engine.train.optim import Optimizers
from tests.bench.pairs import alternate
from tests.bench.report import Missing, Options, Result, versus

ROWS, LENGTH, NEW = 8, 256, 128
PEER = "transformers fp32"


def checkpoint(folder: Path) -> Path:
    """Save a random model of the stdlib recipe's shape, so that both sides load one file."""
    texts = [file.read_text(encoding="utf-8") for file in Path("engine").rglob("*.py")]
    tokenizer = learn(texts, TokenizerConfig(vocab_size=4096))
    shape = {"d_model": 192, "n_layers": 4, "n_heads": 3}
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, **shape))
    initialise(model, torch.Generator().manual_seed(0))
    model.lm_head.weight.data.normal_(std=0.02)
    nothing: dict = {"recipe_yaml": "", "facts": {}, "optimizer": {}, "state": {}}
    sample = SampleConfig()
    snapshot = Snapshot(step=1, model=model, tokenizer=tokenizer, sample=sample, **nothing)
    return save(folder, snapshot, best=True)


def both_sides():
    """Load one checkpoint twice: (our model, our tokenizer, theirs). Raises: Missing."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise Missing("transformers is not installed; the extra `peers` brings it") from None
    keep_heap()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = checkpoint(Path(temporary))
        return *load_model(folder), AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True
        )


def train_step(options: Options) -> Iterator[Result]:
    """A training step with either optimizer, theirs with AdamW."""
    model, _, peer = both_sides()
    rows = torch.randint(0, model.config.vocab_size, (ROWS, LENGTH + 1))
    batch = Batch(tokens_BT=rows[:, :-1], targets_BT=rows[:, 1:])
    chunk = Recipe().train.loss_chunk

    def ours(optimizer: Optimizers) -> None:
        total, count = next_token_loss(model, batch, chunk)
        (total / count).backward()
        optimizer.step(1e-6)
        model.zero_grad()

    adamw = torch.optim.AdamW(peer.parameters(), lr=1e-9, fused=True)

    def theirs() -> None:
        logits = peer(batch.tokens_BT).logits
        F.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten()).backward()
        adamw.step()
        adamw.zero_grad()

    peer.train()
    sides = {PEER: theirs}
    for name in ("adamw", "muon"):
        optimizer = Optimizers(model, OptimConfig(name=name))
        sides[f"lm {name}"] = lambda optimizer=optimizer: ours(optimizer)
    times = alternate(sides, options.rounds)
    for name in ("lm adamw", "lm muon"):
        yield versus(times, name, PEER, ROWS * LENGTH)


def decode(options: Options) -> Iterator[Result]:
    """A prompt of 256 tokens read and 128 more generated, greedily."""
    model, tokenizer, peer = both_sides()
    prompt = torch.randint(0, model.config.vocab_size, (LENGTH,)).tolist()
    settings = SampleConfig(temperature=0, max_tokens=NEW)
    tokens = torch.tensor([prompt])
    wish = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}

    def ours() -> None:
        start = prefill(model, prompt, LENGTH + NEW)
        assert len(list(generate(model, tokenizer, start, settings, seed=0))) == NEW

    def theirs() -> None:
        peer.generate(tokens, attention_mask=torch.ones_like(tokens), **wish)

    times = alternate({"lm": ours, PEER: theirs}, options.rounds)
    yield versus(times, "lm", PEER, NEW)
