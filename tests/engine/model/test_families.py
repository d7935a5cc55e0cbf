"""Every family computes what transformers computes, from the files that each of them writes.

A case is a config.json as a published checkpoint has it, made small. transformers reads it, fills
a model with noise and saves it; we read its weights under both the published config and the one
that transformers writes today.
"""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import checkpoint, manifest
from engine.config import RopeScaling
from engine.generate.decoder import Run
from engine.generate.native import NativeDecoder
from engine.matrices import read_matrices
from engine.model.cache import KVCache
from engine.model.config_json import family_of, from_config_json, to_config_json
from engine.model.families import FAMILIES
from engine.model.transformer import Transformer

transformers = pytest.importorskip("transformers")

V, SHORT, LONG = 401, 6, 28  # prompts within and beyond windows and original contexts
SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "use_cache": True,
    "torch_dtype": "float32",
    "transformers_version": "4.40.0",
}
SILU = {"hidden_act": "silu", "attention_dropout": 0.0}
LLAMA = SIZES | SILU | {"rms_norm_eps": 1e-5, "attention_bias": False, "rope_scaling": None}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
    "rope_type": "llama3",
}
GEMMA = SIZES | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 12,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 30,
    "rms_norm_eps": 1e-6,
    "sliding_window": 7,
    "cache_implementation": "hybrid",
}
GEMMA3 = GEMMA | {
    "model_type": "gemma3_text",
    "num_hidden_layers": 7,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "rope_scaling": None,
}
PHI = (
    SIZES
    | SILU
    | {
        "model_type": "phi3",
        "attention_bias": False,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "original_max_position_embeddings": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "sliding_window": 262_144,
    }
)
# As published, only smaller.
PUBLISHED = {
    "Llama-3.2": LLAMA
    | {"model_type": "llama", "head_dim": 8, "mlp_bias": False, "pretraining_tp": 1}
    | {"rope_scaling": LLAMA3, "rope_theta": 500_000.0, "tie_word_embeddings": True},
    "SmolLM2": LLAMA
    | {"model_type": "llama", "is_llama_config": True, "rope_interleaved": False}
    | {"mlp_bias": False, "pretraining_tp": 1, "rope_theta": 100_000, "tie_word_embeddings": True}
    | {"transformers.js_config": {"dtype": "q4"}, "_name_or_path": "x"},
    "Mistral-7B-v0.1": SIZES
    | {"model_type": "mistral", "hidden_act": "silu", "rms_norm_eps": 1e-5}
    | {"rope_theta": 10_000.0, "sliding_window": 9, "tie_word_embeddings": False},
    "Mistral-7B-v0.3": SIZES
    | SILU
    | {"model_type": "mistral", "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0}
    | {"sliding_window": None, "tie_word_embeddings": False},
    "SmolLM3": LLAMA
    | {"model_type": "smollm3", "mlp_bias": False, "pretraining_tp": 2, "rope_theta": 5e6}
    | {"no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0], "max_window_layers": 28}
    | {"layer_types": ["full_attention"] * 4, "sliding_window": None, "use_sliding_window": False},
    "Qwen2.5": SIZES
    | SILU
    | {"model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0}
    | {"max_window_layers": 28, "sliding_window": 131_072, "use_sliding_window": False}
    | {"use_mrope": False, "tie_word_embeddings": False},
    "Qwen3": LLAMA
    | {"model_type": "qwen3", "head_dim": 12, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000}
    | {"max_window_layers": 28, "sliding_window": None, "use_sliding_window": False}
    | {"tie_word_embeddings": True},
    "Gemma-2": GEMMA
    | {"model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh", "rope_theta": 10_000.0}
    | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.5},
    "Gemma-3-1b": GEMMA3 | {"sliding_window_pattern": 6},
    "Gemma-3-270m": GEMMA3
    | {"_sliding_window_pattern": 6, "use_bidirectional_attention": False}
    | {"layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]},
    "OLMo-2": LLAMA | {"model_type": "olmo2", "rope_theta": 500_000, "tie_word_embeddings": False},
    "Phi-3-mini-4k": PHI
    | {"original_max_position_embeddings": 96, "rope_scaling": None, "sliding_window": 11}
    | {"tie_word_embeddings": False},
    "Phi-3-mini-128k": PHI
    | {"tie_word_embeddings": False}
    | {
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.4],
            "long_factor": [1.0, 2.5, 5.0, 6.5],
        }
    },
    "Phi-4-mini": PHI
    | {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False}
    | {"partial_rotary_factor": 0.75, "tie_word_embeddings": True}
    | {
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.2],
            "long_factor": [1.0, 3.5, 6.0],
        }
    },
    "gpt2": {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": 2,
        "embd_pdrop": 0.1,
        "eos_token_id": 2,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5,
        "n_ctx": 64,
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 3,
        "n_positions": 64,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": V,
    },
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}
MSCALE = YARN | {"mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 4, "beta_slow": 0.02}
WINDOWS = {"use_sliding_window": True, "sliding_window": 7}
# What published members of a family do not have, and its words can say.
PECULIAR = {
    "llama linear": ("SmolLM2", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "llama longrope, context never stretched": (
        "SmolLM2",
        {
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0, 1.1, 1.2, 1.4],
                "long_factor": [1.0, 2.5, 5.0, 6.5],
                "original_max_position_embeddings": 96,
            }
        },
    ),
    "llama longrope, factor given": (
        "SmolLM2",
        {
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0, 1.1, 1.2, 1.4],
                "long_factor": [1.0, 2.5, 5.0, 6.5],
                "original_max_position_embeddings": 16,
                "factor": 3.0,
            }
        },
    ),
    "qwen2 yarn, factor left out": (
        "Qwen2.5",
        {"rope_scaling": {"type": "yarn", "factor": None, "original_max_position_embeddings": 24}},
    ),
    "llama dynamic": ("SmolLM2", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}),
    "llama biases": ("SmolLM2", {"attention_bias": True, "mlp_bias": True}),
    "llama untied, one key head": (
        "SmolLM2",
        {"tie_word_embeddings": False, "num_key_value_heads": 1, "head_dim": 12},
    ),
    "mistral tied, no grouping": (
        "Mistral-7B-v0.1",
        {"tie_word_embeddings": True, "num_key_value_heads": 4},
    ),
    "smollm3 windows": ("SmolLM3", WINDOWS | {"layer_types": None, "no_rope_layers": None}),
    "smollm3 windows, listed": (
        "SmolLM3",
        WINDOWS
        | {"no_rope_layers": [1, 0, 1, 0]}
        | {"layer_types": ["full_attention", "sliding_attention"] * 2},
    ),
    "qwen2 yarn": ("Qwen2.5", {"rope_scaling": YARN}),
    "qwen2 yarn, mscale": ("Qwen2.5", {"rope_scaling": MSCALE}),
    "qwen2 yarn, factor given": ("Qwen2.5", {"rope_scaling": YARN | {"attention_factor": 1.3}}),
    "qwen2 windows": ("Qwen2.5", WINDOWS | {"max_window_layers": 2}),
    "qwen3 biases": ("Qwen3", {"attention_bias": True, "tie_word_embeddings": False}),
    "qwen3 yarn": ("Qwen3", {"rope_scaling": YARN}),
    "gemma2 linear": ("Gemma-2", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "gemma2 untied": ("Gemma-2", {"tie_word_embeddings": False, "attention_bias": True}),
    "gemma3 linear": ("Gemma-3-1b", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "gemma3 capped": (
        "Gemma-3-1b",
        {"final_logit_softcapping": 2.5},
    ),
    "olmo2 tied, one key head": ("OLMo-2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "olmo2 yarn": ("OLMo-2", {"rope_scaling": YARN, "attention_bias": True}),
    "gpt2 untied, narrow": ("gpt2", {"tie_word_embeddings": False, "n_inner": 24}),
}
CASES = PUBLISHED | {name: PUBLISHED[base] | changes for name, (base, changes) in PECULIAR.items()}


@dataclasses.dataclass(frozen=True)
class Oracle:
    """A published-style folder, the same model as transformers saves it, and its logits."""

    published: Path  # one file of weights, the config as published
    current: Path  # shards, the config as transformers writes it today
    tokens: torch.Tensor
    short: torch.Tensor
    long: torch.Tensor


@pytest.fixture(scope="module")
def oracle(tokenizer, tmp_path_factory):
    """Return a function that makes the oracle of a case, once."""
    made: dict[str, Oracle] = {}

    def make(name: str) -> Oracle:
        if name not in made:
            made[name] = make_oracle(CASES[name], tokenizer, tmp_path_factory.mktemp("oracle"))
        return made[name]

    return make


def make_oracle(raw: dict, tokenizer, folder: Path) -> Oracle:
    published, current = folder / "published", folder / "current"
    published.mkdir()
    (published / "config.json").write_text(json.dumps(raw))
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(published), attn_implementation="eager"
    ).eval()
    random = torch.Generator().manual_seed(len(raw))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=random))
        tokens = torch.randint(0, V, (2, LONG), generator=random)
        short, long = theirs(tokens[:, :SHORT]).logits, theirs(tokens).logits
    theirs.save_pretrained(published)
    theirs.save_pretrained(current, max_shard_size="20KB")
    assert len(list(current.glob("*.safetensors"))) > 2
    (published / "config.json").write_text(json.dumps(raw))  # theirs again as it was
    for place in (published, current):
        tokenizer.save(place, 96)
        files = {"config.json": {"bytes": (place / "config.json").stat().st_size, "sha256": "x"}}
        (place / "manifest.json").write_text(json.dumps({"step": 0, "files": files}))
    return Oracle(published, current, tokens, short, long)


