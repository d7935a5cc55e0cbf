"""The folder of a prefix cache: listed, bounded, checked; other files and other processes."""

import os
import time

import numpy as np
import pytest

from engine.generate.blocks import chain, write
from engine.generate.prefix_folder import check, collect, entries, models, note, place


@pytest.fixture
def folder(tmp_path):
    """Two models: of one three blocks, used 30, 20 and 10 s ago, of the other one, 1,000 s ago."""
    now = time.time()
    for identity, ages in (("one", (10, 20, 30)), ("two", (1000,))):
        for block, age in zip(chain(identity, range(64 * len(ages))), ages, strict=True):
            path = block.path(tmp_path)
            path.parent.mkdir(exist_ok=True)
            write(path, block, np.full(616, block.index, np.uint8))  # 1,000 bytes in all
            os.utime(path, (now - age, now - age))
        note(path.parent, f"model {identity}")
    (tmp_path / "stray").write_text("no folder")
    return tmp_path


def test_models_are_listed_by_their_last_use(folder):
    found = models(folder)
    assert [(m.name, m.blocks, m.tokens, m.bytes) for m in found] == [
        ("model one", 3, 192, 3000),
        ("model two", 1, 64, 1000),
    ]
    assert 9 < time.time() - found[0].used < 12 and models(folder / "nowhere") == []
    note(folder / found[0].model, "renamed")
    assert models(folder)[0].name == "model one"


@pytest.mark.parametrize(
    "rule, gone",
    [
        ({"most": 4000}, 0),
        ({"most": 3999}, 1),
        ({"most": 1000}, 3),
        ({"most": 0}, 4),
        ({"age": 15}, 3),
        ({"age": 500}, 1),
        ({"age": 25, "most": 1500}, 3),
        ({}, 0),
    ],
    ids=str,
)
def test_the_longest_unused_go_first(folder, rule, gone):
    before = [entry.path for entry in sorted(entries(folder), key=lambda entry: entry.used)]
    would = collect(folder, **rule, dry=True)
    assert len(list(entries(folder))) == 4
    freed = collect(folder, **rule)
    assert freed == would
    assert (freed.blocks, freed.bytes) == (gone, gone * 1000)
    assert (freed.left_blocks, freed.left_bytes) == (4 - gone, 4000 - gone * 1000)
    assert {entry.path for entry in entries(folder)} == set(before[gone:])


def test_unfinished_files_go_when_they_are_nobodys(folder):
    model = folder / models(folder)[0].model
    old, new = model / ".a.tmp", model / ".b.tmp"
    old.touch()
    new.touch()
    os.utime(old, (0, 0))
    collect(folder, dry=True)
    assert old.exists()
    collect(folder)
    assert not old.exists() and new.exists()


def test_a_check_names_what_is_damaged(folder):
    assert [problem for _, problem in check(folder)] == [None] * 4
    victim = next(entries(folder)).path
    data = victim.read_bytes()
    victim.write_bytes(data[:-1] + b"!")
    assert [(e.path, p) for e, p in check(folder) if p] == [(victim, "its digest differs")]


def test_the_place_is_below_the_cache(tmp_path):
    assert place(tmp_path) == tmp_path / "prefixes"
