"""Grouped-query self-attention: each token gathers what it needs from the tokens before it.

            N query heads     q0 q1 q2 q3      softmax(q kᵀ / √H + mask) v, per query head;
            K key/value heads  └─k0┘ └─k1┘     query head i reads key/value head i // (N/K)

Sources: Vaswani et al. 2017, arXiv:1706.03762 (attention); Ainslie et al. 2023, arXiv:2305.13245
(grouped queries); Dehghani et al. 2023, arXiv:2302.05442 (query/key normalisation).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.kernels.native import Kernels
from engine.model.cache import FullLayer, WindowLayer
from engine.model.norm import make_norm
from engine.model.products import project
from engine.model.rope import rotate


def attend_reference(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    mask_TS: Tensor | None,
    scale: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:
    """Compute attention in the open, one formula a line; the oracle for the fast path.

    Scores are multiplied by `scale` (0 takes 1/√H) and squashed to ±softcap. With a soft cap this
    is the only path: no fused kernel has one.

    Shapes: mask_TS is True where a query may look; returns BNTH.
    Source: Vaswani et al. 2017, eq. 1; Gemma Team 2024, arXiv:2408.00118, section 2 (soft cap).
    """
    group = q_BNTH.shape[1] // k_BKSH.shape[1]
    k_BNSH, v_BNSH = (x.repeat_interleave(group, dim=1) for x in (k_BKSH, v_BKSH))
    score_BNTS = q_BNTH @ k_BNSH.transpose(-1, -2) * (scale or q_BNTH.shape[-1] ** -0.5)
    if softcap:
        score_BNTS = softcap * torch.tanh(score_BNTS / softcap)
    if mask_TS is not None:
        score_BNTS = score_BNTS.masked_fill(~mask_TS, -math.inf)
    return score_BNTS.softmax(dim=-1) @ v_BNSH


def visible(q_position_T: Tensor, k_position_S: Tensor, window: int) -> Tensor:
    """Return mask_TS, True where a key is not in the query's future nor beyond its window."""
    distance_TS = q_position_T[:, None] - k_position_S[None, :]
    mask_TS = distance_TS >= 0
    return mask_TS & (distance_TS < window) if window else mask_TS


