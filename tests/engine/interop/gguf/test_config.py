"""Keys ↔ config.json: defaults as each family means them, and no difference written silently."""

import numpy as np
import pytest
import transformers

from engine.errors import CheckpointError
from engine.interop.gguf.config import architecture_of, complete, to_keys
from engine.interop.gguf.folder import to_hf
from engine.interop.gguf.reader import read
from tests.engine.interop.gguf.tiny import COMMON, LINEAR, config_of, write_case


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'.* only mean 'silu'"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8},
            "sliding_window is True|sliding_window is 8",
        ),
        ("qwen3", {"attention_bias": True}, "attention_bias is True"),
        ("olmo2", {"attention_bias": True}, "attention_bias is True"),
        ("smollm3", {"no_rope_layer_interval": 3}, "no_rope_layer"),
        ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar is 64"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping is None.* mean 50.0"),
        ("llama", {"partial_rotary_factor": 0.5}, "dimension_count"),
        ("gemma3", {"layer_types": ["full_attention"] * 7}, "layer_types is "),
        ("gemma3", {"num_hidden_layers": 62}, "query_pre_attn_scalar is 32, .* only mean 16"),
        ("phi3", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("gpt2", {"activation_function": "relu"}, "activation_function is 'relu'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ],
)
def test_what_a_file_cannot_say_is_refused_by_name(case, changes, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        write_case(tmp_path / "m.gguf", case, **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_model_type_without_a_place_is_refused():
    with pytest.raises(CheckpointError, match="'mamba' has no place .* llama, mistral, smollm3"):
        architecture_of({"model_type": "mamba"})


def test_a_config_that_lacks_a_size_is_refused():
    config = config_of("llama").to_dict()
    del config["intermediate_size"]
    with pytest.raises(CheckpointError, match=r"config\.json lacks intermediate_size"):
        complete(config)


@pytest.mark.parametrize("case", ["llama", "llama-tied", "smollm3", "gemma3", "gpt2", "qwen3"])
def test_what_a_short_config_leaves_out_means_what_transformers_means(case):
    config = config_of(case)
    short = config.to_dict()
    del short["tie_word_embeddings"]
    usual = type(config)().tie_word_embeddings
    assert complete(short)["tie_word_embeddings"] == usual


@pytest.mark.parametrize("case", ["llama-linear", "llama-yarn", "gemma3-linear", "phi3-long"])
def test_classic_and_new_words_for_rotary_positions_are_the_same(case):
    new = complete(config_of(case).to_dict())
    elsewhere = {"rope_parameters"} | (set() if case == "phi3-long" else {"partial_rotary_factor"})
    classic = {key: value for key, value in new.items() if key not in elsewhere}
    assert to_keys(complete(classic))[0] == to_keys(new)[0]
    back = transformers.AutoConfig.for_model(**classic)
    assert back.rope_parameters == config_of(case).rope_parameters


def test_gemma_s_local_base_is_kept(tmp_path):
    parameters = {
        "full_attention": {"rope_type": "default", "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    write_case(tmp_path / "m.gguf", "gemma3", rope_parameters=parameters)
    config, _ = to_hf(read(tmp_path / "m.gguf"))
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (5e5, 2e4)


def test_the_keys_of_a_llama_are_those_of_the_converter():
    """Names and types that other programs ask for, by hand."""
    keys, tensors = to_keys(complete(transformers.LlamaConfig(**COMMON, rope_theta=1e5).to_dict()))
    assert tensors == {}
    assert keys == {
        "llama.context_length": 256,
        "llama.embedding_length": 64,
        "llama.block_count": 7,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.vocab_size": 320,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 1e5,
    }


def test_linear_scaling_is_written_in_two_keys():
    config = config_of("llama", rope_scaling=dict(LINEAR))
    keys, _ = to_keys(complete(config.to_dict()))
    assert keys["llama.rope.scaling.type"] == "linear"
    assert keys["llama.rope.scaling.factor"] == np.float32(4.0)
