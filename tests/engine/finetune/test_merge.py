"""Merging: one model that is the two, proved before it is kept."""

import json

import pytest
import torch
from torch import nn

from engine.checkpoint import load_adapted, load_model
from engine.errors import CheckFailed, CheckpointError, RecipeError
from engine.finetune import merge as merging
from engine.finetune.merge import LENGTH, PROMPTS, TOLERANCE, merge
from engine.interop.exporting import to_folder
from engine.manifest import read_manifest
from engine.model.int8 import Int8Linear
from engine.model.lora import merge_lora, projections
from engine.sampling_defaults import sample_defaults
from tests.engine.interop.folders import leftovers
from tests.engine.test_adapter import FAMILIES, TOKENS, logits, theirs, write_theirs, write_tuned

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_model_is_base_and_adapter(tmp_path, tokenizer, family):
    """For us, and for transformers, which never heard of the adapter."""
    folder = write_tuned(tmp_path, tokenizer, family)
    expected = logits(load_model(folder)[0])
    made = merge(folder, tmp_path / "merged")
    assert made.difference <= made.limit and made.agreed == made.tokens > len(PROMPTS)
    assert made.prompts == len(PROMPTS) and made.base_known and not made.int8
    model, own = load_model(tmp_path / "merged")
    assert all(type(module) is nn.Linear for _, module in projections(model))
    assert own.digest == tokenizer.digest
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(theirs(tmp_path / "merged")), expected, atol=1e-4, rtol=0)
    assert (logits(load_model(made.base)[0]) - expected).abs().max() > 0.1, "the base is another"


def test_a_folder_is_whole_and_says_where_it_comes_from(tmp_path, tokenizer):
    folder = write_tuned(tmp_path, tokenizer)
    merge(folder, tmp_path / "merged", ["another prompt"])
    manifest = read_manifest(tmp_path / "merged")
    source = manifest["source"]
    assert source["origin"] == f"{folder.resolve()} merged onto {source['base']['folder']}"
    tuned = read_manifest(folder)
    assert source["base"]["weights"] == tuned["base"]["weights"]
    assert source["adapter"]["rank"] == 3 and manifest["tokens_seen"] == tuned["tokens_seen"]
    names = {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"}
    assert names <= set(manifest["files"])
    assert sample_defaults(tmp_path / "merged") == sample_defaults(folder)
    to_folder(tmp_path / "merged", tmp_path / "plain", "auto")


def test_beside_8_bits_it_is_merged_onto_the_whole_base(tmp_path, tokenizer):
    """Rounding stays out of the result, which is then near what was trained, not equal to it."""
    folder = write_tuned(tmp_path, tokenizer, base="int8")
    made = merge(folder, tmp_path / "merged")
    assert made.int8 and made.difference <= made.limit
    merged = logits(load_model(tmp_path / "merged")[0])
    whole = load_adapted(folder, as_trained=False)[0]
    torch.testing.assert_close(merged, logits(whole), atol=1e-4, rtol=0)
    trained = load_model(folder)[0]
    assert any(isinstance(module, Int8Linear) for module in trained.modules())
    assert (merged - logits(trained)).abs().max() > 10 * made.limit


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_peft_wrote_is_merged_too(tmp_path, tokenizer, family):
    folder, expected = write_theirs(tmp_path, tokenizer, family)
    made = merge(folder, tmp_path / "merged")
    assert not made.base_known
    torch.testing.assert_close(
        logits(load_model(tmp_path / "merged")[0]), expected, atol=1e-4, rtol=0
    )


def test_a_second_merge_is_refused(tmp_path, tokenizer):
    merge(write_tuned(tmp_path, tokenizer), tmp_path / "merged")
    with pytest.raises(CheckpointError, match="whole model, with no adapter to merge"):
        merge(tmp_path / "merged", tmp_path / "again")
    with pytest.raises(RecipeError, match="merged exists"):
        merge(tmp_path / "tuned" / "best", tmp_path / "merged")


@pytest.mark.parametrize("broken", ["twice", "lost", "nan"])
def test_a_merge_that_changes_the_model_is_not_kept(tmp_path, tokenizer, monkeypatch, broken):
    """The control: a product added twice, not at all, or not a number."""

    def wrong(model):
        before = {name: module.merged().detach() for name, module in projections(model)}
        plain = {name: module.base.weight.detach() for name, module in projections(model)}
        count = merge_lora(model)
        for name, module in projections(model):
            change = before[name] - plain[name]
            module.weight.data += {"twice": change, "lost": -change, "nan": torch.nan}[broken]
        return count

    folder = write_tuned(tmp_path, tokenizer)
    before = leftovers(tmp_path)
    monkeypatch.setattr(merging, "merge_lora", wrong)
    with pytest.raises(CheckFailed, match=r"differs .* in a logit, more than .* was not made"):
        merge(folder, tmp_path / "merged")
    assert leftovers(tmp_path) == before


def test_one_matrix_gone_astray_is_enough_to_notice(tmp_path, tokenizer, monkeypatch):
    """The tolerance is far below what the adapter does: a hundredth of one product shows."""

    def wrong(model):
        name, module = next(iter(projections(model)))
        change = 0.01 * (module.merged() - module.base.weight).detach()
        count = merge_lora(model)
        model.get_submodule(name).weight.data += change
        return count

    folder = write_tuned(tmp_path, tokenizer)
    monkeypatch.setattr(merging, "merge_lora", wrong)
    with pytest.raises(CheckFailed):
        merge(folder, tmp_path / "merged")


def test_a_short_context_is_enough(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setitem(FAMILIES, "llama", FAMILIES["llama"] | {"max_seq_len": 16})
    made = merge(write_tuned(tmp_path, tokenizer), tmp_path / "merged", ["long " * 500, ""])
    assert made.prompts == len(PROMPTS) + 1
    assert made.tokens <= 8 * made.prompts
    assert LENGTH > 8 and made.limit >= TOLERANCE
    manifest = json.loads((tmp_path / "merged" / "manifest.json").read_text())
    assert manifest["step"] == 1 and TOKENS.shape[1] > 16
