"""Options that mean the same in every command, and the places on disk that commands agree on."""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from engine.errors import RecipeError

CHECKPOINTS = Path("checkpoints")

Model = Annotated[
    Optional[str],
    typer.Option("-m", "--model", help="Checkpoint: a folder, or a name under checkpoints/."),
]
Out = Annotated[Optional[Path], typer.Option("-o", "--out", help="Where to write.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Only errors on stderr.")]
Device = Annotated[
    Literal["auto", "cpu", "cuda", "mps"], typer.Option("--device", help="Where to compute.")
]
Dtype = Annotated[
    Literal["auto", "fp32", "bf16", "int8", "int4"],
    typer.Option("--dtype", help="How weights are held; auto: as they are stored."),
]
Kernels = Annotated[
    Literal["auto", "torch"],
    typer.Option("--kernels", help="auto: our own C where it can be built; torch: never."),
]
KeysValues = Annotated[
    Literal["auto", "fp32", "fp16", "int8"],
    typer.Option("--kv", help="How our own C holds keys and values; auto: fp16."),
]
Drafts = Annotated[
    Optional[str],
    typer.Option(
        "--draft",
        metavar="lookup|layers:N|NAME",
        help="Guess ahead, for speed: from the text, by N layers, or by a model.",
    ),
]
DraftTokens = Annotated[
    Optional[int], typer.Option(min=1, max=63, help="Most tokens to guess at once, or 16.")
]
Variables = Annotated[
    Optional[list[str]],
    typer.Option("--var", metavar="KEY=VALUE", help="Value for the chat template; repeatable."),
]
Overrides = Annotated[
    Optional[list[str]],
    typer.Argument(metavar="[KEY=VALUE]...", help="Recipe fields to change, like train.steps=100."),
]


Resume = Annotated[bool, typer.Option("--resume", help="Continue the run, exactly.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the run that is there.")]
VerifyResume = Annotated[
    bool, typer.Option("--verify-resume", help="Prove that a killed run resumes to the bit.")
]
Cache = Annotated[Optional[Path], typer.Option("--cache", help="Where tokens are kept.")]
PrefixCache = Annotated[
    bool, typer.Option("--prefix-cache", help="Keep what is read of prompts for the next call.")
]
PrefixCacheSize = Annotated[
    Optional[str],
    typer.Option(metavar="SIZE", help="With --prefix-cache: room on disk, like 500MB; else 2GB."),
]


def recipes_folder() -> Path:
    """Return the folder of the shipped recipes."""
    import recipes

    return Path(next(iter(recipes.__path__)))


def cache_folder() -> Path:
    """Return where token shards are kept: XDG_CACHE_HOME/lm-workbench or ~/.cache/lm-workbench."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "lm-workbench"


def let_threads_sleep() -> None:
    """Let threads of our own C that wait spin for some 0.1 ms before they sleep.

    By default they do for longer than another program's turn: on a busy machine, half the time.
    OpenMP reads it when the C is loaded.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def byte_count(text: str, option: str) -> int:
    """Read 500MB, 2.5GB or 1000 as bytes, by thousands. Raises: RecipeError naming the option."""
    import re

    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?) ?([kmgt]?)b?", text.strip(), re.IGNORECASE)
    if not found:
        raise RecipeError(f"{option} {text}: not a size; write 500MB or 2GB")
    return round(float(found[1]) * 1000 ** " kmgt".index(found[2].lower() or " "))


def prefix_room(wanted: bool, size: str | None) -> int | None:
    """Return how many bytes kept prompts may take; None if none are. Raises: RecipeError."""
    if not wanted:
        if size is not None:
            raise RecipeError("--prefix-cache-size bounds what --prefix-cache keeps; add that")
        return None
    from engine.generate.prefixes import LIMIT

    return LIMIT if size is None else byte_count(size, "--prefix-cache-size")


def token_places():  # -> Places, imported late
    """Return where tokenizers are looked for; the environment is read here and nowhere else."""
    from engine.text.counting import Places

    tiktoken = os.environ.get("TIKTOKEN_CACHE_DIR")
    return Places(
        cache=cache_folder(),
        tiktoken_cache=Path(tiktoken) if tiktoken else None,
        checkpoints=CHECKPOINTS,
    )


def piped() -> bool:
    """Tell whether standard input is a pipe or a file that has something to say."""
    return not sys.stdin.isatty()


def the_model(name: str | None, holding: str = "config.json") -> Path:
    """Return the checkpoint that -m names; without -m, the only one there is.

    With `holding`, a folder that holds that file will do.

    Raises: RecipeError if there is no name and not exactly one checkpoint; CheckpointError if the
    name leads nowhere.
    """
    from engine.runs import find, list_runs

    if name is None:
        there = list_runs(CHECKPOINTS)
        if len(there) != 1:
            known = (
                f"there are: {', '.join(there)}" if there else "train one with `lm train stdlib`"
            )
            raise RecipeError(f"which model? Give -m NAME; {known}")
        name = there[0]
    return find(name, CHECKPOINTS, holding)


def read_input(text: str | None, file: Path | None, glue: bool = True) -> bytes:
    """Return the text a command works on: -f FILE or a pipe, then the argument, if both are given.

    Between the two goes one empty line; without `glue` two are too many. `-` as argument or file
    is the pipe.

    Raises: RecipeError if there is none, or two; DataError if the file cannot be read.
    """
    argument = None if text in (None, "-") else text.encode("utf-8", "surrogateescape")
    if file is not None and str(file) != "-":
        from cli.inputs import Source

        with Source(str(file), file).open() as stream:
            before = stream.read()
    elif argument is not None and not glue and file is None:
        before = b""  # a pipe may be there without anybody's having meant it
        if piped() and sys.stdin.buffer.read(1):
            raise RecipeError("two texts: a pipe and an argument; - as argument takes the pipe")
    elif piped():
        before = sys.stdin.buffer.read()
    elif text == "-" or file is not None:
        before = sys.stdin.buffer.read()  # typed by hand, up to Ctrl-D
    elif argument is None:
        raise RecipeError("no text given: pass it as an argument, with -f FILE, or through a pipe")
    else:
        before = b""
    if argument is None:
        return before
    if before and not glue:
        raise RecipeError("two texts: -f FILE and an argument; give one of them")
    return before.rstrip(b"\n") + b"\n\n" + argument if before else argument


def template_variables(words: list[str] | None) -> dict[str, object]:
    """Read --var KEY=VALUE for a chat template; a value is JSON, or else text."""
    import json

    found: dict[str, object] = {}
    for word in words or []:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise RecipeError(f"--var {word}: not KEY=VALUE, like enable_thinking=false")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def load_recipe(name: str, overrides: list[str] | None):  # -> Recipe, imported late
    """Load a recipe by name or file, with overrides; its run is named after it by default.

    Raises: RecipeError naming every problem at once.
    """
    from engine.recipe import find_recipe, load, override

    path = find_recipe(name, recipes_folder())
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    recipe = load(text, path.name, overrides or [])
    if not recipe.run.name:
        recipe = override(recipe, run={"name": path.stem})
    return recipe


def is_finetuning(name: str) -> bool:
    """Tell whether a recipe says in its opening lines that it is run by `lm finetune`."""
    from engine.recipe import find_recipe

    path = find_recipe(name, recipes_folder())
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return any(line.startswith("#") and f"lm finetune {path.stem}" in line for line in lines)
