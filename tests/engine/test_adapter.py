"""Adapters on disk: PEFT reads ours, we read PEFT's, and nothing is put on what it does not fit."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from engine.adapter import WEIGHTS, describe, read_adapter
from engine.checkpoint import load_adapted, load_model, load_tensors, save
from engine.config import LoraConfig, OptimConfig, RopeScaling
from engine.errors import CheckpointError
from engine.model.int8 import Int8Linear
from engine.model.lora import LoraLinear, add_lora
from engine.sampling_defaults import sample_defaults
from engine.train.optim import Optimizers
from tests.conftest import make_model
from tests.engine.test_checkpoint import snapshot, unlist

# What transformers and peft say to each other.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
TOKENS = torch.arange(20)[None]
FAMILIES = {
    "qwen3": {},
    "llama": {"qk_norm": "none", "n_kv_heads": 2, "tie_embeddings": True},
    "qwen2": {"qk_norm": "none", "attention_bias": True},
    "mistral": {"qk_norm": "none", "sliding_window": 8},
    "olmo2": {"norm_placement": "post", "qk_norm": "width"},
    "gemma3_text": {
        "norm_offset": True,
        "norm_placement": "sandwich",
        "activation": "geglu_tanh",
        "scale_embeddings": True,
        "tie_embeddings": True,
        "sliding_window": 8,
        "full_every": 2,
        "local_rope_theta": 10_000.0,
        "rope_scaling": RopeScaling(kind="linear", factor=2.0),
    },
    "phi3": {"qk_norm": "none", "rotary_dim": 6, "n_kv_heads": 2},
    "gpt2": {
        "norm": "layernorm",
        "qk_norm": "none",
        "position": "learned",
        "activation": "gelu_tanh",
        "attention_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "tie_embeddings": True,
    },
}


def write_base(root: Path, tokenizer, family: str = "llama") -> Path:
    """A whole checkpoint of a family, in root/base."""
    folder = save(root / "base", snapshot(tokenizer, **FAMILIES[family]), best=True)
    assert json.loads((folder / "config.json").read_text())["model_type"] == family
    return folder


def write_tuned(root: Path, tokenizer, family: str = "llama", **settings) -> Path:
    """An adapter beside it that changes every matrix it is for, in root/tuned."""
    base = write_base(root, tokenizer, family)
    model, _ = load_model(base)
    config = LoraConfig(**({"rank": 3, "alpha": 5.0, "dropout": 0.25} | settings))
    add_lora(model, config, torch.Generator().manual_seed(1))
    stir(model)
    made = dataclasses.replace(snapshot(tokenizer), model=model, base=base)
    return save(root / "tuned", made, best=True)


def stir(model: nn.Module) -> None:
    """Give every B some values."""
    random = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith((".b", "lora_B.default.weight")):
            nn.init.normal_(parameter, std=0.2, generator=random)


def theirs(base: Path):
    """The base in transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, local_files_only=True).eval()


@torch.inference_mode()
def logits(model) -> torch.Tensor:
    found = model(TOKENS)
    return found if isinstance(found, torch.Tensor) else found.logits


def write_theirs(
    root: Path, tokenizer, family: str = "llama", **settings
) -> tuple[Path, torch.Tensor]:
    """An adapter that PEFT wrote, and the logits it gives there."""
    import peft

    base = write_base(root, tokenizer, family)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | settings
    model = peft.get_peft_model(theirs(base), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    stir(model)
    model.save_pretrained(root / "peft")
    return root / "peft", logits(model.eval())


def tampered(folder: Path, name: str) -> Path:
    """A file of an adapter that may be changed without its manifest noticing."""
    if (folder / "manifest.json").exists():
        unlist(folder, name)
    return folder / name


@pytest.mark.parametrize("targets", ["all", "attention", "mlp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_ours(tmp_path, tokenizer, family, targets):
    import peft

    folder = write_tuned(tmp_path, tokenizer, family, targets=targets)
    model, _ = load_model(folder)
    base = tmp_path / "base" / "best"
    peer = peft.PeftModel.from_pretrained(theirs(base), folder).eval()
    with torch.inference_mode():
        torch.testing.assert_close(model(TOKENS), logits(peer), atol=1e-4, rtol=0)
        assert (model(TOKENS) - load_model(base)[0](TOKENS)).abs().max() > 0.1, "it does something"


@pytest.mark.parametrize("family", FAMILIES)
def test_ours_reads_what_peft_wrote(tmp_path, tokenizer, family):
    """Fused matrices share one A there, which our block-diagonal form cannot say: each gets it."""
    folder, expected = write_theirs(tmp_path, tokenizer, family)
    model, _ = load_model(folder)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=0)


SETTINGS = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"use_rslora": True},
    {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"1.mlp.up_proj": 20}},
    {"init_lora_weights": "gaussian", "lora_dropout": 0.3},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_settings_of_peft_are_followed(tmp_path, tokenizer, settings):
    folder, expected = write_theirs(tmp_path, tokenizer, **settings)
    model, _ = load_model(folder)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=0)


