"""Count with the tokenizer of a file, as one counts with a published encoding."""

from collections.abc import Iterable
from pathlib import Path

from engine.text.tokenizer import load_tokenizer


class FromFile:
    """The tokenizer of a tokenizer.json or of a checkpoint."""

    cut = None  # whatever its file says about splitting, text is only read as a whole

    def __init__(self, path: Path) -> None:
        """Load it. Raises: CheckpointError if that fails."""
        self.tokenizer = load_tokenizer(path)
        self.special = {name: token_id for token_id, name in self.tokenizer.special.items()}

    def expect(self, characters: int) -> bool:
        """Nothing is to be prepared, and threads would wait for each other."""
        return False

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, in which nothing is special."""
        return self.tokenizer.encode(text)

    def count(self, text: str) -> int:
        """Return the number of tokens of `text`."""
        return len(self.encode(text))

    def count_stream(self, chunks: Iterable[str]) -> int:
        """Return the number of tokens of the whole, which has to fit into memory."""
        return self.count("".join(chunks))

    def piece(self, token_id: int) -> bytes:
        """Return the bytes of a token."""
        return self.tokenizer.piece(token_id)

    def lengths(self, text: str) -> list[int] | None:
        """Return the number of bytes of each token, if text comes back as it was."""
        if not self.tokenizer.exact:
            return None
        return [len(self.tokenizer.pieces[token_id]) for token_id in self.encode(text)]
