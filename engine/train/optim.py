"""Optimizers: Muon for the blocks' weight matrices, AdamW for everything else.

Muon takes the momentum of a matrix's gradient and replaces it by the nearest matrix whose singular
values are all about one, so that rare directions learn as fast as common ones. Embedding, head,
norms and biases are not maps between hidden spaces; they get AdamW. So do the factors of a LoRA,
whose product alone is such a map, at the rate of the matrices.

Sources: Jordan et al. 2024, kellerjordan.github.io/posts/muon (Muon, Newton–Schulz coefficients);
Loshchilov & Hutter 2019, arXiv:1711.05101 (AdamW).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from engine.config import OptimConfig
from engine.errors import CheckpointError
from engine.model.transformer import Transformer

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(G: Tensor, steps: int = 5) -> Tensor:
    """Push all singular values of a stack of matrices to about one, by Newton–Schulz iteration.

    Shapes: (matrices, rows, columns) → the same; fp32 on CPU, bf16 on accelerators.
    """
    a, b, c = NEWTON_SCHULZ
    X = G.float() if G.device.type == "cpu" else G.bfloat16()
    tall = X.shape[-2] > X.shape[-1]
    if tall:
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):  # X ← a·X + (b·A + c·A²)·X with A = X·Xᵀ
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return (X.mT if tall else X).to(G.dtype)


class Muon:
    """Momentum, orthogonalised, for 2-D weights; matrices of one shape are worked as a stack."""

    def __init__(self, parameters: dict[str, nn.Parameter], config: OptimConfig) -> None:
        self.config = config
        self.parameters = parameters
        self.momentum = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.stacks: dict[torch.Size, list[str]] = {}
        for name, parameter in parameters.items():
            self.stacks.setdefault(parameter.shape, []).append(name)

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Update the weights from their gradients; `factor` scales the learning rate."""
        config, lr = self.config, self.config.lr * factor
        for shape, names in self.stacks.items():
            weights: list[Tensor] = [self.parameters[name] for name in names]
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            momenta = [self.momentum[name] for name in names]
            torch._foreach_lerp_(momenta, gradients, 1 - config.momentum)
            # Nesterov: look one step ahead along the momentum.
            ahead = torch._foreach_lerp(gradients, momenta, config.momentum)
            update = orthogonalize(torch.stack(ahead))
            # A tall matrix needs larger entries for the same effect on its output.
            scale = -lr * max(1.0, shape[0] / shape[1]) ** 0.5
            if config.weight_decay:
                torch._foreach_mul_(weights, 1 - lr * config.weight_decay)
            torch._foreach_add_(weights, list(update.unbind()), alpha=scale)

    def state(self) -> dict[str, Tensor]:
        """Return every tensor that a resumed run needs, by name."""
        return {f"momentum.{name}": tensor for name, tensor in self.momentum.items()}


class AdamW:
    """Adam with decoupled weight decay, one learning rate per parameter group."""

    def __init__(self, groups: list[tuple[dict[str, nn.Parameter], float, float]], config) -> None:
        """Take (parameters by name, peak learning rate, weight decay) per group."""
        self.names = [list(parameters) for parameters, _, _ in groups]
        self.peaks = [lr for _, lr, _ in groups]
        self.inner = torch.optim.AdamW(
            [
                {"params": list(parameters.values()), "lr": lr, "weight_decay": decay}
                for parameters, lr, decay in groups
            ],
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )
        for group in self.inner.param_groups:  # as the first step would, so that state() is whole
            for parameter in group["params"]:
                self.inner.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }

    def step(self, factor: float) -> None:
        """Update the weights from their gradients; `factor` scales the learning rates."""
        for group, peak in zip(self.inner.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        self.inner.step()

    def state(self) -> dict[str, Tensor]:
        """Return every tensor that a resumed run needs, by name."""
        return {
            f"{kind}.{name}": tensor
            for names, group in zip(self.names, self.inner.param_groups, strict=True)
            for name, parameter in zip(names, group["params"], strict=True)
            for kind, tensor in self.inner.state[parameter].items()
        }


class Optimizers:
    """The optimizers of a model, stepped together."""

    def __init__(self, model: Transformer, config: OptimConfig) -> None:
        """Give each trainable parameter to one optimizer, matrices to the one the config names."""
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        factors = {n: p for n, p in named.items() if n.endswith((".a", ".b"))}
        blocks = {n: p for n, p in named.items() if n.startswith("blocks.") and n not in factors}
        matrices = {n: p for n, p in blocks.items() if p.ndim == 2}
        embedding = {n: p for n, p in named.items() if n.startswith("embed_")}
        taken = {*factors, *matrices, *embedding}
        rest = {n: p for n, p in named.items() if n not in taken}
        # A tied embedding is the output head too, where a row's rate would be far too high.
        embed_lr = config.head_lr if model.config.tie_embeddings else config.embed_lr
        groups = [(embedding, embed_lr, 0.0), (rest, config.head_lr, 0.0)]
        groups += [(factors, config.lr, config.weight_decay)]
        self.parts = OPTIMIZERS[config.name](matrices, groups, config)

    def step(self, factor: float) -> None:
        """Update all weights from their gradients; `factor` scales every learning rate."""
        for part in self.parts:
            part.step(factor)

    def state(self) -> dict[str, Tensor]:
        """Return every tensor that a resumed run needs, by name."""
        return {name: tensor for part in self.parts for name, tensor in part.state().items()}

    def load_state(self, saved: dict[str, Tensor]) -> None:
        """Copy saved tensors back. Raises: CheckpointError if they are not this optimizer's."""
        own = self.state()
        if own.keys() != saved.keys():
            odd = sorted(own.keys() ^ saved.keys())[0]
            raise CheckpointError(f"optimizer state does not fit this model, for example {odd}")
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def muon_and_adamw(matrices, groups, config: OptimConfig) -> list[Muon | AdamW]:
    """Muon for the matrices, AdamW for the rest."""
    return [Muon(matrices, config), AdamW(groups, config)]


def adamw_alone(matrices, groups, config: OptimConfig) -> list[Muon | AdamW]:
    """AdamW for everything, with weight decay on the matrices."""
    return [AdamW([(matrices, config.lr, config.weight_decay), *groups], config)]


OPTIMIZERS: dict[str, Callable[..., list[Muon | AdamW]]] = {
    "muon": muon_and_adamw,
    "adamw": adamw_alone,
}
