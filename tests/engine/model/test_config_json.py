"""What is saved here loads in transformers with the same logits, and here as the same model."""

import dataclasses
import json
import math
import time
from pathlib import Path

import pytest
import torch
from hypothesis import example, given

from engine import checkpoint
from engine.config import ModelConfig, SampleConfig
from engine.errors import CheckpointError
from engine.model.config_json import OWN_TYPE, family_of, from_config_json, to_config_json
from engine.model.families import FAMILIES, HARMLESS
from engine.model.transformer import Transformer
from engine.text.tokenizer import Tokenizer
from tests.conftest import make_model
from tests.engine.test_cost import configs

PUBLISHED = {
    "qwen3": {},
    "qwen3 grouped, tied": {"n_kv_heads": 2, "tie_embeddings": True},
    "qwen3 mixed windows": {"sliding_window": 8, "full_every": 2, "n_layers": 4},
    "qwen3 windows only": {"sliding_window": 8},
    "qwen3 biases": {"attention_bias": True, "output_bias": True},
    "qwen3 wide heads, other numbers": {"head_dim": 12, "rope_theta": 500.0, "norm_eps": 0.01},
    "qwen3 heads that do not divide the width": {"d_model": 36, "n_heads": 8, "head_dim": 6},
    "qwen3 padded vocabulary": {"vocab_size": 448},
    "llama": {"qk_norm": "none"},
    "llama grouped, tied": {"qk_norm": "none", "n_kv_heads": 1, "tie_embeddings": True},
    "llama mlp_bias": {"qk_norm": "none", "mlp_bias": True},
    "llama biases everywhere": {
        "qk_norm": "none",
        "mlp_bias": True,
        "attention_bias": True,
        "output_bias": True,
    },
    "llama wide heads, other numbers": {
        "qk_norm": "none",
        "head_dim": 12,
        "rope_theta": 500.0,
        "norm_eps": 0.01,
    },
    # transformers' LlamaConfig refuses such heads and has no window; Mistral is the same besides.
    "mistral heads that do not divide the width": {
        "qk_norm": "none",
        "d_model": 36,
        "n_heads": 8,
        "head_dim": 6,
    },
    "mistral with a window": {"qk_norm": "none", "sliding_window": 8},
    "gpt2": {
        "norm": "layernorm",
        "qk_norm": "none",
        "position": "learned",
        "activation": "gelu_tanh",
        "attention_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "tie_embeddings": True,
    },
}
OWN = {
    "layernorm": {"norm": "layernorm"},
    "sandwich_norm": {"norm_placement": "sandwich"},
    "learned": {"position": "learned"},
    "none": {"position": "none"},
    "gelu": {"activation": "gelu"},
    "softcap": {"logit_softcap": 30.0},
    "qwen3 with mlp_bias": {"mlp_bias": True},
    "post-norm with layernorm": {"norm": "layernorm", "norm_placement": "post"},
    "qwen3 with a soft cap": {"attention_softcap": 20.0},
    "qwen3 half rotated": {"rotary_dim": 4},
    "qwen3 full layers first, then mixed": {
        "sliding_window": 8,
        "window_from": 1,
        "full_every": 3,
        "n_layers": 6,
        "qk_norm": "width",
    },
    "attention_bias without output_bias": {"attention_bias": True},
    "output_bias without attention_bias": {"output_bias": True},
    "GPT-2 with the exact GELU": {
        "norm": "layernorm",
        "qk_norm": "none",
        "position": "learned",
        "activation": "gelu",
        "attention_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "tie_embeddings": True,
    },
}


def save(model: Transformer, tokenizer: Tokenizer, run: Path) -> Path:
    snapshot = checkpoint.Snapshot(
        step=1,
        model=model,
        tokenizer=tokenizer,
        recipe_yaml="",
        sample=SampleConfig(),
        facts={},
        optimizer={},
        state={},
    )
    return checkpoint.save(run, snapshot, best=True)


