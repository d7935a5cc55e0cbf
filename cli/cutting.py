"""Text cut to tokens: `--fit-to` prints what fits, `--split` writes numbered chunks."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cli.counting import class_of, on_terminal
from cli.inputs import Gathered, Reader, Source, not_utf8
from cli.render import emit, emit_bytes, emit_json, say
from engine.errors import RecipeError, ResourceError
from engine.files import whole_folder

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
    tokens, whole = counter.count(kept), counter.count(text)
    if as_json:
        how = {"class": counter.exactness, "plus_minus": counter.plus_minus}
        low, high = counter.interval(tokens)
        ends = {"low": low, "high": high}
        found = {"text": kept, "tokens": tokens, "of_tokens": whole}
        emit_json("count-tokens/fit", found | how | ends)
    else:
        emit_bytes(kept.encode("utf-8", "replace"))
        if on_terminal() and not kept.endswith("\n"):
            emit("")
    about = "≈ " * bool(counter.plus_minus)
    if kept != text and not quiet:
        say(f"kept {about}{tokens:,} of {about}{whole:,} tokens ({strategy}, {counter.name})")
    _say_estimated(counter, limit, quiet)


def _say_estimated(counter: "TokenCounter", limit: int, quiet: bool) -> None:
    """Say what was done so that an estimate keeps to a limit."""
    if counter.plus_minus:
        say(f"{counter.name}: {class_of(counter)}; cut so that its upper end is {limit:,}", quiet)


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
    path = source.path or Path("chunk.txt")
    if folder:
        _refuse_filled(folder)
    with whole_folder(folder) if folder else nullcontext() as place:
        for number, chunk in enumerate(counter.split(text, size, overlap), start=1):
            if place is None:
                tokens = counter.count(chunk)
                found = {"number": number, "tokens": tokens, "text": chunk}
                emit_json("count-tokens/chunk", found | {"class": counter.exactness})
            else:
                file = place / f"{path.stem}-{number:04}{path.suffix}"
                file.write_bytes(chunk.encode("utf-8", "replace"))
    if folder:
        emit(str(folder))
    say(f"{number:,} chunks of at most {size:,} tokens, overlap {overlap:,}, {counter.name}", quiet)
    _say_estimated(counter, size, quiet)


def _refuse_filled(folder: Path) -> None:
    try:
        holds_something = folder.exists() and any(folder.iterdir())
    except OSError as error:
        raise _unwritable(folder, error) from None
    if holds_something:
        raise RecipeError(f"{folder} is not empty; give another folder with -o")


def _unwritable(path: Path, error: OSError) -> ResourceError:
    return ResourceError(f"{path}: cannot be written: {error.strerror or error}; see -o")
