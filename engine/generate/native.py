"""A `Decoder` by our own C (`engine/kernels/decoder.c`): on the CPU, without torch.

Its arithmetic knows nothing of batches: the logits after a token are the same to the bit however
the tokens before it were cut into calls, whatever ran beside them, and whether their keys and
values were computed or loaded.
"""

import ctypes
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from ctypes import POINTER
from dataclasses import replace

import numpy as np

from engine.config import ModelConfig
from engine.cost import decode_bytes, weights_read
from engine.errors import ResourceError
from engine.generate.decoder import BLOCK, Cache, Run
from engine.generate.native_cache import PIECE, NativeCache, address
from engine.kernels.decoder import (
    ACTIVATIONS,
    FORMATS,
    CBatch,
    CLayer,
    CMatrix,
    CModel,
    CNorm,
    Library,
)
from engine.model.shapes import parameter_shapes
from engine.pages import Arena, is_mapped, large_memory, move, worth_copying
from engine.quantize import Matrix

MOVED = 16_000_000  # bytes of weights that a pass moves at least
Part = tuple[Run, int, int]  # a run's tokens from one place up to another


class NativeDecoder:
    """A model's weights, where they lie, and the C that runs them."""

    def __init__(
        self,
        config: ModelConfig,
        matrices: Mapping[str, Matrix | np.ndarray],
        library: Library,
        *,
        kv: str = "fp16",
        identity: str = "",
        threads: int = 0,
        name: str = "",
    ) -> None:
        self.config = config
        self.identity = identity
        self.kv = kv
        self.threads = threads or _cores()
        self.name = name or f"native {_format_of(matrices)}"
        self._library = library
        self.weights = dict(matrices)  # the addresses below are theirs
        self._kept: list[np.ndarray] = []
        self._model = self._describe()
        # From the end on: last comes what is of no block, embedding and head.
        blocks = [None, *range(config.n_layers)]
        mapped = any(isinstance(m, Matrix) and is_mapped(m.data) for m in matrices.values())
        self._unmoved = blocks if mapped and worth_copying(self.bytes) else []
        self._arena = Arena()
        self._room, self._blocks = 0, 0  # what the workspace is for
        self._feed = _Feed()

    def cache(self, capacity: int, rows: int = 1) -> NativeCache:
        """Return an empty cache; see `Decoder.cache`.

        Raises: ResourceError if there is no memory for it.
        """
        try:
            return NativeCache(self.config, capacity, rows, self.kv)
        except MemoryError:
            raise ResourceError(
                f"no memory for the keys and values of {rows} × {capacity:,} tokens; ask for fewer"
                " tokens or rows"
            ) from None

    def forward(self, cache: Cache, runs: Sequence[Run]) -> np.ndarray:
        """Run tokens of several rows; see `Decoder.forward`."""
        assert isinstance(cache, NativeCache)
        assert len({run.row for run in runs}) == len(runs), "each row has one run"
        deepest = wanted = 0
        for run in runs:
            end = cache.lengths[run.row] + len(run.tokens)
            if end > cache.capacity:
                raise ValueError(f"{len(run.tokens)} tokens more do not fit {cache.capacity}")
            assert 0 <= run.wanted <= len(run.tokens)
            deepest, wanted = max(deepest, end), wanted + run.wanted
        cache.turn(deepest)
        logits = np.empty((wanted, self.config.vocab_size), np.float32)
        done = 0
        for piece in _pieces(runs):
            done += self._run(cache, piece, deepest, logits[done:])
        for run in runs:
            cache.grow(run.row, len(run.tokens))
        if self._unmoved:
            self._move_some()
        return logits

    def _move_some(self) -> None:
        """Move some blocks' weights to large pages, a few milliseconds' worth in each pass.

        The first token then waits for no copy, and no weights are in memory twice.
        """
        moved = 0
        while self._unmoved and moved < MOVED:
            index = self._unmoved.pop()
            names = [name for name in self.weights if _block_of(name) == index]
            try:
                moved += sum(map(self._move, names))
            except ResourceError:  # then the others stay where they are
                self._unmoved = []
            if index is not None:
                self._layers[index] = self._layer(index)
        if not self._unmoved:
            self._model = self._describe()

    def _move(self, name: str) -> int:
        """Move a matrix; return its bytes."""
        matrix = self.weights[name]
        if not isinstance(matrix, Matrix):
            return 0
        scale = None if matrix.scale is None else move(matrix.scale, self._arena)
        self.weights[name] = replace(matrix, data=move(matrix.data, self._arena), scale=scale)
        return matrix.bytes

    @property
    def bytes(self) -> int:
        """Memory held by the weights; see `Weighed.bytes`."""
        return sum(self._sizes().values())

    def bytes_read(self, depth: int, rows: int = 1) -> float:
        """Return what a token reads; see `Weighed.bytes_read`."""
        # In int8, the numbers of a head have a scale in fp32.
        number = {"fp32": 4, "fp16": 2, "int8": 1 + 4 / self.config.head_dim}[self.kv]
        weights = weights_read(self.config, self._sizes())
        return decode_bytes(self.config, depth, rows, weights, number)

    def _sizes(self) -> dict[str, int]:
        """Return the bytes of each parameter; a draft of some layers has been given all of them."""
        used = {name: self.weights[name] for name in parameter_shapes(self.config)}
        return {n: w.bytes if isinstance(w, Matrix) else w.nbytes for n, w in used.items()}

    def _run(
        self, cache: NativeCache, piece: Sequence[Part], deepest: int, onto: np.ndarray
    ) -> int:
        """Run at most PIECE tokens, the deepest of them all at `deepest`; return how many logits.

        With one token at a time, most of what this takes is Python's, so it says little.
        """
        feed, many, wanted = self._feed, 0, 0
        for run, first, last in piece:
            tokens, end = run.tokens[first:last], many + last - first
            assert min(tokens) >= 0 and max(tokens) < self.config.vocab_size
            begin = cache.lengths[run.row] + first
            feed.token[many:end] = tokens
            feed.position[many:end] = range(begin, begin + last - first)
            feed.row[many:end] = run.row
            unwanted = max(0, len(run.tokens) - run.wanted - first)
            for place in range(many + unwanted, end):
                feed.which[wanted] = place
                wanted += 1
            many = end
        blocks = (deepest - 1) // BLOCK + 1
        if many > self._room or blocks > self._blocks:
            self._room = max(self._room, many)
            self._blocks = max(self._blocks, 2 * blocks)
            size = self._library.workspace_bytes(
                self._model, self._room, self._blocks, self.threads
            )
            self._work = large_memory(size)
            self._work_at = address(self._work)
        batch = feed.struct
        batch.many, batch.wanted = many, wanted
        room = (self._work_at, self._room, self._blocks)
        self._library.forward(self._model, cache.struct, batch, *room, address(onto), self.threads)
        return wanted

    def _describe(self) -> CModel:
        """Fill in the struct that C reads."""
        config = self.config
        layers = (CLayer * config.n_layers)()
        for index in range(config.n_layers):
            layers[index] = self._layer(index)
        tied = config.tie_embeddings
        model = CModel(
            D=config.d_model,
            L=config.n_layers,
            N=config.n_heads,
            K=config.n_kv_heads,
            H=config.head_dim,
            F=config.d_ff,
            V=config.vocab_size,
            rotary=config.rotary_dim,
            activation=ACTIVATIONS.index(config.activation),
            centred=config.norm == "layernorm",
            whole=config.qk_norm == "width",
            eps=config.norm_eps,
            scale=config.attention_width**-0.5,
            softcap=config.attention_softcap,
            logit_cap=config.logit_softcap,
            embedding_scale=config.d_model**0.5 if config.scale_embeddings else 1.0,
            layers=ctypes.cast(layers, POINTER(CLayer)),
            embedding=self._matrix("embed_tokens"),
            head=self._matrix("embed_tokens" if tied else "lm_head"),
            positions=self._matrix("embed_positions"),
            final=self._norm("norm"),
        )
        self._layers = layers
        return model

    def _layer(self, index: int) -> CLayer:
        """Fill in the struct of a block."""
        block, config = f"blocks.{index}", self.config
        local = config.window(index) > 0
        norms = {
            "attention_in": "input_norm",
            "attention_out": "attention_out_norm",
            "mlp_in": "mlp_norm",
            "mlp_out": "mlp_out_norm",
            "query": "attention.q_norm",
            "key": "attention.k_norm",
        }
        names = {letter: f"attention.{letter}_proj" for letter in "qkvo"}
        names |= {word: f"mlp.{word}_proj" for word in ("gate", "up", "down")}
        return CLayer(
            window=config.window(index),
            rotation=int(local) if config.rotates(index) else -1,
            **{key: self._norm(f"{block}.{name}") for key, name in norms.items()},
            **{key: self._matrix(f"{block}.{name}") for key, name in names.items()},
        )

    def _norm(self, name: str) -> CNorm:
        """Return a norm, or an empty one if the model has none of this name."""
        weight = self._vector(f"{name}.weight")
        if weight is not None and self.config.norm_offset:
            weight = self._keep(weight + np.float32(1))
        return CNorm(address(weight), address(self._vector(f"{name}.bias")))

    def _vector(self, name: str) -> np.ndarray | None:
        found = self.weights.get(name)
        assert not isinstance(found, Matrix)
        return None if found is None else self._keep(np.ascontiguousarray(found, np.float32))

    def _keep(self, array: np.ndarray) -> np.ndarray:
        """Hold on to an array whose address is given away."""
        self._kept.append(array)
        return array

    def _matrix(self, name: str) -> CMatrix:
        """Return a matrix with its bias, or an empty one if the model has none of this name."""
        matrix = self.weights.get(f"{name}.weight")
        if matrix is None:
            return CMatrix()
        assert isinstance(matrix, Matrix)
        return CMatrix(
            format=FORMATS[matrix.format],
            rows=matrix.rows,
            columns=matrix.columns,
            data=address(matrix.data),
            scale=address(matrix.scale),
            bias=address(self._vector(f"{name}.bias")),
        )


