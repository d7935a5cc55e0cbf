"""Does our own decoder compute right on this machine? Held against itself, and against torch.

Its promise is that logits are equal to the bit however the tokens are cut into calls and whatever
runs beside them; torch's differ from them as sums in another order do.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from engine.generate.decoder import Run
from engine.generate.native import NativeDecoder
from engine.kernels.decoder import Library
from engine.model.transformer import Transformer
from engine.quantize import Matrix

Rows = Sequence[Sequence[int]]  # of tokens


def native(model: Transformer, library: Library) -> NativeDecoder:
    """Let our own C run a model's weights where they lie, in fp32."""
    weights: dict[str, Matrix | np.ndarray] = {}
    for name, parameter in model.named_parameters():
        data = parameter.detach().contiguous().numpy()
        if data.ndim == 2:
            weights[name] = Matrix(format="f32", rows=len(data), columns=data.shape[1], data=data)
        else:
            weights[name] = data
    return NativeDecoder(model.config, weights, library, kv="fp32")


def cached(model: Transformer, library: Library, rows: Rows) -> float:
    """Return how far logits of a text read in pieces are from those of all at once."""
    decoder, ids = native(model, library), rows[0]
    cuts = [0, len(ids) // 2, *range(len(ids) - 6, len(ids) + 1)]
    cache = decoder.cache(len(ids))
    parts = [decoder.forward(cache, [Run(0, ids[a:b], wanted=b - a)]) for a, b in pairwise(cuts)]
    return _apart(np.concatenate(parts), _alone(decoder, ids))


def batched(model: Transformer, library: Library, rows: Rows) -> float:
    """Return how far logits of rows of several lengths run together are from those alone."""
    decoder = native(model, library)
    ragged = [ids[: len(ids) - 5 * row] for row, ids in enumerate(rows)]
    runs = [Run(row, ids, wanted=len(ids)) for row, ids in enumerate(ragged)]
    together = decoder.forward(decoder.cache(len(rows[0]), len(rows)), runs)
    return _apart(together, np.concatenate([_alone(decoder, ids) for ids in ragged]))


def beside_torch(model: Transformer, library: Library, rows: Rows) -> float:
    """Return how far logits of a text are from torch's, in units of their root mean square."""
    with torch.inference_mode():
        expected = model(torch.tensor(rows[:1]))[0].numpy()
    found = _alone(native(model, library), rows[0])
    return _apart(found, expected) / float(np.sqrt(np.square(expected).mean()))


def _alone(decoder: NativeDecoder, ids: Sequence[int]) -> np.ndarray:
    return decoder.forward(decoder.cache(len(ids)), [Run(0, ids, wanted=len(ids))])


def _apart(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference; what is no number differs from itself."""
    return float(np.abs(found - expected).max())
