"""`lm runs`: what was trained here, how far and how well."""

from pathlib import Path
from typing import Annotated

import typer

from cli.options import CHECKPOINTS, Json


def runs(
    root: Annotated[Path, typer.Argument(help="Folder that holds the runs.")] = CHECKPOINTS,
    as_json: Json = False,
) -> None:
    """List runs, the lowest held-out bits per byte first.

    \b
    lm runs
    lm runs --json | jq -r '.runs[0].name'
    """
    from cli.render import clock, console, count, emit_json, say
    from engine.cost import parameters
    from engine.errors import InputError
    from engine.manifest import read_config, read_json
    from engine.train.log import read_metrics

    rows, broken = [], []
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        if not (folder / "recipe.yaml").is_file() or (folder / "config.json").is_file():
            continue
        try:
            metrics = list(read_metrics(folder / "metrics.jsonl"))
            best = folder / "best" if (folder / "best").exists() else folder / "last"
            saved = best.exists()
            manifest = read_json(best / "manifest.json") if saved else {}
            size = sum(parameters(read_config(best)).values()) if saved else None
        except InputError as error:
            broken.append(str(error))
            continue
        scores = [row["valid_bpb"] for row in metrics if row.get("final")]
        rows.append(
            {
                "name": folder.name,
                "step": max((row["step"] for row in metrics), default=0),
                "bits_per_byte": scores[-1] if scores else manifest.get("valid_bpb"),
                "finished": bool(scores),
                "parameters": size,
                "tokens": manifest.get("tokens_seen"),
                "seconds": metrics[-1].get("seconds") if metrics else None,
                "data": manifest.get("data", {}).get("source"),
            }
        )
    rows.sort(key=lambda row: (row["bits_per_byte"] is None, row["bits_per_byte"]))
    if as_json:
        emit_json("runs", {"runs": rows})
        return
    if not rows:
        say(f"no runs in {root}; start one with `lm train stdlib`")
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for head in ("run", "bits/byte", "steps", "parameters", "tokens", "time", "data", "state"):
        table.add_column(head, justify="left" if head in ("run", "data", "state") else "right")
    for row in rows:
        bits, steps = row["bits_per_byte"], row["step"]
        table.add_row(
            row["name"],
            f"{bits:.4f}" if bits is not None else "–",
            f"{steps:,}",
            count(row["parameters"]) if row["parameters"] else "–",
            count(row["tokens"]) if row["tokens"] else "–",
            clock(row["seconds"]) if row["seconds"] is not None else "–",
            row["data"] or "–",
            "finished" if row["finished"] else "unfinished",
        )
    if rows:
        console().print(table)
    for line in broken:
        say(f"warning: {line}")
