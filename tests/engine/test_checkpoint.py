"""Checkpoints on disk: whole or absent, verified, readable by others."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch

from engine.checkpoint import (
    Snapshot,
    load_model,
    read_manifest,
    sample_defaults,
    save,
)
from engine.config import SampleConfig
from engine.errors import CheckpointError, ResourceError
from engine.runs import find, list_runs
from tests.conftest import make_model


def snapshot(tokenizer, step: int = 1, seed: int = 0, **changes) -> Snapshot:
    return Snapshot(
        step=step,
        model=make_model(seed, **changes),
        tokenizer=tokenizer,
        recipe_yaml="run: {seed: 1}\n",
        sample=SampleConfig(temperature=0.5, top_k=7, min_p=0.1),
        facts={"tokens_seen": 3},
        optimizer={"momentum.a": torch.arange(4.0)},
        state={"step": step},
    )


SHAPES = [
    {},
    {"tie_embeddings": True},
    {"qk_norm": "none", "n_kv_heads": 2},
    {"norm": "layernorm", "position": "learned", "activation": "gelu", "mlp_bias": True},
    {"sliding_window": 8, "full_every": 2},
    {"logit_softcap": 20.0, "norm_placement": "sandwich"},
]


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_weights_come_back_bit_for_bit(tmp_path, tokenizer, changes):
    before = snapshot(tokenizer, **changes)
    folder = save(tmp_path, before, best=True)
    model, loaded = load_model(folder)
    assert model.config == before.model.config
    for (name, ours), (_, theirs) in zip(
        model.state_dict().items(), before.model.state_dict().items(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert loaded.digest == tokenizer.digest
    tokens = torch.arange(20)[None]
    assert torch.equal(model(tokens), before.model(tokens)), "also what is computed, not stored"


def test_links_move_and_only_what_they_name_is_kept(tmp_path, tokenizer):
    save(tmp_path, snapshot(tokenizer, 1), best=True)
    save(tmp_path, snapshot(tokenizer, 2), best=False)
    save(tmp_path, snapshot(tokenizer, 3), best=False)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000001", "step-000003"]
    assert os.readlink(tmp_path / "best") == "step-000001"
    assert os.readlink(tmp_path / "last") == "step-000003"


def test_nothing_is_pickled(tmp_path, tokenizer):
    folder = save(tmp_path, snapshot(tokenizer), best=True)
    names = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert names == {".json", ".safetensors", ".yaml"}


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "state/optimizer.safetensors"]
)
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_damage_is_found_and_named(tmp_path, tokenizer, name, damage):
    file = save(tmp_path, snapshot(tokenizer), best=True) / name
    data = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
    else:
        file.unlink()
    with pytest.raises(CheckpointError, match=name.rsplit("/", 1)[-1].replace(".", r"\.")):
        load_model(tmp_path / "best")


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path, tokenizer):
    folder = save(tmp_path, snapshot(tokenizer), best=True)
    for change, expected in (
        ({"hidden_size": 64, "head_dim": 8}, "asks for"),
        ({"num_hidden_layers": 3}, "lacks"),
    ):
        config = json.loads((folder / "config.json").read_text()) | change
        (folder / "config.json").write_text(json.dumps(config))
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"].pop("config.json", None)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(CheckpointError, match=expected):
            load_model(folder)


def test_unknown_names_list_what_there_is(tmp_path, tokenizer):
    save(tmp_path / "runs" / "one", snapshot(tokenizer), best=True)
    assert list_runs(tmp_path / "runs") == ["one"]
    assert find("one", tmp_path / "runs") == tmp_path / "runs" / "one" / "best"
    with pytest.raises(CheckpointError, match="no checkpoint two .*there are: one"):
        find("two", tmp_path / "runs")
    with pytest.raises(CheckpointError, match="lm train stdlib"):
        find("two", tmp_path / "empty")


def test_sampling_settings_travel_with_the_checkpoint(tmp_path, tokenizer):
    folder = save(tmp_path, snapshot(tokenizer), best=True)
    assert sample_defaults(folder) == SampleConfig(temperature=0.5, top_k=7, min_p=0.1)


def test_manifest_covers_every_file(tmp_path, tokenizer):
    folder = save(tmp_path, snapshot(tokenizer), best=True)
    manifest = read_manifest(folder)
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert set(manifest["files"]) == files - {"manifest.json"}
    assert manifest["tokens_seen"] == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes to read-only folders too")
def test_a_read_only_folder_is_one_clear_error(tmp_path, tokenizer):
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(ResourceError, match="Permission denied"):
        save(tmp_path / "run", snapshot(tokenizer), best=True)


def test_a_file_in_the_way_is_one_clear_error(tmp_path, tokenizer):
    """Works for root too: a run's folder cannot be made below a file."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot save"):
        save(tmp_path / "file", snapshot(tokenizer), best=True)


def test_a_left_over_temporary_folder_does_no_harm(tmp_path, tokenizer):
    """As after a crash in the middle of a save."""
    half = tmp_path / ".step-000001.tmp"
    (half / "state").mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    folder: Path = save(tmp_path, snapshot(tokenizer), best=True)
    load_model(folder)
    assert not half.exists()