def test_an_adapter_of_peft_borrows_what_it_lacks_from_its_base(tmp_path, tokenizer):
    folder, _ = write_theirs(tmp_path, tokenizer)
    assert not (folder / "tokenizer.json").exists()
    assert load_model(folder)[1].digest == tokenizer.digest
    assert sample_defaults(folder) == sample_defaults(tmp_path / "base" / "best")
    found = describe(folder)
    assert found["base_weights"] is None and found["held"] is None and found["rank"] == 4


REFUSED = {
    "use_dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "bias='all'": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "lm_head": {"target_modules": ["q_proj", "lm_head"]},
    "embed_tokens": {"target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.mark.parametrize("name", REFUSED)
def test_more_than_plain_lora_is_refused_by_name(tmp_path, tokenizer, name):
    folder, _ = write_theirs(tmp_path, tokenizer, "qwen2", **REFUSED[name])
    with pytest.raises(CheckpointError, match=name):
        load_model(folder)


def damage(folder: Path, change) -> None:
    """Change the tensors of an adapter."""
    file = tampered(folder, WEIGHTS)
    tensors = load_tensors(file)
    file.unlink()
    safetensors.torch.save_file(change(tensors), file)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
DAMAGES = {
    r"none of its 28 keys fits this llama": lambda t: {f"inner.{k}": v for k, v in t.items()},
    r"1 keys have no place .*inner\.x": lambda t: t | {"inner.x": torch.ones(1)},
    r"layers\.2.*lora_A": lambda t: t | {Q.replace(".0.", ".2."): t[Q].clone()},
    r"q_proj\.lora_A\.weight is missing": lambda t: {k: v for k, v in t.items() if k != Q},
    r"is 3 × 31, but base and rank ask for 3 × 32": lambda t: t | {Q: t[Q][:, 1:].clone()},
    r"is 4 × 32, but base and rank ask for 3 × 32": lambda t: t | {Q: torch.ones(4, 32)},
    r"it is empty": lambda t: {},
    r"stored as I64": lambda t: t | {Q: torch.ones(3, 32, dtype=torch.int64)},
}


@pytest.mark.parametrize("message", DAMAGES)
def test_an_adapter_that_does_not_fit_is_refused(tmp_path, tokenizer, message):
    folder = write_tuned(tmp_path, tokenizer)
    damage(folder, DAMAGES[message])
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_an_adapter_of_another_family_is_refused(tmp_path, tokenizer):
    folder = write_tuned(tmp_path, tokenizer, "gpt2")
    with pytest.raises(CheckpointError, match="none of its .* keys fits this llama model"):
        read_adapter(folder, make_model(**FAMILIES["llama"]), "llama")


@pytest.mark.parametrize("held", ["fp32", "int8"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_saved_and_loaded_is_as_if_it_had_never_stopped(tmp_path, tokenizer, family, held):
    """Two steps, a checkpoint, a third: every bit of weights, optimizer and logits."""
    folder = write_tuned(tmp_path, tokenizer, family, base=held)
    model, _ = load_model(folder)
    config = OptimConfig(name="adamw", lr=0.01)
    optimizer = Optimizers(model, config)

    def step(model, optimizer, seed: int) -> None:
        model.train()
        torch.manual_seed(seed)  # of dropout
        model(TOKENS).square().mean().backward()
        optimizer.step(1.0)
        model.zero_grad()
        model.eval()

    for seed in range(2):
        step(model, optimizer, seed)
    base = tmp_path / "base" / "best"
    made = dataclasses.replace(
        snapshot(tokenizer, 2), model=model, base=base, optimizer=optimizer.state()
    )
    again = save(tmp_path / "tuned", made, best=True)
    other, _ = load_model(again)
    resumed = Optimizers(other, config)
    resumed.load_state(load_tensors(again / "state" / "optimizer.safetensors"))
    for each, its in ((model, optimizer), (other, resumed)):
        step(each, its, 2)
    assert {n for n, p in other.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key]), key
    for key, tensor in optimizer.state().items():
        assert torch.equal(tensor, resumed.state()[key]), key
    assert torch.equal(model(TOKENS), other(TOKENS))
    assert any(isinstance(m, Int8Linear) for m in other.modules()) == (held == "int8")
    assert next(m for m in other.modules() if isinstance(m, LoraLinear)).dropout.p == 0.25


def test_a_folder_holds_the_adapter_and_not_the_model(tmp_path, tokenizer):
    folder = write_tuned(tmp_path, tokenizer, rank=2, targets="attention", base="int8")
    assert not (folder / "model.safetensors").exists()
    assert all(t.dtype == torch.float32 for t in load_tensors(folder / WEIGHTS).values())
    manifest = json.loads((folder / "manifest.json").read_text())
    # 2 layers × 2 × (q 32+32, k 32+16, v 32+16, o 32+32), two of four heads for keys and values
    trained = 2 * 2 * (64 + 48 + 48 + 64)
    assert manifest["base"]["trained"] == describe(folder)["parameters"] == trained
    assert manifest["base"]["held"] == "int8"
    assert describe(folder)["targets"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "../../base/step-000001"


def test_in_half_precision_the_factors_are_too(tmp_path, tokenizer):
    """And with 8 bits the scales stay in fp32."""
    for held in ("fp32", "int8"):
        folder = write_tuned(tmp_path / held, tokenizer, base=held)
        exact, half = load_model(folder)[0], load_model(folder, dtype=torch.bfloat16)[0]
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
        assert {b.dtype for b in half.buffers()} <= {torch.int8, torch.float32}
        near = logits(exact)
        assert (logits(half).float() - near).abs().max() < 0.05 * near.abs().max()


def test_the_base_may_be_left_as_it_lies_on_disk(tmp_path, tokenizer):
    folder = write_tuned(tmp_path, tokenizer, base="int8")
    trained, whole = load_model(folder)[0], load_adapted(folder, as_trained=False)[0]
    assert not any(isinstance(module, Int8Linear) for module in whole.modules())
    assert 0 < (logits(trained) - logits(whole)).abs().max() < 0.2


def test_both_may_be_moved_together_but_not_apart(tmp_path, tokenizer):
    folder = write_tuned(tmp_path / "here", tokenizer)
    expected = logits(load_model(folder)[0])
    shutil.move(tmp_path / "here", tmp_path / "there")
    folder = tmp_path / "there" / "tuned" / "best"
    assert torch.equal(logits(load_model(folder)[0]), expected)
    base = (tmp_path / "there" / "base" / "best").resolve()
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"its base {base} is not there; .*ln -s NEW_PLACE"):
        load_model(folder)
    base.symlink_to(tmp_path / "elsewhere")  # as the message says
    assert torch.equal(logits(load_model(folder)[0]), expected)


def test_a_model_of_the_workbench_s_own_type_works_too(tmp_path, tokenizer):
    """The names on disk are then ours."""
    FAMILIES["lm-workbench"] = {"activation": "relu2"}
    try:
        folder = write_tuned(tmp_path, tokenizer, "lm-workbench")
    finally:
        del FAMILIES["lm-workbench"]
    assert "base_model.model.blocks.0.mlp.up_proj.lora_A.weight" in load_tensors(folder / WEIGHTS)
    assert isinstance(load_model(folder)[0].blocks[1].mlp.up_proj, LoraLinear)
