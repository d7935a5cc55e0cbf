"""What a model costs, from its shape alone: parameters, FLOPs per token, bytes of KV cache.

Source: Kaplan et al. 2020, arXiv:2001.08361, section 2.1 (six FLOPs per weight per token trained,
plus the attention scores); Pope et al. 2022, arXiv:2211.05102 (cache).
"""

from collections.abc import Mapping

from engine.config import ModelConfig

GATED = ("swiglu", "geglu", "geglu_tanh")  # MLPs with a third matrix


def parameters(config: ModelConfig) -> dict[str, int]:
    """Count parameters per group; the values add up to the model's total."""
    D, F, H = config.d_model, config.d_ff, config.head_dim
    q_width, kv_width = config.n_heads * H, config.n_kv_heads * H
    norm = 2 if config.norm == "layernorm" else 1
    gated = config.activation in GATED
    attention = D * (q_width + 2 * kv_width) + q_width * D
    attention += (q_width + 2 * kv_width) * config.attention_bias + D * config.output_bias
    mlp = (3 if gated else 2) * D * F
    mlp += ((2 if gated else 1) * F + D) * config.mlp_bias
    norms = (4 if config.norm_placement == "sandwich" else 2) * D * norm
    norms += {"none": 0, "head": 2 * H, "width": q_width + kv_width}[config.qk_norm] * norm
    positions = config.max_seq_len * D if config.position == "learned" else 0
    return {
        "embedding": config.vocab_size * D + positions,
        "attention": config.n_layers * attention,
        "mlp": config.n_layers * mlp,
        "norms": config.n_layers * norms + D * norm,
        "head": 0 if config.tie_embeddings else config.vocab_size * D,
    }


def forward_flops(config: ModelConfig, context: int) -> int:
    """Return the FLOPs of one forward pass per token, at a causal context of `context` tokens."""
    count = parameters(config)
    weights = count["attention"] + count["mlp"] + config.vocab_size * config.d_model
    # Scores and weighted sum cost 2 FLOPs each per visible key. The first `window` tokens see half
    # a window on average, the others a whole one.
    windows = [min(config.window(layer) or context, context) for layer in range(config.n_layers)]
    seen = sum(window - window**2 / (2 * max(1, context)) for window in windows)
    return round(2 * weights + 4 * config.n_heads * config.head_dim * seen)


def prefill_flops(config: ModelConfig, length: int) -> int:
    """Return the FLOPs per token of reading a prompt, where only the last token needs the head."""
    head = 2 * config.vocab_size * config.d_model
    return forward_flops(config, length) - head + head // max(1, length)


def decode_flops(config: ModelConfig, depth: int) -> int:
    """Return the FLOPs of one more token after `depth` others, all of which it looks at."""
    windows = [config.window(layer) or depth + 1 for layer in range(config.n_layers)]
    seen = sum(min(window, depth + 1) for window in windows)
    weights = forward_flops(config, 0)
    return weights + 4 * config.n_heads * config.head_dim * seen


def weights_read(config: ModelConfig, sizes: Mapping[str, int]) -> int:
    """Return the bytes of weights that one token reads, of parameters by name and size.

    All there are, but of a table in which it is looked up only its row.
    """
    tables = {"embed_positions.weight": config.max_seq_len}
    if not config.tie_embeddings:  # else it is the head too, and read as a whole
        tables["embed_tokens.weight"] = config.vocab_size
    return sum(size // tables.get(name, 1) for name, size in sizes.items())


def decode_bytes(config: ModelConfig, depth: int, rows: int, weights: int, number: float) -> float:
    """Return the bytes that one more token after `depth` others has to read.

    Every weight once for all rows (`weights` bytes in all), and the keys and values of its own row
    (`number` bytes each).
    """
    keep = [min(config.window(layer) or depth, depth) for layer in range(config.n_layers)]
    return weights / rows + 2 * sum(keep) * config.n_kv_heads * config.head_dim * number


def train_flops(config: ModelConfig, context: int) -> int:
    """Return the FLOPs to train on one token: the backward pass costs twice the forward."""
    return 3 * forward_flops(config, context)


def lora_parameters(config: ModelConfig, rank: int, targets: str = "all") -> int:
    """Count the parameters of a LoRA beside the chosen matrices of all blocks."""
    D, F = config.d_model, config.d_ff
    q_width, kv_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    gated = config.activation in GATED
    attention = 2 * (D + q_width) + 2 * (D + kv_width)  # rows and columns: of q and o, of k and v
    mlp = (3 if gated else 2) * (D + F)
    chosen = {"attention": attention, "mlp": mlp, "all": attention + mlp}[targets]
    return config.n_layers * rank * chosen


def kv_bytes_per_token(config: ModelConfig, bytes_per_number: int = 4) -> int:
    """Return the cache that one more token of context needs, in all full-attention layers."""
    full = sum(not config.window(layer) for layer in range(config.n_layers))
    return 2 * full * config.n_kv_heads * config.head_dim * bytes_per_number


def kv_fixed_bytes(config: ModelConfig, bytes_per_number: int = 4) -> int:
    """Return the cache that windowed layers need in all, however long the context is."""
    windows = sum(config.window(layer) for layer in range(config.n_layers))
    return 2 * windows * config.n_kv_heads * config.head_dim * bytes_per_number
