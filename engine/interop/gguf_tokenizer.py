"""Tokenizers in GGUF files: a tokenizer.json out of their metadata, and the metadata out of one.

Source: src/llama-vocab.cpp and conversion/ of ggml-org/llama.cpp; the tokenizers library's format.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer as FastTokenizer

from engine.errors import CheckpointError
from engine.interop.gguf_vocabulary import (
    BYTE,
    CONTROL,
    FAMILIES,
    GPT2,
    NORMAL,
    ROLES,
    SAME,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    merges_from_scores,
    read_vocabulary,
)

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPACE = "▁"
TRIM = ({"Regex": r"\A +| +\z"}, {"Regex": " {2,}"})  # what becomes nothing, what one space


def tokenizer_from_gguf(metadata: Mapping[str, Any], where: str) -> tuple[str, dict]:
    """Rebuild the tokenizer of a GGUF file from its metadata; `where` names the file in errors.

    Returns: the text of tokenizer.json and the content of tokenizer_config.json.
    Raises: CheckpointError if the metadata is incomplete or contradicts itself, or names a kind or
    a `pre` that this module does not know.
    """
    vocabulary = read_vocabulary(metadata, where)
    parts = {"gpt2": _byte_level, "llama": _sentencepiece, "t5": _unigram}[vocabulary.kind]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(vocabulary),
        **parts(vocabulary),
        "post_processor": _post_processor(vocabulary),
    }
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{role: vocabulary.tokens[token_id] for role, token_id in vocabulary.roles.items()},
        "add_bos_token": vocabulary.flags["add_bos_token"],
        "add_eos_token": vocabulary.flags["add_eos_token"],
        "clean_up_tokenization_spaces": False,
    }
    if vocabulary.context_length:
        settings["model_max_length"] = vocabulary.context_length
    if vocabulary.template:
        settings["chat_template"] = vocabulary.template
    return json.dumps(tokenizer, ensure_ascii=False), settings


def _added_tokens(vocabulary: Vocabulary) -> list[dict]:
    """Return the tokens that are looked for in the text itself, before anything else."""
    ends = {vocabulary.roles.get(role) for role in ("bos_token", "eos_token", "eot_token")}
    return [
        {
            "id": token_id,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": token_type != USER_DEFINED,
        }
        for token_id, (token, token_type) in enumerate(
            zip(vocabulary.tokens, vocabulary.types, strict=True)
        )
        if token_type in (UNKNOWN, CONTROL, USER_DEFINED) or token_id in ends
    ]


def _post_processor(vocabulary: Vocabulary) -> dict | None:
    """Return what puts the begin and end tokens around a text, if the file wants them."""
    around = {}
    for end in ("bos", "eos"):
        if vocabulary.flags[f"add_{end}_token"]:
            around[end] = vocabulary.tokens[vocabulary.roles[f"{end}_token"]]
    if not around:
        return None

    def framed(name: str, segment: int) -> list[dict]:
        parts = [("SpecialToken", around.get("bos")), ("Sequence", name)]
        parts.append(("SpecialToken", around.get("eos")))
        return [{kind: {"id": i, "type_id": segment}} for kind, i in parts if i is not None]

    ids = vocabulary.ids
    return {
        "type": "TemplateProcessing",
        "single": framed("A", 0),
        "pair": framed("A", 0) + framed("B", 1),
        "special_tokens": {
            token: {"id": token, "ids": [ids[token]], "tokens": [token]}
            for token in around.values()
        },
    }


def _byte_level(vocabulary: Vocabulary) -> dict:
    """Return the parts of a byte-level BPE tokenizer."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps: list[dict] = [
        {"type": "Split", "pattern": {"Regex": r}, "behavior": "Isolated", "invert": False}
        for r in vocabulary.pre.splits
    ]
    return {
        "normalizer": {"type": "NFC"} if vocabulary.pre.nfc else None,
        "pre_tokenizer": _sequence("pretokenizers", [*steps, byte_level | {"use_regex": False}]),
        "decoder": byte_level | {"use_regex": True},
        "model": _bpe(vocabulary, vocabulary.merges, ignore_merges=vocabulary.pre.ignore_merges),
    }


