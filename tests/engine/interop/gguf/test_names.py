"""Our table of names against the package gguf, and the changes between the two sides."""

import gguf as library
import pytest
import torch
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel

from engine.interop.gguf.config import complete
from engine.interop.gguf.names import ARCHITECTURES, Slot, layout
from tests.engine.interop.gguf.tiny import CASES, config_of, model_of


def complete_config(case):
    return complete(config_of(case).to_dict())


def architecture(case):
    return case.split("-")[0].replace("llama3.1", "llama").replace("mistral", "llama")


@pytest.mark.parametrize("case", CASES)
def test_every_name_is_the_one_that_the_library_gives(case):
    name = architecture(case)
    config = complete_config(case)
    kind = next(k for k, v in library.MODEL_ARCH_NAMES.items() if v == name)
    theirs = library.get_tensor_name_map(kind, 7)
    slots = layout(name, config)
    assert len(slots) > 20
    for ours, slot in slots.items():
        stem, _, suffix = slot.hf.rpartition(".")
        assert f"{theirs.get_name(stem)}.{suffix}" == ours


def test_no_architecture_is_left_untested():
    assert {architecture(case) for case in CASES} == ARCHITECTURES.keys()


@pytest.mark.parametrize("case", CASES)
def test_names_and_shapes_are_those_of_the_model(case):
    model = model_of(config_of(case))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    slots = layout(architecture(case), complete_config(case)).values()
    found = {slot.hf: slot.shape[::-1] if slot.transposed else slot.shape for slot in slots}
    assert found == expected


@pytest.mark.parametrize("shape", [(24, 5), (24,)])
def test_rows_of_a_head_go_from_halves_to_pairs(shape):
    """Two heads of 12: row j of the first half comes to 2j, its partner 6 + j to 2j + 1."""
    slot = Slot("q", shape, heads=2)
    tensor = torch.randn(shape)
    paired = slot.to_gguf(tensor)
    for head in range(2):
        for j in range(6):
            assert torch.equal(paired[12 * head + 2 * j], tensor[12 * head + j])
            assert torch.equal(paired[12 * head + 2 * j + 1], tensor[12 * head + 6 + j])
    assert torch.equal(slot.to_hf(paired), tensor)
    assert not torch.equal(paired, tensor)


def test_only_linear_layers_of_gpt2_are_transposed():
    slots = layout("gpt2", complete_config("gpt2"))
    turned = {slot.hf for slot in slots.values() if slot.transposed}
    model: GPT2LMHeadModel = model_of(config_of("gpt2"))
    conv = {f"{n}.weight" for n, m in model.named_modules() if type(m).__name__ == "Conv1D"}
    assert turned == conv


def test_only_norms_of_gemma_are_shifted():
    for case in CASES:
        for slot in layout(architecture(case), complete_config(case)).values():
            shifted = architecture(case).startswith("gemma") and "norm" in slot.hf
            assert slot.added == (1.0 if shifted else 0.0)
