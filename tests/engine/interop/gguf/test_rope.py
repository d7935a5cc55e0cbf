"""Rotary scaling: Llama 3's factors against transformers, and found again from themselves."""

import math

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.errors import CheckpointError
from engine.interop.gguf.folder import to_hf
from engine.interop.gguf.reader import read
from engine.interop.gguf.rope import FREQS, llama3_factors, longrope_attention
from engine.interop.gguf.writer import store
from tests.engine.interop.gguf.tiny import LLAMA3, config_of, write_case


def scaling(**changes):
    return LLAMA3 | changes


@pytest.mark.parametrize(("theta", "head_dim"), [(5e5, 128), (5e5, 64), (1e4, 16)])
@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_factors_are_what_transformers_divides_by(theta, head_dim, factor):
    words = {"rope_theta": theta, "head_dim": head_dim, "rope_scaling": scaling(factor=factor)}
    config = config_of("llama", max_position_embeddings=131072, **words)
    theirs, attention = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / theta ** (torch.arange(0, head_dim, 2).double() / head_dim)
    ours = llama3_factors(scaling(factor=factor), theta, head_dim)
    assert attention == 1.0
    torch.testing.assert_close(plain / ours, theirs.double(), rtol=1e-6, atol=0)


def file_with(path, factors):
    """A llama whose factors are replaced."""
    write_case(path, "llama3.1", num_hidden_layers=1)
    gguf = read(path)
    tensors = {name: gguf.tensor(name) for name in gguf.tensors} | {FREQS: factors}
    shapes = {name: (tuple(tensor.shape), "F32") for name, tensor in tensors.items()}
    store(path, gguf.metadata, shapes, tensors.items())
    return read(path)


def by_float32(words, theta, head_dim):
    """The factors as converters compute them: the frequencies rounded to float32."""
    found = []
    for frequency in 1.0 / (
        theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    ):
        old, low, high = (
            words[key]
            for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        )
        wavelength = 2 * math.pi / frequency
        if wavelength < old / high:
            found.append(1.0)
        elif wavelength > old / low:
            found.append(words["factor"])
        else:
            smooth = (old / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / words["factor"] + smooth))
    return torch.tensor(found)


@pytest.mark.parametrize("factor", [8.0, 32.0, 16.0, 5.5])
@pytest.mark.parametrize("original", [8192, 4096])
def test_parameters_are_found_from_what_converters_write(factor, original, tmp_path):
    words = scaling(factor=factor, original_max_position_embeddings=original)
    gguf = file_with(tmp_path / "m.gguf", by_float32(words, 5e5, 16))
    assert to_hf(gguf)[0]["rope_scaling"] == words


def test_factors_that_nothing_gives_are_refused(tmp_path):
    factors = llama3_factors(LLAMA3, 5e5, 16)
    factors[3] *= 1.001
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight follows from no published"):
        to_hf(file_with(tmp_path / "m.gguf", factors))


def test_factors_of_one_are_no_scaling(tmp_path):
    assert to_hf(file_with(tmp_path / "m.gguf", torch.ones(8)))[0]["rope_scaling"] is None


def test_factors_of_the_wrong_size_are_refused(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"rope_freqs\.weight has the shape \(9,\), not \(8,\)"
    ):
        to_hf(file_with(tmp_path / "m.gguf", torch.ones(9)))


def test_longrope_scales_attention_as_transformers_does():
    config = config_of("phi3-long")
    _, attention = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"), seq_len=256)
    assert longrope_attention(256, 64) == pytest.approx(attention, rel=1e-12)
    assert longrope_attention(64, 64) == 1.0


def test_a_longrope_of_another_strength_is_kept(tmp_path):
    words = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    write_case(tmp_path / "m.gguf", "phi3-long", rope_scaling=words | {"attention_factor": 1.5})
    assert to_hf(read(tmp_path / "m.gguf"))[0]["rope_scaling"] == words | {"attention_factor": 1.5}


def test_yarn_keeps_its_four_numbers(tmp_path):
    words = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "attention_factor": 1.25,
    }
    write_case(tmp_path / "m.gguf", "qwen2", rope_scaling=words)
    assert to_hf(read(tmp_path / "m.gguf"))[0]["rope_scaling"] == words


def test_dynamic_scaling_has_no_place_in_a_file(tmp_path):
    words = {"rope_type": "dynamic", "factor": 2.0}
    with pytest.raises(CheckpointError, match="rope_scaling is .*dynamic.* can only mean None"):
        write_case(tmp_path / "m.gguf", "llama", rope_scaling=words)
