"""Building the kernels takes seconds: every command that does it says so first, and only then."""

import shutil

import pytest

from engine.files import sha256
from engine.kernels import compile

SAID, DECODER = "building kernels with ", "building the decoder with "
TRAIN = ["train", "smoke", "train.steps=1", "model.d_model=16", "run.dtype=fp32", "--force"]
COMMANDS = [
    TRAIN,
    ["plan", "smoke", "--no-measure", "run.dtype=fp32"],
    ["bench", "smoke", "--what", "train", "--repeats", "1", "--dtype", "fp32", "--warm-up", "0"],
    ["doctor"],
]


@pytest.fixture
def unbuilt(kernels, library, tmp_path, monkeypatch):
    """A machine that never built them, on which building is quick."""

    def copy(command, sources, made):
        decodes = "decoder.c" in [source.name for source in sources]
        made.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy((library if decodes else kernels).path, made)
        made.with_suffix(".sha256").write_text(sha256(made))

    monkeypatch.setattr(compile, "_compile", copy)
    monkeypatch.setattr(compile, "place", lambda cache: tmp_path / "built")
    return tmp_path / "built"


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_it_is_said_once(run, unbuilt, words):
    first = run(*words)
    assert first.code == 0 and first.err.count(SAID) == 1, first.err
    (line,) = [line for line in first.err.splitlines() if SAID in line]
    assert line.endswith(", once …") and unbuilt.is_dir()
    assert SAID not in first.out and SAID not in run(*words).err


def test_not_when_quiet_nor_without_them(run, unbuilt):
    assert run(*TRAIN, "-q").err == "" and unbuilt.is_dir()
    shutil.rmtree(unbuilt)
    assert SAID not in run(*TRAIN, "run.kernels=torch").err and not unbuilt.exists()


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "-m", "smoke", "a", "--max-tokens", "2"],
        ["generate", "-m", "smoke", "a", "--max-tokens", "2", "--verify"],
        ["bench", "-m", "smoke", "--what", "decode", "--depth", "0", "--repeats", "1"],
        ["bench", "smoke", "--what", "batch", "--batch", "2", "--repeats", "1"],
        ["doctor"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_so_does_what_loads_the_decoder(run, unbuilt, words):
    assert run(*TRAIN, "run.kernels=torch", "-q").code == 0 and not unbuilt.exists()
    if words != ["doctor"]:
        assert DECODER not in run(*words, "--kernels", "torch").err and not unbuilt.exists()
    first = run(*words)
    assert first.code == 0 and first.err.count(DECODER) == 1, first.err
    assert unbuilt.is_dir() and DECODER not in first.out and DECODER not in run(*words).err
    shutil.rmtree(unbuilt)
    assert DECODER not in run(*words, "-q").err and unbuilt.is_dir()


def test_without_a_compiler_it_is_said_that_torch_computes(run, monkeypatch):
    """Not when it was asked for, nor when nobody wants to hear it."""
    assert run(*TRAIN, "run.kernels=torch", "-q").code == 0
    monkeypatch.setattr(compile, "_find_compiler", lambda: None)
    words = ["generate", "-m", "smoke", "a", "--max-tokens", "2", "--device", "cpu"]
    said = "computed by torch, which is slower and takes more memory: no C compiler (cc) was found"
    assert said in run(*words).err.splitlines()
    for more in (["--kernels", "torch"], ["-q"]):
        result = run(*words, *more)
        assert result.code == 0 and "computed by torch" not in result.err
