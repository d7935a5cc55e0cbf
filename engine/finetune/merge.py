"""From a base and its adapter to one whole model, with the proof that nothing changed on the way.

The adapter is added to the weights in fp32, the result is written, read back and compared with the
adapter on a handful of prompts. What does not pass is not kept.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.adapter import describe
from engine.adapter_config import find_base, holder, is_adapter, weights_digest
from engine.checkpoint import load_adapted, load_model, write_model
from engine.config import SampleConfig
from engine.cost import parameters
from engine.errors import CheckFailed, CheckpointError
from engine.files import whole_folder
from engine.generate.decode import generate, prefill
from engine.generate.reference import TorchDecoder
from engine.interop.exporting import licence_of
from engine.interop.importing import check_free
from engine.manifest import read_json, read_manifest, write_json, write_manifest
from engine.model.config_json import QUANTIZATION
from engine.model.lora import merge_lora
from engine.model.transformer import Transformer
from engine.runs import TOKENIZER
from engine.text.tokenizer import Tokenizer
from engine.weights import check_room

# Compared on these, whatever the model was made for: prose, code, numbers, a question, no English.
PROMPTS = (
    "The quick brown fox jumps over",
    "def main() -> None:\n    ",
    "1, 2, 3, 4, 5,",
    "Question: What is the capital of France?\nAnswer:",
    "Grüße aus",
)
LENGTH = 24  # tokens that the adapter continues each prompt by
TOLERANCE = 1e-4  # of the largest logit: what another order of the sums costs, many times over


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """What was merged, and how adapter and merged model compare."""

    folder: Path
    base: Path
    base_known: bool  # the base is proved to be the one that the adapter was trained beside
    int8: bool  # it was held in 8 bits then
    matrices: int
    bytes: int
    prompts: int
    difference: float  # largest of any logit
    limit: float  # the most that is accepted
    agreed: int  # tokens that both find likeliest
    tokens: int


def merge(folder: Path, out: Path, prompts: Sequence[str] = ()) -> Merged:
    """Write base and adapter as one checkpoint; `prompts` are compared beside the fixed ones.

    An adapter trained beside 8-bit matrices is merged onto the base's own weights.

    Raises: CheckFailed if the merged model differs, and `out` is not made; CheckpointError if
    there is no adapter, or it does not fit its base; RecipeError if `out` exists.
    """
    check_free(out)
    if not is_adapter(folder):
        raise CheckpointError(f"{folder}: is a whole model, with no adapter to merge")
    base = find_base(folder)
    model, tokenizer = load_adapted(folder, as_trained=False)
    total = 4 * sum(parameters(model.config).values())
    check_room(out, total)
    texts = [text for text in (*PROMPTS, *prompts) if text]
    answers = [_continue(model, tokenizer, text) for text in texts]
    before = [_logits(model, *answer) for answer in answers]
    matrices = merge_lora(model)
    with whole_folder(out) as made:
        write_model(made, model, base.family)
        _copy_files(folder, base.folder, made)
        write_manifest(made, _lineage(folder, base.folder))
        model, _ = load_model(made)
        after = [_logits(model, *answer) for answer in answers]
        pairs = list(zip(before, after, strict=True))
        difference = max((a - b).abs().max().item() for a, b in pairs)
        limit = TOLERANCE * max(1.0, *(a.abs().max().item() for a in before))
        result = Merged(
            folder=out,
            base=base.folder,
            base_known=base.known,
            int8=base.int8,
            matrices=matrices,
            bytes=total,
            prompts=len(texts),
            difference=difference,
            limit=limit,
            agreed=sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs),
            tokens=sum(len(logits) for logits in before),
        )
        if not difference <= limit:  # so that NaN fails too
            raise CheckFailed(
                f"the merged model differs from {folder} by {difference:.2g} in a logit, more than"
                f" {limit:.2g}, and agrees on {result.agreed} of {result.tokens} tokens; {out} was"
                " not made"
            )
    return result


def _continue(model: Transformer, tokenizer: Tokenizer, text: str) -> tuple[list[int], int]:
    """Return a prompt with its likeliest continuation, and how long the prompt is."""
    context = model.config.max_seq_len
    length = min(LENGTH, context // 2)
    prompt = tokenizer.prompt(text.encode("utf-8", "surrogateescape"))[length - context :]
    decoder = TorchDecoder(model)
    start = prefill(decoder, prompt, decoder.cache(len(prompt) + length))
    greedy = SampleConfig(temperature=0.0, max_tokens=length)
    answer = [token.id for token in generate(decoder, tokenizer, start, greedy, seed=0)]
    return prompt + answer, len(prompt)


@torch.inference_mode()
def _logits(model: Transformer, ids: list[int], prompt: int) -> Tensor:
    """Return what the model expects at each position of a continuation, as TV."""
    return model.head(model.hidden(torch.tensor([ids]))[0, prompt - 1 : -1]).float()


def _copy_files(folder: Path, base: Path, made: Path) -> None:
    """Bring along everything but the weights: the adapter's own files, else those of its base."""
    config = read_json(holder(folder, "config.json") / "config.json") | {"dtype": "float32"}
    for key in ("torch_dtype", QUANTIZATION):  # an adapter may lie beside rounded matrices
        config.pop(key, None)
    write_json(made / "config.json", config)
    texts = holder(folder, "tokenizer.json")  # a tokenizer and its settings belong together
    for name in (*TOKENIZER, "special_tokens_map.json"):
        if (texts / name).is_file():
            shutil.copyfile(texts / name, made / name)
    sampling = holder(folder, "generation_config.json") / "generation_config.json"
    for file in (sampling, *base.glob("LICENSE*"), *base.glob("NOTICE*")):
        if file.is_file():
            shutil.copyfile(file, made / file.name)


def _lineage(folder: Path, base: Path) -> dict[str, Any]:
    """Say what was merged, and keep what the adapter's manifest says of its training."""
    tuned = read_manifest(folder) if (folder / "manifest.json").is_file() else {"step": 0}
    facts = {key: value for key, value in tuned.items() if key not in ("schema", "files", "base")}
    source = {
        "origin": f"{folder.resolve()} merged onto {base.resolve()}",
        "licence": licence_of(read_manifest(base, hash_up_to=0)),
        "adapter": describe(folder),
        "base": {"folder": str(base.resolve()), "weights": weights_digest(base)},
    }
    return facts | {"source": source}