def load(folder: Path) -> Transformer:
    return checkpoint.load_model(folder)[0]


def logits_of(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.fixture(autouse=True)
def _no_hashes(monkeypatch):
    """The manifests here are stubs; `tests/engine/test_checkpoint.py` tests the hashes."""
    monkeypatch.setattr(manifest, "sha256", lambda path: "x")


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name, oracle):
    """From both spellings of the config, single file and shards, short prompt and long."""
    it = oracle(name)
    published, current = load(it.published), load(it.current)
    assert published.config == current.config
    for model in (published, current):
        assert_close(logits_of(model, it.tokens[:, :SHORT]), it.short)
        assert_close(logits_of(model, it.tokens), it.long)


@pytest.mark.parametrize("name", CASES)
def test_cached_logits_equal_transformers(name, oracle):
    """Token by token, and in chunks that begin inside a window and end beyond it."""
    it = oracle(name)
    model = load(it.published)
    for cuts in (range(LONG + 1), (0, 5, 6, 17, LONG)):
        cache = KVCache(model.config, rows=2, capacity=LONG)
        with torch.no_grad():
            parts = [model(it.tokens[:, a:b], cache) for a, b in itertools.pairwise(cuts)]
        assert_close(torch.cat(parts, dim=1), it.long)


@pytest.mark.parametrize("name", CASES)
def test_the_decoder_in_c_equals_transformers(name, oracle, library):
    """The weights as they lie in the file, at once and token by token, without torch."""
    it = oracle(name)
    config = checkpoint.from_config_json(manifest.read_json(it.published / "config.json"), "x")
    decoder = NativeDecoder(config, read_matrices(it.published, config, None), library, kv="fp32")
    for expected, ids in ((it.short, it.tokens[:, :SHORT]), (it.long, it.tokens)):
        cache = decoder.cache(ids.shape[1], rows=2)
        whole = decoder.forward(
            cache, [Run(row, ids[row].tolist(), ids.shape[1]) for row in (0, 1)]
        )
        assert_close(torch.from_numpy(whole).view_as(expected), expected)
        assert cache.lengths == [ids.shape[1]] * 2
    cache, steps = decoder.cache(LONG), it.tokens[0].tolist()
    each = [decoder.forward(cache, [Run(0, [token])]) for token in steps]
    assert np.array_equal(np.concatenate(each), whole[:LONG])


