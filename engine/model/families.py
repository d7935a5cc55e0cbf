"""Published families: one row each, mapping their `config.json` and tensor names to ours.

A model trained here is saved as the family that has its shape, so other engines can load it. A
shape that no family has is saved as model type `lm-workbench`, which only this program reads.
"""

import dataclasses
import re
from typing import Any

from engine.config import ModelConfig
from engine.errors import CheckpointError

OWN_TYPE = "lm-workbench"

# Keys of a config.json that say nothing about the mathematics of the model.
NOT_SHAPE = {"model_type", "bos_token_id", "eos_token_id", "pad_token_id"}

# Our field ↔ the key in config.json; shared by the Llama-shaped families.
LLAMA_KEYS = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "d_ff": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "attention_bias": "attention_bias",
}

# Our tensor name → theirs, with {i} for the layer; shared by the Llama-shaped families.
LLAMA_TENSORS = {
    "embed_tokens": "model.embed_tokens",
    "norm": "model.norm",
    "lm_head": "lm_head",
    "blocks.{i}.input_norm": "model.layers.{i}.input_layernorm",
    "blocks.{i}.mlp_norm": "model.layers.{i}.post_attention_layernorm",
    "blocks.{i}.attention.q_proj": "model.layers.{i}.self_attn.q_proj",
    "blocks.{i}.attention.k_proj": "model.layers.{i}.self_attn.k_proj",
    "blocks.{i}.attention.v_proj": "model.layers.{i}.self_attn.v_proj",
    "blocks.{i}.attention.o_proj": "model.layers.{i}.self_attn.o_proj",
    "blocks.{i}.attention.q_norm": "model.layers.{i}.self_attn.q_norm",
    "blocks.{i}.attention.k_norm": "model.layers.{i}.self_attn.k_norm",
    "blocks.{i}.mlp.gate_proj": "model.layers.{i}.mlp.gate_proj",
    "blocks.{i}.mlp.up_proj": "model.layers.{i}.mlp.up_proj",
    "blocks.{i}.mlp.down_proj": "model.layers.{i}.mlp.down_proj",
}

# family → what a ModelConfig must be to belong to it, its class name, and keys that are constant.
LLAMA_SHAPE = {
    "norm": "rmsnorm",
    "sandwich_norm": False,
    "position": "rope",
    "activation": "swiglu",
    "logit_softcap": 0.0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {
        "class": "Qwen3ForCausalLM",
        "shape": LLAMA_SHAPE | {"qk_norm": True, "mlp_bias": False},
        "constant": {"hidden_act": "silu", "attention_dropout": 0.0},
    },
    "llama": {
        "class": "LlamaForCausalLM",
        "shape": LLAMA_SHAPE | {"qk_norm": False, "sliding_window": 0},
        "constant": {"hidden_act": "silu", "attention_dropout": 0.0},
    },
}


def family_of(config: ModelConfig) -> str:
    """Name the published family that a config belongs to, or `OWN_TYPE`."""
    for name, family in FAMILIES.items():
        fits = all(getattr(config, key) == value for key, value in family["shape"].items())
        # transformers' Llama insists on heads that divide the width, its Qwen3 does not.
        fits = fits and not (name == "llama" and config.d_model % config.n_heads)
        # Both families have one switch for the biases of all four attention projections.
        if fits and config.attention_bias == config.output_bias:
            return name
    return OWN_TYPE


def to_config_json(config: ModelConfig) -> dict[str, Any]:
    """Describe a config in the words of its family."""
    name = family_of(config)
    if name == OWN_TYPE:
        return {"model_type": OWN_TYPE} | dataclasses.asdict(config)
    family = FAMILIES[name]
    written = {"architectures": [family["class"]], "model_type": name} | family["constant"]
    written |= {theirs: getattr(config, ours) for ours, theirs in LLAMA_KEYS.items()}
    written["rope_theta"] = config.rope_theta
    written["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if name == "llama":
        written["mlp_bias"] = config.mlp_bias
    if config.sliding_window:
        windows = [config.window(layer) for layer in range(config.n_layers)]
        written["use_sliding_window"] = True
        written["sliding_window"] = config.sliding_window
        written["full_every"] = config.full_every
        written["layer_types"] = [
            "sliding_attention" if window else "full_attention" for window in windows
        ]
    return written | {"dtype": "float32"}


def from_config_json(raw: dict[str, Any], where: str) -> ModelConfig:
    """Read a config.json that `to_config_json` wrote.

    Raises: CheckpointError if the model type is unknown or the values make no model.
    """
    name = raw.get("model_type")
    try:
        if name == OWN_TYPE:
            return ModelConfig(**{key: raw[key] for key in raw if key not in NOT_SHAPE})
        if name not in FAMILIES:
            raise CheckpointError(
                f"{where}: model type {name!r} is not supported; known are {', '.join(FAMILIES)}"
            )
        values = {ours: raw[theirs] for ours, theirs in LLAMA_KEYS.items()}
        values |= FAMILIES[name]["shape"]
        values["rope_theta"] = raw["rope_parameters"]["rope_theta"]
        values["output_bias"] = values["attention_bias"]
        values["mlp_bias"] = raw.get("mlp_bias", False)
        if raw.get("use_sliding_window"):
            values |= {"sliding_window": raw["sliding_window"], "full_every": raw["full_every"]}
        return ModelConfig(**values)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: not a config this program wrote: {error!r}") from None


def tensor_name(ours: str, family: str) -> str:
    """Translate one of our parameter names, as in `blocks.3.mlp.up_proj.weight`."""
    if family == OWN_TYPE:
        return ours
    stem, _, kind = ours.rpartition(".")
    layer = re.search(r"blocks\.(\d+)\.", stem)
    pattern = re.sub(r"blocks\.\d+\.", "blocks.{i}.", stem)
    return f"{LLAMA_TENSORS[pattern].format(i=layer and layer[1])}.{kind}"