def tokens_of(model: Transformer) -> torch.Tensor:
    """Longer than every window here; includes the last id, padding or not."""
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (2, 40), generator=random)
    tokens[0, 3] = model.config.vocab_size - 1
    return tokens


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_computes_our_logits(name, tokenizer, tmp_path):
    """Every weight is found under its name, none is left over, and the logits are ours."""
    from transformers import AutoModelForCausalLM

    model = make_model(**PUBLISHED[name])
    folder = save(model, tokenizer, tmp_path)
    theirs, report = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert type(theirs).__name__.lower().startswith(name.split()[0])
    assert not any(report.values()), report
    tokens = tokens_of(model)
    with torch.no_grad():
        logits = theirs.eval()(tokens).logits
        torch.testing.assert_close(model(tokens), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [*PUBLISHED, *OWN])
def test_saved_and_loaded_is_the_same_model(name, tokenizer, tmp_path):
    """Config, weights and logits, bit for bit, for shapes that no published family has too."""
    model = make_model(**(PUBLISHED | OWN)[name])
    loaded, _ = checkpoint.load_model(save(model, tokenizer, tmp_path))
    assert loaded.config == model.config
    tokens = tokens_of(model)
    with torch.no_grad():
        assert torch.equal(loaded(tokens), model(tokens))


def test_a_loaded_tied_head_is_still_the_embedding(tokenizer, tmp_path):
    """Else a resumed run would train two matrices where it had one."""
    model = make_model(tie_embeddings=True)
    loaded, _ = checkpoint.load_model(save(model, tokenizer, tmp_path))
    assert loaded.lm_head.weight is loaded.embed_tokens.weight
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, _ in loaded.named_parameters()] == names


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_are_named_after_their_family(name):
    config = make_model(**PUBLISHED[name]).config
    assert family_of(config) == name.split()[0]
    assert to_config_json(config)["model_type"] == name.split()[0]


@pytest.mark.parametrize("name", OWN)
def test_shapes_that_no_family_has_are_our_own(name):
    config = make_model(**OWN[name]).config
    assert family_of(config) == OWN_TYPE
    assert to_config_json(config)["model_type"] == OWN_TYPE


@pytest.mark.parametrize("name", [*PUBLISHED, *OWN])
def test_config_round_trip(name):
    config = make_model(**(PUBLISHED | OWN)[name]).config
    assert from_config_json(json.loads(json.dumps(to_config_json(config))), "x") == config


@given(configs())
@example(ModelConfig(vocab_size=9, full_every=2))
def test_any_config_round_trips(config):
    """A resumed run compares this with its recipe, so even a field without effect must return."""
    assert from_config_json(json.loads(json.dumps(to_config_json(config))), "x") == config


def test_layers_are_typed_for_other_engines():
    raw = to_config_json(ModelConfig(vocab_size=9, n_layers=5, sliding_window=8, full_every=3))
    window, full = "sliding_attention", "full_attention"
    assert raw["layer_types"] == [window, window, full, window, window]
    assert raw["sliding_window"] == 8
    assert raw["use_sliding_window"] is True


@pytest.mark.parametrize("model_type", ["mamba", "", None])
def test_an_unknown_type_is_named_with_its_file(model_type):
    raw = to_config_json(ModelConfig(vocab_size=9)) | {"model_type": model_type}
    with pytest.raises(CheckpointError, match="qwen3") as caught:
        from_config_json(raw, "some/config.json")
    assert repr(model_type) in str(caught.value)
    assert str(caught.value).startswith("some/config.json: ")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_missing_key_is_named_with_its_file(name):
    """Of the keys without a default: nothing that is not said may be made up."""
    raw = raw_of(name)
    for key in set(FAMILIES[name].keys) - set(FAMILIES[name].defaults):
        rest = {other: value for other, value in raw.items() if other != key}
        refused(rest, key)
    for key in set(raw) - set(FAMILIES[name].keys):
        if key != "model_type":
            from_config_json({k: v for k, v in raw.items() if k != key}, "x")


SIZES = {
    "vocab_size": 9,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}


