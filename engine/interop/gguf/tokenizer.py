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
from engine.interop.gguf.vocabulary import (
    BYTES,
    CONTROL,
    SPACE,
    TRIM,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
    merges_from_scores,
    read_vocabulary,
)
from engine.interop.gguf.words import describe_roles, describe_text, kind_of, tokens_and_types


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
    bos, eos = (
        [vocabulary.tokens[vocabulary.roles[f"{end}_token"]]]
        if vocabulary.flags[f"add_{end}_token"]
        else []
        for end in ("bos", "eos")
    )
    if not bos + eos:
        return None
    pair = [
        {kind: {"id": name, "type_id": segment}}
        for segment, text in enumerate("AB")
        for kind, names in (("SpecialToken", bos), ("Sequence", [text]), ("SpecialToken", eos))
        for name in names
    ]
    ids = vocabulary.ids
    special = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in bos + eos}
    return {
        "type": "TemplateProcessing",
        "single": pair[: len(pair) // 2],
        "pair": pair,
        "special_tokens": special,
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
    tokens, types = tokens_and_types(spec, inner.get_vocab(), vocab_size)
    metadata = {
        "tokenizer.ggml.model": kind_of(spec),
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        **describe_text(spec, tokens, types),
        **describe_roles(spec, settings, tokens),
    }
    if template:
        metadata["tokenizer.chat_template"] = template
    return metadata
