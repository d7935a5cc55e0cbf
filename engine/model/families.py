"""Published families: one row each, mapping their `config.json` and tensor names to ours.

A row says how a family spells each of our settings, which settings all its members share, what a
missing key means, which layers look through a window, and which tensors lie on disk.
`engine/model/config_json.py` reads and writes by these rows. To add a family, add its row here and
its equality test against transformers.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Raw = Mapping[str, Any]  # a config.json


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one published family says what a `ModelConfig` says."""

    model_class: str
    keys: Mapping[str, str | tuple[str, ...]]  # their key → our field, or several that it sets
    shape: Mapping[str, Any]  # what members have, as far as no key says otherwise
    defaults: Mapping[str, Any]  # what a missing key means, maybe by a function of the config
    fixed: Mapping[str, Any]  # keys with one understood value
    windows: Callable[[Raw], Iterable[bool]] | None = None  # per layer: windowed? None: no layer
    typed: bool = False  # windowed layers are listed in layer_types
    tensors: Mapping[str, str | tuple[str, ...]]  # their name → ours, several when fused; {i} layer
    transposed: tuple[str, ...] = ()  # their names whose matrices lie as (in, out)


def _all(raw: Raw) -> Iterator[bool]:
    return (True for _ in range(raw["num_hidden_layers"]))


def _after(raw: Raw) -> Iterator[bool]:
    return (i >= raw["max_window_layers"] for i in range(raw["num_hidden_layers"]))


def _between(raw: Raw) -> Iterator[bool]:
    every = raw["sliding_window_pattern"]
    return (bool((i + 1) % every) for i in range(raw["num_hidden_layers"]))


def _without_positions(raw: Raw) -> Iterator[bool]:
    return (not rotates for rotates in raw["no_rope_layers"])


def _head_dim(raw: Raw) -> int:
    return raw["hidden_size"] // max(1, raw["num_attention_heads"])


# What Llama calls things; every later family began as a copy of it.
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "d_ff",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
BIASES = {"attention_bias": ("attention_bias", "output_bias")}
SHAPE = {
    "norm": "rmsnorm",
    "norm_offset": False,
    "norm_placement": "pre",
    "qk_norm": "none",
    "position": "rope",
    "no_rope_every": 0,
    "local_rope_theta": 0.0,
    "activation": "swiglu",
    "attention_bias": False,
    "output_bias": False,
    "mlp_bias": False,
    "attention_softcap": 0.0,
    "scale_embeddings": False,
    "logit_softcap": 0.0,
    "sliding_window": 0,
}
DEFAULTS = {
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "rope_theta": 10000.0,
}
SILU = {"hidden_act": "silu", "attention_dropout": 0.0}
QWEN_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}

ATTENTION = {
    f"model.layers.{{i}}.self_attn.{name}_proj": f"blocks.{{i}}.attention.{name}_proj"
    for name in "qkvo"
}
MLP = {
    f"model.layers.{{i}}.mlp.{name}_proj": f"blocks.{{i}}.mlp.{name}_proj"
    for name in ("gate", "up", "down")
}
OUTER = {"model.embed_tokens": "embed_tokens", "model.norm": "norm", "lm_head": "lm_head"}
QK_NORMS = {
    f"model.layers.{{i}}.self_attn.{name}_norm": f"blocks.{{i}}.attention.{name}_norm"
    for name in "qk"
}
PRE_NORMS = {
    "model.layers.{i}.input_layernorm": "blocks.{i}.input_norm",
    "model.layers.{i}.post_attention_layernorm": "blocks.{i}.mlp_norm",
}
POST_NORMS = {
    "model.layers.{i}.post_attention_layernorm": "blocks.{i}.attention_out_norm",
    "model.layers.{i}.post_feedforward_layernorm": "blocks.{i}.mlp_out_norm",
}
SANDWICH_NORMS = POST_NORMS | {
    "model.layers.{i}.input_layernorm": "blocks.{i}.input_norm",
    "model.layers.{i}.pre_feedforward_layernorm": "blocks.{i}.mlp_norm",
}
LLAMA_TENSORS = OUTER | ATTENTION | MLP | PRE_NORMS

