"""The `tokenizer.*` metadata of a GGUF file: what its words mean, and its arrays, checked.

A file holds tokens, types and scores or merges, and names everything else in a word:
`tokenizer.ggml.model` is the algorithm, and for byte-level BPE `tokenizer.ggml.pre` is how text is
cut before merging. PRES spells that word out. One it lacks is refused, because a guess would load,
run, and quietly make a good model worse.

Source: the GGUF specification; src/llama-vocab.cpp of ggml-org/llama.cpp, whose reading of a file
is what the file means; the published tokenizer.json files for regexes and normalizers.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from engine.errors import CheckpointError
from engine.text.tokenizer import SPLITS

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
SPACE = "▁"  # what SentencePiece writes for it
TRIM = ({"Regex": r"\A +| +\z"}, {"Regex": " {2,}"})  # what becomes nothing, what one space
AGAIN = "convert or download the file again"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
MAX_TOKENS, MAX_TOKEN_LENGTH, MAX_CHARACTERS = 2**21, 1024, 2**24  # beyond any published one

ROLES = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "eot_token": "tokenizer.ggml.eot_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
# What llama.cpp takes where a file does not say.
SILENT_ROLES: dict[str, dict[str, int]] = {
    "gpt2": {},
    "llama": {"bos_token": 1, "eos_token": 2, "unk_token": 0},
    "t5": {"eos_token": 1, "unk_token": 2, "pad_token": 0},
}


@dataclass(frozen=True)
class Pre:
    """Say how text is prepared for byte-level BPE under one of llama.cpp's `pre` names."""

    splits: tuple[str, ...]  # each cuts what the ones before it left whole
    ignore_merges: bool = False  # a word that is a token is taken whole, whatever the merges say
    nfc: bool = False  # published tokenizers compose characters first; llama.cpp never does
    add_bos: bool = False  # where the file does not say


ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{ENDING}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}"
QWEN2 = LLAMA3.replace("{1,3}", "")
QWEN35 = QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"\s\p{L}", r"\s\p{L}\p{M}")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
    rf"|\p{{N}}|{REST}"
).replace(r"[\r\n]*", r"[\r\n/]*")
GPT4O = (
    TEKKEN.replace(rf"{LOWER}+|", rf"{LOWER}+{ENDING}?|")
    .replace(rf"{LOWER}*|", rf"{LOWER}*{ENDING}?|")
    .replace(r"|\p{N}|", r"|\p{N}{1,3}|")
)
DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")

