"""Rotary position scaling: `rope_scaling` of config.json ↔ keys and tensors of a GGUF file.

A file holds Llama 3's scaling only as its result, one factor per frequency, so the parameters are
found by trying the published ones and comparing.

Source: https://github.com/ggml-org/llama.cpp, conversion/{base,llama,phi}.py; YaRN, LongRoPE and
Llama 3's rule as in transformers, modeling_rope_utils.py.
"""

import math
from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor

from engine.interop.gguf.keys import Keys
from engine.interop.gguf.reader import shown

# (original context, low and high frequency factor) of published models, the common one first.
_LLAMA3_SHAPES = [
    (original, 1.0, 4.0) for original in (8192, 4096, 16384, 32768, 2048, 65536, 131072)
]
_LLAMA3_FACTORS = (8.0, 32.0, 2.0, 4.0, 16.0, 64.0)
_YARN = {
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
    "rope.scaling.yarn_attn_factor": "attention_factor",
}
FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"


def llama3_factors(scaling: Mapping[str, Any], theta: float, head_dim: int) -> Tensor:
    """Return by what Llama 3's scaling divides each frequency, as float32.

    Shapes: (H / 2,).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    turns = scaling["original_max_position_embeddings"] * theta**-exponents / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / (kept + (1 - kept) / scaling["factor"])).float()


def read_scaling(keys: Keys, theta: float, head_dim: int) -> dict[str, Any] | None:
    """Return the `rope_scaling` that a file means.

    Raises: CheckpointError if it has no words in config.json.
    """
    kind = keys.text("rope.scaling.type", "linear")
    factor = keys.real("rope.scaling.factor", keys.real("rope.scale_linear", 0.0)) or 1.0
    original = keys.whole("rope.scaling.original_context_length", 0)
    yarn = {theirs: keys.real(ours, None) for ours, theirs in _YARN.items()}
    yarn = {name: value for name, value in yarn.items() if value is not None}
    if keys.real("rope.scaling.yarn_ext_factor", 1.0) != 1.0:
        raise keys.error("rope.scaling.yarn_ext_factor is not 1, which config.json cannot say")
    if keys.real("rope.scaling.yarn_log_multiplier", 0.0) != 0.0:
        raise keys.error("rope.scaling.yarn_log_multiplier is not 0, which config.json cannot say")
    if keys.architecture == "phi3":
        if kind not in ("linear", "longrope") or factor != 1.0:
            raise keys.error(
                f"rope.scaling.type is {shown(kind)} with factor {factor}, phi3 has only longrope"
            )
        return _longrope(keys, original, head_dim)
    if keys.has(FREQS) and keys.architecture == "llama":
        if factor != 1.0:
            raise keys.error(f"has both {FREQS} and rope.scaling.factor")
        return _llama3(keys, theta, head_dim)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and original:
        scaling = {"factor": factor, "original_max_position_embeddings": original}
        return {"rope_type": "yarn"} | scaling | yarn
    raise keys.error(
        f"rope.scaling.type is {shown(kind)}, original context length {original}: not known"
    )


def _llama3(keys: Keys, theta: float, head_dim: int) -> dict[str, Any] | None:
    """Find the parameters whose factors these are."""
    factors = keys.tensor(FREQS, (head_dim // 2,))
    if torch.equal(factors, torch.ones_like(factors)):
        return None
    largest = float(f"{factors.max().item():.4g}")
    for factor, (original, low, high) in product((largest, *_LLAMA3_FACTORS), _LLAMA3_SHAPES):
        scaling = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }
        if torch.allclose(factors, llama3_factors(scaling, theta, head_dim), rtol=2e-5, atol=0):
            return scaling
    raise keys.error(f"{FREQS} follows from no published scaling of Llama 3")


def _longrope(keys: Keys, original: int, head_dim: int) -> dict[str, Any] | None:
    """Read Phi-3's factors for short and long contexts."""
    attention = keys.real("rope.scaling.attn_factor", 1.0)
    pair = LONG, SHORT
    if not any(keys.has(name) for name in pair):
        if attention != 1.0:
            raise keys.error(f"has rope.scaling.attn_factor but no {LONG}")
        return None
    half = keys.size("rope.dimension_count", head_dim) // 2
    long, short = ([keys.decimal(x) for x in keys.tensor(name, (half,))] for name in pair)
    scaling = {"rope_type": "longrope", "long_factor": long, "short_factor": short}
    usual = longrope_attention(keys.whole("context_length"), original)
    if not math.isclose(attention, usual, rel_tol=1e-5):
        scaling["attention_factor"] = attention
    return scaling


def longrope_attention(context: int, original: int) -> float:
    """Return by what LongRoPE multiplies queries and keys unless told otherwise."""
    if original < 2 or context <= original:
        return 1.0
    return math.sqrt(1 + math.log(context / original) / math.log(original))


def write_scaling(
    architecture: str, config: Mapping[str, Any], head_dim: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the keys and the tensors that say a config's `rope_scaling`, as far as they can."""
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type")
    keys: dict[str, Any] = {}
    if architecture == "phi3":
        original, context = (
            config["original_max_position_embeddings"],
            config["max_position_embeddings"],
        )
        keys["rope.scaling.original_context_length"] = original
        if kind != "longrope":
            return keys, {}
        attention = scaling.get("attention_factor") or longrope_attention(context, original)
        keys["rope.scaling.attn_factor"] = attention
        lists = {LONG: scaling["long_factor"], SHORT: scaling["short_factor"]}
        return keys, {name: torch.tensor(values) for name, values in lists.items()}
    if kind == "llama3" and architecture == "llama":
        return keys, {FREQS: llama3_factors(scaling, config["rope_theta"], head_dim)}
    if kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])}
    if kind == "yarn":
        original = scaling["original_max_position_embeddings"]
        keys["rope.scaling.original_context_length"] = original
        keys |= {
            ours: float(scaling[theirs]) for ours, theirs in _YARN.items() if theirs in scaling
        }
    return keys, {}
