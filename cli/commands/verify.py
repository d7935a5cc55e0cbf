"""`lm verify`: prove that a checkpoint is what it was."""

from typing import Annotated

import typer

from cli.options import Json


def verify(
    model: Annotated[str, typer.Argument(help="Checkpoint: folder, or name under checkpoints/.")],
    as_json: Json = False,
) -> None:
    """Hash every file of a checkpoint against its manifest.

    Exit code 3 and the name of the file if one is missing, cut short or changed. Of
    an adapter, its own files; its base must be there with the same weights.

    \b
    lm verify smollm2
    lm verify smollm2 --json | jq .files
    """
    import math

    from cli.options import CHECKPOINTS
    from cli.render import emit, emit_json, size
    from engine.adapter_config import find_base, is_adapter
    from engine.manifest import read_manifest
    from engine.runs import find

    folder = find(model, CHECKPOINTS)
    files = read_manifest(folder, hash_up_to=math.inf)["files"]
    base = find_base(folder).folder if is_adapter(folder) else None
    total = sum(entry["bytes"] for entry in files.values())
    if as_json:
        facts = {"folder": str(folder), "bytes": total, "files": files}
        emit_json("verify", facts | ({"base": str(base)} if base else {}))
        return
    emit(f"{folder}: {len(files)} files, {size(total)}, every one matches its sha256")
    if base:
        emit(f"base {base} has the weights it was trained beside; lm verify {base} hashes them")
