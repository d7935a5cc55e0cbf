"""Hugging Face → GGUF → Hugging Face, against transformers, the package gguf and itself."""

import gguf as library
import pytest
import torch
import transformers

from engine.errors import CheckpointError, RecipeError
from engine.interop.gguf.folder import DTYPES, hf_tensors, to_hf, write
from engine.interop.gguf.names import Slot
from engine.interop.gguf.reader import read
from engine.interop.gguf.writer import store
from tests.engine.interop.gguf.tiny import CASES, TOKENIZER, config_of, model_of, write_case


def logits(model) -> torch.Tensor:
    tokens = torch.randint(3, 320, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens).logits


def imported(gguf):
    """The model that transformers makes of what we read."""
    config, _ = to_hf(gguf)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config), attn_implementation="eager"
    )
    missing, unexpected = model.load_state_dict(dict(hf_tensors(gguf)), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_a_model_comes_back_bit_for_bit_with_its_config(case, tmp_path):
    model, written = write_case(tmp_path / "m.gguf", case)
    gguf = read(tmp_path / "m.gguf")
    assert written.tensors == len(gguf.tensors)
    assert written.bytes == (tmp_path / "m.gguf").stat().st_size
    weights = model.state_dict()
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    found = dict(hf_tensors(gguf))
    assert found.keys() == weights.keys()
    assert [k for k in weights if not torch.equal(found[k], weights[k])] == []
    config, names = to_hf(gguf)
    assert set(names) == set(found)
    back = transformers.AutoConfig.for_model(**config).to_dict()
    before = model.config.to_dict() | {key: back[key] for key in ("architectures", "dtype")}
    # Words of published folders that transformers 5 keeps elsewhere.
    before |= {key: back[key] for key in ("n_ctx", "partial_rotary_factor") if key in back}
    assert {k: (before.get(k), v) for k, v in back.items() if before.get(k) != v} == {}
    assert before.keys() <= back.keys()
    assert config["architectures"] == [type(model).__name__]
    torch.testing.assert_close(logits(imported(gguf)), logits(model), rtol=0, atol=0)


def test_a_mistral_without_window_is_a_llama(tmp_path):
    config = transformers.MistralConfig(**CASES["llama"][1], sliding_window=None)
    model = model_of(config)
    write(tmp_path / "m.gguf", config.to_dict(), model.state_dict().items(), TOKENIZER, "f32")
    gguf = read(tmp_path / "m.gguf")
    assert to_hf(gguf)[0]["model_type"] == "llama"
    torch.testing.assert_close(logits(imported(gguf)), logits(model))


@pytest.mark.parametrize("case", ["llama", "smollm3"])
def test_control_forgetting_the_rows_of_q_and_k_shows(case, tmp_path, monkeypatch):
    model, _ = write_case(tmp_path / "m.gguf", case)
    monkeypatch.setattr(Slot, "to_hf", lambda self, tensor: tensor)
    difference = (logits(imported(read(tmp_path / "m.gguf"))) - logits(model)).abs().max()
    assert difference > 0.1


# What transformers' own reader of GGUF knows. It reads fewer keys than there are, so only
# weights are compared, and only cases whose shape it gets right.
@pytest.mark.parametrize(
    "case", ["llama", "llama-tied", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2"]
)
def test_transformers_reads_the_same_weights_from_the_file(case, tmp_path):
    write_case(tmp_path / "m.gguf", case)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf")
    theirs = theirs.state_dict()
    ours = dict(hf_tensors(read(tmp_path / "m.gguf")))
    assert theirs.keys() - ours.keys() <= {"lm_head.weight"}
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_is_near_and_the_library_reads_the_same(dtype, tmp_path):
    model, written = write_case(tmp_path / "m.gguf", "llama", dtype)
    gguf = read(tmp_path / "m.gguf")
    reader = library.GGUFReader(tmp_path / "m.gguf")
    for tensor in reader.tensors:
        expected = torch.tensor(library.dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(gguf.tensor(tensor.name), expected)
    bits = {"f32": 24, "f16": 11, "bf16": 8, "q8_0": 7}.get(dtype) or int(dtype[1]) - 1
    weights = model.state_dict()
    for name, tensor in hf_tensors(gguf):
        largest = weights[name].abs().max()
        assert (tensor - weights[name]).abs().max() <= 1.1 * largest * 2.0**-bits
    assert written.kept_f16 == []
    assert gguf.metadata["general.file_type"] == DTYPES[dtype][2]


def test_vectors_stay_exact_and_the_embedding_keeps_8_bits(tmp_path):
    write_case(tmp_path / "m.gguf", "gpt2", "q4_0")
    types = {name: info.type for name, info in read(tmp_path / "m.gguf").tensors.items()}
    assert types["position_embd.weight"] == "F32"
    assert types["token_embd.weight"] == "Q8_0"
    assert types["blk.0.attn_qkv.weight"] == "Q4_0"
    assert types["blk.0.attn_qkv.bias"] == types["output_norm.weight"] == "F32"


def test_rows_that_no_block_divides_stay_f16_and_are_named(tmp_path):
    _, written = write_case(tmp_path / "m.gguf", "llama", "q8_0", intermediate_size=90)
    assert written.kept_f16 == [f"blk.{i}.ffn_down.weight" for i in range(7)]
    assert read(tmp_path / "m.gguf").tensors["blk.0.ffn_down.weight"].type == "F16"


def test_an_import_may_ask_for_another_dtype(tmp_path):
    model, _ = write_case(tmp_path / "m.gguf", "gemma2", "bf16")
    for name, tensor in hf_tensors(read(tmp_path / "m.gguf"), torch.bfloat16):
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, model.state_dict()[name].bfloat16())


def test_a_window_that_others_ignore_is_said(tmp_path):
    _, written = write_case(tmp_path / "m.gguf", "mistral-window")
    assert "window of 16" in written.notes[0]


def test_weights_too_large_for_f16_are_refused(tmp_path):
    config = config_of("llama")
    weights = model_of(config).state_dict()
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    with pytest.raises(RecipeError, match=r"blk\.0\.ffn_up\.weight .*bf16"):
        write(tmp_path / "m.gguf", config.to_dict(), weights.items(), {}, "f16")
    assert list(tmp_path.iterdir()) == []


def changed(weights, **changes):
    """Weights with some replaced, or dropped where the new value is None."""
    names = {"norm": "model.norm.weight", "extra": "model.extra.weight"}
    weights = dict(weights) | {names[key]: value for key, value in changes.items()}
    return {name: tensor for name, tensor in weights.items() if tensor is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": None}, r"model\.norm\.weight is missing"),
        ({"norm": torch.ones(3)}, r"model\.norm\.weight has the shape \(3,\).*\(64,\)"),
        ({"extra": torch.ones(3)}, r"model\.extra\.weight is not one of"),
    ],
)
def test_weights_that_do_not_fit_are_not_written(changes, message, tmp_path):
    config = config_of("llama")
    weights = changed(model_of(config).state_dict(), **changes)
    with pytest.raises(CheckpointError, match=message):
        write(tmp_path / "m.gguf", config.to_dict(), weights.items(), {}, "f32")
    assert list(tmp_path.iterdir()) == []


def test_a_weight_given_twice_is_refused(tmp_path):
    config = config_of("llama")
    weights = list(model_of(config).state_dict().items())
    with pytest.raises(CheckpointError, match="is there twice"):
        write(tmp_path / "m.gguf", config.to_dict(), [*weights, weights[0]], {}, "f32")


def restored(path, drop=(), add=()):
    """Write the tensors of a llama again, without some, with others."""
    write_case(path, "llama")
    gguf = read(path)
    tensors = {name: gguf.tensor(name) for name in gguf.tensors if name not in drop}
    tensors |= dict(add)
    shapes = {name: (tuple(tensor.shape), "F32") for name, tensor in tensors.items()}
    store(path, gguf.metadata, shapes, tensors.items())
    return read(path)


@pytest.mark.parametrize(
    ("drop", "add", "message"),
    [
        (["blk.3.ffn_up.weight"], [], r"lacks the tensor blk\.3\.ffn_up\.weight"),
        ([], [("blk.0.attn_q_norm.weight", torch.ones(16))], r"attn_q_norm\.weight' is not one of"),
        ([], [("blk.9.ffn_up.weight", torch.ones(96, 64))], r"blk\.9\.ffn_up\.weight' is not one"),
        ([], [("blk.0.attn_q.bias", torch.ones(64))], r"lacks the tensor blk\.0\.attn_k\.bias"),
        (
            [],
            [("output_norm.weight", torch.ones(60))],
            r"output_norm\.weight has the shape \(60,\)",
        ),
        (["token_embd.weight"], [], r"lacks the tensor token_embd\.weight"),
    ],
)
def test_a_file_with_other_tensors_is_refused_by_name(drop, add, message, tmp_path):
    gguf = restored(tmp_path / "m.gguf", drop, add)
    with pytest.raises(CheckpointError, match=message) as caught:
        to_hf(gguf)
    assert str(caught.value).startswith(f"{tmp_path}/m.gguf: ") and "\n" not in str(caught.value)


def test_old_buffers_beside_the_weights_are_left_out(tmp_path):
    config = config_of("gpt2")
    weights = model_of(config).state_dict()
    weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    write(tmp_path / "m.gguf", config.to_dict(), weights.items(), TOKENIZER, "f32")
    assert "transformer.h.0.attn.bias" not in to_hf(read(tmp_path / "m.gguf"))[1]
