"""What a model costs: counts equal the real tensors and the published numbers."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from engine import cost
from engine.config import LoraConfig, ModelConfig, RopeScaling
from engine.generate.decode import prefill
from engine.generate.reference import TorchDecoder
from engine.model.attention import visible
from engine.model.cache import FullLayer, KVCache
from engine.model.lora import add_lora
from engine.model.transformer import ACTIVATIONS, Transformer
from tests.conftest import make_model

GPT2 = ModelConfig(
    vocab_size=50257,
    d_model=768,
    n_layers=12,
    n_heads=12,
    d_ff=3072,
    max_seq_len=1024,
    norm="layernorm",
    qk_norm="none",
    position="learned",
    activation="gelu",
    attention_bias=True,
    output_bias=True,
    mlp_bias=True,
    tie_embeddings=True,
)
SMOLLM2 = ModelConfig(
    vocab_size=49152,
    d_model=576,
    n_layers=30,
    n_heads=9,
    n_kv_heads=3,
    d_ff=1536,
    qk_norm="none",
    tie_embeddings=True,
)
QWEN3 = ModelConfig(
    vocab_size=151936,
    d_model=1024,
    n_layers=28,
    n_heads=16,
    n_kv_heads=8,
    head_dim=128,
    d_ff=3072,
    tie_embeddings=True,
)
LLAMA2 = ModelConfig(
    vocab_size=32000, d_model=4096, n_layers=32, n_heads=32, d_ff=11008, qk_norm="none"
)


@st.composite
def scalings(draw, pairs: int) -> RopeScaling:
    """Any stretch of the rotary frequencies, for heads of which so many pairs rotate."""
    kind = draw(st.sampled_from(["none", "linear", "yarn", "llama3", "longrope"]))
    values: dict = {} if kind == "none" else {"factor": draw(st.sampled_from([1.0, 1.5, 8.0]))}
    if kind in ("yarn", "llama3", "longrope"):
        values["original_max_seq_len"] = draw(st.integers(2, 30))
    if kind in ("yarn", "longrope"):
        values["attention_factor"] = draw(st.sampled_from([0.0, 1.0, 1.25]))
    if kind == "yarn":
        values |= draw(st.sampled_from([{}, {"beta_fast": 8.0}, {"beta_slow": 0.5}]))
    if kind == "llama3":
        values |= draw(st.sampled_from([{}, {"low_freq_factor": 0.5, "high_freq_factor": 2.0}]))
    if kind == "longrope":
        factors = st.lists(st.sampled_from([1.0, 1.5, 30.0]), min_size=pairs, max_size=pairs)
        values |= {"short_factors": tuple(draw(factors)), "long_factors": tuple(draw(factors))}
    return RopeScaling(kind=kind, **values)


@st.composite
def configs(draw) -> ModelConfig:
    """Any shape a recipe can ask for, small."""
    n_kv_heads = draw(st.integers(1, 3))
    head_dim = 2 * draw(st.integers(1, 6))
    rotary_dim = draw(st.sampled_from([head_dim, 2]))
    norm = draw(st.sampled_from(["rmsnorm", "layernorm"]))
    return ModelConfig(
        vocab_size=draw(st.integers(1, 50)),
        d_model=draw(st.integers(2, 24)),
        n_layers=draw(st.integers(1, 4)),
        n_heads=n_kv_heads * draw(st.integers(1, 3)),
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        d_ff=draw(st.integers(0, 40)),
        max_seq_len=draw(st.integers(1, 30)),
        norm=norm,
        norm_eps=draw(st.sampled_from([1e-6, 1e-5, 0.1])),
        norm_offset=norm == "rmsnorm" and draw(st.booleans()),
        norm_placement=draw(st.sampled_from(["pre", "post", "sandwich"])),
        qk_norm=draw(st.sampled_from(["none", "head", "width"])),
        position=draw(st.sampled_from(["rope", "learned", "none"])),
        rope_theta=draw(st.sampled_from([100.0, 10000.0, 1e6])),
        local_rope_theta=draw(st.sampled_from([0.0, 100.0, 10000.0])),
        rotary_dim=rotary_dim,
        no_rope_every=draw(st.integers(0, 3)),
        rope_scaling=draw(scalings(rotary_dim // 2)),
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        attention_bias=draw(st.booleans()),
        output_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        attention_width=draw(st.sampled_from([0, 5])),
        attention_softcap=draw(st.sampled_from([0.0, 20.0])),
        sliding_window=draw(st.integers(0, 6)),
        full_every=draw(st.integers(0, 3)),
        window_from=draw(st.integers(0, 2)),
        tie_embeddings=draw(st.booleans()),
        scale_embeddings=draw(st.booleans()),
        logit_softcap=draw(st.sampled_from([0.0, 30.0])),
    )


# Part of a tensor's name → its group in `cost.parameters`; the first that fits counts.
GROUPS = {
    "norm": "norms",
    "embed_": "embedding",
    "attention": "attention",
    "mlp": "mlp",
    "lm_head": "head",
}


@given(configs())
def test_counts_equal_the_real_tensors(config):
    """Per group, for any config, against a model built without memory."""
    with torch.device("meta"):
        model = Transformer(config)
    real = dict.fromkeys(GROUPS.values(), 0)
    for name, parameter in model.named_parameters():
        real[next(group for part, group in GROUPS.items() if part in name)] += parameter.numel()
    assert cost.parameters(config) == real


@pytest.mark.parametrize(
    "config, total",
    [
        pytest.param(GPT2, 124_439_808, id="GPT-2 small"),
        pytest.param(SMOLLM2, 134_515_008, id="SmolLM2-135M"),
        pytest.param(QWEN3, 596_049_920, id="Qwen3-0.6B"),
        pytest.param(LLAMA2, 6_738_415_616, id="Llama-2-7B"),
    ],
)
def test_published_parameter_counts(config, total):
    assert sum(cost.parameters(config).values()) == total


def test_published_cache_sizes():
    """Bytes per token in 16-bit numbers: 2·30·3·64·2, 2·28·8·128·2, and half a megabyte."""
    assert cost.kv_bytes_per_token(SMOLLM2, 2) == 23_040
    assert cost.kv_bytes_per_token(QWEN3, 2) == 114_688
    assert cost.kv_bytes_per_token(LLAMA2, 2) == 524_288
    assert cost.kv_bytes_per_token(SMOLLM2) == 46_080


@pytest.mark.parametrize("full_every", [0, 2, 3])
def test_windowed_layers_need_no_cache_for_one_more_token(full_every):
    """The docstring's words, against the cache itself: full layers grow, windows do not."""
    config = ModelConfig(vocab_size=9, d_model=32, sliding_window=16, full_every=full_every)
    cache = KVCache(config, capacity=100)
    held = sum(
        2 * layer.k_BKSH.numel() * 4 for layer in cache.layers if isinstance(layer, FullLayer)
    )
    assert 100 * cost.kv_bytes_per_token(config) == held


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": 2},
        {"activation": "gelu"},
        {"head_dim": 20, "tie_embeddings": True},
        {"position": "learned", "norm": "layernorm", "d_ff": 40},
    ],
    ids=str,
)
def test_matrix_flops_equal_those_counted(changes):
    """torch's own counter over one forward pass; it sees the matrix products, not attention."""
    model = make_model(**changes)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 16, dtype=torch.long))
    counted = counter.get_flop_counts()["Global"]
    matrices = sum(count for op, count in counted.items() if "attention" not in str(op))
    assert matrices == 16 * cost.forward_flops(model.config, 0)


