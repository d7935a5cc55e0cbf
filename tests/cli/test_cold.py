"""What must start fast imports nothing heavy: proved in a process of its own."""

import json
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT, command_environment
from tests.engine.interop.folders import imported as bring_in
from tests.engine.interop.folders import write_folder

PROBE = """
import json, sys
from cli.main import main
code = None
try:
    main(sys.argv[1:])
except SystemExit as end:
    code = end.code or 0
heavy = {"torch", "numpy", "safetensors", "tokenizers", "matplotlib", "pydantic"}
print(json.dumps([code, sorted(heavy & {name.split(".")[0] for name in sys.modules})]))
"""
COMMANDS = [
    "count-tokens",
    "tokenize",
    "train-tokenizer",
    "recipes",
    "data",
    "train",
    "plan",
    "runs",
    "plot",
    "show",
    "generate",
    "quantize",
    "doctor",
    "bench",
]


def loaded(*words: str, cwd=None, code: int = 0) -> list[str]:
    process = subprocess.run(
        [sys.executable, "-c", PROBE, *words],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": "/nonexistent"},
        cwd=cwd,
        check=True,
        timeout=60,
    )
    ended, heavy = json.loads(process.stdout.splitlines()[-1])
    assert ended == code, process.stderr
    return heavy


@pytest.mark.parametrize(
    "words",
    [
        [],
        *[[name] for name in COMMANDS],
        ["recipes", "show"],
        ["data", "check"],
        ["bench", "compare"],
    ],
    ids=str,
)
def test_help_is_cold(words):
    assert loaded(*words, "--help") == []


def test_recipes_are_cold():
    assert loaded("recipes") == loaded("recipes", "show", "stdlib") == []
    assert loaded("recipes", "explain", "train") == []


def test_tokenize_needs_no_torch(tmp_path, tokenizer):
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    heavy = loaded("tokenize", "hello", "-m", str(tmp_path / "tokenizer.json"), "--ids")
    assert set(heavy) <= {"tokenizers"}


@pytest.mark.parametrize(
    "code, words",
    [
        (3, ["quantize", "nothing", "--to", "int8"]),
        (2, ["quantize", "nothing", "--to", "int3"]),
        (3, ["bench", "-m", "nothing"]),
        (2, ["bench", "nothing", "--what", "train"]),
        (2, ["bench", "stdlib", "--what", "trian"]),
        (2, ["bench"]),
    ],
    ids=str,
)
def test_a_name_that_leads_nowhere_is_refused_before_torch_is_imported(tmp_path, code, words):
    assert loaded(*words, cwd=tmp_path, code=code) == []


def test_the_probe_can_fail():
    """The control: a command that does need torch is seen to load it."""
    code = PROBE.replace("from cli.main import main", "import torch\nfrom cli.main import main")
    process = subprocess.run(
        [sys.executable, "-c", code, "--version"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        check=True,
        timeout=60,
    )
    assert "torch" in json.loads(process.stdout.splitlines()[-1])[1]


GENERATING = [
    "cli.generation",
    "engine.generate.decode",
    "engine.generate.session",
    "engine.generate.load",
    "engine.generate.sampler",
    "engine.generate.writer",
]


def imported(modules: list[str]) -> list[str]:
    """What is there of torch after importing modules, in a process of its own."""
    code = f"import sys, {', '.join(modules)}; print('torch' in sys.modules)"
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        check=True,
        timeout=60,
    )
    return process.stdout.split()


def test_generating_needs_no_torch_until_it_is_chosen():
    """Importing it takes longer than a small model's answer."""
    assert imported(GENERATING) == ["False"]
    assert imported([*GENERATING, "engine.generate.reference"]) == ["True"]  # the control


# What a plain greedy answer by our own C has no use for; some of it comes with numpy or typer.
UNNEEDED = {
    *("torch", "yaml", "jinja2", "numpy.random", "secrets", "logging", "concurrent.futures"),
    *("rich", "cli.commands.bench", "cli.commands.chat", "cli.commands.train", "cli.training"),
    *("cli.chat", "cli.drafting", "cli.inputs", "engine.recipe", "engine.text.chat"),
    *("engine.generate.session", "engine.generate.speculate", "engine.generate.prefixes"),
}


@pytest.fixture
def answering(library, tmp_path, tokenizer):
    """Generate in a process of its own; return what it imported of UNNEEDED."""
    write_folder(tmp_path / "source", tokenizer, max_seq_len=128)
    bring_in(tmp_path / "source", tmp_path / "tiny")
    kept = tmp_path / "cache" / "lm-workbench" / "kernels"
    kept.mkdir(parents=True)
    for file in (library.path, library.path.with_suffix(".sha256")):
        shutil.copy(file, kept)
    code = f"""
import sys
from cli.main import main
try:
    main(sys.argv[1:])
finally:
    print()
    print(*({UNNEEDED} & set(sys.modules)))
"""

    def call(*words: str) -> set[str]:
        sizes = ["--max-tokens", "3", "--device", "cpu"]
        process = subprocess.run(
            [sys.executable, "-c", code, "generate", "def", "-m", "tiny", *sizes, *words],
            capture_output=True,
            text=True,
            env=command_environment(tmp_path),
            cwd=tmp_path,
            check=True,
            timeout=60,
        )
        assert "native" in process.stderr
        return set(process.stdout.splitlines()[-1].split())

    return call


def test_a_plain_answer_imports_only_what_it_needs(answering):
    """The first letter waits for every import."""
    assert answering("--temperature", "0") == set()


def test_what_more_is_asked_for_is_imported_then(answering):
    """The controls."""
    assert "numpy.random" in answering("--temperature", "1")
    guessing = answering("--temperature", "0", "--draft", "lookup", "--prefix-cache")
    assert guessing >= {"engine.generate.speculate", "engine.generate.prefixes", "cli.drafting"}


def test_openblas_does_not_spin_beside_us():
    """It reads how long its threads wait as NumPy is imported: the program must say so before."""
    code = """
import os, sys
from cli.main import main
sys.argv = ["lm", "--version"]
try:
    main()
finally:
    print(os.environ["OPENBLAS_THREAD_TIMEOUT"], "numpy" in sys.modules)
"""
    for theirs, expected in ({}, "4"), ({"OPENBLAS_THREAD_TIMEOUT": "20"}, "20"):
        process = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={"PYTHONPATH": str(ROOT), "PATH": ""} | theirs,
            check=True,
            timeout=60,
        )
        assert process.stdout.splitlines()[-1].split() == [expected, "False"]
