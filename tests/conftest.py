"""Fixtures: small real things, made in-process. Nothing here needs a network or a stored model."""

import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from engine.config import ModelConfig, TokenizerConfig
from engine.kernels import build, compile
from engine.kernels.decoder import Library, load_library
from engine.kernels.native import Kernels
from engine.model.transformer import Transformer, initialise
from engine.text.tokenizer import Tokenizer, learn

ROOT = Path(__file__).parent.parent
settings.register_profile("default", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("default")

TEXT = (ROOT / "engine" / "model" / "transformer.py").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Result:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def kernels(tmp_path_factory) -> Kernels:
    """Our C kernels; where they cannot be had, their tests are skipped with the reason."""
    loaded = build.load_kernels(shared_cache(tmp_path_factory.getbasetemp()))
    if not loaded:
        pytest.skip(loaded.reason)
    return loaded


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Library:
    """Our decoder in C; where it cannot be had, its tests are skipped with the reason."""
    loaded = load_library(shared_cache(tmp_path_factory.getbasetemp()))
    if not loaded:
        pytest.skip(loaded.reason)
    return loaded


@pytest.fixture(autouse=True)
def _built_once(request, monkeypatch, tmp_path_factory) -> None:
    """Let tests of this process share one library; those of building build their own."""
    if not request.node.nodeid.startswith(
        ("tests/engine/kernels/test_build", "tests/engine/kernels/test_compile")
    ):
        built = compile.place(shared_cache(tmp_path_factory.getbasetemp()))
        monkeypatch.setattr(compile, "place", lambda cache: built)


def shared_cache(base: Path) -> Path:
    """A folder for all tests of a run, whichever worker they are on."""
    return (base.parent if "popen" in base.name else base) / "kernels-of-this-run"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A byte-level tokenizer of 400 tokens, learned from this project's own source."""
    return learn([TEXT], TokenizerConfig(vocab_size=400))


def make_model(seed: int = 0, **changes) -> Transformer:
    """A tiny model with random weights everywhere: nothing hides behind a zero initialisation."""
    sizes = {"vocab_size": 400, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}
    model = Transformer(ModelConfig(**(sizes | changes)))
    random = torch.Generator().manual_seed(seed)
    initialise(model, random)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    return model.eval()


@pytest.fixture
def run(tmp_path: Path, monkeypatch, capfd) -> Callable[..., Result]:
    """Run `lm` in this process, in an empty folder; returns what it printed and its exit code.

    A process of its own costs two seconds for importing torch; tests that need one start it.
    """
    from cli.main import main

    for name, value in command_environment(tmp_path).items():
        monkeypatch.setenv(name, value)

    def call(*words: object, stdin: bytes = b"", cwd: Path | None = None) -> Result:
        monkeypatch.chdir(cwd or tmp_path)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        sys.stdout.flush()
        out, err = capfd.readouterr()
        return Result(int(end.value.code or 0), out, err)

    return call


def command_environment(home: Path) -> dict[str, str]:
    """The environment of a command under test: one thread, a private cache, no colour."""
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(home / "cache"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "80",
        "NO_COLOR": "1",
    }
