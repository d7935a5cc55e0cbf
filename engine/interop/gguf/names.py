"""Which tensor of a GGUF file is which weight of a Hugging Face folder, and what lies between.

Converters do not only rename. Three changes are undone on the way in and done on the way out:

- llama, smollm3: the rows of Q and K within a head go from halves (x₀ … x₁ …), which rotate with
  each other in Hugging Face's code, to pairs (x₀x₁ …). Missing this leaves a model that talks
  fluently and remembers nothing.
- gemma: its norms multiply by 1 + weight; the file holds the sum.
- gpt2: Hugging Face keeps linear layers as inputs × outputs; the file as everyone else does.

Source: https://github.com/ggml-org/llama.cpp, folder conversion; the package gguf, tensor_mapping.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

# name in the file → (Hugging Face's name, sizes in the file); with the sizes of `_sizes`.
Names = Mapping[str, tuple[str, str]]

_ATTENTION: Names = {
    "attn_q": ("self_attn.q_proj", "QD"),
    "attn_k": ("self_attn.k_proj", "KD"),
    "attn_v": ("self_attn.v_proj", "KD"),
    "attn_output": ("self_attn.o_proj", "DQ"),
}
_MLP: Names = {
    "ffn_gate": ("mlp.gate_proj", "FD"),
    "ffn_up": ("mlp.up_proj", "FD"),
    "ffn_down": ("mlp.down_proj", "DF"),
}
_BEFORE: Names = {
    "attn_norm": ("input_layernorm", "D"),
    "ffn_norm": ("post_attention_layernorm", "D"),
}
_AFTER: Names = {
    "post_attention_norm": ("post_attention_layernorm", "D"),
    "post_ffw_norm": ("post_feedforward_layernorm", "D"),
}
_AROUND: Names = {
    "attn_norm": ("input_layernorm", "D"),
    **_AFTER,
    "ffn_norm": ("pre_feedforward_layernorm", "D"),
}
_HEAD_NORMS: Names = {
    "attn_q_norm": ("self_attn.q_norm", "H"),
    "attn_k_norm": ("self_attn.k_norm", "H"),
}
_WIDE_NORMS: Names = {
    "attn_q_norm": ("self_attn.q_norm", "Q"),
    "attn_k_norm": ("self_attn.k_norm", "K"),
}
_FUSED: Names = {
    "attn_qkv": ("self_attn.qkv_proj", "PD"),
    "attn_output": ("self_attn.o_proj", "DQ"),
    "ffn_up": ("mlp.gate_up_proj", "GD"),
    "ffn_down": ("mlp.down_proj", "DF"),
}
_GPT2: Names = {
    "attn_norm": ("ln_1", "D"),
    "attn_qkv": ("attn.c_attn", "PD"),
    "attn_output": ("attn.c_proj", "DD"),
    "ffn_norm": ("ln_2", "D"),
    "ffn_up": ("mlp.c_fc", "FD"),
    "ffn_down": ("mlp.c_proj", "DF"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How the weights of one `general.architecture` are named and changed."""

    layer: Names
    model_types: tuple[str, ...]  # in config.json; the first is what an import is called
    hf_class: str
    tied: bool = False  # what a config.json means that does not say
    before: Names = field(default_factory=lambda: {"token_embd": ("model.embed_tokens", "VD")})
    after: Names = field(default_factory=lambda: {"output_norm": ("model.norm", "D")})
    prefix: str = "model.layers"
    paired: bool = False  # rows of Q and K in pairs
    added: float = 0.0  # to every norm
    transposed: bool = False  # linear layers
    biased: tuple[str, ...] = ()  # always have a bias
    optional_biases: bool = False  # config.json says whether: attention_bias, mlp_bias
    own_head_dim: bool = False  # config.json has a head_dim of its own


