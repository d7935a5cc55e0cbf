"""Losses: from hidden states and targets to (sum of nats, count of targets).

Every loss here returns the sum and the count, never the mean: the loop divides once per update, so
that accumulation, masks and ranks all weigh each token the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.clock import IDLE, Clock
from engine.data.batches import IGNORE, Batch
from engine.kernels.native import Kernels
from engine.model.transformer import Transformer


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed negative log-likelihood of the targets, in nats, and their count.

    The plain form, with all logits at hand; the oracle for `ChunkedCrossEntropy`.
    """
    loss = F.cross_entropy(
        logits_BTV.flatten(0, -2).float(),
        targets_BT.flatten(),
        ignore_index=IGNORE,
        reduction="sum",
    )
    return loss, (targets_BT != IGNORE).sum()


class ChunkedCrossEntropy(torch.autograd.Function):
    """Output head and cross-entropy together, a few rows of logits at a time.

    A batch of N tokens needs N × V logits, by far the largest tensor of a small model's step. Here
    only `chunk` rows exist at once: the gradient is worked out while they do, so the backward pass
    only has to scale it. Idea: Hsu et al. 2024, arXiv:2410.10989 (fused linear cross-entropy).
    """

    @staticmethod
    def forward(ctx, x_ND, weight_VD, targets_N, chunk, cap, kernels=None, eight_bits=False):
        """Shapes: x_ND and targets_N → sum of nats, a scalar in fp32."""
        kept_N = targets_N != IGNORE
        index_N = targets_N.where(kept_N, 0)
        learns_x, learns_weight = ctx.needs_input_grad[:2]  # a frozen head has none to work out
        grad_x_ND = torch.empty_like(x_ND)
        grad_weight_VD = torch.zeros_like(weight_VD) if learns_weight else None
        head = EightBitHead(kernels, weight_VD) if kernels and eight_bits else Head(weight_VD)
        total = torch.zeros((), device=x_ND.device)
        for start in range(0, x_ND.shape[0], chunk):
            rows = slice(start, start + chunk)
            keep_N = kept_N[rows]
            logits = head.logits(x_ND[rows])
            nats_N, grad = surprise(logits, index_N[rows], cap, kernels)
            total += (nats_N * keep_N).sum()
            if not learns_x:
                continue
            if not keep_N.all():
                grad *= keep_N[:, None]
            head.gradient(grad.to(x_ND.dtype), grad_x_ND[rows], grad_weight_VD)
        ctx.save_for_backward(grad_x_ND, grad_weight_VD)
        return total

    @staticmethod
    def backward(ctx, *grad_outputs):
        """Scale the gradients found in the forward pass."""
        (scale,) = grad_outputs
        grad_x_ND, grad_weight_VD = ctx.saved_tensors
        grad_weight_VD = None if grad_weight_VD is None else grad_weight_VD * scale
        return grad_x_ND * scale, grad_weight_VD, None, None, None, None, None


def surprise(
    logits_NV: Tensor, targets_N: Tensor, cap: float, kernels: Kernels | None
) -> tuple[Tensor, Tensor]:
    """Return each target's nats, and their gradient in the place of the logits."""
    if kernels:
        return kernels.softmax_loss(logits_NV, targets_N, cap), logits_NV
    logits_NV = logits_NV.float()
    if cap:
        logits_NV = cap * torch.tanh(logits_NV / cap)
    log_probs_NV = logits_NV.log_softmax(-1)
    nats_N = -log_probs_NV.gather(1, targets_N[:, None])[:, 0]
    grad_NV = log_probs_NV.exp_()  # softmax; minus the one-hot target it is the gradient
    grad_NV.scatter_add_(1, targets_N[:, None], grad_NV.new_full((len(targets_N), 1), -1.0))
    if cap:
        grad_NV *= 1 - (logits_NV / cap) ** 2
    return nats_N, grad_NV


class Head:
    """The output head's three products, exactly."""

    def __init__(self, weight_VD: Tensor) -> None:
        self.weight_VD = weight_VD

    def logits(self, x_ND: Tensor) -> Tensor:
        """Return x Wᵀ and remember x."""
        self.x_ND = x_ND
        return x_ND @ self.weight_VD.T

    def gradient(self, grad_NV: Tensor, grad_x_ND: Tensor, grad_weight_VD: Tensor | None) -> None:
        """Write the gradient of x, add that of W."""
        torch.mm(grad_NV, self.weight_VD, out=grad_x_ND)
        if grad_weight_VD is not None:
            grad_weight_VD += grad_NV.T @ self.x_ND


class EightBitHead:
    """The same products in 8 bits; in twice 8 bits for the gradient of the logits.

    A row of it holds one number near -1 and thousands of probabilities: with a single digit they
    would all be zero, and no logit would ever be pushed down.
    """

    def __init__(self, kernels: Kernels, weight_VD: Tensor) -> None:
        self.kernels = kernels
        self.by_row, self.by_column = kernels.weave(weight_VD, rows="right", columns="right")

    def logits(self, x_ND: Tensor) -> Tensor:
        """Return x Wᵀ and remember x."""
        x, self.x = self.kernels.weave(x_ND, rows="left", columns="right")
        return self.kernels.multiply(x, self.by_row)

    def gradient(self, grad_NV: Tensor, grad_x_ND: Tensor, grad_weight_VD: Tensor | None) -> None:
        """Write the gradient of x, add that of W."""
        grad_x_ND.zero_()
        for digit in (1, 2):
            grad, across = self.kernels.weave(grad_NV, rows="left", columns="left", digit=digit)
            self.kernels.multiply(grad, self.by_column, onto=grad_x_ND)
            if grad_weight_VD is not None:
                self.kernels.multiply(across, self.x, onto=grad_weight_VD)


def next_token_loss(
    model: Transformer,
    batch: Batch,
    chunk: int,
    recompute: bool = False,
    clock: Clock = IDLE,
) -> tuple[Tensor, Tensor]:
    """Return (sum of nats, count) of predicting each target of the batch.

    The loss of pretraining, where every token is a target, and of finetuning, where answers are.

    Source: Bengio et al. 2003 (neural language model); Radford et al. 2018 (at scale).
    """
    x_BTD = model.hidden(batch.tokens_BT, lengths=batch.lengths, recompute=recompute)
    clock.lap("forward")
    x_ND, targets_N = x_BTD.flatten(0, 1), batch.targets_BT.flatten()
    kept_N = targets_N != IGNORE
    if not kept_N.all():  # what is not learned needs no logits
        x_ND, targets_N = x_ND[kept_N], targets_N[kept_N]
    eight_bits = model.eight_bits and model.training
    total = ChunkedCrossEntropy.apply(
        x_ND,
        model.lm_head.weight,
        targets_N,
        chunk,
        model.config.logit_softcap,
        model.kernels,
        eight_bits,
    )
    count = kept_N.sum()
    clock.lap("loss")
    return total, count
