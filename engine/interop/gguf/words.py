"""A tokenizer.json in GGUF's words: which kind, which `pre`, which scores; or none, said by name.

Everything here takes `spec`, a tokenizer.json as the tokenizers library writes it.
"""

import base64
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.errors import CheckpointError
from engine.interop.gguf.vocabulary import (
    BYTE,
    BYTES,
    CONTROL,
    FAMILIES,
    GPT2,
    NORMAL,
    ROLES,
    SAME,
    SPACE,
    TRIM,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    merges_from_scores,
)


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


def kind_of(spec: dict) -> str:
    """Return GGUF's `tokenizer.ggml.model`. Raises: CheckpointError if it has none for `spec`."""
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


def tokens_and_types(
    spec: dict, vocabulary: Mapping[str, int], vocab_size: int
) -> tuple[list[str], list[int]]:
    """Return a token and its type for every row of the embedding."""
    rows = max(vocabulary.values(), default=0) + 1
    if rows > vocab_size:
        raise CheckpointError(
            f"tokenizer.json: {rows} tokens for an embedding of {vocab_size} rows; "
            "use the tokenizer the model was trained with"
        )
    if len(set(vocabulary.values())) < len(vocabulary):
        raise CheckpointError("tokenizer.json: two tokens share an id; correct it")
    tokens, types = [f"[PAD{row}]" for row in range(vocab_size)], [UNUSED] * vocab_size
    byte_level = kind_of(spec) == "gpt2"
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


def describe_text(spec: dict, tokens: list[str], types: list[int]) -> dict[str, Any]:
    """Return the metadata that says how text becomes tokens.

    Raises: CheckpointError if GGUF has no word for it.
    """
    kind = kind_of(spec)
    if kind == "gpt2":
        return _describe_byte_level(spec)
    if kind == "llama":
        return _describe_sentencepiece(spec, tokens, types)
    return _describe_unigram(spec, len(tokens))


def _describe_byte_level(spec: dict) -> dict[str, Any]:
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
    if not spec["model"]["byte_fallback"] or spec["model"]["ignore_merges"]:
        raise _unfit("it is neither byte-level nor falls back to bytes by merges alone")
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


def _describe_unigram(spec: dict, rows: int) -> dict[str, Any]:
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
    scores = np.zeros(rows, np.float32)
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


def describe_roles(spec: dict, settings: dict, tokens: list[str]) -> dict[str, Any]:
    """Return the ids of the tokens with a role, and which of them go around a text.

    Raises: CheckpointError if `settings`, a tokenizer_config.json, contradicts `spec`.
    """
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    metadata: dict[str, Any] = {}
    for role, key in ROLES.items():
        name = settings.get(role)
        if isinstance(name, dict):
            name = name.get("content")
        if name is None and role == "unk_token":
            unknown = spec["model"].get("unk_id")
            name = spec["model"].get("unk_token") if unknown is None else tokens[unknown]
        if name is not None:
            if not isinstance(name, str) or name not in ids:
                raise CheckpointError(
                    f"tokenizer_config.json: {role} {name!r} is not in the vocabulary; correct it"
                )
            metadata[key] = ids[name]
    around = _around(spec)
    text = around.index("A")
    for end, names in (("bos", around[:text]), ("eos", around[text + 1 :])):
        wanted = settings.get(f"add_{end}_token")
        wanted = bool(names) if wanted is None else bool(wanted)
        own = metadata.get(ROLES[f"{end}_token"])
        if names and [ids.get(name) for name in names] != [own]:
            raise _unfit(f"it puts {' '.join(names)} around a text, not its {end}_token")
        if wanted and own is None:
            raise CheckpointError(
                f"tokenizer_config.json: add_{end}_token is set without {end}_token; name one"
            )
        metadata[f"tokenizer.ggml.add_{end}_token"] = wanted
    return metadata


def _around(spec: dict) -> list[str]:
    """Return the tokens put around a text, which is called A."""
    around = ["A"]
    for step in _steps(spec["post_processor"], "processors"):
        if step["type"] == "TemplateProcessing":
            around = [next(iter(part.values()))["id"] for part in step["single"]]
        if step["type"] not in ("TemplateProcessing", "ByteLevel") or around.count("A") != 1:
            raise _unfit(f"it finishes a text with {step['type']}")
    return around
