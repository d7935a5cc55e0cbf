"""The prefix cache: the same bits with and without, for whatever lies in its folder."""

import multiprocessing
import os
import time

import numpy as np
import pytest
import torch

from engine.generate import prefixes as module
from engine.generate.blocks import chain, read, write
from engine.generate.decoder import Run
from engine.generate.prefix_folder import entries
from engine.generate.prefixes import Prefixes
from engine.generate.reference import CHUNK, TorchDecoder
from tests.conftest import make_model
from tests.engine.generate.test_native import native

IDS = np.random.default_rng(0).integers(0, 400, 3 * CHUNK + 40).tolist()


@pytest.fixture(scope="module")
def decoder():
    return TorchDecoder(make_model(max_seq_len=1024), "one model")


class Free(TorchDecoder):
    """The same decoder that claims to be exact wherever a prompt is cut, as our own C is."""

    grid = 1


def run(decoder, prefixes, ids=IDS, more=8):
    """Return what was restored, the logits after a prompt and after each of some greedy tokens."""
    cache = decoder.cache(len(ids) + more)
    restored = prefixes.restore(decoder, cache, 0, ids) if prefixes else 0
    assert cache.lengths[0] == restored < len(ids)
    logits = [decoder.forward(cache, [Run(0, ids[restored:])])]
    for _ in range(more):
        logits.append(decoder.forward(cache, [Run(0, [int(logits[-1].argmax())])]))
    if prefixes:
        prefixes.store(decoder, cache, 0, ids)
    return restored, np.concatenate(logits)


@pytest.fixture
def filled(decoder, tmp_path):
    """A cache that holds the prompt, and what it told."""
    told = []
    prefixes = Prefixes(tmp_path, name="mine", tell=told.append)
    run(decoder, prefixes)
    assert len(list(entries(tmp_path))) == 3 * CHUNK // 64
    return prefixes, told


def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_the_same_bits_with_and_without(decoder, filled):
    prefixes, told = filled
    _, without = run(decoder, None)
    restored, with_it = run(decoder, prefixes)
    assert restored == 3 * CHUNK and np.array_equal(with_it, without) and not told


@pytest.mark.parametrize("length", [1, 64, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK, 3 * CHUNK + 1])
def test_a_prompt_of_any_length_keeps_a_token_to_run(decoder, filled, length):
    restored, logits = run(decoder, filled[0], IDS[:length])
    assert restored == (length - 1) // CHUNK * CHUNK
    assert np.array_equal(logits, run(decoder, None, IDS[:length])[1])


def test_prompts_share_what_they_have_in_common(decoder, filled):
    other = [*IDS[: 2 * CHUNK + 3], *range(300)]
    restored, logits = run(decoder, filled[0], other)
    assert restored == 2 * CHUNK and np.array_equal(logits, run(decoder, None, other)[1])
    assert run(decoder, filled[0], [7, *IDS])[0] == 0  # a prefix is not found at another place


def test_blocks_of_64_where_the_decoder_is_exact_anywhere(decoder, tmp_path):
    free, prefixes = Free(decoder.model, "free"), Prefixes(tmp_path)
    run(free, prefixes)
    assert len(list(entries(tmp_path))) == len(IDS) // 64
    restored, logits = run(free, prefixes)
    assert restored == (len(IDS) - 1) // 64 * 64
    np.testing.assert_allclose(logits, run(free, None)[1], atol=1e-4)


