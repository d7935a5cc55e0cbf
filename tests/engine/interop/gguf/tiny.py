"""Tiny models of every family as transformers builds them, and a vocabulary for their files."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from engine.interop.gguf.folder import Written, write

COMMON: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 7,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0, 1.25, *[2.5] * 6]}
LLAMA31 = {"max_position_embeddings": 16384, "rope_theta": 5e5, "rope_scaling": LLAMA3}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
GPT2 = {"vocab_size": 320, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

# name → (config class, what it is made of)
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, COMMON),
    "llama-tied": (transformers.LlamaConfig, COMMON | {"tie_word_embeddings": True}),
    "llama-wide": (transformers.LlamaConfig, COMMON | {"head_dim": 32}),
    "llama-bias": (transformers.LlamaConfig, COMMON | {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": (transformers.LlamaConfig, COMMON | {"rope_scaling": LINEAR}),
    "llama-yarn": (transformers.LlamaConfig, COMMON | {"rope_scaling": YARN}),
    "llama3.1": (transformers.LlamaConfig, COMMON | LLAMA31),
    "mistral-window": (transformers.MistralConfig, COMMON | {"sliding_window": 16}),
    "smollm3": (transformers.SmolLM3Config, COMMON),
    "qwen2": (transformers.Qwen2Config, COMMON),
    "qwen3": (transformers.Qwen3Config, COMMON | {"head_dim": 128}),
    "gemma2": (transformers.Gemma2Config, COMMON | GEMMA),
    "gemma3": (transformers.Gemma3TextConfig, COMMON | GEMMA),
    "gemma3-linear": (transformers.Gemma3TextConfig, COMMON | GEMMA | {"rope_scaling": LINEAR}),
    "olmo2": (transformers.Olmo2Config, COMMON),
    "phi3": (transformers.Phi3Config, COMMON | {"original_max_position_embeddings": 256}),
    "phi3-partial": (
        transformers.Phi3Config,
        COMMON | {"partial_rotary_factor": 0.5, "original_max_position_embeddings": 256},
    ),
    "phi3-long": (
        transformers.Phi3Config,
        COMMON | {"rope_scaling": LONG, "original_max_position_embeddings": 64},
    ),
    "gpt2": (transformers.GPT2Config, GPT2 | IDS | {"n_positions": 1024}),
    "gpt2-untied": (
        transformers.GPT2Config,
        GPT2 | IDS | {"n_inner": 96, "tie_word_embeddings": False},
    ),
}
TOKENIZER: dict[str, Any] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>"]
    + [f"<0x{byte:02X}>" for byte in range(256)]
    + [f"t{i}" for i in range(61)],
    "tokenizer.ggml.scores": np.zeros(320, np.float32),
    "tokenizer.ggml.token_type": np.array([2, 3, 3] + [6] * 256 + [1] * 61, np.int32),
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 0,
    "tokenizer.ggml.add_bos_token": True,
}


def config_of(case: str, **changes: Any) -> Any:
    """The transformers config of a case; nested values are copied, transformers changes them."""
    make, words = CASES[case]
    words = words | changes
    return make(**{k: dict(v) if isinstance(v, dict) else v for k, v in words.items()})


def model_of(config: Any) -> Any:
    """A random model, with norms and biases that are not 1 and 0, of numbers bfloat16 holds.

    Gemma's norms go through 1 + weight, which float32 undoes exactly only for such numbers.
    """
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
            parameter.copy_(parameter.bfloat16().float())
    return model.eval()


def write_case(path: Path, case: str, dtype: str = "f32", **changes: Any) -> tuple[Any, Written]:
    """Write a case as a file; return its model and what the writer said."""
    config = config_of(case, **changes)
    model = model_of(config)
    weights = model.state_dict().items()
    return model, write(path, config.to_dict(), weights, TOKENIZER, dtype, {"name": "tiny"})