# On export the first name of the first row that fits is written.
FAMILIES = [
    ("gpt-2 phi-2 exaone4 gigachat a.x-4.0 mellum trillion granite-docling", Pre((GPT2,))),
    ("olmo mpt", Pre((GPT2,), nfc=True)),
    ("default", Pre((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))),
    ("falcon", Pre((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"))),
    ("smollm starcoder refact codeshell exaone minerva-7b mellum2", Pre((r"\p{N}", GPT2))),
    ("command-r", Pre((r"\p{N}", GPT2), nfc=True)),
    (
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 midm-2.0 lfm2",
        Pre((LLAMA3,), ignore_merges=True, add_bos=True),
    ),
    ("glm4", Pre((LLAMA3,), ignore_merges=True)),
    ("smaug-bpe dbrx chatglm-bpe", Pre((LLAMA3,))),
    ("qwen2", Pre((QWEN2,), nfc=True)),
    ("deepseek-r1-qwen megrez", Pre((QWEN2,))),
    ("qwen35", Pre((QWEN35,), nfc=True)),
    ("tekken", Pre((TEKKEN,), ignore_merges=True, add_bos=True)),
    ("gpt-4o llama4", Pre((GPT4O,))),
    ("deepseek-coder", Pre(DEEPSEEK_CODER)),
    ("deepseek-v3", Pre((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK_V3))),
]
PRES = {name: pre for names, pre in FAMILIES for name in names.split()}
# Another spelling that cuts every text alike. This one is cl100k's: its possessive `?+` and `++`
# have nothing to give back, and a greedy `\s*` before one `[\r\n]` already reaches the last one.
SAME = {SPLITS["gpt4"]: LLAMA3}


class Keys:
    """Typed access to metadata that may hold anything."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self.metadata, self.where = metadata, where

    def error(self, what: str, fix: str = AGAIN) -> CheckpointError:
        """Return the error that says what is wrong in this file and what to do."""
        return CheckpointError(f"{self.where}: {what}; {fix}")

    def one(self, key: str, kind: type, default: Any = None) -> Any:
        """Return a single value; without a default it must be there."""
        value = self.metadata.get(key, default)
        value = value.item() if isinstance(value, np.generic) else value
        if value is None:
            raise self.error(f"{key} is missing")
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(f"{key} should be {kind.__name__}, not {type(value).__name__}")
        return value

    def many(self, key: str, kinds: set[type], length: int | None = None) -> list:
        """Return an array, empty if it is missing, of values of `kinds`."""
        values = self.metadata.get(key, [])
        if isinstance(values, np.ndarray) and values.ndim == 1:
            values = values.tolist()
        if not isinstance(values, (list, tuple)):
            raise self.error(f"{key} should be an array, not {type(values).__name__}")
        if wrong := {type(value) for value in values} - kinds:
            raise self.error(f"{key} should not hold {wrong.pop().__name__}")
        if values and length is not None and len(values) != length:
            raise self.error(f"{key} has {len(values)} entries for {length} tokens")
        return list(values)


@dataclass(frozen=True)
class Vocabulary:
    """What a file says about its tokens, checked."""

    kind: str
    pre: Pre  # for gpt2 alone
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[tuple[str, str]]
    roles: dict[str, int]
    flags: dict[str, bool]
    charsmap: bytes
    template: str
    context_length: int

    @cached_property
    def ids(self) -> dict[str, int]:
        """Return the id of every token."""
        return {token: token_id for token_id, token in enumerate(self.tokens)}


def read_vocabulary(metadata: Mapping[str, Any], where: str) -> Vocabulary:
    """Return the tokens of a GGUF file and what it says about them; `where` names it in errors.

    Raises: CheckpointError if something is missing, malformed, contradictory or of unknown kind.
    """
    keys = Keys(metadata, where)
    kind = keys.one("tokenizer.ggml.model", str)
    if kind not in SILENT_ROLES:
        known = ", ".join(SILENT_ROLES)
        raise keys.error(f"tokenizer kind {kind!r} is not supported", f"only {known} are")
    pre = _read_pre(keys) if kind == "gpt2" else Pre(())
    tokens = _read_tokens(keys)
    types, scores = _read_types_and_scores(keys, len(tokens), kind)
    roles = _read_roles(keys, kind, types)
    bytes_too = kind == "llama" and set(BYTES) <= set(tokens)
    if kind != "gpt2" and "unk_token" not in roles and not bytes_too:
        raise keys.error("there is no token for characters outside the vocabulary")
    while _is_padding(tokens[-1], types[-1]) and len(tokens) - 1 not in roles.values():
        tokens.pop()  # a row of the embedding that the published vocabulary does not have
        types.pop()
    architecture = keys.one("general.architecture", str, "")
    return Vocabulary(
        kind=kind,
        pre=pre,
        tokens=tokens,
        types=types,
        scores=scores[: len(tokens)],
        merges=_read_merges(keys, tokens, required=kind == "gpt2"),
        roles=roles,
        flags=_read_flags(keys, kind, pre, roles),
        charsmap=_read_charsmap(keys),
        template=keys.one("tokenizer.chat_template", str, ""),
        context_length=keys.one(f"{architecture}.context_length", int, 0),
    )


def _read_pre(keys: Keys) -> Pre:
    name = keys.one("tokenizer.ggml.pre", str, "default")
    if name not in PRES:
        known = ", ".join(sorted(PRES))
        raise keys.error(f"pre-tokenizer {name!r} is not supported", f"only {known} are")
    return PRES[name]


def _read_types_and_scores(keys: Keys, count: int, kind: str) -> tuple[list[int], list[float]]:
    types = keys.many("tokenizer.ggml.token_type", {int}, count) or [NORMAL] * count
    scores = keys.many("tokenizer.ggml.scores", {float, int}, count)
    if kind != "gpt2" and not scores:
        raise keys.error("tokenizer.ggml.scores is missing")
    try:
        scores = [float(score) for score in scores]
    except OverflowError:
        scores = [math.inf]
    if not all(map(math.isfinite, scores)):
        raise keys.error("tokenizer.ggml.scores holds a value that is not a finite number")
    return types, scores


def _read_flags(keys: Keys, kind: str, pre: Pre, roles: Mapping[str, int]) -> dict[str, bool]:
    silent = {
        "add_bos_token": pre.add_bos or kind == "llama",
        "add_eos_token": kind == "t5",
        "add_space_prefix": kind == "llama",
        "remove_extra_whitespaces": False,
    }
    flags = {name: keys.one(f"tokenizer.ggml.{name}", bool, silent[name]) for name in silent}
    for end in ("bos", "eos"):
        if flags[f"add_{end}_token"] and f"{end}_token" not in roles:
            raise keys.error(f"text should get a {end} token, but {end}_token_id is missing")
    return flags


def _is_padding(token: str, token_type: int) -> bool:
    return token_type == UNUSED and re.fullmatch(r"\[PAD\d+\]", token) is not None


def _read_tokens(keys: Keys) -> list[str]:
    tokens = keys.many("tokenizer.ggml.tokens", {str})
    if not 0 < len(tokens) <= MAX_TOKENS:
        raise keys.error(f"tokenizer.ggml.tokens has {len(tokens)} entries, not 1 … {MAX_TOKENS}")
    longest, total = max(map(len, tokens)), sum(map(len, tokens))
    if longest > MAX_TOKEN_LENGTH or total > MAX_CHARACTERS:
        raise keys.error(f"tokens are absurdly long: up to {longest}, together {total} characters")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]  # as llama.cpp names them
    seen: set[str] = set()
    for token_id, token in enumerate(tokens):
        if token in seen:
            raise keys.error(f"token {token_id} {token!r} is there twice")
        seen.add(token)
    try:
        "".join(tokens).encode()
    except UnicodeEncodeError:
        raise keys.error("tokenizer.ggml.tokens is not UTF-8") from None
    return tokens


def _read_roles(keys: Keys, kind: str, types: list[int]) -> dict[str, int]:
    """Return the ids of the tokens with a role, as far as they are known.

    A converter that had no unknown or padding token may have named an ordinary one, such as `!`.
    Taking that for special would tear it out of every text, so such a claim is dropped.
    """
    roles = {}
    for role, key in ROLES.items():
        token_id = keys.one(key, int, SILENT_ROLES[kind].get(role, -1))
        if key in keys.metadata and not 0 <= token_id < len(types):
            raise keys.error(f"{key} {token_id} is outside 0 … {len(types) - 1}")
        if 0 <= token_id < len(types):
            needless = role == "pad_token" or (role == "unk_token" and kind != "t5")
            ordinary = needless and types[token_id] == NORMAL
            if not ordinary:
                roles[role] = token_id
    return roles


def _read_merges(keys: Keys, tokens: list[str], required: bool) -> list[tuple[str, str]]:
    if required and "tokenizer.ggml.merges" not in keys.metadata:
        raise keys.error("tokenizer.ggml.merges is missing")
    known = set(tokens)
    merges: dict[tuple[str, str], None] = {}  # of two equal ones the first counts
    for merge in keys.many("tokenizer.ggml.merges", {str}):
        cut = merge.find(" ", 1)
        left, right = merge[:cut], merge[cut + 1 :]
        if cut < 0 or not known.issuperset((left, right, left + right)):
            raise keys.error(f"merge {merge!r} does not join two tokens into a third")
        merges.setdefault((left, right))
    return list(merges)


def _read_charsmap(keys: Keys) -> bytes:
    """Return SentencePiece's table of replacements: the size of a trie, the trie, the strings.

    The library that walks the trie trusts it, so every step it could take is checked first.
    """
    values = keys.many("tokenizer.ggml.precompiled_charsmap", {int})
    if not all(-128 <= value <= 255 for value in values):
        raise keys.error("tokenizer.ggml.precompiled_charsmap does not hold bytes")
    charsmap = bytes(value & 255 for value in values)
    size = int.from_bytes(charsmap[:4], "little")
    if charsmap and (size % 4 or not 4 <= size <= len(charsmap) - 4):
        raise keys.error("tokenizer.ggml.precompiled_charsmap is cut short")
    if charsmap and not _is_trie(charsmap[4 : size + 4], charsmap[size + 4 :]):
        raise keys.error("tokenizer.ggml.precompiled_charsmap points outside itself")
    return charsmap


def _is_trie(units: bytes, strings: bytes) -> bool:
    """Tell whether each node of a double array has its children, and its string, within bounds."""
    unit = np.frombuffer(units, "<u4").astype(np.int64)
    child = np.arange(len(unit)) ^ ((unit >> 10) << ((unit & 512) >> 6))
    node = unit < 2**31  # the others are values: where in `strings` a replacement starts
    if not node[0] or (child[node] | 255).max() >= len(unit):
        return False
    value = unit[child[node & (unit & 256 > 0)]] & (2**31 - 1)
    try:
        starts = np.cumsum([len(c.encode()) for c in strings.decode()])
    except UnicodeDecodeError:
        return False
    return bool(np.isin(value, [0, *starts]).all() and (value < len(strings)).all())


def merges_from_scores(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """Return the merges that SentencePiece's scores stand for: best first, every way to make each.

    Only normal tokens take part: text never becomes a control token, and user-defined ones have
    been taken out of it before.
    Source: SentencePieceExtractor in transformers, whose order it gives.
    """
    normal = {
        t: score for t, score, kind in zip(tokens, scores, types, strict=True) if kind == NORMAL
    }
    ranked = []
    for rank, (token, score) in enumerate(normal.items()):
        for cut in range(1, len(token)):
            if token[:cut] in normal and token[cut:] in normal:
                ranked.append((-score, rank, -cut, token))
    return [(token[:-cut], token[-cut:]) for _, _, cut, token in sorted(ranked)]