def raw_of(name: str) -> dict:
    """Return a small config.json of a family, every key that its row knows said."""
    family = FAMILIES[name]
    gpt2 = {"vocab_size": 9, "n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 64}
    sizes = gpt2 if name == "gpt2" else SIZES
    known = {*family.keys, *family.defaults, *family.fixed}
    raw = {"model_type": name} | {key: value for key, value in sizes.items() if key in known}
    for key, default in family.defaults.items():
        raw.setdefault(key, default(raw) if callable(default) else default)
    for key, allowed in family.fixed.items():
        raw[key] = allowed[0] if isinstance(allowed, tuple) else allowed
    if "sliding_window" in known:
        raw |= {"sliding_window": 8}
    if raw.get("max_window_layers"):
        raw |= {"use_sliding_window": True, "max_window_layers": 2}
    from_config_json(raw, "x")
    return raw


def refused(raw: dict, *words: str) -> str:
    """Check that a config is refused in one line that begins with its file; return the line."""
    started = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        from_config_json(raw, "some/config.json")
    assert time.perf_counter() - started < 1
    line = str(caught.value)
    assert line.startswith("some/config.json: ")
    assert "\n" not in line
    assert len(line) < 1000
    for word in words:
        assert word in line, line
    return line


ELSEWHERE = ("quantization_config", "num_experts", "layer_scale", "sliding_windw", "rope_ratio")


@pytest.mark.parametrize("name", FAMILIES)
def test_an_unknown_key_is_refused_by_name(name):
    """Also one that another family understands."""
    raw = raw_of(name)
    others = {key for f in FAMILIES.values() for key in (*f.keys, *f.defaults, *f.fixed)}
    for key in {*ELSEWHERE, *others, "layer_types", "rope_parameters"} - set(raw) - HARMLESS:
        family = FAMILIES[name]
        optional = family.typed and key == "layer_types"
        rope = "rope_theta" in family.defaults and key in (
            "rope_parameters",
            "original_max_position_embeddings",
        )
        if not optional and not rope:
            refused(raw | {key: {"a": 1}}, repr(key))
    from_config_json(raw | {"_anything": 1, "transformers_version": "9"}, "x")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_value_that_is_not_supported_is_refused_by_name(name):
    family = FAMILIES[name]
    assert family.fixed
    for key in family.fixed:
        for value in ("relu", 0.37, [1], {"a": 1}, "x" * 100_000):
            refused(raw_of(name) | {key: value}, key)


ABSURD = (2**60, 2**5000, -1, -(2**60), 1.5, 1e308, math.inf, math.nan, "12", "", True, None)
ABSURD += ([], [3], {}, {"a": 1}, 0)
# What is a meaning somewhere, or cannot matter.
MEANT = {
    "tie_word_embeddings": (True,),
    "attention_bias": (True,),
    "mlp_bias": (True,),
    "max_window_layers": (2**60, 2**5000, None, 0),
    "no_rope_layer_interval": (2**60, 2**5000),
    "sliding_window_pattern": (2**60, 2**5000),
    "sliding_window": (None, 0),
    "use_sliding_window": (None, True),
    "num_key_value_heads": (None,),
    "head_dim": (None,),
    "n_inner": (None,),
    "hidden_act": ABSURD,  # Gemma's is not what counts
    "no_rope_layers": (None,),
    "partial_rotary_factor": (True,),
    "original_max_position_embeddings": ABSURD,  # without a scaling there is nothing to divide by
    "use_bidirectional_attention": (None, 0),
    "attention_dropout": (0,),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_absurd_values_of_any_key_are_refused_at_once(name):
    family = FAMILIES[name]
    raw = raw_of(name)
    for key in {*family.keys, *family.defaults}:
        for value in ABSURD:
            try:
                from_config_json(raw | {key: value}, "x")
            except CheckpointError:
                refused(raw | {key: value})
                continue
            numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
            ours = family.keys.get(key)
            meant = any(value is ok or value == ok for ok in MEANT.get(key, ()))
            floats = key.endswith(("eps", "epsilon", "softcapping")) or "rope" in key
            large = numeric and math.isfinite(min(value, 10**300)) and value > 1 and floats
            width = key == "query_pre_attn_scalar" and numeric and value >= 1
            small = floats and value in (0, None) and "rope" not in key
            assert meant or large or width or small, f"{key}={value!r:.40} as {ours} was accepted"


ROPES = {
    "an unknown kind": ({"rope_type": "spiral", "factor": 2.0}, "'spiral'"),
    "an unknown older kind": ({"type": "spiral", "factor": 2.0}, "'spiral'"),
    "an unknown key": ({"rope_type": "linear", "factor": 2.0, "twist": 1}, "'twist'"),
    "a key without a scaling": ({"rope_type": "default", "twist": 1}, "'twist'"),
    "a key of another kind": ({"rope_type": "linear", "factor": 2.0, "beta_fast": 1}, "beta_fast"),
    "llama3 with factors": (LLAMA3 | {"attention_factor": 2.0}, "attention_factor"),
    "llama3 upside down": (LLAMA3 | {"low_freq_factor": 4.0}, "low_freq_factor"),
    "mscale of another kind": ({"rope_type": "linear", "factor": 2.0, "mscale": 1.0}, "mscale"),
    "linear without a factor": ({"rope_type": "linear"}, "factor is missing"),
    "linear by null": ({"type": "linear", "factor": None}, "factor is missing"),
    "llama3 without its bounds": (
        {"rope_type": "llama3", "factor": 2.0, "high_freq_factor": 4.0},
        "low_freq_factor is missing",
    ),
    "a factor below one": ({"rope_type": "linear", "factor": 0.5}, "factor"),
    "a factor in words": ({"rope_type": "yarn", "factor": "4"}, "factor"),
    "NaN": ({"rope_type": "yarn", "factor": math.nan}, "factor"),
    "infinity": ({"rope_type": "linear", "factor": math.inf}, "factor"),
    "null theta": ({"rope_type": "default", "rope_theta": None}, "rope_theta"),
    "yarn into a shorter context": (
        {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 128},
        "factor=0.5",
    ),
    "no truncation": ({"rope_type": "yarn", "factor": 2.0, "truncate": False}, "truncate"),
    "no beta": ({"rope_type": "yarn", "factor": 2.0, "beta_fast": 0}, "beta_fast"),
    "longrope without factors": ({"rope_type": "longrope"}, "factors"),
    "longrope of zeros": (
        {"rope_type": "longrope", "short_factor": [0.0] * 4, "long_factor": [1.0] * 4},
        "above 0",
    ),
    "longrope in words": (
        {"rope_type": "longrope", "short_factor": ["a"] * 4, "long_factor": [1.0] * 4},
        "short_factors",
    ),
    "a list": ([1, 2], ""),
    "a word": ("linear", ""),
    "a number": (7, ""),
    "a list for a kind": ({"rope_type": ["linear"], "factor": 2.0}, ""),
    "a rotated part": ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial"),
    "per layer": ({"full_attention": {}, "sliding_attention": {}}, "attention"),
    "contradiction": ({"rope_type": "linear", "type": "odd", "factor": 2.0}, "rope type"),
}


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("case", ROPES)
def test_rotary_positions_that_are_not_understood_are_refused(case, spelling):
    value, word = ROPES[case]
    refused(raw_of("qwen2") | {spelling: value}, word)


@pytest.mark.parametrize(
    "inner",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "default", "factor": 2.0},
        {"rope_theta": None},
        {"rope_theta": 0.5},
        {"rope_theta": "1e4"},
        {"rope_theta": math.nan},
        7,
    ],
    ids=str,
)
def test_local_positions_that_are_not_understood_are_refused(inner):
    raw = raw_of("gemma3_text")
    refused(raw | {"rope_parameters": {"sliding_attention": inner, "full_attention": {}}})
    refused(raw | {"rope_parameters": {"sliding_attention": {}, "chunked_attention": {}}})


