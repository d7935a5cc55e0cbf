"""Shared memory: the same numbers, tied ones still one, seen through a second mapping."""

import os
import pickle

import pytest
import safetensors.torch
import torch
from torch import nn

from engine.config import LoraConfig
from engine.model.lora import add_lora
from engine.train.shared import Shared, move, numbers, with_numbers, without_numbers
from tests.conftest import make_model

TOKENS = torch.arange(20)[None]


def tuned(base: str):
    """A model with LoRA that does something, beside a base as it is or in 8 bits."""
    model = make_model(tie_embeddings=True)
    add_lora(model, LoraConfig(rank=4, base=base), torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if name.endswith(".b"):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    return model


MODELS = {
    "plain": make_model,
    "tied": lambda: make_model(tie_embeddings=True),
    "lora": lambda: tuned("fp32"),
    "int8": lambda: tuned("int8"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_second_process_would_see_the_model_and_every_change_of_it(kind):
    """What is sent is pickled and has no numbers; what it computes with is the first one's."""
    model = MODELS[kind]()
    with torch.inference_mode():
        before = model(TOKENS)
    parameters = [*model.parameters()]
    shared = move(model)
    assert [*map(id, parameters)] == [*map(id, model.parameters())]  # which optimizers hold
    sent = pickle.dumps(without_numbers(model))
    assert len(sent) < sum(tensor.nbytes for tensor in numbers(model))
    arrived = pickle.loads(sent)
    other = with_numbers(arrived, Shared(numbers(arrived), os.dup(shared.file)).tensors)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert (a.requires_grad, a.shape, a.dtype) == (b.requires_grad, b.shape, b.dtype)
    assert (other.lm_head.weight is other.embed_tokens.weight) == (kind != "plain")
    with torch.inference_mode():
        assert torch.equal(model(TOKENS), before)
        assert torch.equal(other(TOKENS), before)
        for parameter in model.parameters():
            parameter.mul_(1.5)
        changed = model(TOKENS)
        assert torch.equal(other(TOKENS), changed) and not torch.equal(changed, before)
    shared.close()
    assert torch.equal(model(TOKENS), changed)  # the memory outlives the file


def test_weights_mapped_from_a_file_are_copied_and_the_file_is_not_written(tmp_path):
    model = make_model()
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_model(model, str(file))
    written = file.read_bytes()
    model.load_state_dict(safetensors.torch.load_file(file), assign=True)
    move(model).close()
    with torch.no_grad():
        model.embed_tokens.weight.zero_()
    assert file.read_bytes() == written


def test_tensors_begin_at_cache_lines_and_do_not_overlap():
    like = [torch.zeros(3, dtype=torch.int8), torch.zeros(5, 7), torch.zeros(()), torch.zeros(1)]
    shared = Shared(like)
    for number, tensor in enumerate(shared.tensors):
        assert tensor.data_ptr() % 64 == 0
        tensor.fill_(number)
    assert [tensor.flatten()[-1].item() for tensor in shared.tensors] == [0, 1, 2, 3]
    shared.close()
