"""Where runs and checkpoints lie: finding, making and clearing their folders. Imports no torch.

What a folder holds is described in `engine/checkpoint.py`.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from engine.errors import CheckpointError, RecipeError, ResourceError
from engine.files import write_whole

# Everything that a run writes into its folder; what else is there is the user's and stays.
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
OWN = ("recipe.yaml", "metrics.jsonl", "plan.json", *TOKENIZER, "stdin", "best", "last")
# What a folder holds that is a checkpoint: a whole model, or an adapter beside another.
MODELS = ("config.json", "adapter_config.json")
OWN_PATTERNS = ("step-[0-9]*", ".step-*.tmp", ".*.tmp")


def find(name: str, root: Path, holding: str = "config.json") -> Path:
    """Find a checkpoint by folder, or by name under `root`; of a run, take its best.

    A folder that holds an adapter and nothing else is one too, unless other than a model is asked.

    Raises: CheckpointError listing the names there are.
    """
    wanted = MODELS if holding in MODELS else (holding,)
    for base in (Path(os.path.expanduser(name)), root / name):
        # Unlike those of Path, these functions take names that no file can have.
        for link in (base / "best", base / "last"):
            if os.path.islink(link) and not os.path.exists(link):
                raise CheckpointError(f"{link} names {link.readlink()}, which is gone")
        for candidate in (base, base / "best", base / "last"):
            if any(os.path.isfile(candidate / file) for file in wanted):
                return candidate
    if name.endswith(".gguf") and os.path.isfile(name):
        raise CheckpointError(f"{name}: not imported yet; lm import {name} -o checkpoints/NAME")
    names = list_runs(root)
    there = f"there are: {', '.join(names)}" if names else "train one with `lm train stdlib`"
    raise CheckpointError(f"no checkpoint {name} (looked in . and {root}/); {there}")


def list_runs(root: Path) -> list[str]:
    """Name the folders under `root` that hold a checkpoint."""
    if not root.is_dir():
        return []
    return sorted(
        path.name
        for path in root.iterdir()
        if not path.name.startswith(".")
        and any((path / part / file).is_file() for part in ("", "last", "best") for file in MODELS)
    )


def has_begun(folder: Path) -> bool:
    """Tell whether a folder holds a run that took a step; a failed start leaves none."""
    return any((folder / name).exists() for name in ("metrics.jsonl", "last"))


def create_run(folder: Path, recipe_yaml: str) -> None:
    """Begin a run in a folder: its recipe, and nothing that a failed start left."""
    delete_run(folder)
    write_whole(folder / "recipe.yaml", recipe_yaml)


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep a run's folder to this process; the system lets go of it however the process ends.

    Raises: RecipeError if another process trains in it; ResourceError if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise ResourceError(
            f"{folder}: cannot create a run here: {error.strerror or error}; choose another"
            " folder with -o"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RecipeError(
                f"{folder}: another process is training here; wait for it, or choose another"
                " folder with -o"
            ) from None
        yield


def delete_run(folder: Path) -> None:
    """Remove what a run wrote, and only that. Raises: ResourceError if the disk refuses."""
    found = [folder / name for name in OWN]
    found += [path for pattern in OWN_PATTERNS for path in folder.glob(pattern)]
    for path in found:
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise ResourceError(f"{path}: cannot be removed: {error.strerror or error}") from None


def tidy(folder: Path) -> None:
    """Remove what a killed process left: half-written checkpoints, and such as no link names."""
    kept = {(folder / link).resolve().name for link in ("last", "best")}
    for path in folder.glob("step-*"):
        if path.name not in kept:
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
