"""Documents to token shards on disk: tokenised once, memory-mapped ever after.

A shard folder is named after the digest of text, tokenizer and settings, so it can never be stale.
It holds `train.bin` and `valid.bin` (uint16, or uint32 beyond 65,536 tokens), where an end-of-text
token follows each document, and `shards.json`. Interrupted packing goes on where it was. Next on
the arrow: `engine/data/batches.py`.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.corpora import Corpus, Scan, held_out
from engine.data.documents import Piece
from engine.errors import DataError, ResourceError
from engine.files import write_whole
from engine.text.tokenizer import Tokenizer

LAYOUT = 1  # raise when the files' meaning changes: old shards are then made anew
BATCH_BYTES = 2 << 20  # text encoded at a time: bounds memory, feeds all cores


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """What one side of the split holds."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """A finished shard folder."""

    folder: Path
    digest: str
    dtype: str
    rule: str  # how the held-out text was chosen, in words
    train: Split
    valid: Split
    cached: bool  # found on disk rather than made now

    def tokens(self, split: str) -> np.ndarray:
        """Map the tokens of `train` or `valid` without reading them."""
        return np.memmap(self.folder / f"{split}.bin", dtype=self.dtype, mode="r")


@dataclass(frozen=True, slots=True, kw_only=True)
class PackProgress:
    """How far packing is, in bytes of text."""

    done: int
    total: int


def pack(
    train: tuple[Corpus, Scan],
    valid: tuple[Corpus, Scan] | None,
    tokenizer: Tokenizer,
    one_in: int,
    cache: Path,
) -> Generator[PackProgress, None, Shards]:
    """Tokenise a corpus into `cache`, yielding progress and returning the `Shards`.

    Without `valid`, documents whose name hashes to 0 modulo `one_in` are held out; a corpus of too
    few documents for that gives up its tail, the last 1/`one_in` of its bytes, instead.

    Raises: DataError if there is nothing on one side; ResourceError if the disk is full.
    """
    if found := packed(train, valid, tokenizer, one_in, cache):
        return found
    place = _place(train, valid, tokenizer, one_in, cache)
    folder: Path = place["folder"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (cache / f".{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second run on this corpus waits here
            if not (folder / "shards.json").is_file():
                writer = _Writer(folder, tokenizer, place["dtype"])
                yield from _write_shards(writer, train, valid, one_in, place["rule"])
    except OSError as error:
        raise ResourceError(
            f"{folder}: cannot write token shards: {error.strerror or error}; free some"
            " space or choose another folder with --cache"
        ) from None
    return _read_shards(place, cached=False)


def packed(
    train: tuple[Corpus, Scan],
    valid: tuple[Corpus, Scan] | None,
    tokenizer: Tokenizer,
    one_in: int,
    cache: Path,
) -> Shards | None:
    """Return what `pack` made of a corpus earlier, if it did."""
    place = _place(train, valid, tokenizer, one_in, cache)
    made = (place["folder"] / "shards.json").is_file()
    return _read_shards(place, cached=True) if made else None


def _place(
    train: tuple[Corpus, Scan],
    valid: tuple[Corpus, Scan] | None,
    tokenizer: Tokenizer,
    one_in: int,
    cache: Path,
) -> dict[str, Any]:
    """Say where the shards of a corpus lie, and how."""
    scan = train[1]
    parts = (LAYOUT, scan.digest, valid and valid[1].digest, tokenizer.digest, one_in)
    parts = (*parts, tokenizer.end_of_text)  # not in the digest: settings beside it may name it
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()
    return {
        "folder": cache / digest[:16],
        "digest": digest,
        "dtype": "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
        "rule": split_rule(scan, valid, one_in),
    }


def _read_shards(place: dict[str, Any], cached: bool) -> Shards:
    """Read the sizes of finished shards."""
    meta = json.loads((place["folder"] / "shards.json").read_text(encoding="utf-8"))
    train, valid = Split(**meta["train"]), Split(**meta["valid"])
    return Shards(**place, train=train, valid=valid, cached=cached)


def _write_shards(
    writer: "_Writer",
    train: tuple[Corpus, Scan],
    valid: tuple[Corpus, Scan] | None,
    one_in: int,
    rule: str,
) -> Iterator[PackProgress]:
    """Tokenise everything and, last, write shards.json, which makes the folder valid."""
    total = train[1].bytes + (valid[1].bytes if valid else 0)
    for done in writer.run(sides(train, valid, one_in)):
        yield PackProgress(done=done, total=total)
    if sum(split.bytes for split in writer.splits.values()) != total:
        shutil.rmtree(writer.folder)
        raise DataError(f"{train[0].name}: changed while it was being read; try again")
    for side, split in writer.splits.items():
        if not split.bytes:
            raise DataError(f"{train[0].name}: no text left for the {side} side ({rule})")
    meta = {side: asdict(split) for side, split in writer.splits.items()}
    write_whole(writer.folder / "shards.json", json.dumps(meta | {"rule": rule}, indent=2))
    writer.progress.unlink()


def split_rule(scan: Scan, valid: tuple[Corpus, Scan] | None, one_in: int) -> str:
    """Say how the held-out text is chosen."""
    if valid:
        return f"all of {valid[0].name}"
    if scan.splits_by_name:
        return f"documents whose name's sha256 is 0 modulo {one_in}"
    return f"the last 1/{one_in} of the text, which has too few documents to hold out whole ones"


def sides(
    corpus_and_scan: tuple[Corpus, Scan], valid: tuple[Corpus, Scan] | None, one_in: int
) -> Iterator[tuple[str, Piece]]:
    """Yield every piece with the side it belongs to, `train` or `valid`, in a fixed order."""
    train, scan = corpus_and_scan
    tail = 0 if scan.splits_by_name else scan.bytes - scan.bytes // one_in
    seen = 0
    for piece in train.pieces():
        if valid:
            yield "train", piece
        elif not tail:
            yield "valid" if held_out(piece.document, one_in) else "train", piece
        else:
            size = len(piece.text.encode("utf-8", "surrogatepass"))
            after = seen + size
            if seen < tail < after or (tail == after and not piece.end):
                near = max(1, round(len(piece.text) * (tail - seen) / size))
                cut = piece.text.find("\n", near - 1) + 1 or near
                if cut == len(piece.text) and after == scan.bytes:  # leave something to hold out
                    cut = max(1, min(near, cut - 1))
                yield "train", Piece(document=piece.document, text=piece.text[:cut], end=True)
                rest = piece.text[cut:]
                yield "valid", Piece(document=piece.document, text=rest, end=piece.end)
            else:
                yield "train" if seen < tail else "valid", piece
            seen += size
    for piece in valid[0].pieces() if valid else ():
        yield "valid", piece


class _Writer:
    """Appends tokens to the two files and notes, after each batch, how far it is."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, dtype: str) -> None:
        self.folder, self.tokenizer, self.dtype = folder, tokenizer, dtype
        self.progress = folder / "progress.json"
        self.splits = {"train": Split(), "valid": Split()}
        self.pieces = 0
        if self.progress.is_file():
            noted = json.loads(self.progress.read_text(encoding="utf-8"))
            self.pieces = noted["pieces"]
            self.splits = {side: Split(**noted[side]) for side in self.splits}

    def run(self, stream: Iterator[tuple[str, Piece]]) -> Iterator[int]:
        """Write all pieces not yet written; yield the bytes done after each batch."""
        files = {}
        for side, split in self.splits.items():
            files[side] = (self.folder / f"{side}.bin").open("ab")
            files[side].truncate(split.tokens * np.dtype(self.dtype).itemsize)
        try:
            for _ in range(self.pieces):
                next(stream)
            batch: list[tuple[str, Piece]] = []
            held = 0
            for side, piece in stream:
                batch.append((side, piece))
                held += len(piece.text)
                if held >= BATCH_BYTES:
                    yield self._write(batch, files)
                    batch, held = [], 0
            yield self._write(batch, files)
        finally:
            for file in files.values():
                file.close()

    def _write(self, batch: list[tuple[str, Piece]], files) -> int:
        texts = [piece.text for _, piece in batch]
        for (side, piece), ids in zip(batch, self.tokenizer.encode_batch(texts), strict=True):
            if piece.end:
                ids.append(self.tokenizer.end_of_text)
            np.asarray(ids, dtype=self.dtype).tofile(files[side])
            split = self.splits[side]
            self.splits[side] = Split(
                documents=split.documents + piece.end,
                bytes=split.bytes + len(piece.text.encode("utf-8", "surrogatepass")),
                tokens=split.tokens + len(ids),
            )
        self.pieces += len(batch)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
        noted = {"pieces": self.pieces} | {side: asdict(s) for side, s in self.splits.items()}
        write_whole(self.progress, json.dumps(noted))
        return sum(split.bytes for split in self.splits.values())
