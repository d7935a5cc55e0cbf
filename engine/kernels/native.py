"""The C kernels seen from Python: tensors in, tensors out, every shape checked before the call.

All of them take contiguous fp32 tensors on the CPU. Each has a plain counterpart in torch, which is
the reference in tests and what runs where the library does not.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

FUNCTIONS = ("weave", "multiply", "norm_forward", "norm_backward", "rotate", "swiglu_forward")
FUNCTIONS += ("swiglu_backward", "softmax_loss", "attention_forward", "attention_backward")
Role = Literal["left", "right"]  # where in a product a factor stands
BLOCK = 256  # rows that share a scale when a matrix is summed over its rows


def _up(n: int, unit: int) -> int:
    return -(-n // unit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Woven:
    """A matrix in 8 bits, as `products.c` lays it out, for products over its columns or its rows.

    `lanes` × `depth`; `scale` has one number a lane, or one for each BLOCK of depth.
    """

    bytes: Tensor
    scale: Tensor
    sums: Tensor | None  # of right factors
    lanes: int
    depth: int
    by_row: bool


class Kernels:
    """The loaded library. Can be pickled: another process loads the same file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        for name in FUNCTIONS:
            getattr(self._library, name)  # AttributeError now, not in the middle of a step

    def __reduce__(self):
        return Kernels, (self.path,)

    def _call(self, name: str, *arguments: Tensor | int | float | None) -> None:
        """Call a C function: tensors as pointers, int as long, torch's number of threads last."""
        words: list = []
        for argument in arguments:
            if isinstance(argument, Tensor):
                assert argument.device.type == "cpu"
                words.append(ctypes.c_void_p(argument.data_ptr()))
            elif argument is None:
                words.append(ctypes.c_void_p(0))
            elif isinstance(argument, float):
                words.append(ctypes.c_float(argument))
            else:
                words.append(ctypes.c_long(argument))
        getattr(self._library, name)(*words, ctypes.c_int(torch.get_num_threads()))

    def weave(self, x: Tensor, rows: Role, columns: Role, digit: int = 1) -> tuple[Woven, Woven]:
        """Round a matrix to 8 bits, as a factor by its rows and as another by its columns.

        Digit 2 rounds what digit 1 leaves over, 254 times finer: both together have some 15 bits.

        Shapes: x (rows, columns) → (its rows as lanes, its columns as lanes).
        """
        _check(x, 2)
        R, C = x.shape
        blocks = _up(R, BLOCK)
        by_row = Woven(
            bytes=x.new_empty(_up(R, 16) * _up(C, 4) * 64, dtype=torch.uint8),
            scale=x.new_empty(R),
            sums=x.new_empty(1, R, dtype=torch.int32) if rows == "right" else None,
            lanes=R,
            depth=C,
            by_row=True,
        )
        by_column = Woven(
            bytes=x.new_empty(_up(C, 16) * _up(R, 4) * 64, dtype=torch.uint8),
            scale=x.new_empty(blocks),
            sums=x.new_empty(blocks, C, dtype=torch.int32) if columns == "right" else None,
            lanes=C,
            depth=R,
            by_row=False,
        )
        parts = [(woven.bytes, woven.scale, woven.sums) for woven in (by_row, by_column)]
        self._call("weave", x, R, C, digit, *parts[0], *parts[1])
        return by_row, by_column

    def multiply(self, left: Woven, right: Woven, onto: Tensor | None = None) -> Tensor:
        """Multiply two woven factors of one depth, or add their product to `onto`.

        Shapes: lanes of left × lanes of right, fp32.
        """
        assert left.depth == right.depth
        assert left.sums is None and right.sums is not None
        M, N, depth = left.lanes, right.lanes, left.depth
        C = torch.empty(M, N) if onto is None else onto
        assert C.shape == (M, N) and C.is_contiguous()
        one = torch.ones(max(M, N))
        whole = left.by_row and right.by_row
        per_block = [w.scale for w in (left, right) if not w.by_row]
        block_scale = per_block[0] * per_block[1] if len(per_block) == 2 else (*per_block, one)[0]
        self._call(
            "multiply",
            left.bytes,
            right.bytes,
            M,
            N,
            depth,
            _up(depth, 4) * 4 if whole else BLOCK,
            left.scale if left.by_row else one,
            right.scale if right.by_row else one,
            block_scale,
            right.sums,
            int(onto is not None),
            C,
            N,
        )
        return C

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return x / rms(x) · weight and 1 / rms(x). Shapes: (…, D), (D) → (…, D), (…)."""
        _check(x)
        _check(weight, 1)
        assert x.shape[-1] == len(weight)
        y, r = torch.empty_like(x), x.new_empty(x.shape[:-1])
        self._call("norm_forward", x, weight, eps, r.numel(), x.shape[-1], y, r)
        return y, r

    def norm_gradient(
        self, x: Tensor, weight: Tensor, r: Tensor, dy: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of x and weight."""
        _check(x)
        _check(dy)
        assert x.shape == dy.shape and r.shape == x.shape[:-1]
        dx, dweight = torch.empty_like(x), x.new_empty(torch.get_num_threads(), x.shape[-1])
        self._call("norm_backward", x, weight, r, dy, r.numel(), x.shape[-1], dx, dweight)
        return dx, dweight.sum(0)

    def rotate(self, x_BTNH: Tensor, cos_TH: Tensor, sin_TH: Tensor, sign: float) -> Tensor:
        """Turn every head's pairs by their position's angle, or back with sign -1."""
        _check(x_BTNH, 4)
        B, T, N, H = x_BTNH.shape
        y_BTNH = torch.empty_like(x_BTNH)
        rotary = cos_TH.shape[-1]
        assert cos_TH.shape == sin_TH.shape == (T, rotary) and rotary <= H
        self._call("rotate", x_BTNH, cos_TH, sin_TH, sign, B * T, T, N, H, rotary, y_BTNH)
        return y_BTNH

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return silu(gate) · up."""
        _check(gate)
        _check(up)
        assert gate.shape == up.shape
        y = torch.empty_like(gate)
        self._call("swiglu_forward", gate, up, gate.numel(), y)
        return y

    def swiglu_gradient(self, gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of gate and up."""
        _check(gate)
        _check(up)
        _check(dy)
        assert gate.shape == up.shape == dy.shape
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        self._call("swiglu_backward", gate, up, dy, gate.numel(), dgate, dup)
        return dgate, dup

    def softmax_loss(self, logits_NV: Tensor, targets_N: Tensor, cap: float) -> Tensor:
        """Return each row's nats and turn the logits into their gradient, in place."""
        _check(logits_NV, 2)
        N, V = logits_NV.shape
        assert targets_N.shape == (N,) and targets_N.dtype == torch.long
        assert not N or (targets_N.min() >= 0 and targets_N.max() < V)
        nats_N = logits_NV.new_empty(N)
        self._call("softmax_loss", logits_NV, targets_N.contiguous(), cap, N, V, nats_N)
        return nats_N

    def attention(
        self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, scale: float, onto: Tensor
    ) -> Tensor:
        """Write causal attention's y_BTNH onto a tensor; return the log-sum-exp of all scores."""
        for x in (q_BTNH, k_BTKH, v_BTKH, onto):
            _check(x, 4)
        B, T, N, H = q_BTNH.shape
        K = k_BTKH.shape[2]
        assert H % 16 == 0 and N % K == 0 and k_BTKH.shape == v_BTKH.shape == (B, T, K, H)
        assert onto.shape == q_BTNH.shape
        lse = q_BTNH.new_empty(B, N, _up(T, 64) * 64)
        self._call("attention_forward", q_BTNH, k_BTKH, v_BTKH, B, T, N, K, H, scale, onto, lse)
        return lse

    def attention_gradient(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        y: Tensor,
        lse: Tensor,
        dy: Tensor,
        scale: float,
        onto: Sequence[Tensor],
    ) -> None:
        """Write the gradients of q, k and v; all as in `attention`."""
        for x, like in zip((dy, y, *onto), (q, q, q, k, v), strict=True):
            _check(x, 4)
            assert x.shape == like.shape
        B, T, N, H = q.shape
        self._call("attention_backward", q, k, v, y, lse, dy, B, T, N, k.shape[2], H, scale, *onto)


def _check(x: Tensor, ndim: int | None = None) -> None:
    assert x.dtype == torch.float32 and x.is_contiguous() and x.ndim == (ndim or x.ndim)
