"""`lm doctor`: what this machine can do, and whether the engine computes right on it."""

from typing import Annotated

import typer

from cli.options import Device, Json, Model, Quiet


def doctor(
    model: Model = None,
    slow: Annotated[
        bool, typer.Option("--all", help="Also what takes a minute: torch.compile.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    device: Device = "auto",
) -> None:
    """Say what this machine can do, and check that it computes right.

    Measured here and now: how fast memory is read and matrices are multiplied.
    Then everything that must be equal is worked out twice, on a small random
    model or on the one that -m names. Exit code 7 if a difference is too large.

    \b
    lm doctor
    lm doctor -m smollm2
    lm doctor --json | jq '.checks[] | select(.ok == false)'
    """
    from cli.diagnosis import diagnose
    from cli.options import CHECKPOINTS, cache_folder
    from engine.runs import find

    folder = find(model, CHECKPOINTS) if model else None
    diagnose(folder, cache_folder(), device, slow=slow, as_json=as_json, quiet=quiet)