GEMMA_KEYS = (
    SIZES
    | BIASES
    | {
        "head_dim": "head_dim",
        "query_pre_attn_scalar": "attention_width",
        "final_logit_softcapping": "logit_softcap",
        "sliding_window": "sliding_window",
    }
)
GEMMA_SHAPE = {
    "norm": "rmsnorm",
    "norm_offset": True,
    "norm_placement": "sandwich",
    "position": "rope",
    "no_rope_every": 0,
    "activation": "geglu_tanh",
    "mlp_bias": False,
    "scale_embeddings": True,
}
GEMMA_DEFAULTS = DEFAULTS | {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_act": "gelu_pytorch_tanh",  # Gemma 1 and 2 configs carry it too; it is not what counts
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "use_bidirectional_attention": None,
}
GEMMA_FIXED = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_dropout": 0.0,
    "use_bidirectional_attention": (None, False),
}

FAMILIES: dict[str, Family] = {
    "qwen3": Family(
        model_class="Qwen3ForCausalLM",
        keys=SIZES | BIASES | {"head_dim": "head_dim", "sliding_window": "sliding_window"},
        shape=SHAPE | {"qk_norm": "head"},
        defaults=DEFAULTS
        | QWEN_WINDOWS
        | {"num_key_value_heads": 32, "head_dim": 128, "attention_bias": False},
        fixed=SILU,
        windows=_after,
        typed=True,
        tensors=LLAMA_TENSORS | QK_NORMS,
    ),
    "llama": Family(
        model_class="LlamaForCausalLM",
        keys=SIZES | BIASES | {"head_dim": "head_dim", "mlp_bias": "mlp_bias"},
        shape=SHAPE,
        defaults=DEFAULTS | {"head_dim": _head_dim, "attention_bias": False, "mlp_bias": False},
        fixed=SILU | {"rope_interleaved": False},
        tensors=LLAMA_TENSORS,
    ),
    "mistral": Family(
        model_class="MistralForCausalLM",
        keys=SIZES | {"head_dim": "head_dim", "sliding_window": "sliding_window"},
        shape=SHAPE,
        defaults=DEFAULTS
        | {"num_key_value_heads": 8, "head_dim": _head_dim, "sliding_window": 4096},
        fixed=SILU,
        windows=_all,
        tensors=LLAMA_TENSORS,
    ),
    "qwen2": Family(
        model_class="Qwen2ForCausalLM",
        keys=SIZES | {"sliding_window": "sliding_window"},
        shape=SHAPE | {"attention_bias": True},
        defaults=DEFAULTS | QWEN_WINDOWS | {"num_key_value_heads": 32},
        fixed=SILU | {"use_mrope": False},
        windows=_after,
        typed=True,
        tensors=LLAMA_TENSORS,
    ),
    "smollm3": Family(
        model_class="SmolLM3ForCausalLM",
        keys=SIZES | BIASES | {"mlp_bias": "mlp_bias", "sliding_window": "sliding_window"},
        shape=SHAPE,
        defaults=DEFAULTS
        | {
            "num_key_value_heads": 4,
            "attention_bias": False,
            "mlp_bias": False,
            "no_rope_layer_interval": 4,
            "no_rope_layers": None,
            "sliding_window": None,
            "use_sliding_window": False,
            "max_window_layers": None,  # published configs carry it; here it decides nothing
            "tie_word_embeddings": True,
            "rope_theta": 2_000_000.0,
        },
        fixed=SILU,
        windows=_without_positions,
        typed=True,
        tensors=LLAMA_TENSORS,
    ),
    "olmo2": Family(
        model_class="Olmo2ForCausalLM",
        keys=SIZES | BIASES,
        shape=SHAPE | {"norm_placement": "post", "qk_norm": "width"},
        defaults=DEFAULTS | {"rms_norm_eps": 1e-5, "attention_bias": False},
        fixed=SILU,
        tensors=OUTER | ATTENTION | MLP | POST_NORMS | QK_NORMS,
    ),
    "gemma2": Family(
        model_class="Gemma2ForCausalLM",
        keys=GEMMA_KEYS | {"attn_logit_softcapping": "attention_softcap"},
        shape=GEMMA_SHAPE | {"qk_norm": "none", "local_rope_theta": 0.0},
        defaults=GEMMA_DEFAULTS
        | {
            "sliding_window_pattern": 2,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
        fixed=GEMMA_FIXED | {"sliding_window_pattern": 2},
        windows=_between,
        typed=True,
        tensors=OUTER | ATTENTION | MLP | SANDWICH_NORMS,
    ),
    "gemma3_text": Family(
        model_class="Gemma3ForCausalLM",
        keys=GEMMA_KEYS,
        shape=GEMMA_SHAPE | {"qk_norm": "head", "attention_softcap": 0.0},
        defaults=GEMMA_DEFAULTS
        | {
            "sliding_window_pattern": 6,
            "final_logit_softcapping": None,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
        fixed=GEMMA_FIXED | {"attn_logit_softcapping": None},  # transformers would not apply it
        windows=_between,
        typed=True,
        tensors=OUTER | ATTENTION | MLP | SANDWICH_NORMS | QK_NORMS,
    ),
    "phi3": Family(
        model_class="Phi3ForCausalLM",
        keys=SIZES | {"sliding_window": "sliding_window"},
        shape=SHAPE,
        defaults=DEFAULTS
        | {
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "partial_rotary_factor": 1.0,
            "original_max_position_embeddings": 4096,
        },
        fixed=SILU
        | {"attention_bias": False, "mlp_bias": False, "lm_head_bias": False}
        | {"full_attn_mod": 1, "interpolate_factor": 1},  # what Phi-4-mini says beyond Phi-3
        windows=_all,
        tensors={
            name: parts
            for name, parts in LLAMA_TENSORS.items()
            if not name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
        }
        | {
            "model.layers.{i}.self_attn.qkv_proj": tuple(
                f"blocks.{{i}}.attention.{name}_proj" for name in "qkv"
            ),
            "model.layers.{i}.mlp.gate_up_proj": (
                "blocks.{i}.mlp.gate_proj",
                "blocks.{i}.mlp.up_proj",
            ),
        },
    ),
    "gpt2": Family(
        model_class="GPT2LMHeadModel",
        keys={
            "vocab_size": "vocab_size",
            "n_positions": "max_seq_len",
            "n_embd": "d_model",
            "n_layer": "n_layers",
            "n_head": "n_heads",
            "n_inner": "d_ff",
            "layer_norm_epsilon": "norm_eps",
            "tie_word_embeddings": "tie_embeddings",
        },
        shape={
            "norm": "layernorm",
            "norm_placement": "pre",
            "norm_offset": False,
            "qk_norm": "none",
            "position": "learned",
            "activation": "gelu_tanh",
            "attention_bias": True,
            "output_bias": True,
            "mlp_bias": True,
            "attention_softcap": 0.0,
            "scale_embeddings": False,
            "logit_softcap": 0.0,
            "sliding_window": 0,
            "no_rope_every": 0,
        },
        defaults={
            "layer_norm_epsilon": 1e-5,
            "n_inner": lambda raw: 4 * raw["n_embd"],
            "tie_word_embeddings": True,
            "activation_function": "gelu_new",
        },
        fixed={
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        tensors={
            "transformer.wte": "embed_tokens",
            "transformer.wpe": "embed_positions",
            "transformer.ln_f": "norm",
            "transformer.h.{i}.ln_1": "blocks.{i}.input_norm",
            "transformer.h.{i}.ln_2": "blocks.{i}.mlp_norm",
            "transformer.h.{i}.attn.c_attn": tuple(
                f"blocks.{{i}}.attention.{name}_proj" for name in "qkv"
            ),
            "transformer.h.{i}.attn.c_proj": "blocks.{i}.attention.o_proj",
            "transformer.h.{i}.mlp.c_fc": "blocks.{i}.mlp.up_proj",
            "transformer.h.{i}.mlp.c_proj": "blocks.{i}.mlp.down_proj",
            "lm_head": "lm_head",
        },
        transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    ),
}

# Keys that say how a model was made, stored or served, and nothing about its mathematics. So do
# all that begin with an underscore.
HARMLESS = frozenset(  # one string, read as words
    """
    architectures attn_implementation attn_pdrop auto_map bos_token_id cache_implementation
    chunk_size_feed_forward decoder_start_token_id dtype embd_pdrop eos_token_id finetuning_task
    gradient_checkpointing id2label initializer_factor initializer_range is_decoder
    is_encoder_decoder is_llama_config label2id loss_type model_type n_ctx name_or_path
    num_labels output_attentions output_hidden_states pad_token_id prefix pretraining_tp
    problem_type reorder_and_upcast_attn resid_pdrop return_dict sep_token_id
    summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj task_specific_params tokenizer_class torch_dtype torchscript
    transformers.js_config transformers_version unk_token_id unsloth_fixed unsloth_version
    use_cache use_return_dict
    """.split()  # noqa: SIM905
)
