"""A manifest proves what a checkpoint is made of, and believes nothing about itself."""

import json
import math
import os
import re

import pytest

from engine.errors import CheckpointError
from engine.manifest import LARGEST, read_config, read_json, read_manifest, write_manifest


@pytest.fixture
def folder(tmp_path):
    """A folder of one small and one large file, one of them further down, and its manifest."""
    made = tmp_path / "made"
    (made / "state").mkdir(parents=True)
    (made / "small.txt").write_text("small")
    (made / "state" / "large.bin").write_bytes(bytes(1000))
    write_manifest(made, {"step": 3, "data": {"digest": "d"}})
    return made


def test_every_file_is_listed_and_the_facts_are_kept(folder):
    manifest = read_manifest(folder)
    assert manifest["step"] == 3 and manifest["data"] == {"digest": "d"}
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == {
        "small.txt": 5,
        "state/large.bin": 1000,
    }
    # sha256 of "small", worked out by sha256sum
    known = "81db8ebbbbc69c6c6ad4a6aa92b76e0c08af547da236b9e2c9dbe1d8285a8130"
    assert manifest["files"]["small.txt"]["sha256"] == known


@pytest.mark.parametrize("place", [0, 1, 499, 998, 999])
def test_a_flipped_bit_of_a_large_file_shows_when_everything_is_hashed(folder, place):
    """And not before: hashing gigabytes at every start would take longer than loading them."""
    file = folder / "state" / "large.bin"
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    read_manifest(folder, hash_up_to=999)
    for limit in (1000, math.inf):
        with pytest.raises(CheckpointError, match=r"state/large\.bin: its sha256 differs"):
            read_manifest(folder, hash_up_to=limit)


@pytest.mark.parametrize("size", [0, 999, 1001])
def test_another_size_shows_at_once(folder, size):
    (folder / "state" / "large.bin").write_bytes(bytes(size))
    with pytest.raises(CheckpointError, match=rf"large\.bin: {size} bytes instead of 1000"):
        read_manifest(folder, hash_up_to=0)


def test_a_missing_file_or_a_folder_in_its_place(folder):
    (folder / "small.txt").unlink()
    with pytest.raises(CheckpointError, match=r"small\.txt is missing"):
        read_manifest(folder)
    (folder / "small.txt").mkdir()
    with pytest.raises(CheckpointError, match=r"small\.txt is missing"):
        read_manifest(folder)


ENTRY = {"bytes": 5, "sha256": "x"}
NO_MANIFESTS = {
    "null": None,
    "a list": [],
    "nothing": {},
    "no step": {"files": {"small.txt": ENTRY}},
    "a step of another kind": {"step": "3", "files": {"small.txt": ENTRY}},
    "no files": {"step": 3},
    "files that are none": {"step": 3, "files": {}},
    "files in a list": {"step": 3, "files": ["small.txt"]},
    "entries that are none": {"step": 3, "files": {"small.txt": None}},
    "no size": {"step": 3, "files": {"small.txt": {"sha256": "x"}}},
    "a size in words": {"step": 3, "files": {"small.txt": {"bytes": "5", "sha256": "x"}}},
    "no sum": {"step": 3, "files": {"small.txt": {"bytes": 5}}},
    "a way out": {"step": 3, "files": {"../secret": ENTRY}},
    "a way out, further down": {"step": 3, "files": {"state/../../secret": ENTRY}},
    "a place of the system's": {"step": 3, "files": {"/etc/hostname": ENTRY}},
    "the folder itself": {"step": 3, "files": {"": ENTRY}},
    "a name that no file can have": {"step": 3, "files": {"a\0b": ENTRY}},
}


@pytest.mark.parametrize("case", NO_MANIFESTS)
def test_what_is_no_manifest_is_refused(folder, case):
    (folder.parent / "secret").write_text("small")
    (folder / "manifest.json").write_text(json.dumps(NO_MANIFESTS[case]))
    with pytest.raises(CheckpointError, match=r"manifest\.json: not a manifest"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"1" * 10_000, "not valid JSON"),
        (b" " * (LARGEST + 1), "has more than 20,000,000 bytes"),
    ],
    ids=["nothing", "half", "no text", "deep", "a long number", "huge"],
)
def test_json_that_is_none(tmp_path, content, words):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(f"{file}: ") + words) as caught:
        read_json(file)
    assert "\n" not in str(caught.value)


def test_json_that_is_no_file(tmp_path):
    """A pipe or a device would be read for ever."""
    file = tmp_path / "config.json"
    with pytest.raises(CheckpointError, match="No such file"):
        read_json(file)
    file.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="not a file"):
        read_json(file)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CheckpointError, match="not a file"):
        read_json(file)
    with pytest.raises(CheckpointError, match="not a file"):
        read_config(tmp_path)