class CausalAttention(torch.autograd.Function):
    """The plain triangle without a cache, as training sees it, in our own kernel."""

    @staticmethod
    def forward(ctx, kernels: Kernels, q_BTNH, k_BTKH, v_BTKH, scale, lengths):
        """Shapes: → y_BTNH; every text of these lengths on its own."""
        inputs = [x.contiguous() for x in (q_BTNH, k_BTKH, v_BTKH)]
        y_BTNH = torch.empty_like(inputs[0])
        lses = []
        cut = (x.split(lengths, dim=1) for x in (*inputs, y_BTNH))
        for q, k, v, y in zip(*cut, strict=True):
            lses.append(kernels.attention(q, k, v, scale, onto=y))
        ctx.save_for_backward(*inputs, y_BTNH, *lses)
        ctx.kernels, ctx.scale, ctx.lengths = kernels, scale, lengths
        return y_BTNH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grad_outputs):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of q, k and v."""
        q, k, v, y, *lses = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in (q, k, v)]
        dy = grad_outputs[0].contiguous()
        cut = (x.split(ctx.lengths, dim=1) for x in (q, k, v, y, dy, *gradients))
        for lse, q, k, v, y, dy, *onto in zip(lses, *cut, strict=True):
            ctx.kernels.attention_gradient(q, k, v, y, lse, dy, ctx.scale, onto=onto)
        return None, *gradients, None, None


class Attention(nn.Module):
    """Project to queries, keys and values, attend, project back."""

    kernels: Kernels | None = None
    eight_bits: bool = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_width = config.n_heads * config.head_dim
        kv_width = config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.d_model, q_width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.d_model, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.d_model, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_width, config.d_model, bias=config.output_bias)
        self.scale = config.attention_width**-0.5
        self.softcap = config.attention_softcap
        self.whole = config.qk_norm == "width"  # one norm over all heads, before they are parted
        self.q_norm = self.k_norm = nn.Identity()
        if config.qk_norm != "none":
            self.q_norm = make_norm(config, q_width if self.whole else config.head_dim)
            self.k_norm = make_norm(config, kv_width if self.whole else config.head_dim)

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        mask_TS: Tensor | None,
        causal: bool,
        cache: FullLayer | WindowLayer | None,
        length: int,
        lengths: Sequence[int] = (),
    ) -> Tensor:
        """Attend over x and, with a cache, over the `length` tokens before it.

        Shapes: x_BTD → BTD. `causal` says that the mask is the plain triangle, which SDPA can
        apply without one; otherwise mask_TS (or None: everything is visible) decides. With
        `lengths`, x holds texts of these lengths, and the mask, of the longest, is for each.
        """
        B, T, _ = x_BTD.shape
        eight = self.kernels if self.eight_bits and self.training else None
        q_BTW, k_BTW, v_BTW = project(x_BTD, [self.q_proj, self.k_proj, self.v_proj], eight)
        q_BTNH, k_BTKH = self._heads(q_BTW, self.q_norm), self._heads(k_BTW, self.k_norm)
        v_BTKH = v_BTW.view(B, T, -1, self.head_dim)
        if rope is not None:
            q_BTNH, k_BTKH = (rotate(x, *rope, self.kernels) for x in (q_BTNH, k_BTKH))
        native = causal and cache is None and not self.softcap and not self.head_dim % 16
        if self.kernels and native:
            y_BTNH = CausalAttention.apply(
                self.kernels, q_BTNH, k_BTKH, v_BTKH, self.scale, lengths or (T,)
            )
        else:
            y_BTNH = self._gather(q_BTNH, k_BTKH, v_BTKH, mask_TS, causal, cache, length, lengths)
        return project(y_BTNH.reshape(B, T, -1), [self.o_proj], eight)[0]

    def _gather(
        self,
        q_BTNH: Tensor,
        k_BTKH: Tensor,
        v_BTKH: Tensor,
        mask_TS: Tensor | None,
        causal: bool,
        cache: FullLayer | WindowLayer | None,
        length: int,
        lengths: Sequence[int],
    ) -> Tensor:
        """Attend by torch's kernels, over the cache or text by text. Shapes: → y_BTNH."""
        q_BNTH, k_BKTH, v_BKTH = (x.transpose(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
        if cache is not None:
            k_BKTH, v_BKTH = cache.update(length, k_BKTH, v_BKTH)
        k_BKTH, v_BKTH = k_BKTH.to(q_BNTH.dtype), v_BKTH.to(q_BNTH.dtype)
        if not lengths:
            return self._attend(q_BNTH, k_BKTH, v_BKTH, mask_TS, causal).transpose(1, 2)
        cut = [x.split(list(lengths), dim=2) for x in (q_BNTH, k_BKTH, v_BKTH)]
        texts = [
            self._attend(q, k, v, None if mask_TS is None else mask_TS[:n, :n], causal)
            for q, k, v, n in zip(*cut, lengths, strict=True)
        ]
        return torch.cat(texts, dim=2).transpose(1, 2)

    def _attend(
        self, q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask_TS: Tensor | None, causal: bool
    ) -> Tensor:
        """Gather the values: by torch's fused kernel, or in the open where it has no soft cap."""
        if self.softcap:
            if causal:
                T = q_BNTH.shape[2]
                mask_TS = torch.ones(T, T, dtype=torch.bool, device=q_BNTH.device).tril()
            return attend_reference(q_BNTH, k_BKSH, v_BKSH, mask_TS, self.scale, self.softcap)
        return F.scaled_dot_product_attention(
            q_BNTH,
            k_BKSH,
            v_BKSH,
            attn_mask=mask_TS,
            is_causal=causal,
            scale=self.scale,
            enable_gqa=q_BNTH.shape[1] != k_BKSH.shape[1],
        )

    def _heads(self, x_BTW: Tensor, norm: nn.Module) -> Tensor:
        """Part a projection of width W = heads · H into normalised heads, as B T heads H."""
        x_BTW = norm(x_BTW) if self.whole else x_BTW
        x_BTNH = x_BTW.view(*x_BTW.shape[:2], -1, self.head_dim)
        return x_BTNH if self.whole else norm(x_BTNH)