SAVED = ["llama linear", "qwen2 yarn, mscale", "qwen2 windows", "smollm3 windows, listed"]
SAVED += ["gemma2 untied", "gemma3 linear", "olmo2 yarn", "gpt2 untied, narrow"]


@pytest.mark.parametrize("name", [*PUBLISHED, *SAVED])
def test_what_we_save_loads_in_transformers(name, oracle, tokenizer, tmp_path):
    """As a family that says the same, every tensor under its name, none left over."""
    it = oracle(name)
    model = load(it.published)
    folder = checkpoint.save(
        tmp_path,
        checkpoint.Snapshot(
            step=1,
            model=model,
            tokenizer=tokenizer,
            recipe_yaml="",
            sample=checkpoint.SampleConfig(),
            facts={},
            optimizer={},
            state={},
        ),
        best=True,
    )
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    with torch.no_grad():
        assert_close(theirs.eval()(it.tokens[:, :SHORT]).logits, it.short)
        assert_close(theirs.eval()(it.tokens).logits, it.long)
    again = load(folder)
    assert again.config == model.config
    assert torch.equal(logits_of(again, it.tokens), logits_of(model, it.tokens))


# Some families say what an earlier one can say too; the first is chosen.
ALSO = {
    "Mistral-7B-v0.3": "llama",
    "Phi-3-mini-4k": "mistral",
    "Phi-3-mini-128k": "mistral",
}


