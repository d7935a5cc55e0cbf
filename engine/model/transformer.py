"""The decoder: token ids in, one score per vocabulary entry out. The heart of the workbench.

    tokens ─ embed ─┬─ norm ─ attention ─(+)─ norm ─ MLP ─(+)─ … L blocks … ─ norm ─ head ─ logits
                    └──────── residual ───┘└─── residual ──┘

One class serves every family in `families.py`; a `ModelConfig` says which. It knows nothing of
losses (`engine/train/loss.py`) nor of sampling (`engine/generate/sampler.py`).
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.config import ModelConfig
from engine.kernels.compile import Unavailable
from engine.kernels.native import Kernels
from engine.model.angles import attention_factor
from engine.model.attention import Attention, visible
from engine.model.cache import FullLayer, KVCache, WindowLayer
from engine.model.norm import make_norm
from engine.model.products import project
from engine.model.rope import frequencies, rotation


def relu2(x: Tensor) -> Tensor:
    """Square the positive part. Source: So et al. 2021, arXiv:2109.08668 (Primer)."""
    return F.relu(x).square()


# name → (function, gated). Source of the gated forms: Shazeer 2020, arXiv:2002.05202.
ACTIVATIONS = {
    "swiglu": (F.silu, True),
    "geglu": (F.gelu, True),
    "geglu_tanh": (partial(F.gelu, approximate="tanh"), True),
    "gelu": (F.gelu, False),
    "gelu_tanh": (partial(F.gelu, approximate="tanh"), False),
    "relu2": (relu2, False),
}


class SwiGLU(torch.autograd.Function):
    """silu(gate) · up in one pass over memory, and its gradient in another."""

    @staticmethod
    def forward(ctx, kernels: Kernels, gate, up):
        """Shapes: two alike → the same."""
        ctx.save_for_backward(gate, up)
        ctx.kernels = kernels
        return kernels.swiglu(gate, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grad_outputs):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of gate and up."""
        gate, up = ctx.saved_tensors
        return None, *ctx.kernels.swiglu_gradient(gate, up, grad_outputs[0].contiguous())


class MLP(nn.Module):
    """Widen, bend, narrow: the part of a block that works on each token alone."""

    kernels: Kernels | None = None
    eight_bits: bool = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.swiglu = config.activation == "swiglu"
        self.activation, gated = ACTIVATIONS[config.activation]
        D, F_ = config.d_model, config.d_ff
        self.gate_proj = nn.Linear(D, F_, bias=config.mlp_bias) if gated else None
        self.up_proj = nn.Linear(D, F_, bias=config.mlp_bias)
        self.down_proj = nn.Linear(F_, D, bias=config.mlp_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Shapes: BTD → BTD."""
        eight = self.kernels if self.eight_bits and self.training else None
        if self.gate_proj is None:
            wide_BTF = self.activation(*project(x_BTD, [self.up_proj], eight))
        else:
            gate_BTF, up_BTF = project(x_BTD, [self.gate_proj, self.up_proj], eight)
            if self.kernels and self.swiglu:
                wide_BTF = SwiGLU.apply(self.kernels, gate_BTF, up_BTF)
            else:
                wide_BTF = self.activation(gate_BTF) * up_BTF
        return project(wide_BTF, [self.down_proj], eight)[0]


class Block(nn.Module):
    """Attention, then MLP, each added to the stream; where they are normalised varies by family.

    `pre` normalises what a branch reads (GPT-2, Llama), `post` what it adds (OLMo 2), `sandwich`
    both (Gemma).
    """

    def __init__(self, config: ModelConfig, dropout: float) -> None:
        super().__init__()

        def norm(*placements: str) -> nn.Module:
            """Make a norm where the config's placement is one of these."""
            wanted = config.norm_placement in placements
            return make_norm(config, config.d_model) if wanted else nn.Identity()

        self.input_norm = norm("pre", "sandwich")
        self.attention = Attention(config)
        self.attention_out_norm = norm("post", "sandwich")
        self.mlp_norm = norm("pre", "sandwich")
        self.mlp = MLP(config)
        self.mlp_out_norm = norm("post", "sandwich")
        self.drop = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor, **attention) -> Tensor:
        """Shapes: BTD → BTD; keyword arguments go to `Attention.forward`."""
        branch_BTD = self.attention(self.input_norm(x_BTD), **attention)
        x_BTD = x_BTD + self.drop(self.attention_out_norm(branch_BTD))
        branch_BTD = self.mlp(self.mlp_norm(x_BTD))
        return x_BTD + self.drop(self.mlp_out_norm(branch_BTD))


