"""LoRA: a small trainable product beside each frozen matrix.

    x ─┬─────── W, frozen ──────(+)─ y        y = W x + alpha / rank · B A x
       └─ dropout ─ A ─ B · scale┘            A: R × in, B: out × R

B starts at zero, so the first step starts from the base's own function, bit for bit.

Source: Hu et al. 2021, arXiv:2106.09685.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import LoraConfig
from engine.errors import RecipeError
from engine.model.int8 import Int8Linear, quantize_linears
from engine.model.transformer import Transformer

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
TARGETS = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}


class LoraLinear(nn.Module):
    """A frozen linear map `base` and the product of `a` and `b` beside it."""

    def __init__(
        self, base: nn.Linear | Int8Linear, rank: int, alpha: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        device = base.weight.device
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.alpha, self.scale = alpha, alpha / rank
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (…, in) → (…, out)."""
        y = self.base(x)
        low = F.linear(self.dropout(x), self.a).flatten(0, -2)
        # One pass over y, where `y + scale * (low @ bᵀ)` takes three.
        return torch.addmm(y.flatten(0, -2), low, self.b.t(), alpha=self.scale).view_as(y)

    def merged(self) -> Tensor:
        """Return W + scale · B A, in fp32."""
        base = self.base
        weight = base.widened() if isinstance(base, Int8Linear) else base.weight.float()
        return torch.addmm(weight, self.b.float(), self.a.float(), alpha=self.scale)


def projections(model: Transformer) -> Iterator[tuple[str, nn.Module]]:
    """Name the matrices that may get a LoRA, in the order of the model, whatever they are now."""
    for name, module in list(model.named_modules()):
        if name.startswith("blocks.") and name.rpartition(".")[2] in TARGETS["all"]:
            yield name, module


def add_lora(model: Transformer, config: LoraConfig, generator: torch.Generator) -> None:
    """Freeze the model and put a LoRA beside the chosen matrices of each block.

    With base=int8 the blocks' matrices are rounded first. `a` is drawn like the weight of an
    nn.Linear, on the CPU, in the order of the model.

    Raises: RecipeError if the model has LoRA already, or none of its matrices is chosen.
    """
    if any(isinstance(module, LoraLinear) for module in model.modules()):
        raise RecipeError("train.base is an adapter already; merge it first: lm merge NAME -o OUT")
    model.requires_grad_(False)
    if config.base == "int8":
        quantize_linears(model)
    for name, module in projections(model):
        if name.rpartition(".")[2] in TARGETS[config.targets]:
            assert isinstance(module, (nn.Linear, Int8Linear))
            layer = LoraLinear(module, config.rank, config.alpha, config.dropout)
            drawn = torch.empty(layer.a.shape)
            nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=generator)
            layer.a.data.copy_(drawn)
            model.set_submodule(name, layer.train(model.training))


@torch.no_grad()
def merge_lora(model: Transformer) -> int:
    """Add each LoRA to its matrix, in fp32 and in place; return how many there were.

    Matrices in 8 bits are widened, those without a LoRA too. A model without either is left alone.
    """
    merged = 0
    for name, module in projections(model):
        if isinstance(module, (LoraLinear, Int8Linear)):
            lora = isinstance(module, LoraLinear)
            base = module.base if lora else module
            with torch.device("meta"):
                plain = nn.Linear(base.in_features, base.out_features)
            plain.weight = nn.Parameter(module.merged() if lora else module.widened())
            plain.bias = base.bias
            model.set_submodule(name, plain)
            merged += lora
    return merged
