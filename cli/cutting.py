"""Text cut to tokens: `--fit-to` prints what fits, `--split` writes numbered chunks."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cli.counting import on_terminal
from cli.inputs import Gathered, Reader, Source, not_utf8
from cli.render import emit, emit_bytes, emit_json, say
from engine.errors import RecipeError, ResourceError

if TYPE_CHECKING:
    from engine.text.counting import TokenCounter

Strategy = Literal["head", "tail", "middle"]


def only_source(gathered: Gathered, option: str) -> Source:
    """Return the only source there is.

    Raises: RecipeError if there are several; DataError if one cannot be read.
    """
    if gathered.problems:
        raise gathered.problems[0]
    if len(gathered.sources) != 1:
        raise RecipeError(f"{option} cuts one text, not {len(gathered.sources)}; name one file")
    return gathered.sources[0]


def read_whole(source: Source, quiet: bool) -> str:
    """Return the whole text of a source; what is not UTF-8 is U+FFFD, and said."""
    with source.open() as stream:
        reader = Reader(source.name, stream, refuse_binary=source.path is not None)
        text = "".join(reader)
    if reader.replaced:
        say(f"{not_utf8(reader.replaced)}: U+FFFD instead", quiet)
    return text


def print_fitting(
    source: Source,
    counter: "TokenCounter",
    limit: int,
    strategy: Strategy,
    as_json: bool,
    quiet: bool,
) -> None:
    """Print as much of a text as fits into `limit` tokens, nothing added and nothing else."""
    text = read_whole(source, quiet)
    kept = counter.fit(text, limit, strategy)
    tokens = counter.count(kept)
    if as_json:
        whole = counter.count(text)
        emit_json("count-tokens/fit", {"text": kept, "tokens": tokens, "of_tokens": whole})
    else:
        emit_bytes(kept.encode("utf-8", "replace"))
        if on_terminal() and not kept.endswith("\n"):
            emit("")
    if kept != text and not quiet:
        say(f"kept {tokens:,} of {counter.count(text):,} tokens ({strategy}, {counter.name})")


def write_chunks(
    source: Source,
    counter: "TokenCounter",
    size: int,
    overlap: int,
    folder: Path | None,
    quiet: bool,
) -> None:
    """Write chunks of at most `size` tokens: files in a folder, or JSON lines on stdout.

    Raises: RecipeError if the folder holds something; ResourceError if it cannot be written.
    """
    text = read_whole(source, quiet)
    number = 0
    if folder:
        _prepare(folder)
    path = source.path or Path("chunk.txt")
    for number, chunk in enumerate(counter.split(text, size, overlap), start=1):
        tokens = counter.count(chunk)
        if folder is None:
            emit_json("count-tokens/chunk", {"number": number, "tokens": tokens, "text": chunk})
        else:
            _write(folder / f"{path.stem}-{number:04}{path.suffix}", chunk)
    if folder:
        emit(str(folder))
    say(f"{number:,} chunks of at most {size:,} tokens, overlap {overlap:,}, {counter.name}", quiet)


def _prepare(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        holds_something = any(folder.iterdir())
    except OSError as error:
        raise _unwritable(folder, error) from None
    if holds_something:
        raise RecipeError(f"{folder} is not empty; give another folder with -o")


def _write(file: Path, text: str) -> None:
    try:
        file.write_bytes(text.encode("utf-8", "replace"))
    except OSError as error:
        raise _unwritable(file, error) from None


def _unwritable(path: Path, error: OSError) -> ResourceError:
    return ResourceError(f"{path}: cannot be written: {error.strerror or error}; see -o")