@pytest.mark.parametrize("format, kv", [("int8", "fp16"), ("bf16", "int8"), ("int4", "fp32")])
def test_our_own_c_gives_the_same_bits_wherever_blocks_end(tmp_path, library, format, kv):
    own = native(make_model(max_seq_len=1024), library, format, kv=kv, identity="in C")
    prefixes = Prefixes(tmp_path)
    for length in (3 * CHUNK + 40, 65, 64, 200):
        restored, logits = run(own, prefixes, IDS[:length])
        assert restored == (0 if length > 500 else (length - 1) // 64 * 64)
        assert np.array_equal(logits, run(own, None, IDS[:length])[1])


def test_a_row_that_holds_some_is_filled_further(decoder, tmp_path):
    """As in a conversation; what a row holds is not lost if nothing is found."""
    free, prefixes = Free(decoder.model, "free"), Prefixes(tmp_path)
    run(free, prefixes)
    cache = free.cache(len(IDS), rows=2)
    free.forward(cache, [Run(1, IDS[:100])])
    assert prefixes.restore(free, cache, 1, IDS) == 12 * 64 - 100 and cache.lengths == [0, 768]
    other = [*IDS[:100], *range(300)]
    cache.rewind(1, 100)
    assert prefixes.restore(free, cache, 1, other) == 0 and cache.lengths == [0, 100]


def test_a_damaged_block_is_said_and_computed_again(decoder, filled):
    prefixes, told = filled
    path = chain("one model", IDS)[CHUNK // 64 + 1].path(prefixes.folder)
    before = path.read_bytes()
    flip(path, 5000)
    restored, logits = run(decoder, prefixes)
    assert restored == CHUNK and np.array_equal(logits, run(decoder, None)[1])
    assert len(told) == 1 and "digest differs" in told[0] and str(path) in told[0]
    assert path.read_bytes() == before  # stored anew
    assert run(decoder, prefixes)[0] == 3 * CHUNK and len(told) == 1


def test_the_control_a_wrong_block_that_nobody_checks_changes_the_answer(
    decoder, filled, monkeypatch
):
    """Without the digest the flipped byte would reach the logits."""
    prefixes, _ = filled
    block = chain("one model", IDS)[0]
    path = block.path(prefixes.folder)
    data = read(path)[1].copy()
    data[3::4] ^= 0x40  # exponents of fp32
    monkeypatch.setattr(module, "read", lambda p: (block, data) if p == path else read(p))
    restored, logits = run(decoder, prefixes)
    assert restored == 3 * CHUNK and not np.array_equal(logits, run(decoder, None)[1])


def test_blocks_of_another_model_or_other_tokens_are_not_used(decoder, filled):
    prefixes, told = filled
    other = TorchDecoder(make_model(seed=1, max_seq_len=1024), "another model")
    assert run(other, prefixes)[0] == 0 and not told
    blocks, strange = chain("one model", IDS), chain("another model", IDS)
    path = blocks[0].path(prefixes.folder)
    for wrong in (strange[0], blocks[1]):  # whole in itself, under a name that is not its own
        path.write_bytes(wrong.path(prefixes.folder).read_bytes())
        restored, logits = run(decoder, prefixes)
        assert restored == 0 and np.array_equal(logits, run(decoder, None)[1])
        assert "name of another block" in told.pop()
    path.unlink()
    write(path, blocks[1], read(blocks[1].path(prefixes.folder))[1])
    assert run(decoder, prefixes)[0] == 0 and told


def test_a_size_that_does_not_fit_ends_it(decoder, filled):
    """An identity that covers too little: another shape of cache under the same name."""
    prefixes, told = filled
    wide = TorchDecoder(make_model(max_seq_len=1024, n_layers=3), "one model")
    assert run(wide, prefixes)[0] == 0
    assert len(told) == 1 and "no prefix cache" in told[0]
    assert run(wide, prefixes)[0] == 0 and len(told) == 1


def test_windows_keep_no_blocks_and_say_so_once(tmp_path):
    model = make_model(max_seq_len=1024, sliding_window=32, full_every=2)
    windowed, told = TorchDecoder(model, "windowed"), []
    prefixes = Prefixes(tmp_path, tell=told.append)
    results = [run(windowed, prefixes) for _ in range(3)]
    assert [restored for restored, _ in results] == [0, 0, 0] and len(told) == 1
    assert "sliding window" in told[0]
    assert all(np.array_equal(logits, run(windowed, None)[1]) for _, logits in results)


def test_a_window_that_cannot_go_back_ends_it(tmp_path, monkeypatch):
    """Blocks of a cache smaller than the window are there, but this one is larger."""
    windowed, told = Free(make_model(max_seq_len=1024, sliding_window=300), "windowed"), []
    prefixes = Prefixes(tmp_path, tell=told.append)
    small = windowed.cache(256)
    windowed.forward(small, [Run(0, IDS[:256])])
    assert prefixes.store(windowed, small, 0, IDS[:256]) == 4
    assert prefixes.restore(windowed, windowed.cache(1024), 0, IDS[:200]) == 0
    assert len(told) == 1 and "sliding window" in told[0]

    def refuse(row, length):
        raise ValueError(f"cannot go back to {length}")

    prefixes, cache = Prefixes(tmp_path, tell=told.append), windowed.cache(1024)
    windowed.forward(cache, [Run(0, IDS[:70])])
    monkeypatch.setattr(cache, "rewind", refuse)
    assert prefixes.restore(windowed, cache, 0, IDS[:200]) == 0 and cache.lengths == [70]
    assert told[1:] == ["no prefix cache: cannot go back to 64"]


def test_a_decoder_without_identity_goes_without(decoder, tmp_path):
    told = []
    prefixes = Prefixes(tmp_path, tell=told.append)
    assert run(TorchDecoder(decoder.model), prefixes)[0] == 0
    assert len(told) == 1 and not list(entries(tmp_path))


def test_a_folder_that_takes_nothing_is_said_once(decoder, tmp_path, monkeypatch):
    told = []
    (tmp_path / "file").touch()
    prefixes = Prefixes(tmp_path / "file" / "prefixes", tell=told.append)
    assert run(decoder, prefixes)[0] == run(decoder, prefixes)[0] == 0
    assert len(told) == 1 and "takes no more blocks" in told[0]

    def full(*_):
        raise OSError(28, "No space left on device")

    told.clear()
    prefixes = Prefixes(tmp_path / "full", tell=told.append)
    run(decoder, prefixes, IDS[: CHUNK + 1])
    monkeypatch.setattr(module, "write", full)
    assert [run(decoder, prefixes)[0] for _ in range(2)] == [CHUNK, CHUNK]  # it still reads
    assert told == [f"prefix cache: {tmp_path}/full takes no more blocks: No space left on device"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_read(decoder, filled):
    prefixes, _ = filled
    for folder in (prefixes.folder, *prefixes.folder.iterdir()):
        folder.chmod(0o555)
    assert run(decoder, prefixes)[0] == 3 * CHUNK


def test_the_folder_is_bounded_and_the_longest_unused_go(decoder, filled):
    prefixes, _ = filled
    size = next(entries(prefixes.folder)).bytes
    small = Prefixes(prefixes.folder, limit=12 * size)
    for entry in entries(prefixes.folder):
        os.utime(entry.path, (time.time() - 60,) * 2)
    run(decoder, small, IDS[: CHUNK + 1])  # used now
    run(decoder, small, [5, *IDS[:CHUNK]])
    assert len(list(entries(prefixes.folder))) == 12
    assert run(decoder, small, IDS[: CHUNK + 1])[0] == CHUNK
    assert run(decoder, small, [5, *IDS[:CHUNK]])[0] == CHUNK


def test_of_one_prompt_its_end_goes_first(decoder, tmp_path):
    prefixes = Prefixes(tmp_path)
    run(decoder, prefixes)
    size = next(entries(tmp_path)).bytes
    prefixes.limit = 11 * size
    run(decoder, prefixes, [9, *IDS[: 2 * CHUNK]])  # eight more
    left = [block.path(tmp_path).exists() for block in chain("one model", IDS)]
    assert left == [True] * 3 + [False] * 9


def _work(folder, seed):
    torch.set_num_threads(1)
    decoder = TorchDecoder(make_model(max_seq_len=1024), "one model")
    told = []
    prefixes = Prefixes(folder, limit=300_000, tell=told.append)
    for turn in range(12):
        ids = [(seed + turn) % 3, *IDS[: 2 * CHUNK]]
        if not np.array_equal(run(decoder, prefixes, ids, 1)[1], run(decoder, None, ids, 1)[1]):
            told.append("differs")
    if told:
        raise SystemExit(str(told))


def test_two_processes_at_once(tmp_path):
    """Both write, read and make room in one folder; neither sees a difference or complains."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_work, args=(tmp_path, seed)) for seed in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
