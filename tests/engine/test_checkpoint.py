"""Checkpoints on disk: whole or absent, verified, readable by others."""

import json
import os
import stat
from pathlib import Path

import pytest
import safetensors.torch
import torch

from engine.checkpoint import Snapshot, load_model, load_tensors, read_manifest, save
from engine.config import SampleConfig
from engine.errors import CheckpointError, ResourceError
from engine.runs import find, list_runs
from engine.sampling_defaults import sample_defaults
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


def unlist(folder: Path, name: str) -> None:
    """Take a file out of the manifest, so that it may be changed."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"].pop(name, None)
    (folder / "manifest.json").write_text(json.dumps(manifest))


SHAPES = [
    {},
    {"tie_embeddings": True},
    {"qk_norm": "none", "n_kv_heads": 2},
    {"norm": "layernorm", "position": "learned", "activation": "gelu", "mlp_bias": True},
    {"sliding_window": 8, "full_every": 2},
    {"logit_softcap": 20.0, "norm_placement": "sandwich"},
    {"qk_norm": "none", "rotary_dim": 6},  # a phi3: fused tensors
    {"norm_placement": "post", "qk_norm": "width", "norm_offset": True},
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
    unlist(folder, "config.json")
    written = json.loads((folder / "config.json").read_text())
    full = "full_attention"
    for change, expected in (
        ({"hidden_size": 64}, r"model\.embed_tokens\.weight is 400 × 32, but .* 400 × 64"),
        ({"num_hidden_layers": 3, "layer_types": [full] * 3}, r"lack model\.layers\.2\."),
        ({"num_hidden_layers": 1, "layer_types": [full]}, r"no place .* model\.layers\.1\..* …"),
        ({"attention_bias": True}, r"lack model\.layers\.0\.self_attn\.q_proj\.bias"),
        ({"model_type": "llama", "attention_bias": False, "mlp_bias": False}, "not understood"),
        ({"vocab_size": 399}, "400 tokens, the model only 399"),
    ):
        (folder / "config.json").write_text(json.dumps(written | change))
        with pytest.raises(CheckpointError, match=expected):
            load_model(folder)


def test_tensors_that_follow_from_the_config_are_passed_over(tmp_path, tokenizer):
    """Old checkpoints carry rotary frequencies, and a copy of a tied head; nothing else."""
    folder = save(tmp_path, snapshot(tokenizer, tie_embeddings=True), best=True)
    unlist(folder, "model.safetensors")
    tensors = load_tensors(folder / "model.safetensors")
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
    }
    safetensors.torch.save_file(tensors | extra, folder / "model.safetensors")
    load_model(folder)
    extra["model.layers.0.self_attn.q_proj.lora_A"] = torch.ones(4)
    safetensors.torch.save_file(tensors | extra, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensors have no place .*lora_A$"):
        load_model(folder)


FAMILIES = {
    "qwen3": {},
    "qwen3 tied": {"tie_embeddings": True},
    "gpt2": {
        "norm": "layernorm",
        "qk_norm": "none",
        "position": "learned",
        "activation": "gelu_tanh",
        "attention_bias": True,
        "output_bias": True,
        "mlp_bias": True,
    },
    "phi3": {"qk_norm": "none", "rotary_dim": 6},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_training_a_loaded_model_leaves_its_file_alone(tmp_path, tokenizer, name):
    """Weights are mapped, some are parts of one tensor: each learns, and the disk stays."""
    folder = save(tmp_path, snapshot(tokenizer, **FAMILIES[name]), best=True)
    assert json.loads((folder / "config.json").read_text())["model_type"] == name.split()[0]
    before = (folder / "model.safetensors").read_bytes()
    model, _ = load_model(folder)
    fresh = make_model(**FAMILIES[name])
    for trained in (model, fresh):
        optimizer = torch.optim.AdamW(trained.parameters(), lr=0.1)
        for _ in range(2):
            trained(torch.arange(20)[None]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    states = zip(model.state_dict().items(), fresh.state_dict().items(), strict=True)
    for (key, ours), (_, expected) in states:
        torch.testing.assert_close(ours, expected, msg=key)
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_weights_are_mapped_from_the_file_where_they_can_be(tmp_path, tokenizer):
    """In the dtype of the file; another one is a copy."""
    folder = save(tmp_path, snapshot(tokenizer), best=True)
    file = str((folder / "model.safetensors").resolve())

    def mapped(tensor: torch.Tensor) -> bool:
        for line in Path("/proc/self/maps").read_text().splitlines():
            first, last = (int(word, 16) for word in line.split()[0].split("-"))
            if first <= tensor.data_ptr() < last:
                return line.endswith(file)
        return False

    for dtype, expected in ((torch.float32, True), (None, True), (torch.bfloat16, False)):
        model, _ = load_model(folder, dtype=dtype)
        assert all(mapped(p) == expected for p in model.parameters())


MANIFESTS = (
    *("", "[]", "7", "null", '"a"', "{", "[" * 100_000),
    '{"step": 1}',
    '{"step": 1, "files": {}}',
    '{"step": 1, "files": []}',
    '{"step": 1, "files": ["a"]}',
    '{"files": {"a": {}}}',
    '{"files": {"config.json": {"bytes": 1, "sha256": "x"}}}',
    '{"step": 1, "files": {"config.json": 7}}',
    '{"step": 1, "files": {"config.json": {}}}',
    '{"step": 1, "files": {"config.json": {"bytes": "1", "sha256": 7}}}',
    r'{"step": 1, "files": {"a\u0000b": {"bytes": 1, "sha256": "x"}}}',
)


@pytest.mark.parametrize("text", MANIFESTS, ids=lambda text: text[:60])
def test_a_manifest_that_is_none_is_one_clear_error(tmp_path, tokenizer, text):
    folder = save(tmp_path, snapshot(tokenizer), best=True)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    assert str(caught.value).startswith(str(folder))


@pytest.mark.parametrize("name", ["config.json", "manifest.json"])
@pytest.mark.parametrize("data", [b"", b"\xff", b"[" * 100_000, b"{", b"1" * 10_000], ids=len)
def test_json_that_is_none_names_its_file(tmp_path, tokenizer, name, data):
    folder = save(tmp_path, snapshot(tokenizer), best=True)
    unlist(folder, name)
    (folder / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=name):
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
