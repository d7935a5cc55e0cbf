"""docs/cli.md from every --help: `make docs` writes it, tests/test_docs.py compares."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "cli.md"
COMMANDS = (
    *([], ["count-tokens"], ["tokenize"], ["train-tokenizer"]),
    *(["data"], ["data", "check"], ["train"], ["finetune"], ["plan"], ["runs"], ["plot"], ["show"]),
    *(["recipes"], ["recipes", "show"], ["recipes", "check"], ["recipes", "explain"]),
    *(
        ["generate"],
        ["chat"],
        ["import"],
        ["merge"],
        ["quantize"],
        ["export"],
        ["verify"],
        ["doctor"],
    ),
    *(["bench"], ["bench", "compare"]),
    *(["cache"], ["cache", "ls"], ["cache", "gc"], ["cache", "verify"]),
)


def help_text(words: list[str]) -> str:
    """Return what `lm … --help` prints at 80 columns."""
    environment = os.environ | {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}
    process = subprocess.run(
        [sys.executable, "-m", "cli.main", *words, "--help"],
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": str(ROOT)},
        check=True,
        timeout=60,
    )
    lines = [line.rstrip() for line in process.stdout.strip("\n").splitlines()]
    return "\n".join(lines).strip("\n").replace("python -m cli.main", "lm")


def render() -> str:
    """Return the whole page."""
    parts = ["# Every command\n\nGenerated from `--help` by `make docs`, kept current by a test.\n"]
    for words in COMMANDS:
        name = " ".join(["lm", *words])
        parts.append(f"## {name}\n\n```text\n{help_text(words)}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
