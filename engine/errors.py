"""Every error a person can cause, with the exit code a script can act on.

    EngineError            1   base; str(error) is one line: what, where, how to fix
    ├─ RecipeError         2   bad key, value or combination in a recipe or an option
    ├─ InputError          3   a file is missing, unreadable or malformed
    │  ├─ DataError            … in the text to train on
    │  └─ CheckpointError      … in a checkpoint or tokenizer
    ├─ ResourceError       4   memory, disk, device or optional package missing
    ├─ DivergenceError     5   the loss or the gradient is not finite
    ├─ LimitError          6   a context, token or cost limit was reached
    └─ CheckFailed         7   a check the user asked for did not hold

The engine raises these; `cli/main.py` is the one place that catches them. Anything else that
escapes is a bug and keeps its traceback.
"""

LONGEST = 1000  # characters of a line


class EngineError(Exception):
    """Base of all expected failures; never raised itself."""

    exit_code = 1

    def __str__(self) -> str:
        """Return the message, its lines of bearable length and harmless on a terminal."""
        return "\n".join(map(_harmless, super().__str__().split("\n")))


class RecipeError(EngineError):
    """A recipe or an option asks for something that does not exist or does not fit together."""

    exit_code = 2


class InputError(EngineError):
    """A file given by the user cannot be used."""

    exit_code = 3

    def __str__(self) -> str:
        """Return the message on one line of bearable length, whatever it quotes from the file."""
        return _harmless(Exception.__str__(self))


class DataError(InputError):
    """A corpus is missing, unreadable, binary or empty."""


class CheckpointError(InputError):
    """A checkpoint or tokenizer is missing, incomplete or does not match its manifest."""


class ResourceError(EngineError):
    """The machine lacks memory, disk, a device or an optional package."""

    exit_code = 4


class DivergenceError(EngineError):
    """Training produced a loss or gradient that is not a finite number."""

    exit_code = 5


class LimitError(EngineError):
    """A limit was reached that the user may raise: context length, tokens, money."""

    exit_code = 6


class CheckFailed(EngineError):
    """Something the user asked to be proved does not hold."""

    exit_code = 7


def _harmless(line: str) -> str:
    """Shorten a line, and spell out what a terminal would obey."""
    if len(line) > LONGEST:  # the beginning says where, the end what to do
        line = f"{line[: LONGEST // 2]} … {line[3 - LONGEST // 2 :]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
