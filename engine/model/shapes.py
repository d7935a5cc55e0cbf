"""Which parameters a model has and how they lie on disk, by its config alone: needs no torch."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from engine.config import ModelConfig
from engine.cost import GATED
from engine.errors import CheckpointError
from engine.model.config_json import Stored, stored_tensors

Shape = tuple[int, ...]

# Endings of tensors that some old checkpoints carry and that follow from the config.
BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Return what `Transformer(config)` has, in its order; no head that is the embedding too."""
    D, V = config.d_model, config.vocab_size
    shapes: dict[str, Shape] = {"embed_tokens.weight": (V, D)}
    if config.position == "learned":
        shapes["embed_positions.weight"] = (config.max_seq_len, D)
    for i in range(config.n_layers):
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in _block(config)}
    shapes |= _norm(config, "norm", D)
    return shapes if config.tie_embeddings else shapes | {"lm_head.weight": (V, D)}


def _block(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    """List one block's parameters."""
    D, F = config.d_model, config.d_ff
    q_width, kv_width = (n * config.head_dim for n in (config.n_heads, config.n_kv_heads))
    before = config.norm_placement in ("pre", "sandwich")
    after = config.norm_placement in ("post", "sandwich")
    if before:
        yield from _norm(config, "input_norm", D).items()
    bias = config.attention_bias
    yield from _linear("attention.q_proj", D, q_width, bias)
    yield from _linear("attention.k_proj", D, kv_width, bias)
    yield from _linear("attention.v_proj", D, kv_width, bias)
    yield from _linear("attention.o_proj", q_width, D, config.output_bias)
    if config.qk_norm != "none":
        whole = config.qk_norm == "width"
        yield from _norm(config, "attention.q_norm", q_width if whole else config.head_dim).items()
        yield from _norm(config, "attention.k_norm", kv_width if whole else config.head_dim).items()
    if after:
        yield from _norm(config, "attention_out_norm", D).items()
    if before:
        yield from _norm(config, "mlp_norm", D).items()
    if config.activation in GATED:
        yield from _linear("mlp.gate_proj", D, F, config.mlp_bias)
    yield from _linear("mlp.up_proj", D, F, config.mlp_bias)
    yield from _linear("mlp.down_proj", F, D, config.mlp_bias)
    if after:
        yield from _norm(config, "mlp_out_norm", D).items()


def _linear(name: str, inputs: int, outputs: int, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)


def _norm(config: ModelConfig, name: str, width: int) -> dict[str, Shape]:
    kinds = ("weight", "bias") if config.norm == "layernorm" else ("weight",)
    return {f"{name}.{kind}": (width,) for kind in kinds}


def stored_shape(item: Stored, shapes: Mapping[str, Shape]) -> Shape:
    """Return the shape that a tensor has on disk."""
    rows = sum(shapes[part][0] for part in item.parts)
    shape = (rows, *shapes[item.parts[0]][1:])
    return shape[::-1] if item.transposed else shape


def check_fit(
    config: ModelConfig, model_type: str, there: Mapping[str, Shape], where: Path | str
) -> list[Stored]:
    """Compare the tensors on disk with those that a config asks for; return how to read them.

    Raises: CheckpointError naming one that is missing, left over or of another shape.
    """
    shapes, left = parameter_shapes(config), dict(there)
    stored = list(stored_tensors(shapes, config, model_type))
    for item in stored:
        if item.name not in left:
            raise CheckpointError(f"{where}: the weights lack {item.name}")
        shape, expected = left.pop(item.name), stored_shape(item, shapes)
        if shape != expected:
            raise CheckpointError(
                f"{where}: {item.name} is {' × '.join(map(str, shape))}, but config.json asks for"
                f" {' × '.join(map(str, expected))}"
            )
    needless = (*BUFFERS, "lm_head.weight") if config.tie_embeddings else BUFFERS
    if over := [name for name in left if not name.endswith(needless)]:
        raise CheckpointError(
            f"{where}: {len(over)} tensors have no place in a {model_type} model: {over[0]}"
            + (" …" if over[1:] else "")
        )
    return stored
