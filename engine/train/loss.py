"""Losses: from hidden states and targets to (sum of nats, count of targets).

Every loss here returns the sum and the count, never the mean: the loop divides once per update, so
that accumulation, masks and ranks all weigh each token the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.clock import IDLE, Clock
from engine.data.batches import IGNORE, Batch
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
    def forward(ctx, x_ND, weight_VD, targets_N, chunk, cap):
        """Shapes: x_ND and targets_N → sum of nats, a scalar in fp32."""
        kept = targets_N != IGNORE
        index_N = targets_N.where(kept, 0)
        grad_x_ND = torch.empty_like(x_ND)
        learns = ctx.needs_input_grad[1]  # a frozen head has no gradient to work out
        grad_weight_VD = torch.zeros_like(weight_VD) if learns else None
        total = torch.zeros((), device=x_ND.device)
        for start in range(0, x_ND.shape[0], chunk):
            rows = slice(start, start + chunk)
            index, keep = index_N[rows, None], kept[rows, None]
            logits = (x_ND[rows] @ weight_VD.T).float()
            if cap:
                logits = cap * torch.tanh(logits / cap)
            log_probs = logits.log_softmax(-1)
            total -= (log_probs.gather(1, index) * keep).sum()
            if not ctx.needs_input_grad[0]:
                continue
            grad = log_probs.exp_()  # softmax; minus the one-hot target it is the gradient
            grad.scatter_add_(1, index, grad.new_full(index.shape, -1.0))
            if cap:
                grad *= 1 - (logits / cap) ** 2
            if not keep.all():
                grad *= keep
            grad = grad.to(x_ND.dtype)
            grad_x_ND[rows] = grad @ weight_VD
            if grad_weight_VD is not None:
                grad_weight_VD += grad.T @ x_ND[rows]
        ctx.save_for_backward(grad_x_ND, grad_weight_VD)
        return total

    @staticmethod
    def backward(ctx, *grad_outputs):
        """Scale the gradients found in the forward pass."""
        (scale,) = grad_outputs
        grad_x_ND, grad_weight_VD = ctx.saved_tensors
        grad_weight_VD = None if grad_weight_VD is None else grad_weight_VD * scale
        return grad_x_ND * scale, grad_weight_VD, None, None, None


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
    total = ChunkedCrossEntropy.apply(
        x_ND, model.lm_head.weight, targets_N, chunk, model.config.logit_softcap
    )
    count = kept_N.sum()
    clock.lap("loss")
    return total, count