@pytest.mark.parametrize(
    "window, full_every, window_from",
    [(0, 0, 0), (64, 0, 0), (500, 0, 0), (900, 0, 0), (64, 3, 0), (64, 0, 2), (64, 3, 1)],
)
@pytest.mark.parametrize("context", [100, 1000])
def test_attention_flops_equal_the_visible_pairs(window, full_every, window_from, context):
    """Two products of 2·N·H FLOPs for every key a query sees, averaged over the context."""
    config = ModelConfig(
        vocab_size=9,
        n_layers=3,
        head_dim=10,
        sliding_window=window,
        full_every=full_every,
        window_from=window_from,
    )
    position = torch.arange(context)
    seen = sum(
        int(visible(position, position, config.window(layer)).sum()) / context
        for layer in range(config.n_layers)
    )
    attention = cost.forward_flops(config, context) - cost.forward_flops(config, 0)
    assert attention == pytest.approx(4 * 4 * 10 * seen, rel=0.02)


@pytest.mark.parametrize("targets", ["all", "attention", "mlp"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_the_parameters_of_a_lora_are_counted(targets, activation):
    model = make_model(activation=activation, n_kv_heads=2, head_dim=12)
    add_lora(model, LoraConfig(rank=3, targets=targets), torch.Generator())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert cost.lora_parameters(model.config, 3, targets) == trained


def test_flops_by_hand():
    """Six FLOPs a weight and token in training; the embedding is a look-up and costs none."""
    config = ModelConfig(vocab_size=10, d_model=8, n_layers=1, n_heads=2, d_ff=12, qk_norm="none")
    weights = 4 * 8 * 8 + 3 * 8 * 12 + 10 * 8
    assert cost.forward_flops(config, 0) == 2 * weights
    assert cost.forward_flops(config, 6) == 2 * weights + 4 * 8 * 3
    assert cost.train_flops(config, 6) == 3 * (2 * weights + 4 * 8 * 3)


def test_reading_and_generating_by_hand():
    """A prompt needs one row of logits; a token looks at all before it and at itself."""
    config = ModelConfig(vocab_size=10, d_model=8, n_layers=1, n_heads=2, d_ff=12, qk_norm="none")
    blocks, head = 2 * (4 * 8 * 8 + 3 * 8 * 12), 2 * 10 * 8
    assert cost.prefill_flops(config, 4) == blocks + 4 * 8 * 2 + head // 4
    assert cost.decode_flops(config, 5) == blocks + head + 4 * 8 * 6
    # 1000 bytes of weights shared by 4 rows; 5 keys and values of 8 numbers of 2 bytes.
    assert cost.decode_bytes(config, 5, rows=4, weights=1000, number=2) == 250 + 5 * 2 * 8 * 2
    windowed = replace(config, sliding_window=3)
    assert cost.decode_flops(windowed, 5) == blocks + head + 4 * 8 * 3
    assert cost.decode_bytes(windowed, 5, 1, 0, 4) == 3 * 2 * 8 * 4


def test_of_a_table_a_token_reads_a_row():
    """Unless the embedding is the head too, which is read as a whole."""
    sizes = {"embed_tokens.weight": 400, "embed_positions.weight": 640, "lm_head.weight": 400}
    sizes["blocks.0.mlp.up_proj.weight"] = 1000
    config = ModelConfig(vocab_size=40, max_seq_len=64, tie_embeddings=False)
    assert cost.weights_read(config, sizes) == 10 + 10 + 400 + 1000
    del sizes["lm_head.weight"]
    assert cost.weights_read(replace(config, tie_embeddings=True), sizes) == 400 + 10 + 1000


@pytest.mark.parametrize("length", [1, 16])
def test_matrix_flops_of_a_prompt_equal_those_counted(tokenizer, length):
    model = make_model()
    with FlopCounterMode(display=False) as counter:
        decoder = TorchDecoder(model)
        prefill(decoder, [1] * length, decoder.cache(length))
    counted = counter.get_flop_counts()["Global"]
    matrices = sum(count for op, count in counted.items() if "attention" not in str(op))
    config = model.config
    attention = cost.forward_flops(config, length) - cost.forward_flops(config, 0)
    # The share of the head is rounded down, once per token.
    assert 0 <= matrices - length * (cost.prefill_flops(config, length) - attention) < length
