"""The keys of a GGUF file ↔ config.json, in Hugging Face's words.

Reading is the definition. Writing makes the keys, reads them back and refuses every difference, so
a config that a file cannot say is never written as something else.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from engine.errors import CheckpointError
from engine.interop.gguf.keys import Keys, Source
from engine.interop.gguf.names import ARCHITECTURES
from engine.interop.gguf.rope import read_scaling, write_scaling

# key in the file → key in config.json
_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_GPT2_KEYS = {
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "attention.head_count": "n_head",
    "attention.head_count_kv": "n_head",
    "vocab_size": "vocab_size",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
_IDS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
# What config.json says that changes nothing in a model that is run, or stands elsewhere in a file.
_INERT = {
    "architectures", "model_type", "dtype", "use_cache", "initializer_range", "n_ctx",
    "attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "pretraining_tp",
    "max_window_layers", *_IDS,
}  # fmt: skip
_ALIKE = {"use_cache": True, "initializer_range": 0.02, "attention_dropout": 0.0}
_SILU = {"hidden_act": "silu"}
_GELU = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attn_logit_softcapping": None,
    "attention_bias": False,
}
# llama.cpp tells the 27B models, whose scale is another, by their number of layers.
_BIG_GEMMA = {"gemma2": 46, "gemma3": 62}
_GEMMA3_PERIOD = 6
_CAPS = {
    "gemma2": ("attn_logit_softcapping", "final_logit_softcapping"),
    "gemma3": ("final_logit_softcapping",),
}


def to_config(source: Source) -> dict[str, Any]:
    """Describe a file as config.json does, floats as the decimals that were meant.

    Raises: CheckpointError naming the key that is missing, impossible or not understood.
    """
    keys = Keys(source)
    name = keys.architecture
    arch = ARCHITECTURES[name]
    config = {"architectures": [arch.hf_class], "model_type": arch.model_types[0]}
    config |= _shape(keys)
    for key, ours in _IDS.items():
        token = source.metadata.get(ours)
        config[key] = token if type(token) is int and 0 <= token < config["vocab_size"] else None
    config["tie_word_embeddings"] = not keys.has("output.weight")
    config |= _gpt2(keys, config) if name == "gpt2" else _decoder(keys, config)
    keys.finish()
    return config | {"dtype": "float32"}


def _shape(keys: Keys) -> dict[str, Any]:
    """Read the sizes that every model has."""
    shape: dict[str, Any] = {}
    for ours, theirs in (_GPT2_KEYS if keys.architecture == "gpt2" else _KEYS).items():
        if ours.endswith("epsilon"):
            shape[theirs] = keys.real(ours)
        elif ours == "vocab_size":
            rows = keys.source.tensors.get("token_embd.weight")
            shape[theirs] = keys.size(ours, rows and rows.shape[0])
        elif ours == "attention.head_count_kv":
            heads = keys.size("attention.head_count")
            groups = keys.size(ours, heads)
            if heads % groups or (keys.architecture == "gpt2" and heads != groups):
                raise keys.error(f"has {heads} heads and {groups} key/value heads")
            shape[theirs] = groups
        else:
            shape[theirs] = keys.size(ours)
    layers = keys.size("block_count")
    if layers > len(keys.source.tensors):
        raise keys.error(f"claims {layers} layers with {len(keys.source.tensors)} tensors")
    if shape["vocab_size"] is None:
        raise keys.error("lacks the tensor token_embd.weight")
    return shape


def _gpt2(keys: Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    """Read what only GPT-2 has."""
    inner, d = keys.size("feed_forward_length"), config["n_embd"]
    if d % config["n_head"]:
        raise keys.error(f"has {config['n_head']} heads, which do not divide {d}")
    return {
        "n_ctx": config["n_positions"],
        "n_inner": None if inner == 4 * d else inner,
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
    }


def _decoder(keys: Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    """Read what the models with rotary positions have."""
    name, arch = keys.architecture, ARCHITECTURES[keys.architecture]
    usual = config["hidden_size"] / config["num_attention_heads"]
    head_dim = keys.size("attention.key_length", int(usual))
    if head_dim % 2 or (head_dim != usual and not arch.own_head_dim):
        raise keys.error(f"has heads of {head_dim} in a model where {usual:g} would be right")
    if keys.size("attention.value_length", head_dim) != head_dim:
        raise keys.error(f"{name}.attention.value_length is not the key length, {head_dim}")
    theta = keys.real("rope.freq_base", 10000.0)
    if theta < 1:
        raise keys.error(f"{name}.rope.freq_base is {theta}")
    found: dict[str, Any] = {**_ALIKE, "rope_theta": theta}
    if arch.own_head_dim:
        found["head_dim"] = head_dim
    found["rope_scaling"] = read_scaling(keys, theta, head_dim)
    found |= _SPECIAL.get(name, _plain)(keys, config, head_dim)
    if name != "phi3" and keys.size("rope.dimension_count", head_dim) != head_dim:
        raise keys.error(f"{name}.rope.dimension_count is not the key length, {head_dim}")
    return found


def _plain(keys: Keys, config: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """Read what is special to models that have little special: biases and full attention."""
    name, layers = keys.architecture, config["num_hidden_layers"]
    window = keys.whole("attention.sliding_window", 0)
    found: dict[str, Any] = dict(_SILU)
    if name == "llama" and window and not keys.has("blk.0.attn_q.bias"):
        found |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
        return found | {"sliding_window": window}
    if window:
        raise keys.error(f"{name}.attention.sliding_window is {window}, which {name} has not")
    if name in ("qwen2", "qwen3", "smollm3"):
        found |= {"use_sliding_window": False, "sliding_window": None}
        found["layer_types"] = ["full_attention"] * layers
    if name == "smollm3":  # llama.cpp has this rule in its code
        found["no_rope_layers"] = [int((i + 1) % 4 != 0) for i in range(layers)]
        found["no_rope_layer_interval"] = 4
    if ARCHITECTURES[name].optional_biases:
        found["attention_bias"] = keys.has("blk.0.attn_q.bias")
        found["mlp_bias"] = keys.has("blk.0.ffn_up.bias")
    elif name != "qwen2":
        found["attention_bias"] = False
    return found


def _phi3(keys: Keys, config: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """Read windows, the rotated part of a head and the context before it was stretched."""
    rotated = keys.size("rope.dimension_count", head_dim)
    if rotated > head_dim or rotated % 2:
        raise keys.error(f"phi3.rope.dimension_count is {rotated}, a head has {head_dim}")
    context = config["max_position_embeddings"]
    return _SILU | {
        "partial_rotary_factor": rotated / head_dim,
        "original_max_position_embeddings": keys.size(
            "rope.scaling.original_context_length", context
        ),
        "sliding_window": keys.whole("attention.sliding_window", 0) or None,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    }


def _gemma(keys: Keys, config: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """Read windows, caps and the scale of attention."""
    name, layers = keys.architecture, config["num_hidden_layers"]
    big = layers == _BIG_GEMMA[name]
    scale = config["hidden_size"] // config["num_attention_heads"] if big else head_dim
    found: dict[str, Any] = {**_GELU, "query_pre_attn_scalar": scale}
    if name == "gemma2":
        found["attn_logit_softcapping"] = keys.real("attn_logit_softcapping", 50.0)
        found["final_logit_softcapping"] = keys.real("final_logit_softcapping", 30.0)
        found["sliding_window"] = keys.size("attention.sliding_window", 4096)
    else:
        found["final_logit_softcapping"] = keys.real("final_logit_softcapping", None) or None
        found["sliding_window"] = keys.size("attention.sliding_window")
        found["rope_local_base_freq"] = keys.real("rope.freq_base_swa", 10000.0)
    pattern = keys.flags("attention.sliding_window_pattern", layers)
    if pattern is None:
        pattern = 2 if name == "gemma2" else _GEMMA3_PERIOD
    if isinstance(pattern, int):
        pattern = [(i + 1) % pattern != 0 for i in range(layers)]
    kinds = {True: "sliding_attention", False: "full_attention"}
    found["layer_types"] = [kinds[sliding] for sliding in pattern]
    return found


_SPECIAL = {"gemma2": _gemma, "gemma3": _gemma, "phi3": _phi3}


def architecture_of(config: Mapping[str, Any]) -> str:
    """Name the architecture of a config. Raises: CheckpointError if there is none."""
    for name, arch in ARCHITECTURES.items():
        if config.get("model_type") in arch.model_types:
            return name
    known = ", ".join(kind for arch in ARCHITECTURES.values() for kind in arch.model_types)
    raise CheckpointError(
        f"config.json: model type {config.get('model_type')!r} has no place in a GGUF file;"
        f" known are {known}"
    )


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """Spell out what a config.json leaves to defaults, rotary positions in the classic words.

    Raises: CheckpointError if something is missing that has no default.
    """
    name = architecture_of(config)
    full = dict(config)
    if full.get("tie_word_embeddings") is None:
        full["tie_word_embeddings"] = ARCHITECTURES[name].tied
    needed = _GPT2_KEYS if name == "gpt2" else _KEYS
    if name == "gpt2":
        full.setdefault("n_inner", None)
    else:
        if full.get("num_key_value_heads") is None:
            full["num_key_value_heads"] = full.get("num_attention_heads")
        full |= _rope_words(full)
        if not full.get("use_sliding_window", True):
            full["sliding_window"] = None
    for key in needed.values():
        if not isinstance(full.get(key), int | float):
            raise CheckpointError(f"config.json lacks {key}; complete it")
    if name != "gpt2" and full.get("head_dim") is None:
        full["head_dim"] = full["hidden_size"] // full["num_attention_heads"]
    if name == "phi3":
        full.setdefault("original_max_position_embeddings", full["max_position_embeddings"])
    return full


def _rope_words(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate `rope_parameters` of newer files into `rope_theta` and `rope_scaling`."""
    words = config.get("rope_parameters") or {}
    local = words.get("sliding_attention") or {}
    scaling = dict(words.get("full_attention") or words or config.get("rope_scaling") or {})
    theta = scaling.pop("rope_theta", config.get("rope_theta", 10000.0))
    partial = scaling.pop("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    scaling["rope_type"] = scaling.pop("type", None) or scaling.get("rope_type", "default")
    if "original_max_position_embeddings" in config:  # Phi-3 keeps it outside
        scaling.pop("original_max_position_embeddings", None)
    scaling = {key: value for key, value in scaling.items() if value is not None}
    return {
        "rope_theta": float(theta),
        "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
        "rope_local_base_freq": local.get("rope_theta", config.get("rope_local_base_freq", 1e4)),
        "partial_rotary_factor": partial,
    }


def to_keys(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the keys of a complete config, and the tensors that stand for its rotary scaling."""
    name = architecture_of(config)
    table = _GPT2_KEYS if name == "gpt2" else _KEYS
    keys = {ours: config[theirs] for ours, theirs in table.items()}
    tensors: dict[str, Tensor] = {}
    if name == "gpt2":
        keys["feed_forward_length"] = config["n_inner"] or 4 * config["n_embd"]
    else:
        head_dim = config["head_dim"]
        keys["attention.key_length"] = keys["attention.value_length"] = head_dim
        keys["rope.dimension_count"] = int(head_dim * config["partial_rotary_factor"])
        keys["rope.freq_base"] = config["rope_theta"]
        scaling, tensors = write_scaling(name, config, head_dim)
        keys |= scaling
    window = config.get("sliding_window") or 0
    if name == "phi3" or (window and name in ("llama", "gemma2", "gemma3")):
        keys["attention.sliding_window"] = window
    for cap in _CAPS.get(name, ()):
        if config.get(cap):
            keys[cap] = float(config[cap])
    if name == "gemma3":
        keys["rope.freq_base_swa"] = float(config["rope_local_base_freq"])
    return {f"{name}.{key}": value for key, value in keys.items()}, tensors


def check(config: Mapping[str, Any], said: Mapping[str, Any]) -> None:
    """Refuse a config that differs from what its keys say when they are read back.

    Raises: CheckpointError naming the first key that a file cannot say.
    """
    for key, value in said.items():
        if key in config and key not in _INERT and not _same(config[key], value):
            raise CheckpointError(
                f"config.json: {key} is {config[key]!r:.80}, but a GGUF file of this architecture"
                f" can only mean {value!r:.80}; this model cannot be written"
            )


def _same(ours: Any, theirs: Any) -> bool:
    """Compare as a file can: numbers in float32."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        return ours.keys() == theirs.keys() and all(_same(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    if isinstance(ours, int | float) and isinstance(theirs, int | float):
        return bool(np.float32(ours) == np.float32(theirs))
    return ours == theirs
