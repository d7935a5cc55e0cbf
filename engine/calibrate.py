"""Round a model to int4 by what its matrices are multiplied by, not by their numbers alone.

Rounding every number to the nearest step keeps W' near W. What counts is that W'x stays near Wx
for the x that a model meets, and those are anything but alike: a few directions carry most of it.
So we let the model read some text, note the inputs of every matrix, and round with feedback:

    H = Σ x xᵀ                what the inputs have in common
    U = Cholesky of H⁻¹       H⁻¹ = Uᵀ U, upper triangle
    for each column j:        round it; its error, over U_jj, times row j of U, is taken from the
                              columns not yet rounded, which thus make up for it

Scale and minimum of a group are chosen when its turn comes, by the same measure: with all later
columns making up for what they can, a group's error e costs ‖e U_gg⁻¹‖², and for fixed steps the
best scale and minimum follow from two equations.

The blocks go one after another, and each sees the text as the rounded blocks before it hand it on.

Source: Frantar et al. 2022, arXiv:2210.17323 (GPTQ).
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.model.transformer import Transformer
from engine.quantize import FARTHEST, GROUP, SPANS, Matrix, format_of, lay, pack, unpack

DAMP = 0.01  # of H's mean diagonal, added to it: directions hardly seen keep their weights
TURNS = 4  # of rounding a group, then fitting scale and minimum to its steps
MOST_NATS = 700  # beyond it, exp leaves fp64
ROWS = 8  # windows that go through a block at a time
# Matrices that read the same input share what is known of it; the first is where we listen.
READERS = (
    ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    ("attention.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@torch.no_grad()
def calibrate(
    model: Transformer, tokens_BT: Tensor, fine: Sequence[str] = ()
) -> Iterator[tuple[str, Matrix]]:
    """Round a model's matrices, each to its `format_of` in int4; yields each with its name.

    The model's own weights become what the rounded ones stand for.

    Shapes: tokens_BT, windows of text of one length.
    Raises: ValueError naming a matrix that cannot be rounded.
    """
    outside = {"embed_tokens": model.embed_tokens, "embed_positions": model.embed_positions}
    if not model.config.tie_embeddings:
        outside["lm_head"] = model.lm_head
    for name, layer in outside.items():
        if layer is not None:
            yield f"{name}.weight", _round_alone(f"{name}.weight", layer)
    if model.config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    places = _places(model, tokens_BT)
    x_BTD = places[0].x_BTD
    for index, (block, place) in enumerate(zip(model.blocks, places, strict=True)):
        run = partial(block, **place.surroundings)
        linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        seconds = _listen(run, linears, x_BTD)
        for readers in READERS:
            layers = {f"blocks.{index}.{n}.weight": linears[n] for n in readers if n in linears}
            second = seconds[next(name for name in readers if name in linears)]
            for name in [name for name in layers if format_of(name, "int4", fine) == "int8"]:
                yield name, _round_alone(name, layers.pop(name))
            yield from _round_together(layers, second)
        for part in x_BTD.split(ROWS):
            part.copy_(run(part))


@torch.no_grad()
def perplexity(model: Transformer, tokens_BT: Tensor) -> float:
    """Return exp of the mean surprise in nats at a token. Shapes: tokens_BT, windows of text."""
    nats = [
        F.cross_entropy(model(row[None, :-1])[0].float(), row[1:], reduction="sum").item()
        for row in tokens_BT
    ]
    mean = math.fsum(nats) / (tokens_BT.numel() - len(tokens_BT))
    return math.exp(min(mean, MOST_NATS))


class _Place(nn.Module):
    """Stand where a block was and note what it would have been given."""

    def forward(self, x_BTD: Tensor, **surroundings: Any) -> Tensor:
        """Hand the stream on as it is."""
        self.x_BTD, self.surroundings = x_BTD, surroundings
        return x_BTD


def _places(model: Transformer, tokens_BT: Tensor) -> list[_Place]:
    """Return what each block is given beside the stream, and what the first one is given of it."""
    blocks, places = model.blocks, [_Place() for _ in model.blocks]
    model.blocks = nn.ModuleList(places)
    model.hidden(tokens_BT)
    model.blocks = blocks
    return places


def _listen(run: Any, linears: dict[str, nn.Linear], x_BTD: Tensor) -> dict[str, Tensor]:
    """Send the stream through a block and sum up what its matrices read: H by name of a reader."""
    first = [next(name for name in readers if name in linears) for readers in READERS]
    seconds = {name: torch.zeros(2 * [linears[name].in_features]) for name in first}

    def hear(name: str, _: nn.Module, args: tuple[Tensor]) -> None:
        """Count some more inputs in."""
        x_ND = args[0].flatten(0, -2)
        seconds[name].addmm_(x_ND.T, x_ND)

    hooks = [linears[name].register_forward_pre_hook(partial(hear, name)) for name in first]
    for part in x_BTD.split(ROWS):
        run(part)
    for hook in hooks:
        hook.remove()
    return seconds


def _round_alone(name: str, layer: Any) -> Matrix:
    """Round a matrix to int8, which is fine enough to be told nothing of its inputs."""
    try:
        made = pack(layer.weight.numpy(), "int8")
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None
    layer.weight = nn.Parameter(torch.from_numpy(unpack(made)))
    return made


def _round_together(layers: dict[str, nn.Linear], second: Tensor) -> Iterator[tuple[str, Matrix]]:
    """Round matrices that read the same input to int4, as one."""
    if not layers:
        return
    sizes = [layer.out_features for layer in layers.values()]
    for name, layer in layers.items():
        if not layer.weight.abs().max() <= FARTHEST:
            raise ValueError(f"{name} holds NaN, infinity or numbers beyond ±{FARTHEST:,}")
    if not second.isfinite().all():
        raise ValueError(f"{next(iter(layers))} is given NaN or infinity by the text")
    weight = torch.cat([layer.weight for layer in layers.values()])
    upper = feedback(second)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # thousands of tiny steps: waiting for each other costs several times
    try:
        parts = [whole.split(sizes) for whole in round_columns(weight, upper)]
    finally:
        torch.set_num_threads(threads)
    for (name, layer), *part in zip(layers.items(), *parts, strict=True):
        made = lay(*(tensor.numpy() for tensor in part))
        layer.weight = nn.Parameter(torch.from_numpy(unpack(made)))
        yield name, made


def feedback(second: Tensor, damp: float = DAMP) -> Tensor:
    """Return U, by which errors are passed on, of H damped. Shapes: (n, n) → (n, n)."""
    damped = second.double()
    level = float(damped.diagonal().mean())
    damped = damped + torch.eye(len(damped)) * (damp * level if level else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


def round_columns(weight: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round group by group, column by column, and let later columns make up for earlier ones.

    Shapes: (rows, n), U (n, n) → steps uint8 (rows, n), scale and minimum fp16 (rows, groups).
    """
    left = weight.T.contiguous()  # (n, rows): a column lies in one piece
    steps = torch.empty_like(left, dtype=torch.uint8)
    lines = []
    for first in range(0, len(left), GROUP):
        group = slice(first, min(first + GROUP, len(left)))
        q, scale, minimum, error = _round_group(left[group], upper[group, group])
        steps[group] = q
        lines.append((scale, minimum))
        left[group.stop :].addmm_(upper[group, group.stop :].T, error, alpha=-1)
    scale, minimum = (torch.stack(line, dim=1).half() for line in zip(*lines, strict=True))
    return steps.T.contiguous(), scale, minimum


