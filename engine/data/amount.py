"""How many tokens a text has, before it is tokenised: counted if that is cheap, else estimated.

tokens packed earlier → exact        a tokenizer → bytes ÷ what it makes of a sample
                                     none yet    → the same, by one learned from the sample
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.config import Recipe
from engine.data.corpora import Corpus, Scan, open_corpus, scan
from engine.data.pack import packed
from engine.text.tokenizer import Tokenizer, learn, load_tokenizer

READ = 200_000_000  # bytes of files that are read whole; of more, sizes are believed
SAMPLE = 2_000_000  # bytes of text that bytes per token are estimated from


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """How much there is to learn from, and to be judged by."""

    tokens: int
    held_tokens: int  # held out
    bytes_per_token: float
    vocabulary: int  # entries of the tokenizer
    how: str  # the tokens were found, in words; empty if they are exact


def measure_text(recipe: Recipe, folder: Path, cache: Path) -> Amount | None:
    """Count the text of a pretraining recipe; None if it can be read only once.

    Raises: DataError if there is no text; CheckpointError if the tokenizer named is no good.
    """
    data = recipe.data
    if data.train == "-":
        return None
    train = open_corpus(data.train, data)
    valid = open_corpus(data.valid, data) if data.valid else None
    own = folder / "tokenizer.json"  # of the run, if it began
    path = own if own.is_file() else Path(recipe.tokenizer.path) if recipe.tokenizer.path else None
    tokenizer = load_tokenizer(path, exact=True) if path else None
    scans: list[tuple[Corpus, Scan] | None] = [None, None]
    if sum(_size(corpus) for corpus in (train, valid) if corpus) <= READ:
        scans = [scan(corpus, data.holdout) if corpus else None for corpus in (train, valid)]
    read, held = scans
    if read and tokenizer and (made := packed(read, held, tokenizer, data.holdout, cache)):
        per_token = made.train.bytes / max(1, made.train.tokens)
        tokens, held_tokens = made.train.tokens, made.valid.tokens
        return _amount(tokens, held_tokens, per_token, tokenizer, "")
    sizes = [found[1].bytes if found else 0 for found in scans]
    if not read:
        sizes = [_size(train), _size(valid) if valid else 0]
    sample = list(_sample(read[0] if read else train, sizes[0]))
    used = tokenizer or learn(sample, recipe.tokenizer)
    taken = sum(len(text.encode("utf-8", "surrogatepass")) for text in sample)
    per_token = taken / max(1, sum(map(len, used.encode_batch(sample))))
    share = 0 if valid else 1 / data.holdout
    tokens, held_bytes = (1 - share) * sizes[0] / per_token, sizes[1] or share * sizes[0]
    how = f"estimated from {taken / 1e6:.1f} MB" + (
        "" if tokenizer else ", tokenizer to be learned"
    )
    return _amount(round(tokens), round(held_bytes / per_token), per_token, used, how)


def _amount(tokens: int, held: int, per_token: float, tokenizer: Tokenizer, how: str) -> Amount:
    return Amount(
        tokens=tokens,
        held_tokens=held,
        bytes_per_token=per_token,
        vocabulary=tokenizer.vocab_size,
        how=how,
    )


def _size(corpus: Corpus) -> int:
    """Return the bytes of a corpus as it lies on disk."""
    files = sum(path.stat().st_size for _, path in corpus.files)
    return files + sum(len(text) for _, text in corpus.texts)


def _sample(corpus: Corpus, size: int) -> Iterator[str]:
    """Yield documents from all over a corpus, or from its beginning if it is very large."""
    every = max(1, size // SAMPLE) if size <= READ else 1
    taken = 0
    for number, piece in enumerate(corpus.pieces()):
        if number % every == 0 and piece.text:
            yield piece.text
            taken += len(piece.text)
        if taken >= SAMPLE:
            return
