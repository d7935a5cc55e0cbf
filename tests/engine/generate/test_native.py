"""The decoder in C against the transformer in torch, and its promise: the same to the bit."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.config import ModelConfig
from engine.errors import ResourceError
from engine.generate import native as decoding
from engine.generate.decoder import BLOCK, Run
from engine.generate.native import PIECE, NativeDecoder
from engine.generate.reference import TorchDecoder
from engine.model.transformer import Transformer
from engine.quantize import Matrix, format_of, pack, unpack
from tests.conftest import ROOT

FORMATS = ("f32", "bf16", "f16", "int8", "int4")


def random_model(seed: int, **sizes) -> Transformer:
    """A model whose attention looks about: weights large enough for scores to differ."""
    config = ModelConfig(**({"vocab_size": 61, "max_seq_len": 1024} | sizes))
    model, random = Transformer(config).eval(), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15, generator=random)
    return model


def native(model: Transformer, library, format: str, threads: int = 1, **kv) -> NativeDecoder:
    """The same model in C, its weights packed; the torch one takes what packing left of them."""
    weights: dict[str, Matrix | np.ndarray] = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = parameter.numpy()
            if values.ndim == 1:
                weights[name] = values
                continue
            weights[name] = matrix = pack(values, format_of(name, format))
            parameter.copy_(torch.from_numpy(np.array(unpack(matrix))))
    return NativeDecoder(model.config, weights, library, threads=threads, **kv)


def logits_of(model: Transformer, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids]))[0].numpy()


def some_ids(count: int, seed: int = 0, below: int = 61) -> list[int]:
    return np.random.default_rng(seed).integers(0, below, count).tolist()


SHAPES = {
    "plain": {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2},
    "odd": {"d_model": 36, "n_layers": 2, "n_heads": 3, "n_kv_heads": 1, "head_dim": 10}
    | {"d_ff": 50, "attention_bias": True, "mlp_bias": True, "output_bias": True},
    "gpt2": {"d_model": 48, "n_layers": 2, "n_heads": 4, "position": "learned"}
    | {"norm": "layernorm", "activation": "gelu_tanh", "attention_bias": True, "qk_norm": "none"}
    | {"output_bias": True, "mlp_bias": True, "tie_embeddings": True},
    "gemma": {"d_model": 64, "n_layers": 6, "n_heads": 4, "n_kv_heads": 1, "head_dim": 32}
    | {"sliding_window": 20, "full_every": 3, "local_rope_theta": 1e3, "norm_offset": True}
    | {"norm_placement": "sandwich", "activation": "geglu_tanh", "scale_embeddings": True}
    | {"attention_softcap": 20.0, "logit_softcap": 5.0, "tie_embeddings": True},
    "olmo": {"d_model": 64, "n_layers": 2, "n_heads": 4, "qk_norm": "width", "rotary_dim": 8}
    | {"norm_placement": "post", "activation": "geglu", "no_rope_every": 2},
    "wide heads": {"d_model": 80, "n_layers": 1, "n_heads": 10, "n_kv_heads": 2, "head_dim": 80}
    | {"activation": "relu2", "d_ff": 130},
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_those_of_torch(name, format, library):
    """Plain weights to 1e-5 of the largest; rounding activations to bytes costs a few percent."""
    model = random_model(3, **SHAPES[name])
    decoder, ids = native(model, library, format, kv="fp32"), some_ids(PIECE + 90)
    expected = logits_of(model, ids)
    found = decoder.forward(decoder.cache(len(ids)), [Run(0, ids, len(ids))])
    limit = 0.06 if format.startswith("int") else 1e-5
    assert np.abs(found - expected).max() < limit * np.abs(expected).max()
    if format.startswith("int"):
        rounding(model)
        same = np.abs(found - logits_of(model, ids))
        assert same[0].max() < 1e-5 * np.abs(expected).max()  # later, roundings fall either way
        assert same.mean() < np.abs(found - expected).mean()


def rounding(model: Transformer) -> None:
    """Let every product of the torch model round what it reads as the C does: groups of 32."""

    def round_groups(module, inputs):
        x = inputs[0]
        short = -x.shape[-1] % 32
        groups = torch.nn.functional.pad(x, (0, short)).unflatten(-1, (-1, 32))
        scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
        return ((groups / scale).round() * scale).flatten(-2)[..., : x.shape[-1]]

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(round_groups)


@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 40),
    st.integers(2, 90),
    st.integers(1, 70),
    st.integers(2, 200),
    st.integers(0, 40),
    st.sampled_from(FORMATS[:3]),
)
def test_shapes_that_divide_nothing(library, K, group, H, D, F, V, window, format):  # fmt: skip
    H += H % 2
    sizes = {"d_model": D, "n_layers": 2, "n_heads": K * group, "n_kv_heads": K, "head_dim": H}
    model = random_model(1, **sizes, d_ff=F, vocab_size=V, sliding_window=window, full_every=2)
    decoder, ids = native(model, library, format, kv="fp32"), some_ids(75, below=V)
    found = decoder.forward(decoder.cache(80), [Run(0, ids, 75)])
    np.testing.assert_allclose(found, logits_of(model, ids), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kv", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("format", ["f32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("name", ["odd", "gemma"])
def test_however_tokens_are_cut_and_batched_the_bits_are_the_same(name, format, kv, library):
    model = random_model(4, **SHAPES[name])
    decoder = native(model, library, format, kv=kv)
    ids = some_ids(2 * PIECE + 3)
    whole = decoder.forward(decoder.cache(len(ids)), [Run(0, ids, len(ids))])
    decoder = NativeDecoder(model.config, decoder.weights, library, kv=kv, threads=2)
    cache, random, done, found = decoder.cache(len(ids) + 9, 4), np.random.default_rng(0), 0, []
    while done < len(ids):
        size = min(int(random.choice([1, 2, 5, 17, 70, 300])), len(ids) - done)
        others = [Run(0, some_ids(3, done), 0)] if cache.lengths[0] + 3 <= len(ids) else []
        logits = decoder.forward(cache, [*others, Run(2, ids[done : done + size], size)])
        found.append(logits)
        done += size
    assert np.array_equal(np.concatenate(found), whole)


def test_the_bits_would_show_a_difference(library):
    """A control of the test above: one other token, far back, changes every logit after it."""
    decoder = native(random_model(4, **SHAPES["odd"]), library, "int8")
    ids = some_ids(200)
    one = decoder.forward(decoder.cache(200), [Run(0, ids)])
    other = decoder.forward(decoder.cache(200), [Run(0, [(ids[0] + 1) % 61, *ids[1:]])])
    assert not np.array_equal(one, other)


def test_kept_in_fewer_bits_logits_move_a_little(library):
    model = random_model(5, **SHAPES["plain"])
    ids, found = some_ids(150), {}
    for kv in ("fp32", "fp16", "int8"):
        decoder = native(model, library, "f32", kv=kv)
        found[kv] = decoder.forward(decoder.cache(150), [Run(0, ids, 150)])
    size = np.abs(found["fp32"]).max()
    assert 0 < np.abs(found["fp16"] - found["fp32"]).max() < 1e-3 * size
    assert 1e-4 * size < np.abs(found["int8"] - found["fp32"]).max() < 2e-2 * size


@pytest.mark.parametrize("name", ["plain", "gemma"])
def test_rewinding_forgets(name, library):
    """Also where a window's ring has gone round since; what it let go of is not pretended."""
    model = random_model(6, **SHAPES[name])
    decoder, ids = native(model, library, "f32", kv="fp16"), some_ids(900)
    straight, back = decoder.cache(900), decoder.cache(900)
    decoder.forward(back, [Run(0, ids[:800], 0)])
    decoder.forward(back, [Run(0, some_ids(40, seed=9), 0)])
    back.rewind(0, 800)
    expected = decoder.forward(straight, [Run(0, ids[:850], 50)])
    assert np.array_equal(decoder.forward(back, [Run(0, ids[800:850], 50)]), expected)
    if name == "gemma":
        with pytest.raises(ValueError, match="older keys are gone"):
            back.rewind(0, 100)
        assert back.lengths == [850]
    back.rewind(0, 0)
    again = decoder.forward(back, [Run(0, ids[:850], 50)])
    assert np.array_equal(again, expected)
    with pytest.raises(ValueError, match="cannot rewind"):
        back.rewind(0, 851)


