"""The objective of finetuning: the answers of the rows, and a share of text not to be forgotten.

It is the loss of pretraining over fewer targets: what is not learned has none.

Sources: Ouyang et al. 2022, arXiv:2203.02155, section 3.5 (supervised finetuning); Rolnick et al.
2019, arXiv:1811.11682 (replay against forgetting).
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.config import Recipe
from engine.data.batches import Batch, SampleBatches, WindowBatches, digest, end_to_end
from engine.data.samples import Sample
from engine.finetune.prepare import Tuning, replay_rows
from engine.model.transformer import Transformer
from engine.text.tokenizer import Tokenizer
from engine.train.evaluate import Score
from engine.train.gradient import Batches, Loss
from engine.train.loss import next_token_loss

SCORED = 4096  # tokens scored at a time


@dataclass(frozen=True, slots=True)
class Mixture:
    """Packs of samples, and windows of the replayed text after them."""

    packs: SampleBatches
    windows: WindowBatches | None

    def __call__(self, step: int) -> Sequence[Batch]:
        """Return the parts of batch `step`."""
        return self.packs(step) + (self.windows(step) if self.windows else [])

    def longest(self) -> Sequence[Batch]:
        """Return a batch than which none takes more memory."""
        return self.packs.longest() + (self.windows(0) if self.windows else [])


class Finetuning:
    """Learn the answers of rows; judged by the surprise at the answers of rows held out."""

    def __init__(
        self, recipe: Recipe, tuning: Tuning, tokenizer: Tokenizer, base: Path, weights: str
    ) -> None:
        """Learn what `tuning` holds, from a base whose weights have the digest `weights`."""
        self.recipe, self.tuning, self.base, self.weights = recipe, tuning, base, weights
        train = recipe.train
        self.packs = SampleBatches(
            tuning.train.samples,
            capacity=recipe.data.seq_len,
            packs=train.batch_size,
            parts=train.accumulate,
            seed=recipe.run.seed,
            packing=recipe.data.packing,
        )
        sizes = [self.packs.size(chosen) for chosen in self.packs.bins]
        self.mean_pack = sum(sizes) / len(sizes)  # tokens
        self.replayed = replay_rows(recipe, sizes)
        windows = None
        if self.replayed and tuning.own_text:
            tokens = tuning.own_text.tokens("train")
            length, seed = recipe.data.seq_len, recipe.run.seed
            windows = WindowBatches(tokens, length, self.replayed, seed, train.accumulate)
        self.mixture = Mixture(self.packs, windows)
        self.batches: Batches = self.mixture
        self.loss: Loss = partial(
            next_token_loss, chunk=train.loss_chunk, recompute=train.recompute
        )
        self._piece_bytes = np.array([len(piece) for piece in tokenizer.pieces])
        self._piece_bytes[list(tokenizer.special)] = 0  # a control token stands for no text

    @property
    def digest(self) -> str:
        """A fingerprint of rows, base and replayed text."""
        tuning = self.tuning
        text = tuning.own_text.digest if self.replayed and tuning.own_text else ""
        parts = (digest(tuning.train.samples), digest(tuning.valid.samples), self.weights, text)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def evaluate(self, model: Transformer) -> Score:
        """Score some of the held-out rows, evenly chosen."""
        return self._score(model, self.recipe.eval.bytes)

    def judge(self, model: Transformer) -> Score:
        """Score the held-out rows."""
        return self._score(model, self.recipe.eval.final_bytes)

    def _score(self, model: Transformer, most: int) -> Score:
        samples = self.tuning.valid.samples
        size = sum(map(self._bytes, samples))
        return self.score(model, samples[:: -(-size // most) or 1])

    def _bytes(self, sample: Sample) -> int:
        """Return the bytes of text that a sample's answers are."""
        return int(self._piece_bytes[sample.ids[sample.learned]].sum())

    @torch.inference_mode()
    def score(self, model: Transformer, samples: Sequence[Sample]) -> Score:
        """Return the surprise at the answers of these samples."""
        model.eval()
        device = model.embed_tokens.weight.device
        nats = 0.0
        for group in _groups(samples):
            batch = end_to_end(group).to(device)
            nats += next_token_loss(model, batch, self.recipe.train.loss_chunk)[0].item()
        return Score(
            nats=nats,
            tokens=sum(int(sample.learned.sum()) for sample in samples),
            bytes=max(1, sum(map(self._bytes, samples))),
        )

    def lineage(self) -> Mapping[str, Any]:
        """Name the base, the rows, and how many were learned."""
        tuning = self.tuning
        sides = {
            name: {"rows": side.tally.rows, "tokens": side.tally.tokens}
            | {"learned": side.tally.learned, "dropped": side.tally.dropped, "cut": side.tally.cut}
            for name, side in (("train", tuning.train), ("valid", tuning.valid))
        }
        data = {"source": self.recipe.data.train, "format": tuning.format, "digest": self.digest}
        data |= {"held_out": tuning.rule, "replay": self.recipe.train.replay}
        parent = {"folder": str(self.base.resolve()), "weights": self.weights}
        return {"parent": parent, "data": data | sides}


def _groups(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Yield samples in groups of some thousands of tokens."""
    group, size = list[Sample](), 0
    for sample in samples:
        if group and size + len(sample.ids) > SCORED:
            yield group
            group, size = [], 0
        group.append(sample)
        size += len(sample.ids)
    yield group