@pytest.mark.parametrize("name", CASES)
def test_configs_round_trip_under_the_right_family(name):
    config = from_config_json(CASES[name], "x")
    assert family_of(config) == ALSO.get(name, CASES[name]["model_type"])
    written = json.loads(json.dumps(to_config_json(config)))
    assert from_config_json(written, "x") == config


def scaling(**changes):
    """Return a change of rope_scaling, from the case's own."""
    return lambda config: {"rope_scaling": dataclasses.replace(config.rope_scaling, **changes)}


def plain(config):
    return {"rope_scaling": RopeScaling()}


def swapped(config):
    old = config.rope_scaling
    swap = {"short_factors": old.long_factors, "long_factors": old.short_factors}
    return {"rope_scaling": dataclasses.replace(old, **swap)}


CONTROLS = [
    ("Gemma-2", {"norm_offset": False}),
    ("Gemma-2", {"scale_embeddings": False}),
    ("Gemma-2", {"attention_softcap": 0.0}),
    ("Gemma-2", {"logit_softcap": 0.0}),
    ("Gemma-2", {"attention_width": 12}),
    ("Gemma-2", {"full_every": 3}),
    ("Gemma-2", {"activation": "geglu"}),
    ("Gemma-2", {"sliding_window": 8}),
    ("Gemma-3-1b", {"local_rope_theta": 0.0}),
    ("Gemma-3-1b", {"rope_theta": 10_000.0}),
    ("Gemma-3-1b", {"full_every": 0}),
    ("Gemma-3-1b", {"qk_norm": "none"}),
    ("gemma3 linear", plain),
    ("Mistral-7B-v0.1", {"sliding_window": 10}),
    ("Mistral-7B-v0.1", {"sliding_window": 8}),
    ("Mistral-7B-v0.1", {"sliding_window": 0}),
    ("Llama-3.2", plain),
    ("Llama-3.2", {"rope_theta": 400_000.0}),
    ("Llama-3.2", {"norm_eps": 1e-2}),
    ("Llama-3.2", scaling(high_freq_factor=3.0)),
    ("Llama-3.2", scaling(original_max_seq_len=48)),
    ("llama linear", plain),
    ("qwen2 yarn", plain),
    ("qwen2 yarn", scaling(attention_factor=1.0)),
    ("qwen2 yarn, mscale", scaling(attention_factor=0.0)),
    ("qwen2 yarn, mscale", scaling(beta_fast=32.0, beta_slow=1.0)),
    ("qwen2 windows", {"window_from": 1}),
    ("qwen2 windows", {"window_from": 3}),
    ("SmolLM3", {"no_rope_every": 0}),
    ("SmolLM3", {"no_rope_every": 3}),
    ("Qwen3", {"qk_norm": "none"}),
    ("OLMo-2", {"qk_norm": "none"}),
    ("Phi-3-mini-128k", swapped),
    ("Phi-3-mini-128k", scaling(attention_factor=1.0)),
    ("Phi-4-mini", swapped),
    ("gpt2", {"activation": "gelu"}),
    ("gpt2", {"norm": "rmsnorm"}),
]