@pytest.mark.parametrize("kv", ["fp32", "fp16", "int8"])
def test_rows_and_blocks_can_be_copied(kv, library):
    decoder, ids = native(random_model(7, **SHAPES["odd"]), library, "int8", kv=kv), some_ids(140)
    cache, other = decoder.cache(200, rows=2), decoder.cache(333)
    decoder.forward(cache, [Run(0, ids, 0)])
    cache.copy(0, 1)
    for index in range(2):
        other.load_block(0, cache.save_block(0, index))
    decoder.forward(other, [Run(0, ids[2 * BLOCK :], 0)])
    a, b = decoder.forward(cache, [Run(0, [5]), Run(1, [5])])
    c = decoder.forward(other, [Run(0, [5])])[0]
    assert np.array_equal(a, b) and np.array_equal(a, c)
    with pytest.raises(ValueError, match="holds less"):
        cache.save_block(0, 2)
    with pytest.raises(ValueError, match="another model"):
        decoder.cache(100).load_block(0, np.zeros(7, np.uint8))
    with pytest.raises(ValueError, match="no room"):
        other.load_block(0, cache.save_block(0, 0))
    with pytest.raises(ValueError, match="do not fit"):
        decoder.forward(cache, [Run(0, ids)])


def test_windowed_layers_keep_no_blocks_and_little_memory(library):
    decoder = native(random_model(8, **SHAPES["gemma"]), library, "f32")
    cache = decoder.cache(1024)
    decoder.forward(cache, [Run(0, some_ids(BLOCK))])
    with pytest.raises(ValueError, match="sliding window"):
        cache.save_block(0, 0)
    full = 1024 * 2 * 32 * 2  # tokens × keys and values × width × two bytes, a layer
    assert 2 * full < cache.bytes < 6 * full


