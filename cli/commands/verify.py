"""`lm verify`: prove that a checkpoint is what it was."""

from typing import Annotated

import typer

from cli.options import Json


def verify(
    model: Annotated[str, typer.Argument(help="Checkpoint: folder, or name under checkpoints/.")],
    as_json: Json = False,
) -> None:
    """Hash every file of a checkpoint against its manifest.

    Exit code 3 and the name of the file if one is missing, cut short or changed.

    \b
    lm verify smollm2
    lm verify smollm2 --json | jq .files
    """
    import math

    from cli.options import CHECKPOINTS
    from cli.render import emit, emit_json, size
    from engine.manifest import read_manifest
    from engine.runs import find

    folder = find(model, CHECKPOINTS)
    files = read_manifest(folder, hash_up_to=math.inf)["files"]
    total = sum(entry["bytes"] for entry in files.values())
    if as_json:
        emit_json("verify", {"folder": str(folder), "bytes": total, "files": files})
        return
    emit(f"{folder}: {len(files)} files, {size(total)}, every one matches its sha256")