class _Feed:
    """The tokens of a call, written over for each."""

    def __init__(self) -> None:
        arrays = [np.zeros(PIECE, np.int32) for _ in range(4)]
        self.token, self.position, self.row, self.which = arrays
        names = ("token", "position", "row", "which")
        self.struct = CBatch(**dict(zip(names, map(address, arrays), strict=True)))


def _pieces(runs: Sequence[Run]) -> Iterator[list[Part]]:
    """Cut runs into what one call takes: some tokens of some runs, PIECE in all."""
    piece: list[Part] = []
    left = PIECE
    for run in runs:
        first = 0
        while first < len(run.tokens):
            last = min(len(run.tokens), first + left)
            piece.append((run, first, last))
            left -= last - first
            first = last
            if not left:
                yield piece
                piece, left = [], PIECE
    if piece:
        yield piece


def _format_of(matrices: Mapping[str, Matrix | np.ndarray]) -> str:
    """Name the format that most numbers of the blocks have."""
    short = {"f32": "fp32", "f16": "fp16"}
    numbers: Counter[str] = Counter()
    for name, matrix in matrices.items():
        if isinstance(matrix, Matrix) and name.startswith("blocks"):
            numbers[matrix.format] += matrix.rows * matrix.columns
    format = numbers.most_common(1)[0][0]
    return short.get(format, format)


def _block_of(name: str) -> int | None:
    """Return the block that a parameter is of, if any."""
    return int(name.split(".")[1]) if name.startswith("blocks.") else None


def _cores() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
