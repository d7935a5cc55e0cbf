"""The parameters of a model, known without making one."""

import itertools

import pytest
import torch

from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.model.config_json import OWN_TYPE, from_config_json, stored_tensors
from engine.model.families import FAMILIES
from engine.model.shapes import check_fit, parameter_shapes, stored_shape
from engine.model.transformer import ACTIVATIONS, Transformer
from tests.engine.model.test_families import CASES

SMALL = {"vocab_size": 50, "d_model": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
SMALL |= {"head_dim": 10, "d_ff": 20, "max_seq_len": 16}


def of_the_model(config: ModelConfig) -> list[tuple[str, tuple[int, ...]]]:
    with torch.device("meta"):
        state = Transformer(config).state_dict()
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    return [(name, tuple(tensor.shape)) for name, tensor in state.items() if name not in tied]


@pytest.mark.parametrize("name", CASES)
def test_every_family_has_the_parameters_of_the_model(name):
    config = from_config_json(CASES[name], "x")
    assert list(parameter_shapes(config).items()) == of_the_model(config)


OPTIONS = {
    "norm": ("rmsnorm", "layernorm"),
    "norm_placement": ("pre", "post", "sandwich"),
    "qk_norm": ("none", "head", "width"),
    "position": ("rope", "learned", "none"),
    "activation": tuple(ACTIVATIONS),
    "tie_embeddings": (False, True),
    "attention_bias": (False, True),
    "output_bias": (False, True),
    "mlp_bias": (False, True),
}


@pytest.mark.parametrize("pair", list(itertools.combinations(OPTIONS, 2)), ids="-".join)
def test_every_two_options_have_the_parameters_of_the_model(pair):
    for values in itertools.product(*(OPTIONS[name] for name in pair)):
        config = ModelConfig(**SMALL, **dict(zip(pair, values, strict=True)))
        assert list(parameter_shapes(config).items()) == of_the_model(config)


def on_disk(config: ModelConfig, model_type: str) -> dict[str, tuple[int, ...]]:
    shapes = parameter_shapes(config)
    stored = stored_tensors(shapes, config, model_type)
    return {item.name: stored_shape(item, shapes) for item in stored}


def test_what_lies_fused_or_transposed_is_known_on_disk():
    gpt2 = on_disk(from_config_json(CASES["gpt2"], "x"), "gpt2")
    assert gpt2["transformer.h.0.attn.c_attn.weight"] == (32, 96)
    assert gpt2["transformer.h.0.attn.c_attn.bias"] == (96,)
    phi = on_disk(from_config_json(CASES["Phi-3-mini-4k"], "x"), "phi3")
    assert phi["model.layers.0.self_attn.qkv_proj.weight"] == (32 + 16 + 16, 32)


@pytest.mark.parametrize("model_type", [OWN_TYPE, "llama"])
def test_what_fits_is_accepted_and_what_does_not_is_named(model_type):
    config = from_config_json(CASES["SmolLM2"], "x")
    assert model_type in (OWN_TYPE, *FAMILIES)
    there = on_disk(config, model_type)
    name = list(there)[3]
    assert len(check_fit(config, model_type, there, "x")) == len(there)
    check_fit(config, model_type, there | {"lm_head.weight": (401, 32)}, "x")
    with pytest.raises(CheckpointError, match=f"x: the weights lack {name}"):
        check_fit(config, model_type, {k: v for k, v in there.items() if k != name}, "x")
    with pytest.raises(CheckpointError, match=f"{name} is 3 × 5, but config.json asks for"):
        check_fit(config, model_type, there | {name: (3, 5)}, "x")
    with pytest.raises(CheckpointError, match="1 tensors have no place in a .*: extra"):
        check_fit(config, model_type, there | {"extra": (1,)}, "x")