def test_the_part_of_a_head_that_rotates_is_a_number_that_leaves_some():
    for part in (0, 0.0, 0.1, -0.5, 1.5, math.nan, math.inf, "0.5", None, [1], 2**5000):
        refused(raw_of("phi3") | {"partial_rotary_factor": part})
    config = from_config_json(raw_of("phi3") | {"partial_rotary_factor": 0.5}, "x")
    assert config.rotary_dim == 4


def test_a_scaling_added_to_a_newer_file_counts():
    """As a reader of a model card does it; transformers heeds it too."""
    raw = raw_of("qwen2") | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    del raw["rope_theta"]
    config = from_config_json(raw | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "x")
    assert config.rope_scaling.kind == "linear"
    assert config.rope_theta == 1e6


S, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.typed])
def test_layers_without_a_pattern_are_refused(name):
    raw = raw_of(name) | {"use_sliding_window": True} if name == "smollm3" else raw_of(name)
    for types, word in (
        ([S, S, FULL, FULL, S, S], "pattern"),
        ([S, FULL, S, S, FULL, S], "pattern"),
        ([S, FULL], "2 layer_types for 6 layers"),
        ([S] * 7, "7 layer_types for 6 layers"),
        ([S, FULL, "chunked_attention", S, FULL, S], "chunked_attention"),
        ("sliding_attention", ""),
        (7, ""),
        ([[S]] * 6, ""),
        ({S: 1}, ""),
    ):
        refused(raw | {"layer_types": types}, word)


