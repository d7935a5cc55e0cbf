"""What an adapter says of itself and its base: followed, or refused in one line."""

import dataclasses
import json

import pytest

from engine.adapter_config import (
    find_base,
    holder,
    is_adapter,
    model_digest,
    read_adapter_config,
    weights_digest,
)
from engine.checkpoint import load_model, save
from engine.errors import CheckpointError
from engine.runs import find, list_runs
from tests.engine.test_adapter import tampered, write_base, write_tuned
from tests.engine.test_checkpoint import snapshot

GOOD = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "base_model_name_or_path": "base"}
WRONG = {
    "not the config of a LoRA": [[], 7, {}, {"peft_type": "IA3"}, {"peft_type": ["LORA"]}],
    "rank .* must be a whole number": [
        *({"r": None}, {"r": 0}, {"r": True}, {"r": "3"}, {"r": 10**30}, {"r": 1.5}),
        {"rank_pattern": {"q_proj": -1}},
    ],
    "lora_alpha .* must be a number": [
        *({"lora_alpha": None}, {"lora_alpha": "x"}, {"lora_alpha": 1e30}),
        *({"lora_alpha": float("nan")}, {"alpha_pattern": {"q_proj": []}}),
    ],
    "must be JSON objects": [{"rank_pattern": [1]}, {"alpha_pattern": "x"}],
    "lora_dropout .* share below 1": [{"lora_dropout": 1.0}, {"lora_dropout": "0"}],
    "is not supported, only plain LoRA": [
        *({"bias": "all"}, {"bias": ["none"]}, {"use_dora": True}, {"modules_to_save": ["a"]}),
        *(
            {"init_lora_weights": "pissa"},
            {"layer_replication": [[0, 2], [1, 2]]},
            {"init_lora_weights": {}, "new_trick": {"a": 1}},
        ),
    ],
}


@pytest.mark.parametrize(("message", "changes"), WRONG.items(), ids=list(WRONG))
def test_what_is_not_understood_is_refused(tmp_path, message, changes):
    for change in changes:
        value = GOOD | change if change and isinstance(change, dict) else change
        (tmp_path / "adapter_config.json").write_text(json.dumps(value))
        with pytest.raises(CheckpointError, match=message) as caught:
            read_adapter_config(tmp_path)
        assert str(tmp_path) in str(caught.value)


def test_settings_that_are_off_do_not_matter(tmp_path):
    config = GOOD | {"use_dora": False, "modules_to_save": None, "new_trick": {}, "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert read_adapter_config(tmp_path)["lora_dropout"] == 0.0


def test_a_pattern_that_fits_nothing_is_refused(tmp_path, tokenizer):
    folder = write_tuned(tmp_path, tokenizer)
    file = tampered(folder, "adapter_config.json")
    config = json.loads(file.read_text())
    for name in ("z_proj", "(a+)+$", ""):
        file.write_text(json.dumps(config | {"rank_pattern": {name: 3}}))
        with pytest.raises(CheckpointError, match="fits no matrix"):
            load_model(folder)


@pytest.mark.parametrize("name", [None, 7, "", "a\0b", "x" * 5000, "org/model", "..", "/dev/null"])
def test_a_base_that_is_nowhere_is_one_clear_error(tmp_path, name):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(GOOD | {"base_model_name_or_path": name})
    )
    with pytest.raises(CheckpointError, match="base_model_name_or_path") as caught:
        load_model(tmp_path)
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


def test_other_weights_under_the_same_name_are_refused(tmp_path, tokenizer):
    folder = write_tuned(tmp_path, tokenizer)
    base = find_base(folder)
    assert base.known and not base.int8 and base.family == "llama"
    digest = weights_digest(base.folder)
    save(tmp_path / "other", snapshot(tokenizer, 1, 7, qk_norm="none", n_kv_heads=2), best=True)
    base.folder.rename(tmp_path / "kept")
    base.folder.symlink_to(tmp_path / "other" / "step-000001")
    with pytest.raises(CheckpointError, match=rf"other weights .*, then {digest[:12]}\)"):
        load_model(folder)
    base.folder.unlink()
    (tmp_path / "kept").rename(base.folder)
    load_model(folder)


def test_an_adapter_upon_an_adapter_is_refused(tmp_path, tokenizer):
    folder = write_tuned(tmp_path, tokenizer)
    (tmp_path / "upon").mkdir()
    (tmp_path / "upon" / "adapter_config.json").write_text(
        json.dumps(GOOD | {"base_model_name_or_path": str(folder)})
    )
    with pytest.raises(CheckpointError, match="is an adapter; merge it first: lm merge"):
        find_base(tmp_path / "upon")


def test_a_bare_adapter_is_found_and_listed(tmp_path, tokenizer):
    write_base(tmp_path, tokenizer)
    (tmp_path / "bare").mkdir()
    config = json.dumps(GOOD | {"base_model_name_or_path": "../base/best"})
    (tmp_path / "bare" / "adapter_config.json").write_text(config)
    assert list_runs(tmp_path) == ["bare", "base"]
    found = find("bare", tmp_path)
    assert is_adapter(found) and holder(found, "config.json") == tmp_path / "base" / "best"
    with pytest.raises(CheckpointError, match="no checkpoint bare"):
        find("bare", tmp_path, "tokenizer.json")
    assert not find_base(found).known


def test_the_adapter_s_own_tokenizer_wins(tmp_path, tokenizer):
    folder = write_tuned(tmp_path, tokenizer)
    assert holder(folder, "tokenizer.json") == folder
    assert holder(folder, "nothing.json") == tmp_path / "base" / "step-000001"
    assert dataclasses.is_dataclass(find_base(folder))


def test_a_digest_tells_models_apart_by_base_adapter_and_config(tmp_path, tokenizer):
    folder = write_tuned(tmp_path, tokenizer)
    base = find_base(folder).folder
    before = model_digest(folder)
    assert len({before, model_digest(base)}) == 2 and before == model_digest(folder)
    config = (base / "config.json").read_bytes()
    (base / "config.json").write_bytes(config.replace(b"rms_norm_eps", b"rms_norm_epz"))
    assert model_digest(folder) != before
    (base / "config.json").write_bytes(config)
    assert model_digest(folder) == before
    weights = tampered(folder, "adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert model_digest(folder) != before
