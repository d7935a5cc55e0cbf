"""What is saved here loads in transformers with the same logits, and here as the same model."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import example, given

from engine import checkpoint
from engine.config import ModelConfig, SampleConfig
from engine.errors import CheckpointError
from engine.model.config_json import OWN_TYPE, family_of, from_config_json, to_config_json
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
}
OWN = {
    "layernorm": {"norm": "layernorm"},
    "sandwich_norm": {"norm_placement": "sandwich"},
    "learned": {"position": "learned"},
    "none": {"position": "none"},
    "gelu": {"activation": "gelu"},
    "softcap": {"logit_softcap": 30.0},
    "qwen3 with mlp_bias": {"mlp_bias": True},
    # transformers' LlamaConfig refuses these, its Qwen3Config does not.
    "llama heads that do not divide the width": {
        "qk_norm": "none",
        "d_model": 36,
        "n_heads": 8,
        "head_dim": 6,
    },
    "llama with a window": {"qk_norm": "none", "sliding_window": 8},
    "attention_bias without output_bias": {"attention_bias": True},
    "output_bias without attention_bias": {"output_bias": True},
    "GPT-2": {
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


@pytest.mark.parametrize("key", ["hidden_size", "rope_parameters", "attention_bias"])
def test_a_missing_key_is_named_with_its_file(key):
    raw = to_config_json(ModelConfig(vocab_size=9))
    del raw[key]
    with pytest.raises(CheckpointError, match=rf"^some/config\.json: .*{key}"):
        from_config_json(raw, "some/config.json")


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": "wide"}, {"num_attention_heads": 3}, {"rope_parameters": None}],
    ids=str,
)
def test_values_that_make_no_model_are_refused(changes):
    raw = to_config_json(ModelConfig(vocab_size=9)) | changes | {"head_dim": 0}
    with pytest.raises(CheckpointError, match=r"^some/config\.json: "):
        from_config_json(raw, "some/config.json")


def test_an_own_config_holds_every_field_and_ignores_what_other_engines_want():
    """A saved config.json also carries the special token ids, which are no part of the shape."""
    config = make_model(**OWN["GPT-2"]).config
    raw = to_config_json(config)
    assert set(raw) == {"model_type", *(field.name for field in dataclasses.fields(config))}
    assert from_config_json(raw | {"bos_token_id": 0, "eos_token_id": 0}, "x") == config
