"""Which tokenizer does a model use? Our own rules for published names, never a silent guess.

OpenAI publishes its encodings: names lead to them exactly. Anthropic and Google publish none for
their hosted models: those are estimated, as a multiple of what o200k_base counts, with an interval
that was measured and is held by a test. What can be had as a file needs the file.

Source: tiktoken 0.14, tiktoken/model.py; the context windows are the makers' published ones.
"""

import difflib
import re
from dataclasses import dataclass

from engine.errors import RecipeError
from engine.text.encodings import ENCODINGS


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A count that is a multiple of another encoding's."""

    factor: float  # tokens for every token of o200k_base
    plus_minus: float  # the share by which nine of ten documents are off at most
    basis: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What is published about one model, or the models whose names begin alike."""

    name: str
    encoding: str
    estimate: Estimate | None = None
    window: int | None = None  # tokens of context
    chat: bool = False  # whether OpenAI's frame of messages applies


# Measured on 404 documents of 1,500 to 12,000 characters: English prose and manuals (70), Markdown
# (30), Python, C, JavaScript and Rust (80), HTML (20), JSON (45), tables of numbers (15), program
# messages in 36 languages (144). The factor makes the interval narrowest that holds nine documents
# of ten; it is stated a little wider. Off the most: for Claude, scripts other than Latin (up to
# 2.4 tokens for one of o200k_base) and plain numbers (1.0); for Gemini, numbers (1.9), because each
# digit is a token, and Indic scripts (0.8). The counts are in tests/engine/text/estimates.csv.
#
# Claude: ctok 1.3.0, an unofficial reconstruction that matches nearly all of two million counts its
# author asked the vendor for; not one figure is Anthropic's own. Gemini: the tokenizer of Gemma 3,
# which Google calls the same as Gemini 2.0's (Gemma 3 report, arXiv:2503.19786, section 2.2).
CLAUDE_3 = Estimate(factor=1.30, plus_minus=0.25, basis="ctok, an unofficial reconstruction")
CLAUDE_47 = Estimate(factor=1.62, plus_minus=0.30, basis="ctok, an unofficial reconstruction")
GEMINI = Estimate(factor=1.08, plus_minus=0.25, basis="the tokenizer of Gemma 3")

M = 1_000_000
O200K = {  # beginning of a name -> context window
    "gpt-4o": 128_000,
    "chatgpt-4o": 128_000,
    "gpt-4.1": 1_047_576,
    "gpt-4.5": 128_000,
    "gpt-5": 400_000,
    "gpt-5-chat": 128_000,
    "gpt-5.1-chat": 128_000,
    "gpt-5.2-chat": 128_000,
    "gpt-5.3-chat": 128_000,
    "gpt-5.4": 1_050_000,
    "gpt-5.4-mini": 400_000,
    "gpt-5.4-nano": 400_000,
    "o1": 200_000,
    "o1-mini": 128_000,
    "o1-preview": 128_000,
    "o3": 200_000,
    "o4": 200_000,
}
CL100K = {
    "gpt-4": 8_192,
    "gpt-4-32k": 32_768,
    "gpt-4-turbo": 128_000,
    "gpt-4-1106": 128_000,
    "gpt-4-0125": 128_000,
    "gpt-4-vision": 128_000,
    "gpt-3.5": 16_385,
    "gpt-35": 16_385,
    "gpt-3.5-turbo-instruct": 4_096,
}
EMBEDDINGS = ("text-embedding-3", "text-embedding-ada-002", "ada-002")
OLDER = {
    "text-davinci-003": "p50k_base",
    "text-davinci-002": "p50k_base",
    "text-davinci-001": "r50k_base",
    "code-davinci": "p50k_base",
    "davinci-002": "cl100k_base",
    "babbage-002": "cl100k_base",
    "davinci": "r50k_base",
    "curie": "r50k_base",
    "babbage": "r50k_base",
    "ada": "r50k_base",
    "gpt-2": "gpt2",
}
HOSTED = {  # beginning of a name -> estimate, context window
    "claude": (CLAUDE_47, None),  # newer than this table
    "claude-2": (CLAUDE_3, 200_000),
    "claude-3": (CLAUDE_3, 200_000),
    "claude-opus-3": (CLAUDE_3, 200_000),
    "claude-sonnet-3": (CLAUDE_3, 200_000),
    "claude-haiku-3": (CLAUDE_3, 200_000),
    "claude-opus-4": (CLAUDE_3, 200_000),
    "claude-sonnet-4": (CLAUDE_3, 200_000),
    "claude-haiku-4": (CLAUDE_3, 200_000),
    "claude-opus-4-6": (CLAUDE_3, M),
    "claude-sonnet-4-6": (CLAUDE_3, M),
    "claude-opus-4-7": (CLAUDE_47, M),
    "claude-opus-4-8": (CLAUDE_47, M),
    "claude-opus-5": (CLAUDE_47, M),
    "claude-sonnet-5": (CLAUDE_47, M),
    "claude-haiku-5": (CLAUDE_47, M),
    "claude-fable-5": (CLAUDE_47, M),
    "claude-mythos-5": (CLAUDE_47, M),
    "gemini": (GEMINI, 1_048_576),
    "gemini-1.0": (GEMINI, 32_768),
    "gemini-1.5-pro": (GEMINI, 2_097_152),
}
TABLE = {
    row.name: row
    for row in (
        *(Model(name=n, encoding="o200k_base", window=w, chat=True) for n, w in O200K.items()),
        *(Model(name=n, encoding="cl100k_base", window=w, chat=True) for n, w in CL100K.items()),
        *(Model(name=n, encoding="cl100k_base", window=8_192) for n in EMBEDDINGS),
        *(Model(name=n, encoding=e) for n, e in OLDER.items()),
        Model(name="gpt-oss", encoding="o200k_harmony", window=131_072),
        *(
            Model(name=n, encoding="o200k_base", estimate=e, window=w)
            for n, (e, w) in HOSTED.items()
        ),
        *(Model(name=n, encoding=n) for n in ENCODINGS),
    )
}
# Their tokenizers are published, but as files that are not on every machine.
OPEN_FAMILIES = (
    "llama",
    "meta-llama",
    "qwen",
    "qwq",
    "mistral",
    "mixtral",
    "codestral",
    "deepseek",
    "gemma",
    "phi",
    "smollm",
    "olmo",
    "glm",
    "kimi",
    "yi",
    "falcon",
    "command-r",
)


def resolve(name: str) -> Model:
    """Return what is known of a model: `openai/gpt-4o-2024-08-06` or `ft:gpt-4o-mini:acme::7p4l`.

    Raises: RecipeError with the nearest names, or with how to give a tokenizer.
    """
    plain = name.strip().lower()
    plain = re.sub(r"^ft:([^:]+).*", r"\1", plain.rsplit("/", 1)[-1])
    plain = re.sub(r"^(?:[a-z]{2,6}\.)?(?:anthropic|openai|google)\.", "", plain)
    plain = re.sub(r"^(claude)-(\d)[.-](\d)-(opus|sonnet|haiku)", r"\1-\4-\2-\3", plain)
    plain = re.sub(r"^(claude-[a-z]+-\d)\.(\d)", r"\1-\2", plain)
    for size in range(len(plain), 0, -1):
        row = TABLE.get(plain[:size])
        if row is not None and _ends_there(plain, size):
            return row
    if plain.startswith(OPEN_FAMILIES):
        raise RecipeError(
            f"{name}: its tokenizer is a file of its own; give the path of its tokenizer.json, or"
            " the name of a checkpoint that has it"
        )
    near = difflib.get_close_matches(plain, known_models(), n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "give a model or a tokenizer.json"
    raise RecipeError(f"{name} is not a model whose tokenizer is known; {hint}")


def _ends_there(name: str, size: int) -> bool:
    """Whether a known name ends there: `gpt-5` in `gpt-5.1` does, `ada` in `adagio` does not."""
    return size == len(name) or not name[size].isalnum() or not name[size - 1].isalpha()


def known_models() -> list[str]:
    """Return the names, and beginnings of names, that `resolve` knows."""
    return sorted(TABLE)
