"""What is measured: a checkpoint, or the model that a recipe describes, with random weights.

Weights that mean nothing multiply as fast as any others; so do random tokens.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.adapter_config import find_base, holder, is_adapter
from engine.bench.cases import Case, What
from engine.config import ModelConfig, Recipe, SampleConfig, TokenizerConfig
from engine.cost import parameters
from engine.generate.decoder import Weighed
from engine.generate.load import (
    check_torch,
    first_build,
    load_decoder,
    native_library,
    pack_decoder,
)
from engine.generate.reference import TorchDecoder
from engine.hardware import check_memory, pick_device, pick_dtype
from engine.kernels.compile import Unavailable
from engine.manifest import read_json
from engine.model.config_json import from_config_json
from engine.model.transformer import Transformer, initialise
from engine.recipe import flatten, override, to_dict
from engine.sampling_defaults import sample_defaults
from engine.text.tokenizer import Tokenizer, learn, load_tokenizer
from engine.train.prepare import check_settings

Loaded = tuple[Weighed, Tokenizer]
Loader = Callable[[Case], Loaded]  # dtype, kernels, kv and threads wished for → ready to use
# Of a weight, with its part of a scale; in int4 embeddings have 8 bits.
BYTES = {"fp32": 4, "bf16": 2, "int8": 1.07, "int4": 0.75}
# Of a run's length and rate, and of what cases say themselves.
WITHOUT_EFFECT = (
    "train.steps",
    "train.budget",
    "train.schedule.",
    "train.base",
    "train.batch_size",
)
WITHOUT_EFFECT += ("sample.max_tokens",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model that can be loaded, and a recipe to train it by, or only one of them."""

    name: str
    config: ModelConfig
    load: Loader
    building: Callable[[Case], str]  # says that loading will build our own C first
    sample: SampleConfig  # how `lm generate` would choose its tokens
    device: torch.device
    folder: Path | None = None  # where its weights come from; without one they are random
    recipe: Recipe | None = None  # with every size filled in
    cache: Path = Path()  # where what is built for this machine is kept

    def loaded(self, case: Case) -> Loaded:
        """Return what a case runs and its tokenizer, which knows no end: a speed has no last word.

        Raises: ResourceError if memory does not suffice.
        """
        check_memory(
            self._size(case), self.device, f"loading {self.name}", "the model, or --dtype,"
        )
        decoder, tokenizer = self.load(case)
        endless = copy.copy(tokenizer)
        endless.ends = frozenset()
        return decoder, endless

    def _size(self, case: Case) -> int:
        """Return the bytes that the weights of a case take."""
        if self.folder and case.dtype == "auto":  # as they are stored
            whole = find_base(self.folder).folder if is_adapter(self.folder) else self.folder
            return sum(file.stat().st_size for file in whole.glob("*.safetensors"))
        each = BYTES[case.dtype] if self.folder else 4  # random weights are drawn in fp32
        return round(each * sum(parameters(self.config).values()))


def from_checkpoint(name: str, folder: Path, cache: Path, device: str = "auto") -> Subject:
    """Take a checkpoint as it is, loaded as `lm generate` does."""
    file = holder(folder, "config.json") / "config.json"

    def load(case: Case) -> Loaded:
        """Take what is stored, in the precision that is wished for."""
        dtype, kernels, kv, threads = case.how
        how = {"dtype": dtype, "kernels": kernels, "kv": kv, "threads": threads}
        return load_decoder(folder, device=device, cache=cache, **how)

    return Subject(
        name=name,
        config=from_config_json(read_json(file), str(file)),
        load=load,
        building=lambda case: first_build(folder, device, case.kernels, cache),
        sample=sample_defaults(folder),
        device=pick_device(device),
        folder=folder,
        cache=cache,
    )


def from_recipe(recipe: Recipe, cache: Path, device: str = "auto") -> Subject:
    """Take the model of a recipe, untrained. Raises: RecipeError for a recipe of `lm finetune`."""
    check_settings(recipe)
    tokenizer = stand_in(recipe)
    size = recipe.model.vocab_size or tokenizer.vocab_size
    recipe = override(recipe, model={"vocab_size": size})
    device = recipe.run.device if device == "auto" else device
    place = pick_device(device)

    def load(case: Case) -> Loaded:
        """Make random weights; like those that `lm train` writes, they are fp32 if nobody asks."""
        dtype, kernels, kv, threads = case.how
        library = native_library(None, device, kernels, cache)
        if isinstance(library, Unavailable):
            check_torch(dtype, kv, library)
        model = Transformer(recipe.model)
        initialise(model, torch.Generator().manual_seed(recipe.run.seed))
        if not isinstance(library, Unavailable):
            weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
            how = {"dtype": dtype, "kv": kv, "threads": threads}
            return pack_decoder(recipe.model, weights, library, **how), tokenizer
        precision = pick_dtype("fp32" if dtype == "auto" else dtype, place)
        return TorchDecoder(model.eval().to(place, precision)), tokenizer

    return Subject(
        name=recipe.run.name,
        config=recipe.model,
        load=load,
        building=lambda case: first_build(None, device, case.kernels, cache),
        sample=recipe.sample,
        device=place,
        recipe=recipe,
        cache=cache,
    )


def settings(subject: Subject, what: What) -> str:
    """Write what else the speed of a work depends on, as far as it is not as usual.

    Returns: key=value words in order, such as `model.d_model=64 train.optim.name=adamw`.
    """
    parts: dict[str, Any] = {"model": subject.config, "sample": subject.sample}
    if what == "train":
        assert subject.recipe
        parts = {"model": subject.recipe.model, "train": subject.recipe.train}
    now = flatten({name: to_dict(part) for name, part in parts.items()})
    usual = flatten({name: to_dict(type(part)()) for name, part in parts.items()})
    return " ".join(
        f"{key}={json.dumps(value, separators=(',', ':'))}".replace('"', "")
        for key, value in sorted(now.items())
        if value != usual[key] and not key.startswith(WITHOUT_EFFECT)
    )


def stand_in(recipe: Recipe) -> Tokenizer:
    """Return the tokenizer of a recipe, or one of its size, learned from words made up."""
    if recipe.tokenizer.path:
        return load_tokenizer(Path(recipe.tokenizer.path), exact=True)
    size = min(recipe.tokenizer.vocab_size, recipe.model.vocab_size or 1 << 20)
    letters = np.random.default_rng(0).integers(97, 123, (2 * size, 8), dtype=np.uint8)
    text = b" ".join(row.tobytes() for row in letters).decode("ascii")
    return learn([text], replace(TokenizerConfig(), vocab_size=max(260, size)))


def random_ids(subject: Subject, tokenizer: Tokenizer, rows: int, length: int) -> list[list[int]]:
    """Return rows of ids that the tokenizer knows, the same each time."""
    most = min(tokenizer.vocab_size, subject.config.vocab_size)
    return np.random.default_rng(0).integers(0, most, (rows, length)).tolist()