def test_both_decoders_keep_to_one_contract(library):
    """Mixed runs of several rows, some of which want nothing, in the order they came."""
    model = random_model(9, **SHAPES["plain"])
    one, two = native(model, library, "f32", kv="fp32"), TorchDecoder(model)
    caches = [decoder.cache(100, rows=3) for decoder in (one, two)]
    for runs in (
        [Run(1, some_ids(30)), Run(0, some_ids(7, 1), 3)],
        [Run(2, some_ids(1, 2), 0), Run(1, some_ids(2, 3), 2), Run(0, some_ids(5, 4), 1)],
    ):
        a, b = (d.forward(c, runs) for d, c in zip((one, two), caches, strict=True))
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert caches[0].lengths == caches[1].lengths == [12, 32, 1]


WIDE = {  # of arrays as wide as these, one alone would fill a small stack
    "group": {"d_model": 4, "n_heads": 4096, "n_kv_heads": 1, "head_dim": 2},
    "model": {"d_model": 65_536, "n_heads": 1, "head_dim": 2, "position": "learned"},
}


@pytest.mark.parametrize("name", WIDE)
def test_no_array_lies_on_the_stack_of_a_thread(name, library):
    """Regression: pointers to the queries of a tile did, and a learned position's vector."""
    program = f"""
import sys
from pathlib import Path
import numpy as np
from engine.kernels.decoder import Library
from tests.engine.generate.test_native import WIDE, NativeDecoder, Run, native, random_model

library = Library(Path(sys.argv[1]))
model = random_model(3, **WIDE[{name!r}], n_layers=1, d_ff=2, vocab_size=5, max_seq_len=40)
one = native(model, library, "f32")
two = NativeDecoder(model.config, one.weights, library, threads=2)
runs = [Run(0, [1, 2, 3, 4] * 10, 40)]
found = [decoder.forward(decoder.cache(40), runs) for decoder in (one, two)]
print(np.array_equal(*found))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(library.path)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_STACKSIZE": "128k"},
        cwd=ROOT,
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr[-2000:]


def test_no_memory_for_a_cache_is_one_clear_error(library, monkeypatch):
    decoder = native(random_model(1, **SHAPES["plain"]), library, "f32")
    assert decoder.cache(100, rows=2).lengths == [0, 0]

    def refused(*args):
        raise MemoryError

    monkeypatch.setattr(decoding.np, "zeros", refused)
    with pytest.raises(ResourceError, match="keys and values of 2 × 100 tokens; ask for fewer"):
        decoder.cache(100, rows=2)
