"""How good is the model? Bits per byte on held-out text, a figure no tokenizer can flatter.

    bits per byte = (nats over all tokens / ln 2) / bytes of the text those tokens spell

Every byte counts once, predicted from what stands before it in the same document.

Sources: Shannon 1948 (bits of surprise); Gao et al. 2020, arXiv:2101.00027, section 3.1 (bpb).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from engine.data.batches import IGNORE
from engine.model.transformer import Transformer
from engine.text.tokenizer import Tokenizer

ROWS = 8  # windows scored at a time
SPAN = 1 << 14  # tokens looked at for a document's end
LEAST = 64  # tokens scored of a document, however small the share
CHUNK = 1024  # positions whose logits exist at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The surprise of a model at a text."""

    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """Bits to encode one byte of the text with this model as the predictor."""
        return self.nats / math.log(2) / self.bytes

    @property
    def loss(self) -> float:
        """Nats per token; comparable only between models with the same tokenizer."""
        return self.nats / self.tokens


def documents(tokens: np.ndarray, end_of_text: int) -> Iterator[np.ndarray]:
    """Yield the documents of a token stream, cut at its end-of-text tokens, in flat memory."""
    start = 0
    while start < len(tokens):
        size = SPAN
        while True:  # look further ahead until the document's end is in sight
            ends = np.flatnonzero(tokens[start : start + size] == end_of_text)
            if len(ends) or start + size >= len(tokens):
                break
            size *= 2
        stop = start + int(ends[0]) if len(ends) else len(tokens)
        if stop > start:
            yield np.asarray(tokens[start:stop])
        start = stop + 1


def windows(length: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """Cover positions 0 … length - 1 by windows of at most `context` inputs.

    Returns: (start, first scored, end) per window. Each position is scored once; all but those of
    a document's first window have at least context - stride tokens before them.
    """
    covered, found = 0, []
    while covered < length:
        end = min(length, context if not covered else covered + stride)
        found.append((max(0, end - context), covered, end))
        covered = end
    return found


def score(
    model: Transformer,
    tokenizer: Tokenizer,
    tokens: np.ndarray,
    *,
    context: int,
    stride: int,
    max_bytes: int | None = None,
    share: float = 1.0,
) -> Score:
    """Score a token stream document by document, the first `max_bytes` bytes of it or all.

    With a `share` below 1, only that part of each document, its beginning, is scored: a quick look
    at all of them says more than a long one at the first few. Each document is predicted from an
    end-of-text token on, so its first token counts too.
    """
    chosen = list(_beginnings(tokens, tokenizer, max_bytes, share))
    found = score_documents(model, tokenizer, chosen, context=context, stride=stride)
    return Score(
        nats=math.fsum(each.nats for each in found),
        tokens=sum(each.tokens for each in found),
        bytes=sum(each.bytes for each in found),
    )


def _beginnings(
    tokens: np.ndarray, tokenizer: Tokenizer, max_bytes: int | None, share: float
) -> Iterator[np.ndarray]:
    """Yield the part of each document that `score` looks at."""
    piece_bytes = _piece_bytes(tokenizer)
    size = 0
    for document in documents(tokens, tokenizer.end_of_text):
        document = document[: max(LEAST, math.ceil(share * len(document)))]
        if max_bytes is not None:
            room = max_bytes - size
            fitting = np.searchsorted(piece_bytes[document].cumsum(), room, side="right")
            document = document[: max(int(fitting), not size)]  # one token at the least
        if not len(document):
            return
        size += int(piece_bytes[document].sum())
        yield document


def _piece_bytes(tokenizer: Tokenizer) -> np.ndarray:
    return np.array([len(piece) for piece in tokenizer.pieces])


@torch.inference_mode()
def score_documents(
    model: Transformer,
    tokenizer: Tokenizer,
    chosen: Sequence[np.ndarray],
    *,
    context: int,
    stride: int,
) -> list[Score]:
    """Score each of these documents, given as token ids without an end."""
    model.eval()
    device = model.embed_tokens.weight.device
    rows: list[tuple[np.ndarray, np.ndarray, int]] = []  # inputs, targets, whose window it is
    for number, document in enumerate(chosen):
        inputs = np.concatenate(([tokenizer.end_of_text], document[:-1])).astype(np.int64)
        for start, first, end in windows(len(document), context, stride):
            targets = document[start:end].astype(np.int64)
            targets[: first - start] = IGNORE
            rows.append((inputs[start:end], targets, number))
    nats = np.zeros(len(chosen))
    rows.sort(key=lambda row: len(row[0]))  # windows of one length share a batch without padding
    for first in range(0, len(rows), ROWS):
        group = rows[first : first + ROWS]
        longest = len(group[-1][0])
        tokens_BT = torch.zeros(len(group), longest, dtype=torch.long)
        targets_BT = torch.full((len(group), longest), IGNORE)
        for row, (inputs, targets, _) in enumerate(group):  # padding on the right sees nothing
            tokens_BT[row, : len(inputs)] = torch.from_numpy(inputs)
            targets_BT[row, : len(targets)] = torch.from_numpy(targets)
        x_BTD = model.hidden(tokens_BT.to(device))
        scored_BT = targets_BT != IGNORE
        x_ND, targets_N = x_BTD[scored_BT.to(device)], targets_BT[scored_BT].to(device)
        owners_N = np.repeat([number for *_, number in group], scored_BT.sum(1).numpy())
        for chunk in range(0, len(targets_N), CHUNK):
            part = slice(chunk, chunk + CHUNK)
            logits = model.head(x_ND[part]).float()
            losses_N = F.cross_entropy(logits, targets_N[part], reduction="none").double().cpu()
            nats += np.bincount(owners_N[part], weights=losses_N.numpy(), minlength=len(nats))
    piece_bytes = _piece_bytes(tokenizer)
    return [
        Score(nats=float(sum_), tokens=len(document), bytes=int(piece_bytes[document].sum()))
        for sum_, document in zip(nats, chosen, strict=True)
    ]
