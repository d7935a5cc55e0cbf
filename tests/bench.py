"""`make bench`: training and decoding beside transformers, in one run, as ratios of medians.

Both sides work on the same shape, weights, batch and precision, alternately, so that a machine that
changes its speed changes it for both.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from engine.checkpoint import Snapshot, load_model, save
from engine.config import ModelConfig, OptimConfig, SampleConfig, TokenizerConfig
from engine.data.batches import Batch
from engine.generate.decode import generate, prefill
from engine.hardware import keep_heap
from engine.model.transformer import Transformer, initialise
from engine.text.tokenizer import learn
from engine.train.loss import next_token_loss
from engine.train.optim import Optimizers

REPEATS = 9
ROWS, LENGTH, NEW = 8, 256, 128


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


def compare(name: str, ours: Callable[[], None], theirs: Callable[[], None], work: int) -> None:
    """Time both in turn and print the medians and their ratio."""
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    ours(), theirs()  # warm up
    for _ in range(REPEATS):
        for side, function in (("ours", ours), ("theirs", theirs)):
            start = time.perf_counter()
            function()
            times[side].append(time.perf_counter() - start)
    a, b = statistics.median(times["ours"]), statistics.median(times["theirs"])
    spread = (max(times["ours"]) - min(times["ours"])) / a
    print(
        f"{name:<28} lm {work / a:>8,.0f} tok/s   transformers {work / b:>8,.0f} tok/s"
        f"   ratio {b / a:.2f}   spread {spread:.0%}"
    )


def main() -> None:
    """Run every comparison."""
    keep_heap()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = checkpoint(Path(temporary))
        model, tokenizer = load_model(folder)
        peer = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    rows = torch.randint(0, model.config.vocab_size, (ROWS, LENGTH + 1))
    batch = Batch(tokens_BT=rows[:, :-1], targets_BT=rows[:, 1:])

    def train_ours(optimizer: Optimizers) -> None:
        total, count = next_token_loss(model, batch, 1024)
        (total / count).backward()
        optimizer.step(1e-6)
        model.zero_grad()

    adamw = torch.optim.AdamW(peer.parameters(), lr=1e-9, fused=True)

    def train_theirs() -> None:
        logits = peer(batch.tokens_BT).logits
        F.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten()).backward()
        adamw.step()
        adamw.zero_grad()

    for name in ("adamw", "muon"):
        optimizer = Optimizers(model, OptimConfig(name=name))
        label = f"train, {name} (theirs adamw)"
        compare(label, lambda o=optimizer: train_ours(o), train_theirs, ROWS * LENGTH)

    model.eval(), peer.eval()
    prompt = rows[0, :LENGTH].tolist()
    settings = SampleConfig(temperature=0, max_tokens=NEW)

    def decode_ours() -> None:
        start = prefill(model, prompt, LENGTH + NEW)
        assert len(list(generate(model, tokenizer, start, settings, seed=0))) == NEW

    def decode_theirs() -> None:
        tokens = torch.tensor([prompt])
        mask = torch.ones_like(tokens)
        peer.generate(
            tokens, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
        )

    compare(f"prefill {LENGTH} + decode {NEW}", decode_ours, decode_theirs, NEW)


if __name__ == "__main__":
    main()