def _sentencepiece(vocabulary: Vocabulary) -> dict:
    """Return the parts of a SentencePiece BPE tokenizer: spaces are marked, nothing is cut."""
    prefix = vocabulary.flags["add_space_prefix"]
    mark = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    decode = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    merges = vocabulary.merges or merges_from_scores(
        vocabulary.tokens, vocabulary.scores, vocabulary.types
    )
    unknown = vocabulary.roles.get("unk_token")
    return {
        # Prepend acts on every stretch between added tokens, as llama.cpp does.
        "normalizer": _sequence(
            "normalizers", [{"type": "Prepend", "prepend": SPACE}, mark] if prefix else [mark]
        ),
        "pre_tokenizer": None,
        "decoder": _sequence("decoders", decode if prefix else decode[:-1]),
        "model": _bpe(
            vocabulary,
            merges,
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=vocabulary.ids.keys() >= set(BYTES),
        ),
    }


def _bpe(vocabulary: Vocabulary, merges: Sequence[tuple[str, str]], **settings: Any) -> dict:
    bare = {"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    unset = {"unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE", **bare, **unset, **settings, "vocab": vocabulary.ids, "merges": merges}


def _unigram(vocabulary: Vocabulary) -> dict:
    """Return the parts of a SentencePiece unigram tokenizer."""
    steps: list[dict] = []
    if vocabulary.charsmap:
        charsmap = base64.b64encode(vocabulary.charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if vocabulary.flags["remove_extra_whitespaces"]:
        steps += [
            {"type": "Replace", "pattern": pattern, "content": content}
            for pattern, content in zip(TRIM, ("", " "), strict=True)
        ]
    prefix = "always" if vocabulary.flags["add_space_prefix"] else "never"
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": prefix}
    return {
        "normalizer": _sequence("normalizers", steps) if steps else None,
        "pre_tokenizer": metaspace | {"split": False},
        "decoder": metaspace | {"split": False},
        "model": {
            "type": "Unigram",
            "unk_id": vocabulary.roles.get("unk_token"),
            "vocab": [
                list(pair) for pair in zip(vocabulary.tokens, vocabulary.scores, strict=True)
            ],
            "byte_fallback": vocabulary.ids.keys() >= set(BYTES),
        },
    }


def _sequence(name: str, steps: list[dict]) -> dict:
    return {"type": "Sequence", name: steps}


def tokenizer_to_gguf(
    tokenizer_json: dict, settings: dict, vocab_size: int, template: str | None
) -> dict[str, Any]:
    """Return the metadata that makes a GGUF reader cut text as this tokenizer does.

    `settings` is tokenizer_config.json; `vocab_size` the rows of the embedding, more than there are
    tokens if need be; `template` the chat template. An int in the result is a GGUF uint32.
    Raises: CheckpointError if GGUF has no word for how this tokenizer works.
    """
    try:
        inner = FastTokenizer.from_str(json.dumps(tokenizer_json))
    except Exception as error:  # noqa: BLE001 (the library raises nothing more specific)
        raise CheckpointError(f"tokenizer.json: cannot be read ({error}); check the file") from None
    spec = json.loads(inner.to_str())  # spelled as the library does today, whoever wrote it
    kind = _kind(spec)
    tokens, types = _tokens_and_types(spec, inner.get_vocab(), vocab_size)
    describe = {"gpt2": _describe_byte_level, "llama": _describe_sentencepiece}
    metadata = {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        **describe.get(kind, _describe_unigram)(spec, tokens, types),
        **_describe_roles(spec, settings, tokens),
    }
    if template:
        metadata["tokenizer.chat_template"] = template
    return metadata


def _unfit(what: str) -> CheckpointError:
    return CheckpointError(
        f"tokenizer.json: {what}, which GGUF has no word for; "
        "keep the model in its folder, or train one whose tokenizer splits text as `gpt4` does"
    )


def _steps(part: dict | None, name: str) -> list[dict]:
    """Return the steps of a part that may be absent, one step or a sequence of them."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for inner in part[name] for step in _steps(inner, name)]
    return [part]


def _kind(spec: dict) -> str:
    kind = spec["model"]["type"]
    if kind == "Unigram":
        return "t5"
    if kind != "BPE":
        raise _unfit(f"its model is {kind}")
    if odd := [
        key
        for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout")
        if spec["model"][key]
    ]:
        raise _unfit(f"its BPE has {odd[0]}")
    steps = _steps(spec["pre_tokenizer"], "pretokenizers")
    return "gpt2" if any(step["type"] == "ByteLevel" for step in steps) else "llama"


def _tokens_and_types(
    spec: dict, vocabulary: Mapping[str, int], vocab_size: int
) -> tuple[list[str], list[int]]:
    """Return a token and its type for every row of the embedding."""
    if max(vocabulary.values()) >= vocab_size:
        raise CheckpointError(
            f"tokenizer.json: {max(vocabulary.values()) + 1} tokens for an embedding of "
            f"{vocab_size} rows; use the tokenizer the model was trained with"
        )
    tokens, types = [f"[PAD{row}]" for row in range(vocab_size)], [UNUSED] * vocab_size
    byte_level = _kind(spec) == "gpt2"
    for token, token_id in vocabulary.items():
        tokens[token_id] = token
        types[token_id] = BYTE if not byte_level and token in BYTES else NORMAL
    for added in spec["added_tokens"]:
        if not added["special"] and (added["single_word"] or added["lstrip"] or added["rstrip"]):
            raise _unfit(f"{added['content']!r} takes more of the text than itself")
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
        if not byte_level and added["content"] == spec["model"].get("unk_token"):
            types[added["id"]] = UNKNOWN
        if not added["special"] and not byte_level:  # found before spaces are marked
            tokens[added["id"]] = added["content"].replace(SPACE, " ")
    if len(set(tokens)) < vocab_size:
        raise CheckpointError("tokenizer.json: a token is named [PADn]; rename it")
    return tokens, types


def _describe_byte_level(spec: dict, tokens: list[str], types: list[int]) -> dict[str, Any]:
    """Find the `pre` that splits text as `spec` does."""
    splits = []
    steps = _steps(spec["pre_tokenizer"], "pretokenizers")
    for step in steps:
        if step["type"] == "ByteLevel" and step is steps[-1] and not step["add_prefix_space"]:
            splits += [GPT2] if step["use_regex"] else []
        elif step["type"] == "Digits" and step["individual_digits"]:
            splits.append(r"\p{N}")
        elif (
            step["type"] == "Split"
            and "Regex" in step["pattern"]
            and ((step["behavior"], step["invert"]) in (("Isolated", False), ("Removed", True)))
        ):
            regex = step["pattern"]["Regex"]
            splits.append(SAME.get(regex, regex))
        else:
            raise _unfit(f"it prepares text with {json.dumps(step)}")
    normalizers = [step["type"] for step in _steps(spec["normalizer"], "normalizers")]
    if normalizers not in ([], ["NFC"]):
        raise _unfit(f"it normalizes text with {', '.join(normalizers)}")
    ignore_merges, nfc = spec["model"]["ignore_merges"], bool(normalizers)
    for names, pre in FAMILIES:
        if (pre.splits, pre.ignore_merges, pre.nfc) == (tuple(splits), ignore_merges, nfc):
            return {
                "tokenizer.ggml.pre": names.split()[0],
                "tokenizer.ggml.merges": [" ".join(pair) for pair in spec["model"]["merges"]],
            }
    how = f"{'with' if ignore_merges else 'without'} ignore_merges, {'NFC' if nfc else 'no NFC'}"
    raise _unfit(f"it splits text at {' then '.join(splits)} ({how})")


def _describe_sentencepiece(spec: dict, tokens: list[str], types: list[int]) -> dict[str, Any]:
    """Turn merges into scores, if they are such that scores can say the same."""
    mark = ("Replace", {"String": " "}, SPACE)
    steps = _steps(spec["normalizer"], "normalizers")
    prefix = bool(steps) and steps[0]["type"] == "Prepend" and steps[0]["prepend"] == SPACE
    normalizers = [(s["type"], s.get("pattern"), s.get("content")) for s in steps[prefix:]]
    splits = [  # spaces are marked by then, so a split at them does nothing: Gemma's has one
        step
        for step in _steps(spec["pre_tokenizer"], "pretokenizers")
        if (step["type"], step.get("pattern")) != ("Split", {"String": " "})
    ]
    if normalizers != [mark] or splits:
        raise _unfit(f"it prepares text with {json.dumps([*steps, *splits])}")
    normal = {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    merges = [
        (left, right)
        for left, right in spec["model"]["merges"]
        if normal.issuperset((left, right, left + right))
    ]
    rank: dict[str, int] = {}
    ranks = [rank.setdefault(left + right, len(rank)) for left, right in merges]
    scores = [-float(rank.get(token, len(rank))) for token in tokens]
    if ranks != sorted(ranks) or set(merges) != set(merges_from_scores(tokens, scores, types)):
        raise _unfit("its merges are not, token by token, all the ways to make it")
    return {
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def _describe_unigram(spec: dict, tokens: list[str], types: list[int]) -> dict[str, Any]:
    """Say what a unigram tokenizer does with spaces, and its scores."""
    charsmap, trimmed = b"", False
    for step in _steps(spec["normalizer"], "normalizers"):
        if step["type"] == "Precompiled":
            charsmap = base64.b64decode(step["precompiled_charsmap"])
        elif step["type"] == "Replace" and step["pattern"] in TRIM:
            trimmed = True
        else:
            raise _unfit(f"it normalizes text with {json.dumps(step)}")
    steps = _steps(spec["pre_tokenizer"], "pretokenizers")
    if steps and steps[0] == {"type": "WhitespaceSplit"}:
        trimmed, steps = True, steps[1:]
    if len(steps) != 1 or steps[0]["type"] != "Metaspace" or steps[0]["prepend_scheme"] == "first":
        raise _unfit(f"it prepares text with {json.dumps(steps)}")
    scores = np.zeros(len(tokens), np.float32)
    known = [score for _, score in spec["model"]["vocab"]]
    scores[: len(known)] = known
    metadata = {
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": steps[0]["prepend_scheme"] == "always",
        "tokenizer.ggml.remove_extra_whitespaces": trimmed,
    }
    if charsmap:
        metadata["tokenizer.ggml.precompiled_charsmap"] = np.frombuffer(charsmap, np.uint8)
    return metadata


def _describe_roles(spec: dict, settings: dict, tokens: list[str]) -> dict[str, Any]:
    """Return the ids of the tokens with a role, and which of them go around a text."""
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    metadata: dict[str, Any] = {}
    for role, key in ROLES.items():
        name = settings.get(role)
        name = name["content"] if isinstance(name, dict) else name
        if name is None and role == "unk_token":
            name = spec["model"].get("unk_token")
        if name is None:
            continue
        if name not in ids:
            raise CheckpointError(f"tokenizer_config.json: {role} {name!r} is no token; correct it")
        metadata[key] = ids[name]
    if metadata.get(ROLES["unk_token"]) is None and spec["model"].get("unk_id") is not None:
        metadata[ROLES["unk_token"]] = spec["model"]["unk_id"]
    frames = [s for s in _steps(spec["post_processor"], "processors") if "single" in s]
    around = [next(iter(part.values()))["id"] for part in frames[0]["single"]] if frames else ["A"]
    text = around.index("A")
    for end, names in (("bos", around[:text]), ("eos", around[text + 1 :])):
        wanted = settings.get(f"add_{end}_token")
        wanted = bool(names) if wanted is None else bool(wanted)
        own = metadata.get(ROLES[f"{end}_token"])
        if names and [ids.get(name) for name in names] != [own]:
            raise _unfit(f"it puts {' '.join(names)} around a text, not its {end}_token")
        if wanted and own is None:
            raise CheckpointError(f"tokenizer_config.json: add_{end}_token without {end}_token")
        metadata[f"tokenizer.ggml.add_{end}_token"] = wanted
    return metadata