ARCHITECTURES = {
    "llama": Architecture(
        layer={**_BEFORE, **_ATTENTION, **_MLP},
        model_types=("llama", "mistral"),
        hf_class="LlamaForCausalLM",
        paired=True,
        optional_biases=True,
        own_head_dim=True,
    ),
    "smollm3": Architecture(
        layer={**_BEFORE, **_ATTENTION, **_MLP},
        model_types=("smollm3",),
        hf_class="SmolLM3ForCausalLM",
        tied=True,
        paired=True,
        optional_biases=True,
    ),
    "qwen2": Architecture(
        layer={**_BEFORE, **_ATTENTION, **_MLP},
        model_types=("qwen2",),
        hf_class="Qwen2ForCausalLM",
        biased=("attn_q", "attn_k", "attn_v"),
    ),
    "qwen3": Architecture(
        layer={**_BEFORE, **_ATTENTION, **_HEAD_NORMS, **_MLP},
        model_types=("qwen3",),
        hf_class="Qwen3ForCausalLM",
        own_head_dim=True,
    ),
    "gemma2": Architecture(
        layer={**_AROUND, **_ATTENTION, **_MLP},
        model_types=("gemma2",),
        hf_class="Gemma2ForCausalLM",
        tied=True,
        added=1.0,
        own_head_dim=True,
    ),
    "gemma3": Architecture(
        layer={**_AROUND, **_ATTENTION, **_HEAD_NORMS, **_MLP},
        model_types=("gemma3_text",),
        hf_class="Gemma3ForCausalLM",
        tied=True,
        added=1.0,
        own_head_dim=True,
    ),
    "olmo2": Architecture(
        layer={**_AFTER, **_ATTENTION, **_WIDE_NORMS, **_MLP},
        model_types=("olmo2",),
        hf_class="Olmo2ForCausalLM",
    ),
    "phi3": Architecture(
        layer={**_BEFORE, **_FUSED},
        model_types=("phi3",),
        hf_class="Phi3ForCausalLM",
    ),
    "gpt2": Architecture(
        layer=_GPT2,
        model_types=("gpt2",),
        hf_class="GPT2LMHeadModel",
        tied=True,
        before={
            "token_embd": ("transformer.wte", "VD"),
            "position_embd": ("transformer.wpe", "TD"),
        },
        after={"output_norm": ("transformer.ln_f", "D")},
        prefix="transformer.h",
        transposed=True,
        biased=(*_GPT2, "output_norm"),
    ),
}


@dataclass(frozen=True, slots=True)
class Slot:
    """One weight: its name in a folder, its shape in the file and how the two differ."""

    hf: str
    shape: tuple[int, ...]
    heads: int = 0  # whose rows are in pairs
    added: float = 0.0
    transposed: bool = False

    def to_hf(self, tensor: Tensor) -> Tensor:
        """Undo what a converter did."""
        if self.heads:
            rows = tensor.reshape(self.heads, -1, 2, *tensor.shape[1:])
            return rows.transpose(1, 2).reshape(tensor.shape)
        if self.transposed:
            return tensor.T.contiguous()
        return tensor - self.added if self.added else tensor

    def to_gguf(self, tensor: Tensor) -> Tensor:
        """Do what a converter does."""
        if self.heads:
            rows = tensor.reshape(self.heads, 2, -1, *tensor.shape[1:])
            return rows.transpose(1, 2).reshape(tensor.shape)
        if self.transposed:
            return tensor.T.contiguous()
        return tensor.float() + self.added if self.added else tensor


def layout(architecture: str, config: Mapping[str, Any]) -> dict[str, Slot]:
    """List every tensor that a file of this architecture and config holds, in a model's order."""
    arch = ARCHITECTURES[architecture]
    sizes = _sizes(config)
    biased = set(arch.biased)
    if arch.optional_biases and config.get("attention_bias"):
        biased |= set(_ATTENTION)
    if arch.optional_biases and config.get("mlp_bias"):
        biased |= set(_MLP)
    heads = {"attn_q": sizes["N"], "attn_k": sizes["M"]} if arch.paired else {}
    slots = {}

    def put(stem: str, hf: str, letters: str, at: str = "") -> None:
        """Add a module: its weight, and its bias if it has one."""
        shape = tuple(sizes[letter] for letter in letters)
        slots[f"{at}{stem}.weight"] = Slot(
            f"{hf}.weight",
            shape,
            heads=heads.get(stem, 0),
            added=arch.added if stem.endswith("norm") else 0.0,
            transposed=arch.transposed and bool(at) and len(shape) == 2,
        )
        if stem in biased:
            slots[f"{at}{stem}.bias"] = Slot(f"{hf}.bias", shape[:1], heads=heads.get(stem, 0))

    for stem, (hf, letters) in arch.before.items():
        put(stem, hf, letters)
    for i in range(sizes["L"]):
        for stem, (hf, letters) in arch.layer.items():
            put(stem, f"{arch.prefix}.{i}.{hf}", letters, f"blk.{i}.")
    for stem, (hf, letters) in arch.after.items():
        put(stem, hf, letters)
    if not config["tie_word_embeddings"]:
        put("output", "lm_head", "VD")
    return slots


def _sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """Name the sizes of a config with letters: M key/value heads, P and G fused, T positions."""
    if "n_embd" in config:
        d, heads = config["n_embd"], config["n_head"]
        inner, positions, layers = config["n_inner"] or 4 * d, config["n_positions"], "n_layer"
        kv_heads, head_dim = heads, d // heads
    else:
        d, heads = config["hidden_size"], config["num_attention_heads"]
        inner, positions, layers = config["intermediate_size"], 0, "num_hidden_layers"
        kv_heads, head_dim = config["num_key_value_heads"], config.get("head_dim") or d // heads
    q, k = heads * head_dim, kv_heads * head_dim
    return {
        "V": config["vocab_size"], "D": d, "F": inner, "G": 2 * inner, "T": positions,
        "Q": q, "K": k, "P": q + 2 * k, "H": head_dim, "N": heads, "M": kv_heads,
        "L": config[layers],
    }  # fmt: skip
