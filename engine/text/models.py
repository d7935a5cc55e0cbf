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
O200K = {  # name -> context window
    "gpt-4o": 128_000,
    "chatgpt-4o": 128_000,
    "gpt-4.1": 1_047_576,
    "gpt-4.5": 128_000,
    **dict.fromkeys(["gpt-5", "gpt-5.1", "gpt-5.2", "gpt-5.3"], 400_000),
    **dict.fromkeys(["gpt-5-chat", "gpt-5.1-chat", "gpt-5.2-chat", "gpt-5.3-chat"], 128_000),
    **{"gpt-5.4": 1_050_000, "gpt-5.5": 1_000_000, "gpt-5.6": 1_050_000},
    **dict.fromkeys(["gpt-5.4-mini", "gpt-5.4-nano"], 400_000),
    "o1": 200_000,
    "o1-mini": 128_000,
    "o1-preview": 128_000,
    "o3": 200_000,
    "o4-mini": 200_000,
}
CL100K = {
    "gpt-4": 8_192,
    "gpt-4-32k": 32_768,
    "gpt-4-turbo": 128_000,
    "gpt-4-1106": 128_000,
    "gpt-4-0125": 128_000,
    "gpt-4-1106-vision": 128_000,
    "gpt-4-vision": 128_000,
    "gpt-3.5": 16_385,
    "gpt-3.5-turbo": 16_385,
    "gpt-3.5-turbo-16k": 16_385,
    "gpt-3.5-turbo-instruct": 4_096,
}
EMBEDDINGS = (
    "text-embedding-3-small",
    "text-embedding-3-large",
    "text-embedding-ada-002",
    "ada-002",
)
OLDER = {
    "text-davinci-003": "p50k_base",
    "text-davinci-002": "p50k_base",
    "text-davinci-001": "r50k_base",
    "code-davinci-001": "p50k_base",
    "code-davinci-002": "p50k_base",
    "davinci-002": "cl100k_base",
    "babbage-002": "cl100k_base",
    "davinci": "r50k_base",
    "curie": "r50k_base",
    "babbage": "r50k_base",
    "ada": "r50k_base",
    "gpt-2": "gpt2",
}
HOSTED = {  # name -> estimate, context window
    **{
        f"claude-{name}": (CLAUDE_3, 200_000)
        for name in (
            *("opus-3", "sonnet-3", "haiku-3", "sonnet-3-5", "haiku-3-5", "sonnet-3-7"),
            *("opus-4", "sonnet-4", "opus-4-0", "sonnet-4-0", "opus-4-1"),
            *("opus-4-5", "sonnet-4-5", "haiku-4-5"),
        )
    },
    **{f"claude-{name}": (CLAUDE_3, M) for name in ("opus-4-6", "sonnet-4-6")},
    **{
        f"claude-{name}": (CLAUDE_47, M)
        for name in (
            *("opus-4-7", "opus-4-8", "opus-5", "sonnet-5", "haiku-5"),
            *("opus-5-5", "sonnet-5-5", "haiku-5-5"),
            *("fable-5", "fable-5-1", "fable-5-2", "mythos-5", "mythos-5-2"),
        )
    },
    "gemini-pro": (GEMINI, 32_768),
    "gemini-1.0-pro": (GEMINI, 32_768),
    "gemini-1.5-pro": (GEMINI, 2_097_152),
    **{
        f"gemini-{name}": (GEMINI, 1_048_576)
        for name in (
            *("1.5-flash", "2.0-flash", "2.0-pro", "2.5-pro", "2.5-flash", "3-pro", "3-flash"),
            *("3.1-pro", "3.1-flash", "3.5-flash", "3.6-flash", "3.7-flash", "3.8-flash"),
        )
    },
}
TABLE = {
    row.name: row
    for row in (
        *(Model(name=n, encoding="o200k_base", window=w, chat=True) for n, w in O200K.items()),
        *(Model(name=n, encoding="cl100k_base", window=w, chat=True) for n, w in CL100K.items()),
        *(Model(name=n, encoding="cl100k_base", window=8_192) for n in EMBEDDINGS),
        *(Model(name=n, encoding=e) for n, e in OLDER.items()),
        *(
            Model(name=f"gpt-oss-{n}", encoding="o200k_harmony", window=131_072)
            for n in ("20b", "120b", "safeguard-20b", "safeguard-120b")
        ),
        *(
            Model(name=n, encoding="o200k_base", estimate=e, window=w)
            for n, (e, w) in HOSTED.items()
        ),
        *(Model(name=n, encoding=n) for n in ENCODINGS),
    )
}
# What may follow a name without changing its tokenizer: a day or a revision, for whom it is, and
# how a provider marks it. Everything else might be another model.
VARIANTS = (
    "mini|nano|pro|max|lite|8b|audio|realtime|search|codex|chat|latest|preview|exp|api|image|tts"
    "|transcribe|diarize|live|thinking|deep-research|cyber|luna|sol|terra"
)
REVISIONS = r"\d{4}-\d\d-\d\d|\d{8}|\d{4}|\d{3}|\d\d-\d\d|v\d"
ENDING = re.compile(
    rf"(?:[-@](?:{VARIANTS}|{REVISIONS}))*(?::(?:\d|free|extended|thinking|online))?"
)
PLAIN_ENDING = re.compile(rf"(?:[-@](?:preview|latest|{REVISIONS}))*(?:-?\d?:\d|:free)?")
PROVIDERS = re.compile(
    r"(?:(?:openai(?:-community)?|azure(?:_ai)?|anthropic|google(?:-[a-z]+)?|gemini|models|bedrock"
    r"|vertex(?:_ai)?|openrouter|github|litellm)[/:])+"
)
# Real models, but what they use is not known here, nor was an estimate measured.
UNKNOWN = (
    *("codex-mini", "computer-use", "gpt-audio", "gpt-image", "gpt-live", "gpt-realtime"),
    *("claude-1", "claude-2", "claude-v1", "claude-instant", "gpt-6", "gemini-4", "grok"),
)
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
    plain = _plain(name)
    for size in range(len(plain), 0, -1):
        row = TABLE.get(plain[:size])
        if row is not None and _ends_well(row, plain[size:]):
            return row
    last = plain.rsplit("/", 1)[-1]
    if last.startswith(OPEN_FAMILIES):
        raise RecipeError(
            f"{name}: its tokenizer is a file of its own; give the path of its tokenizer.json, or"
            " the name of a checkpoint that has it"
        )
    if re.match(rf"(?:{'|'.join(UNKNOWN)})(?![a-z0-9])", last):
        raise RecipeError(
            f"{name}: which tokenizer it uses is not known here; -m o200k_base counts as for gpt-5"
        )
    near = difflib.get_close_matches(last, known_models(), n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "give a model or a tokenizer.json"
    raise RecipeError(f"{name} is not a model whose tokenizer is known; {hint}")


def _plain(name: str) -> str:
    """Return a name without its provider, in its maker's spelling: Azure has names without dots."""
    plain = PROVIDERS.sub("", name.strip().lower(), count=1) if name else ""
    plain = re.sub(r"^ft:([^:]+):.*", r"\1", plain)
    plain = re.sub(r"^(?:[a-z-]+\.)?(?:anthropic|openai|google)\.", "", plain)
    plain = re.sub(r"^gpt-(35|41)(?=-|$)", lambda found: f"gpt-{found[1][0]}.{found[1][1]}", plain)
    plain = re.sub(r"^(claude)-(\d(?:[.-]\d)?)-(opus|sonnet|haiku)", r"\1-\3-\2", plain)
    return re.sub(r"^(claude-[a-z]+-\d)\.(\d)", r"\1-\2", plain)


def _ends_well(row: Model, rest: str) -> bool:
    """Whether what follows a known name leaves its tokenizer as it is."""
    if row.name in ENCODINGS:
        return not rest
    varied = row.encoding == "o200k_base"
    return (ENDING if varied else PLAIN_ENDING).fullmatch(rest) is not None


def known_models() -> list[str]:
    """Return the names that `resolve` knows, each of which may have a known ending."""
    return sorted(TABLE)
