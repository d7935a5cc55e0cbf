"""Writing files: the old content or the new, never half of it."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import InputError, ResourceError
from engine.files import flush, point, sha256, whole_folder, write_whole


def fail(*_):
    raise OSError("the disk is gone")


def test_write_whole_creates_and_replaces(tmp_path):
    file = tmp_path / "a.json"
    for text in ("first, and longer", "naïve 日本\n", ""):
        write_whole(file, text)
        assert file.read_bytes() == text.encode()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_content(tmp_path, monkeypatch, broken):
    file = tmp_path / "a.json"
    write_whole(file, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, broken, fail)
        with pytest.raises(ResourceError, match="the disk is gone"):
            write_whole(file, "new")
    assert file.read_text() == "old"
    write_whole(file, "newer")
    assert file.read_text() == "newer"


def test_text_that_cannot_be_encoded_leaves_the_old_content(tmp_path):
    file = tmp_path / "a.json"
    write_whole(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(file, "new \ud800")
    assert file.read_text() == "old"


def test_all_content_is_on_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    """Renamed first, a power cut could leave an empty file under the good name."""
    events = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor):
        events.append(("fsync", os.fstat(descriptor).st_size))
        fsync(descriptor)

    def noted_replace(source, target):
        events.append(("replace", None))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_whole(tmp_path / "a.json", "x" * 1000)
    assert events[:2] == [("fsync", 1000), ("replace", None)]


def test_a_link_is_made_and_moved(tmp_path):
    link = tmp_path / "latest"
    for target in ("step1", "step2"):
        (tmp_path / target).mkdir()
        (tmp_path / target / "name").write_text(target)
        point(link, target)
        assert link.readlink() == Path(target)
        assert (link / "name").read_text() == target
    names = {entry.name for entry in tmp_path.iterdir()}
    assert names == {"latest", "step1", "step2"}
    assert not list((tmp_path / "step1").glob("*latest*"))


def test_a_failing_link_leaves_the_old_one(tmp_path, monkeypatch):
    """What it leaves lying about does not stop the next try either."""
    link = tmp_path / "latest"
    point(link, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="the disk is gone"):
            point(link, "new")
    assert link.readlink() == Path("old")
    point(link, "newer")
    assert link.readlink() == Path("newer")


def test_flush_takes_files_and_folders_and_leaks_nothing(tmp_path, monkeypatch):
    """A descriptor must be closed even if the disk fails, or a long run uses them all up."""
    (tmp_path / "a").write_text("a")
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    flush(tmp_path / "a")
    flush(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(descriptor) or fail())
    with pytest.raises(OSError, match="the disk is gone"):
        flush(tmp_path)
    assert len(synced) == 3
    for descriptor in synced:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (3 << 20) + 5])
def test_sha256_is_of_the_whole_file(tmp_path, size):
    data = os.urandom(1000) * (size // 1000 + 1)
    (tmp_path / "a").write_bytes(data[:size])
    assert sha256(tmp_path / "a") == hashlib.sha256(data[:size]).hexdigest()


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "on" / "the way" / "out"
    with pytest.raises(RuntimeError), whole_folder(out) as folder:
        (folder / "half").write_text("x")
        assert not out.exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == [], "not even the folders on the way"
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    (tmp_path / "on" / "the way" / f".out.{killed.pid}.tmp" / "left").mkdir(parents=True)
    with whole_folder(out) as folder:
        assert list(folder.iterdir()) == [], "what a killed process left is gone"
        (folder / "whole").write_text("x")
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (out / "whole").read_text() == "x"


def test_a_folder_where_none_can_be(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError, match="cannot be written"), whole_folder(tmp_path / "file/x"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_message_about_a_file_is_one_line_whatever_the_file_says():
    error = InputError("x: the key 'a\nerror: b\x1b[2J\ud800' is not known" + "y" * 5000)
    assert str(error).isprintable() and len(str(error)) < 1100
    assert str(error).startswith(r"x: the key 'a\nerror: b\x1b[2J\ud800' is")


def test_two_processes_do_not_write_into_each_other(tmp_path, monkeypatch):
    """Both make the same folder at once: the first to end has it, whole; the other is told."""
    late = pytest.raises(ResourceError, match="out: cannot be written")
    with late, whole_folder(tmp_path / "out") as ours:
        (ours / "a").write_text("ours")
        monkeypatch.setattr(os, "getpid", os.getppid)
        with whole_folder(tmp_path / "out") as theirs:
            assert theirs != ours
            (theirs / "a").write_text("theirs")
    assert (tmp_path / "out" / "a").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
