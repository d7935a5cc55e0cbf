"""Keys of an architecture: each has a type and a range, and none is passed over."""

import numpy as np
import pytest

from engine.errors import CheckpointError
from engine.interop.gguf.config import to_config
from engine.interop.gguf.folder import to_hf
from engine.interop.gguf.keys import Keys
from engine.interop.gguf.reader import read
from engine.interop.gguf.writer import store
from tests.engine.interop.gguf.tiny import write_case


@pytest.fixture
def changed(tmp_path):
    """Write a case, change its keys (None drops one), read it back."""

    def change(case, keys):
        path = tmp_path / "m.gguf"
        write_case(path, case)
        gguf = read(path)
        metadata = {k: v for k, v in (gguf.metadata | keys).items() if v is not None}
        shapes = {name: (info.shape, info.type) for name, info in gguf.tensors.items()}
        store(path, metadata, shapes, ((name, gguf.tensor(name)) for name in gguf.tensors))
        return read(path)

    return change


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.architecture", "mamba", "architecture 'mamba'; known are llama"),
        ("general.architecture", None, "architecture None"),
        ("general.architecture", np.array([1, 2], np.uint32), "architecture array"),
        ("general.type", "adapter", "holds 'adapter', not a model"),
        ("llama.block_count", None, r"lacks the key llama\.block_count"),
        ("llama.block_count", 0, r"llama\.block_count is 0"),
        ("llama.block_count", 1 << 30, "claims 1073741824 layers with 66 tensors"),
        ("llama.block_count", "seven", r"llama\.block_count is 'seven'"),
        ("llama.block_count", True, r"llama\.block_count is True"),
        ("llama.context_length", 1 << 40, r"llama\.context_length is 1099511627776"),
        ("llama.embedding_length", 128, r"token_embd\.weight has the shape"),
        ("llama.attention.head_count", np.array([4, 2, 4]), "differs from layer to layer"),
        ("llama.attention.head_count_kv", 3, "has 4 heads and 3 key/value heads"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "epsilon is nan"),
        ("llama.attention.key_length", 15, "heads of 15"),
        ("llama.attention.value_length", 8, "value_length is not the key length"),
        ("llama.rope.dimension_count", 8, "dimension_count is not the key length"),
        ("llama.rope.freq_base", 0.0, r"freq_base is 0\.0"),
        ("llama.rope.scaling.type", "su", "rope.scaling.type is 'su'"),
        ("llama.rope.scaling.yarn_ext_factor", 2.0, "yarn_ext_factor is not 1"),
        ("llama.rope.scaling.yarn_log_multiplier", 0.1, "yarn_log_multiplier is not 0"),
        ("llama.expert_count", 8, r"'llama\.expert_count' = 8 is not understood"),
        ("llama.attention.scale", 0.5, r"'llama\.attention\.scale' = 0\.5 is not understood"),
        ("llama.logit_scale", 2.0, r"'llama\.logit_scale' = 2\.0 is not understood"),
        ("llama.attention.causal", False, "causal' = False is not understood"),
        ("llama.x\ny", ["a\nb"] * 99, r"'llama\.x\\ny' = \['a"),
    ],
)
def test_a_key_that_is_wrong_or_unknown_is_refused_by_name(key, value, message, changed):
    gguf = changed("llama", {key: value})
    with pytest.raises(CheckpointError, match=message) as caught:
        to_hf(gguf)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.expert_count", 0),
        ("llama.attention.causal", True),
        ("llama.rope.scaling.finetuned", False),
        ("llama.attention.head_count", np.array([4] * 7, np.int32)),
        ("llama.rope.scaling.type", "none"),
        ("llama.rope.scaling.factor", 1.0),
        ("llama.vocab_size", None),
        ("llama.attention.key_length", None),
        ("other.key", 5),
        ("general.type", None),
    ],
)
def test_a_key_that_changes_nothing_is_let_be(key, value, changed):
    before = to_config(changed("llama", {}))
    assert to_config(changed("llama", {key: value})) == before


def test_a_number_is_the_decimal_that_was_meant(changed):
    gguf = changed("llama", {})
    stored = gguf.metadata["llama.attention.layer_norm_rms_epsilon"]
    assert stored == float(np.float32(1e-5)) != 1e-5
    assert Keys(gguf).real("attention.layer_norm_rms_epsilon") == 1e-5


def test_a_pattern_of_windows_is_read_as_period_or_list(changed):
    key = "gemma3.attention.sliding_window_pattern"
    usual = to_config(changed("gemma3", {}))["layer_types"]
    assert usual == ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    every_third = to_config(changed("gemma3", {key: 3}))["layer_types"]
    assert every_third == (["sliding_attention"] * 2 + ["full_attention"]) * 2 + usual[:1]
    listed = np.array([kind != "full_attention" for kind in every_third])
    assert to_config(changed("gemma3", {key: listed}))["layer_types"] == every_third