def _round_group(w: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Round a group of columns from several ranges on; the one with the smallest cost wins.

    Shapes: (k, rows), U (k, k) → steps (k, rows), scale and minimum (rows), e U⁻¹ (k, rows).
    """
    low, high = w.amin(0), w.amax(0)
    spans = torch.tensor(SPANS)[:, None]
    wide = spans * (high - low)
    scale, minimum = halves(wide / 15, low + (high - low - wide) / 2)  # (spans, rows)
    w, k = w[:, None], len(w)
    inverse = torch.linalg.solve_triangular(upper.T, torch.eye(k), upper=False)  # U⁻ᵀ
    flat = (inverse @ torch.ones(k, 1))[:, :, None]
    aimed = (inverse @ w.flatten(1)).view_as(w)
    best = _pick(_try(w, upper, scale, minimum))
    for _ in range(TURNS):
        slope = (inverse @ best[1].flatten(1)).view_as(w)
        again = _try(w, upper, *halves(*_line(slope, flat, aimed)))
        best = _pick(tuple(torch.cat(pair, dim=-2) for pair in zip(best, again, strict=True)))
    _, q, scale, minimum, error = best
    return q[:, 0].to(torch.uint8), scale[0], minimum[0], error[:, 0]


def _pick(tried: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Take for each row the line that costs least; cost comes first, lines lie along axis -2."""
    winner = tried[0].argmin(0, keepdim=True)
    return tuple(x.gather(-2, winner.expand(*x.shape[:-2], 1, -1)) for x in tried)


def _try(w: Tensor, upper: Tensor, scale: Tensor, minimum: Tensor) -> tuple[Tensor, ...]:
    """Round column after column by some lines.

    Shapes: w (k, 1, rows), lines (tries, rows) → cost (tries, rows), steps q (k, tries, rows),
    scale, minimum, e U⁻¹ like q.
    """
    left = w.expand(-1, *scale.shape).clone()
    q, inverse = torch.empty_like(left), 1 / scale.clamp_min(1e-30)
    for j, column in enumerate(left):
        torch.mul(column - minimum, inverse, out=q[j]).round_().clamp_(0, 15)
        column -= torch.addcmul(minimum, q[j], scale)
        column /= upper[j, j]
        left[j + 1 :].flatten(1).addr_(upper[j, j + 1 :], column.flatten(), alpha=-1)
    cost = left.square().sum(0).nan_to_num(torch.inf)  # a line beyond f16 is none
    return cost, q, scale, minimum, left


def _line(slope: Tensor, flat: Tensor, aimed: Tensor) -> tuple[Tensor, Tensor]:
    """Solve the least squares aimed ≈ scale · slope + minimum · flat along the first axis."""
    ss, sf, ff = (slope * slope).sum(0), (slope * flat).sum(0), (flat * flat).sum(0)
    sa, fa = (slope * aimed).sum(0), (flat * aimed).sum(0)
    scale = ((ff * sa - sf * fa) / (ss * ff - sf * sf).clamp_min(1e-30)).clamp_min(0)
    return scale, (fa - scale * sf) / ff


def halves(scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor]:
    """Round to what is stored of scale and minimum, and go on with that."""
    return scale.half().float(), minimum.half().float()
