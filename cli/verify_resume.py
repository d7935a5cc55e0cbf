"""The proof behind `--verify-resume`: kill a real run, resume it, compare every bit."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cli.render import emit_json, say
from engine.config import Recipe
from engine.errors import CheckFailed, RecipeError
from engine.files import sha256
from engine.recipe import dump, override
from engine.train.log import read_metrics

STEPS = 12
KILLS = 2


def verify_resume(recipe: Recipe, cache: Path, as_json: bool, command: str) -> bool:
    """Run a few steps twice, once undisturbed and once killed on the way, and compare.

    The recipe is kept but for its length: the data, model, optimizer and schedule are the user's.

    Raises: CheckFailed if one of the runs ends by itself with an error.
    """
    if recipe.data.train == "-":
        raise RecipeError("--verify-resume runs the recipe several times: name a file, not -")
    few = {"save_every": "2", "every": 5, "bytes": 2000, "final_bytes": 2000, "overlap": 1}
    short = override(recipe, train={"steps": STEPS}, eval=few)
    with tempfile.TemporaryDirectory(prefix="lm-verify-") as temporary:
        folder = Path(temporary)
        (folder / "recipe.yaml").write_text(dump(short), encoding="utf-8")
        say(f"running {STEPS} steps without a stop …")
        _wait(_start(command, folder, "whole", cache, resume=False))
        kills = []
        for _ in range(KILLS):
            process = _start(command, folder, "killed", cache, resume=bool(kills))
            kills.append(_kill_on_the_way(process, folder / "killed" / "metrics.jsonl", kills))
            say(f"killed with SIGKILL after step {kills[-1]}, resuming …")
        _wait(_start(command, folder, "killed", cache, resume=True))
        last = folder / "whole" / "last"
        weights = next(path.name for path in sorted(last.glob("*model.safetensors")))
        same = {
            part: sha256(last / name) == sha256(folder / "killed" / "last" / name)
            for part, name in (("weights", weights), ("optimizer", "state/optimizer.safetensors"))
        }
        losses = [_losses(folder / name / "metrics.jsonl") for name in ("whole", "killed")]
    same["losses"] = losses[0] == losses[1] and len(losses[0]) >= STEPS
    if as_json:
        emit_json("verify-resume", {"identical": all(same.values()), "parts": same, "kills": kills})
    parts = [
        f"weights {_word(same['weights'])}",
        f"optimizer {_word(same['optimizer'])}",
        f"{len(losses[0])} losses and scores {_word(same['losses'])}",
    ]
    say(f"{'bit-identical' if all(same.values()) else 'NOT identical'}: {', '.join(parts)}")
    return all(same.values())


def _word(same: bool) -> str:
    return "equal" if same else "DIFFER"


def _start(command: str, folder: Path, name: str, cache: Path, resume: bool) -> subprocess.Popen:
    """Start a run in a process of its own."""
    words = [sys.executable, "-m", "cli.main", command, str(folder / "recipe.yaml"), "--quiet"]
    words += ["-o", str(folder / name), "--cache", str(cache)]
    words += ["--resume"] * (resume and (folder / name / "recipe.yaml").is_file())
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    )


def _wait(process: subprocess.Popen) -> None:
    _, errors = process.communicate()
    if process.returncode:
        raise CheckFailed(f"a run failed: {errors.decode(errors='replace').strip()}")


def _kill_on_the_way(process: subprocess.Popen, metrics: Path, before: list[int]) -> int:
    """Kill the process at a random moment after it took some steps; returns the steps taken."""
    goal = min((before[-1] if before else 0) + random.randint(1, 4), STEPS - 2)
    while process.poll() is None:
        done = _steps(metrics)
        if done >= goal:
            time.sleep(random.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return _steps(metrics)
        time.sleep(0.002)
    _wait(process)
    raise CheckFailed("the run ended before it could be killed; give the recipe more work per step")


def _steps(metrics: Path) -> int:
    """Return the last step that was logged."""
    return max((row["step"] for row in read_metrics(metrics)), default=0)


def _losses(metrics: Path) -> list[str]:
    """Return every logged loss and score, written exactly."""
    return [
        json.dumps([row["step"], row.get("loss"), row.get("valid_bpb"), row.get("grad_norm")])
        for row in read_metrics(metrics)
    ]