@pytest.mark.parametrize(
    "name, wrong", CONTROLS, ids=[f"{n} {i}" for i, (n, _) in enumerate(CONTROLS)]
)
def test_the_oracle_sees_each_peculiarity(name, wrong, oracle):
    """A model that is wrong in one way is wrong by more than five times what is allowed above."""
    it = oracle(name)
    right = load(it.published)
    changes = wrong(right.config) if callable(wrong) else wrong
    config = dataclasses.replace(right.config, **changes)
    assert config != right.config
    model = Transformer(config).eval()
    model.load_state_dict(right.state_dict(), strict=False)
    off = (logits_of(model, it.tokens) - it.long).abs().max().item()
    assert off > 5e-4, off


# Keys whose default transformers keeps elsewhere, or under another name.
ROPE = ("rope_theta", "rope_local_base_freq", "partial_rotary_factor")
HERE_ONLY = {
    ("gemma2", "hidden_act"),
    ("gemma3_text", "hidden_act"),
    ("gemma2", "sliding_window_pattern"),
    ("gemma3_text", "sliding_window_pattern"),
    ("smollm3", "max_window_layers"),
}
SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 8}
SMALL_GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 8}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_missing_key_means_what_it_means_to_transformers(name):
    """Each default of a row, against the config class made without that key."""
    sizes = SMALL_GPT2 if name == "gpt2" else SMALL
    theirs = transformers.AutoConfig.for_model(name, **sizes)
    raw = theirs.to_dict()
    for key, default in FAMILIES[name].defaults.items():
        if (name, key) in HERE_ONLY:
            continue
        if key in ROPE:
            rope = theirs.rope_parameters
            full, local = rope.get("full_attention", rope), rope.get("sliding_attention", rope)
            place = local if key == "rope_local_base_freq" else full
            expected = place["rope_theta" if key.startswith("rope") else key]
        elif key == "n_inner":
            expected = 4 * 32  # transformers leaves the None in place and multiplies later
        elif key == "use_bidirectional_attention":  # None and False both mean no
            assert not theirs.use_bidirectional_attention
            continue
        elif key == "num_key_value_heads" and default is None:
            assert theirs.num_key_value_heads == theirs.num_attention_heads
            continue
        elif key in ("sliding_window", "no_rope_layers"):
            # Qwen's classes drop a window that is not used; SmolLM3's writes its list out.
            field = next(f for f in dataclasses.fields(type(theirs)) if f.name == key)
            expected = field.default
        else:
            expected = raw[key] if key in raw else getattr(theirs, key)
        assert (default(sizes) if callable(default) else default) == expected, key


@pytest.mark.parametrize("name", FAMILIES)
def test_fixed_values_are_those_of_transformers(name):
    theirs = transformers.AutoConfig.for_model(name)
    for key, allowed in FAMILIES[name].fixed.items():
        if hasattr(theirs, key) and key != "sliding_window_pattern":
            allowed = allowed if isinstance(allowed, tuple) else (allowed,)
            assert getattr(theirs, key) in allowed, key


@pytest.mark.parametrize("name", CASES)
def test_the_class_is_the_one_that_transformers_takes(name, oracle):
    raw = json.loads((oracle(name).current / "config.json").read_text())
    assert raw["architectures"] == [FAMILIES[raw["model_type"]].model_class]
