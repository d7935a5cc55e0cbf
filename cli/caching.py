"""What is kept between calls: listed, freed, checked."""

import os
import re
import time
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from cli.render import console, emit, emit_json, say, size
from engine.errors import CheckFailed, RecipeError
from engine.generate.prefix_folder import check, collect, models, place

PARTS = {"kernels": "C libraries", "wheels": "downloads"}  # folders known by their names
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def show(cache: Path, as_json: bool) -> None:
    """Write what is kept of each model, and what else lies in the folder."""
    kept = models(place(cache))
    others = sorted(_others(cache).items(), key=lambda item: -item[1][1])
    total = sum(model.bytes for model in kept)
    if as_json:
        rows = [
            {"model": m.model, "name": m.name, "blocks": m.blocks, "tokens": m.tokens}
            | {
                "bytes": m.bytes,
                "last_use": datetime.fromtimestamp(m.used, timezone.utc).isoformat(),
            }
            for m in kept
        ]
        found = [{"kind": kind, "files": n, "bytes": b} for kind, (n, b) in others]
        emit_json(
            "cache", {"folder": str(cache), "bytes": total, "prefixes": rows, "others": found}
        )
        return
    if not kept:
        say("no prompts are kept; lm generate --prefix-cache keeps them")
    if kept:
        table = _table("model", "blocks", "tokens", "size", "last use")
        for m in kept:
            used = time.strftime("%Y-%m-%d %H:%M", time.localtime(m.used))
            table.add_row(
                escape(m.name or m.model), f"{m.blocks:,}", f"{m.tokens:,}", size(m.bytes), used
            )
        console().print(table)
    if others:
        table = _table("also there", "files", "size")
        for kind, (files, number) in others:
            table.add_row(kind, f"{files:,}", size(number))
        console().print(table)
    say(f"{cache}")


def free(cache: Path, most: float | None, age: float | None, dry: bool, as_json: bool) -> None:
    """Remove blocks and say how much that freed."""
    freed = collect(place(cache), most=most, age=age, dry=dry)
    if as_json:
        facts = {"blocks": freed.blocks, "bytes": freed.bytes}
        left = {"left_blocks": freed.left_blocks, "left_bytes": freed.left_bytes}
        emit_json("cache-gc", {"dry_run": dry} | facts | left)
        return
    verb = "would free" if dry else "freed"
    emit(
        f"{verb} {size(freed.bytes)} of {freed.blocks:,} blocks; {size(freed.left_bytes)} of"
        f" {freed.left_blocks:,} blocks left"
    )


def examine(cache: Path, repair: bool, as_json: bool) -> None:
    """Check every block, name the damaged and, if asked to, remove them.

    Raises: CheckFailed if damaged blocks are left.
    """
    blocks, total, damaged = 0, 0, []
    for entry, problem in check(place(cache)):
        blocks, total = blocks + 1, total + entry.bytes
        if problem:
            if repair:
                with suppress(OSError):
                    entry.path.unlink()
            removed = not os.path.lexists(entry.path)
            damaged.append({"path": str(entry.path), "problem": problem, "removed": removed})
    if as_json:
        emit_json("cache-verify", {"blocks": blocks, "bytes": total, "damaged": damaged})
    else:
        for found in damaged:
            emit(f"{found['path']}: {found['problem']}{'; removed' * found['removed']}")
        if not damaged:
            emit(f"{blocks:,} blocks, {size(total)}, every one is whole")
    if left := sum(not found["removed"] for found in damaged):
        raise CheckFailed(
            f"{left:,} of {blocks:,} blocks are damaged; lm cache verify --repair removes them"
        )


def seconds(text: str, option: str) -> float:
    """Read 30d, 12h, 10m or 90s as seconds. Raises: RecipeError naming the option."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhd])", text.strip())
    if not found:
        raise RecipeError(f"{option} {text}: not a time; write 30d, 12h, 10m or 90s")
    return float(found[1]) * UNITS[found[2]]


def _others(cache: Path) -> dict[str, tuple[int, int]]:
    """Return files and bytes of all but the prefixes, by kind; links are not followed."""
    found: dict[str, tuple[int, int]] = {}
    _, folders, single = next(os.walk(cache), ("", [], []))
    for path in (cache / name for name in (*folders, *single)):
        if path == place(cache):
            continue
        whole = path.is_dir() and not path.is_symlink()
        inside = [Path(folder, name) for folder, _, names in os.walk(path) for name in names]
        for file in inside if whole else [path]:
            if path.name == "kernels" and file.suffix != ".so":
                continue  # the digest of a library
            with suppress(OSError):
                files, number = found.get(kind := _kind(path), (0, 0))
                found[kind] = files + 1, number + file.lstat().st_size
    return found


def _kind(path: Path) -> str:
    """Say what a file or folder of the cache is for."""
    if path.suffix == ".ranks":
        return "tokenizers"
    if os.path.exists(path / "shards.json"):
        return "tokens to train on"
    return PARTS.get(path.name, "other")


def _table(*heads: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for index, head in enumerate(heads):
        table.add_column(head, justify="right" if index else "left")
    return table