def _embedding(rows: int, width: int) -> nn.Embedding:
    """Make an embedding without filling it: drawing its numbers on the meta device, as loading
    would, imports all of torch's compiler, a second of nothing.
    """
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class Transformer(nn.Module):
    """A decoder-only transformer, stateless: everything that changes is an argument."""

    kernels: Kernels | None = None
    eight_bits: bool = False

    def __init__(self, config: ModelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = _embedding(config.vocab_size, config.d_model)
        learned = config.position == "learned"
        self.embed_positions = _embedding(config.max_seq_len, config.d_model) if learned else None
        self.blocks = nn.ModuleList(Block(config, dropout) for _ in range(config.n_layers))
        self.norm = make_norm(config, config.d_model)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def accelerate(self, kernels: Kernels | Unavailable, eight_bits: bool = False) -> None:
        """Compute by our own kernels, or without them by torch alone; fp32 on the CPU only.

        With `eight_bits`, a model that is in training multiplies in 8 bits.
        """
        assert kernels or not eight_bits
        for module in self.modules():
            if hasattr(type(module), "kernels"):
                module.kernels = kernels or None  # type: ignore[assignment]
            if hasattr(type(module), "eight_bits"):
                module.eight_bits = eight_bits  # type: ignore[assignment]

    def forward(
        self, tokens_BT: Tensor, cache: KVCache | None = None, *, causal: bool = True
    ) -> Tensor:
        """Score every vocabulary entry as the next token, at every position.

        Shapes: tokens_BT → logits_BTV (fp32 or the autocast dtype).
        """
        return self.head(self.hidden(tokens_BT, cache, causal=causal))

    def head(self, x_BTD: Tensor) -> Tensor:
        """Turn final hidden states into logits; kept apart so that callers may pick positions."""
        logits_BTV = self.lm_head(x_BTD)
        cap = self.config.logit_softcap
        return cap * torch.tanh(logits_BTV / cap) if cap else logits_BTV

    def hidden(
        self,
        tokens_BT: Tensor | None,
        cache: KVCache | None = None,
        *,
        causal: bool = True,
        inputs_embeds: Tensor | None = None,
        lengths: Sequence[int] = (),
        recompute: bool = False,
    ) -> Tensor:
        """Run the blocks; with a cache, continue after the tokens it holds and add these to it.

        Shapes: tokens_BT, or inputs_embeds BTD in their place, → BTD after the final norm.
        With causal=False every token sees every other, windows included. With `lengths`, every row
        is cut into texts of these lengths that know nothing of each other: each begins at position
        0. With `recompute`, blocks keep nothing for their gradient but compute it again (Chen et
        al. 2016, arXiv:1604.06174).
        Raises: ValueError beyond max_seq_len.
        """
        x_BTD: Tensor = self.embed_tokens(tokens_BT) if inputs_embeds is None else inputs_embeds
        T, start = max(lengths, default=x_BTD.shape[1]), cache.length if cache else 0
        if start + T > self.config.max_seq_len:
            raise ValueError(f"{start + T} tokens exceed max_seq_len={self.config.max_seq_len}")
        if self.config.scale_embeddings:
            x_BTD = x_BTD * x_BTD.new_tensor(self.config.d_model**0.5)
        position_T = torch.cat([torch.arange(start, start + n) for n in lengths or [T]])
        if self.embed_positions is not None:
            x_BTD = x_BTD + self.embed_positions(position_T.to(x_BTD.device))
        ropes = self._rotations(position_T, cache.capacity if cache else T, x_BTD.device)
        masks: dict[tuple, tuple[Tensor | None, bool]] = {}  # layers of one kind share a mask
        for index, block in enumerate(self.blocks):
            layer = cache.layers[index] if cache else None
            window = self.config.window(index)
            kind = (window, layer.first if layer else 0)
            if kind not in masks:
                masks[kind] = self._mask(T, start, layer, window, causal, x_BTD.device)
            mask_TS, triangle = masks[kind]
            run = partial(checkpoint, block, use_reentrant=False) if recompute else block
            x_BTD = run(
                x_BTD,
                rope=ropes[window > 0] if self.config.rotates(index) else None,
                mask_TS=mask_TS,
                causal=triangle,
                cache=layer,
                length=start,
                lengths=lengths,
            )
        if cache:
            cache.advance(T)
        return self.norm(x_BTD)

    def _rotations(
        self, position_T: Tensor, longest: int, device: torch.device
    ) -> Sequence[tuple[Tensor, Tensor] | None]:
        """Compute the rotations of positions: for full layers, and for windowed ones.

        Which LongRoPE factors count is settled by the `longest` the sequence may become, so that
        keys in the cache never need to be turned again.
        """
        config = self.config
        if config.position != "rope":
            return [None, None]
        long = longest > config.rope_scaling.original_max_seq_len

        def turn(frequency: Tensor, factor: float) -> tuple[Tensor, Tensor]:
            """Compute on the CPU, in fp64, which not every device has."""
            cos_TH, sin_TH = rotation(frequency, position_T, factor)
            return cos_TH.to(device), sin_TH.to(device)

        full = turn(frequencies(config, long=long), attention_factor(config))
        local = turn(frequencies(config, local=True), 1.0) if config.local_rope_theta else full
        return [full, local]

    @staticmethod
    def _mask(
        T: int,
        start: int,
        layer: FullLayer | WindowLayer | None,
        window: int,
        causal: bool,
        device: torch.device,
    ) -> tuple[Tensor | None, bool]:
        """Choose what T queries from position `start` see: (mask_TS or None, plain triangle?)."""
        if not causal:
            return None, False
        if start == 0 and (not window or window >= T):
            return None, True
        if T == 1 and not window:
            return None, False  # the newest token sees everything before it
        q_position_T = torch.arange(start, start + T, device=device)
        k_position_S = layer.positions(start, T, device) if layer else q_position_T
        return visible(q_position_T, k_position_S, window), False


def initialise(model: Transformer, generator: torch.Generator) -> None:
    """Fill all weights for training from nothing, from `generator` alone.

    Matrices that read the stream get variance 1/fan-in; matrices that write to it, and an untied
    head, start at zero, so that every block begins as the identity and the first loss is exactly
    ln V. Norms begin as the identity. Source: zero-initialised output projections, Zhang et al.
    2019, arXiv:1901.09321.
    """
    tied = model.config.tie_embeddings
    for name, parameter in model.named_parameters():
        if (
            name.endswith(("o_proj.weight", "down_proj.weight", ".bias"))
            or name == "lm_head.weight"
        ):
            nn.init.zeros_(parameter)
        elif name.startswith("embed_"):
            nn.init.normal_(parameter, std=0.02 if tied else 1.0, generator=generator)
        elif parameter.ndim == 1:
            nn.init.constant_(parameter, 0.0 if model.config.norm_offset else 1.0)
        else:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)
