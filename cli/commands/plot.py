"""`lm plot`: curves of one or more runs, in the terminal or as a picture."""

from pathlib import Path
from typing import Annotated, Optional

import typer

METRICS = ("loss", "valid_bpb", "valid_loss", "grad_norm", "lr")


def plot(
    runs: Annotated[list[str], typer.Argument(help="Runs: folders, or names under checkpoints/.")],
    metric: Annotated[str, typer.Option("--metric", help=f"One of {', '.join(METRICS)}.")] = "loss",
    x: Annotated[str, typer.Option("--x", help="step, tokens or seconds.")] = "step",
    out: Annotated[
        Optional[Path], typer.Option("-o", "--out", help="Write a .png or .svg instead.")
    ] = None,
) -> None:
    """Draw training curves, several runs over each other.

    \b
    lm plot stdlib
    lm plot stdlib deeper --metric valid_bpb --x seconds -o curves.png
    """
    from cli.options import CHECKPOINTS
    from cli.plots import COLOURS, Curve, draw, smooth, write_picture
    from cli.render import console, say
    from engine.errors import DataError, RecipeError
    from engine.train.log import read_metrics

    if metric not in METRICS:
        raise RecipeError(f"--metric {metric} is not one of {', '.join(METRICS)}")
    if x not in ("step", "tokens", "seconds"):
        raise RecipeError(f"--x {x} is not step, tokens or seconds")
    curves = []
    for name in runs:
        files = [Path(name) / "metrics.jsonl", CHECKPOINTS / name / "metrics.jsonl"]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            raise DataError(f"no metrics.jsonl in {name} (looked in . and {CHECKPOINTS}/)")
        rows = [row for row in read_metrics(file) if not row.get("final")]
        tokens = {row["step"]: row["tokens"] for row in rows if "tokens" in row}
        points = [
            (tokens.get(row["step"], 0) if x == "tokens" else row[x], row[metric])
            for row in rows
            if metric in row
        ]
        if not points:
            raise DataError(f"{file} has no {metric} yet")
        curves.append(Curve(name=name, points=smooth(points) if metric == "loss" else points))
    if out:
        write_picture(curves, out, x, metric)
        say(f"wrote {out}")
        return
    screen = console()
    for row in draw(curves, min(screen.width, 100), 16):
        screen.print(row)
    names = (f"[{COLOURS[i % len(COLOURS)]}]━ {c.name}[/]" for i, c in enumerate(curves))
    screen.print(f"{metric} over {x}   " + "   ".join(names))
