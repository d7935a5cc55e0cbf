"""Rows of the stdlib recipe's shape, 3.3 M parameters, beside transformers, from one checkpoint."""

import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, redirect_stdout
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from cli.options import cache_folder
from cli.render import emit
from engine.bench.cases import Case
from engine.bench.measure import Repetition, measure
from engine.bench.subject import from_checkpoint, random_ids
from engine.checkpoint import Snapshot, load_model, save
from engine.config import ModelConfig, OptimConfig, Recipe, SampleConfig, TokenizerConfig
from engine.data.batches import Batch
from engine.generate.decode import generate, prefill
from engine.generate.reference import TorchDecoder
from engine.hardware import keep_heap, use_threads
from engine.model.transformer import Transformer, initialise
from engine.recipe import override
from engine.text.tokenizer import learn
from engine.train.optim import Optimizers
from tests.bench.pairs import alternate
from tests.bench.report import Missing, Options, Result, versus
from tests.bench.training import chosen, steps_of

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
    adamw = torch.optim.AdamW(peer.parameters(), lr=1e-9, fused=True)

    def theirs() -> None:
        logits = peer(batch.tokens_BT).logits
        F.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten()).backward()
        adamw.step()
        adamw.zero_grad()

    peer.train()
    with ExitStack() as stack:
        sides: dict[str, Callable[[], object]] = {PEER: theirs}
        for name in ("adamw", "muon"):
            optim = OptimConfig(name=name)
            recipe = override(Recipe(), train={"optim": optim}, run={"device": "cpu"})
            own, precision = copy.deepcopy(model), chosen(recipe)
            precision.prepare(own)
            optimizer = Optimizers(own, recipe.train.optim)
            steps = steps_of(own, optimizer, precision, recipe, batch, use_threads(0))
            sides[f"lm {name}"] = stack.enter_context(steps)
        times = alternate(sides, options.rounds)
    for name in ("lm adamw", "lm muon"):
        yield versus(times, name, PEER, ROWS * LENGTH)


def decode(options: Options) -> Iterator[Result]:
    """A prompt of 256 tokens read and 128 more generated, greedily."""
    model, tokenizer, peer = both_sides()
    prompt = torch.randint(0, model.config.vocab_size, (LENGTH,)).tolist()
    settings = SampleConfig(temperature=0, max_tokens=NEW)
    tokens, decoder = torch.tensor([prompt]), TorchDecoder(model)
    wish = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}

    def ours() -> None:
        start = prefill(decoder, prompt, decoder.cache(LENGTH + NEW))
        assert len(list(generate(decoder, tokenizer, start, settings, seed=0))) == NEW

    def theirs() -> None:
        peer.generate(tokens, attention_mask=torch.ones_like(tokens), **wish)

    times = alternate({"lm": ours, PEER: theirs}, options.rounds)
    yield versus(times, "lm", PEER, NEW)


def overhead(options: Options) -> Iterator[Result]:
    """What `lm bench --what decode` costs over `lm generate`: the same prompt, tokens and weights.

    A side is one repetition. The model is small: what watching adds to a token shows best there.
    """
    keep_heap()
    threads = use_threads(0)
    case = Case(
        what="decode", model="small", dtype="auto", threads=threads, depth=LENGTH, tokens=NEW
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = checkpoint(Path(temporary))
        subject = from_checkpoint("small", folder, cache_folder(), "cpu")
        loaded = subject.loaded(case)
    subject = replace(subject, load=lambda case: loaded, building=lambda case: "")
    decoder, tokenizer = loaded
    (prompt,) = random_ids(subject, tokenizer, 1, LENGTH)
    settings = replace(subject.sample, max_tokens=NEW)
    start = prefill(decoder, prompt, decoder.cache(LENGTH + NEW, rows=2))

    def generating() -> None:
        """Write the text as it comes, as the command does."""
        for token in generate(decoder, tokenizer, start.copied(1), settings, seed=0):
            if token.text:
                emit(token.text, end="")

    def benching() -> None:
        event = next(events)
        assert isinstance(event, Repetition) and len(event.times) == NEW

    ours, watched = "lm generate", "lm bench"
    rounds = replace(options.rounds, most=4 * options.rounds.most)  # short ones, for a small effect
    endless = measure(subject, [case], warm_up=0, repeats=1 << 30)
    with closing(endless) as events, Path(os.devnull).open("w") as nowhere:
        next(events)  # the limits of the machine
        with redirect_stdout(nowhere):
            times = alternate({ours: generating, watched: benching}, rounds)
    yield versus(times, ours, watched, NEW)