@pytest.mark.parametrize(
    "types",
    [
        *([S] * 6, [FULL] * 6, [S, FULL] * 3, [S, S, FULL] * 2, [S] * 5 + [FULL]),
        *([FULL] * 2 + [S] * 4, [FULL, S, FULL, S, FULL, S]),
    ],
    ids=lambda types: "".join(kind[0] for kind in types),
)
def test_layers_with_a_pattern_are_read_as_listed(types):
    """The alternation that begins with a full layer has no words here and is refused."""
    raw = raw_of("qwen3") | {"layer_types": types}
    if types[:2] == [FULL, S] and types[2] == FULL:
        types = [S if i % 2 else FULL for i in range(6)]
        refused(raw, "pattern")
        return
    config = from_config_json(raw, "x")
    assert [config.window(i) > 0 for i in range(6)] == [kind == S for kind in types]


def test_layers_without_positions_follow_an_interval():
    raw = raw_of("smollm3")
    for layers, word in (
        ([1, 0, 0, 1, 1, 1], "no_rope_layers"),
        ([0, 1, 1, 1, 1, 1], "no_rope_layers"),
        ([1, 0], "no_rope_layers"),
        ([1, 1, 2, 1, 1, 2], ""),
        (["1", "0"] * 3, ""),
        (7, ""),
    ):
        refused(raw | {"no_rope_layers": layers}, word)
    for every in (0, -1, 1.5, "4", True, None):
        refused(raw | {"no_rope_layer_interval": every, "no_rope_layers": None})
    for layers, every in (([1, 0] * 3, 2), ([1] * 6, 0), ([0] * 6, 1)):
        assert from_config_json(raw | {"no_rope_layers": layers}, "x").no_rope_every == every


def test_a_model_that_also_sees_is_refused():
    raw = {"model_type": "gemma3", "text_config": raw_of("gemma3_text"), "vision_config": {}}
    refused(raw, "'gemma3'", "gemma3_text")


@pytest.mark.parametrize("raw", [[], "llama", 7, None, True, {}, {"model_type": []}], ids=str)
def test_what_is_no_config_is_refused(raw):
    refused(raw)


def test_an_own_config_is_checked_as_a_recipe_is():
    raw = to_config_json(make_model(**OWN["softcap"]).config)
    for key, value in (
        ("d_model", -3),
        ("n_layers", 2**60),
        ("norm", "batchnorm"),
        ("rope_scaling", "yarn"),
        ("rope_scaling", None),
        ("rope_scaling", {"kind": "yarn"}),
        ("norm_eps", math.nan),
        ("twist", 1),
    ):
        refused(raw | {key: value}, key)
    refused(raw | {"rope_scaling": {"twist": 1}}, "twist")


def test_an_own_config_holds_every_field_and_ignores_what_other_engines_want():
    """A saved config.json also carries the special token ids, which are no part of the shape."""
    config = make_model(**OWN["GPT-2 with the exact GELU"]).config
    raw = to_config_json(config)
    assert set(raw) == {
        "model_type",
        "dtype",
        *(field.name for field in dataclasses.fields(config)),
    }
    assert from_config_json(raw | {"bos_token_id": 0, "eos_token_id": 0}, "x") == config
