"""The prefix cache: keys and values of prompts kept on disk, so that no beginning is run twice.

    prefixes = Prefixes(place(cache), name="smollm2", tell=print)
    restored = prefixes.restore(decoder, cache, 0, prompt)      # before the prompt is run
    prefixes.store(decoder, cache, 0, prompt)                   # after

Blocks of 64 tokens are found by content (engine/generate/blocks.py), so prompts share what they
have in common without anybody's having said so. A block is checked before it is used and computed
again if it is damaged; where nothing can be written, nothing is kept. What a model says is the
same with and without.

Source: Kwon et al. 2023, arXiv:2309.06180; Zheng et al. 2023, arXiv:2312.07104.
"""

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path

from engine.errors import ResourceError
from engine.generate.blocks import Block, chain, read, write
from engine.generate.decoder import BLOCK, Cache, Decoder
from engine.generate.prefix_folder import collect, note

LIMIT = 2_000_000_000  # bytes


class Prefixes:
    """Blocks of prompts in a folder."""

    def __init__(
        self,
        folder: Path,
        *,
        limit: float = LIMIT,
        name: str = "",
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Keep at most `limit` bytes in a folder; `tell` hears, once, what does not work."""
        self.folder = folder
        self.limit = limit
        self.name = name
        self.reads = self.writes = True
        self._tell = tell

    def restore(self, decoder: Decoder, cache: Cache, row: int, ids: Sequence[int]) -> int:
        """Append to a row the blocks that `ids` go on with; return how many tokens it gained.

        What the row holds must begin `ids`. At least one token is left to run, for its logits.
        """
        if not self._can(decoder):
            return 0
        held, grid = cache.lengths[row], grid_of(decoder)
        blocks = chain(decoder.identity, ids[: (len(ids) - 1) // grid * grid])[held // BLOCK :]
        blocks = list(takewhile(self._has, blocks))
        if (held // BLOCK + len(blocks)) * BLOCK // grid * grid <= held:
            return 0
        try:
            cache.rewind(row, held // BLOCK * BLOCK)
        except ValueError as error:  # a sliding window has let go of what lies that far back
            self._without(str(error))
            return 0
        for block in blocks:
            if not self._load(cache, row, block):
                break
        cache.rewind(row, max(cache.lengths[row] // grid * grid, min(held, cache.lengths[row])))
        self._touch(blocks)
        return max(0, cache.lengths[row] - held)

    def store(self, decoder: Decoder, cache: Cache, row: int, ids: Sequence[int]) -> int:
        """Keep the blocks of `ids`, which the row begins with; return how many were new."""
        if not (self._can(decoder) and self.writes):
            return 0
        grid = grid_of(decoder)
        blocks = chain(decoder.identity, ids[: len(ids) // grid * grid])
        new = [block for block in blocks if not self._has(block)]
        try:
            for block in new:
                payload = cache.save_block(row, block.index)
                path = block.path(self.folder)
                path.parent.mkdir(parents=True, exist_ok=True)
                write(path, block, payload)
            if new:
                note(new[0].path(self.folder).parent, self.name)
        except ValueError as error:
            self._without(str(error))
            return 0
        except (OSError, ResourceError) as error:
            self.writes = False
            why = getattr(error, "strerror", None) or error
            self._tell(f"prefix cache: {self.folder} takes no more blocks: {why}")
        self._touch(blocks)
        if new:
            collect(self.folder, most=self.limit)
        return len(new)

    def least(self, decoder: Decoder) -> int:
        """Return how many tokens a prompt must have for any of it to be kept."""
        return max(BLOCK, grid_of(decoder))

    def _has(self, block: Block) -> bool:
        return os.path.exists(block.path(self.folder))  # False too where nobody may look

    def _can(self, decoder: Decoder) -> bool:
        if self.reads and not decoder.identity:
            self._without(f"{decoder.name} does not say what its keys depend on")
        return self.reads

    def _without(self, reason: str) -> None:
        """Go on without the cache, and say so."""
        self.reads = self.writes = False
        self._tell(f"no prefix cache: {reason}")

    def _load(self, cache: Cache, row: int, wanted: Block) -> bool:
        """Append a block to a row; tell whether it was there and whole."""
        path = wanted.path(self.folder)
        try:
            block, payload = read(path)
            if block != wanted:
                raise ValueError("it is of other tokens, or of another model")
        except FileNotFoundError:  # another process has made room
            return False
        except (OSError, ValueError) as error:
            self._tell(f"prefix cache: {path} is damaged and computed again: {error}")
            with contextlib.suppress(OSError):
                path.unlink()
            return False
        try:
            cache.load_block(row, payload)
        except ValueError as error:
            self._without(str(error))
            return False
        return True

    def _touch(self, blocks: Sequence[Block]) -> None:
        """Note that blocks were used; the later in a prompt, the sooner one may go.

        Without those before it a block is of no use.
        """
        now = time.time_ns()
        for block in blocks:
            with contextlib.suppress(OSError):
                used = now - 1000 * block.index
                os.utime(block.path(self.folder), ns=(used, used))


def grid_of(decoder: Decoder) -> int:
    """Return the step at which a prompt may be cut without a change of any bit of what follows.

    A decoder whose products depend on how many tokens are run at once says on which `grid` it runs
    them; for others any place will do.
    """
    return getattr(decoder, "grid", 1)
