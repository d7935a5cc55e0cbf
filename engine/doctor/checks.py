"""Does the engine compute right on this machine? Things that must be equal, worked out twice.

    cached = uncached    batch = single    packed = alone    1 × 8 = 8 × 1    1 thread = all …

Each check measures a difference and holds it against a limit. Sums in another order differ in the
last bits of fp32; a wrong mask, a stale cache or a broken kernel differs by far more. The model is
one of ours with random weights, or any checkpoint.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from engine.checkpoint import Snapshot, load_model, save
from engine.config import ModelConfig, RunConfig, SampleConfig, TokenizerConfig
from engine.data.batches import Batch
from engine.doctor import decoding
from engine.errors import CheckpointError, LimitError, ResourceError
from engine.generate.sampler import sample, seeded
from engine.hardware import autocast, check_memory, pick_dtype
from engine.kernels.compile import Unavailable
from engine.kernels.decoder import Library
from engine.kernels.native import Kernels
from engine.model.cache import KVCache
from engine.model.int8 import Int8Linear
from engine.model.transformer import Transformer, initialise
from engine.text.tokenizer import Tokenizer, learn
from engine.train.gradient import Share
from engine.train.loss import next_token_loss

TOKENS = 32  # of a text that is run through the model; longer than the random model's window
ROWS = 8  # of a batch whose gradient is compared
TOGETHER = 3  # rows run as one
LEARNED = 8  # tokens of each row whose gradient is compared
SHORTEST = 16  # context that can be checked
DRAWS = 64
ROUNDING = 5e-4  # what another order of sums may change; some trained models magnify it
LOSSY = {"bf16": 0.05, "int8": 0.1}  # what a lower precision may change, layer by layer
LOSSY_ELSE = 0.1  # of a precision that has no row above


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is examined: a model in fp32, with its tokenizer."""

    model: Transformer
    tokenizer: Tokenizer
    adapter: bool = False  # its files hold only a part of it
    kernels: Kernels | Unavailable = Unavailable("they were not asked for")
    library: Library | Unavailable = Unavailable("it was not asked for")  # our own decoder

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.model.embed_tokens.weight.device

    def tokens(self, rows: int, longest: int = TOKENS) -> Tensor:
        """Draw the same random texts each time. Shapes: (rows, T)."""
        shape = (rows, min(longest, self.model.config.max_seq_len))
        random = torch.Generator().manual_seed(rows)
        return torch.randint(self.tokenizer.vocab_size, shape, generator=random).to(self.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that must hold: what was measured, and the most that is right."""

    name: str
    value: float | None  # None if it was skipped, or broke off
    limit: float
    ok: bool | None  # None if it was skipped
    meaning: str
    note: str = ""  # why it was skipped, or how it broke off


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A check before it is made; `measure` returns a figure, or says why there is none."""

    name: str
    limit: float
    meaning: str
    measure: Callable[[Subject], float | str]


def examine(subject: Subject, *, compiler: str = "", slow: bool = False) -> Iterator[Check]:
    """Make every check, that of torch.compile only if `slow`; `compiler` is its C++ compiler.

    Raises: LimitError if the model reads too few tokens to compare anything.
    """
    if (context := subject.model.config.max_seq_len) < SHORTEST:
        raise LimitError(f"a context of {context} tokens is too short to check; {SHORTEST} will do")
    last = Question(
        name="compiled = eager",
        limit=ROUNDING,
        meaning="logits of torch.compile",
        measure=partial(_compiled, slow=slow, compiler=compiler),
    )
    for question in (*CHECKS, *_precisions(), last):
        yield _answer(question, subject)


def _answer(question: Question, subject: Subject) -> Check:
    """Measure, and hold it against the limit."""
    value, ok, note = None, None, ""
    try:
        found = question.measure(subject)
        if isinstance(found, str):
            note = found
        else:
            value, ok = found, found <= question.limit  # which nan is not
    except ResourceError as error:
        note = str(error)
    except (CheckpointError, RuntimeError, ValueError) as error:
        # That it cannot be computed is a finding.
        ok, note = False, str(error).strip().split("\n")[0]
    return Check(
        name=question.name,
        value=value,
        limit=question.limit,
        ok=ok,
        meaning=question.meaning,
        note=note,
    )


def random_subject(device: torch.device) -> Subject:
    """Make a small model, always the same: grouped heads, windowed and full layers, no zeros."""
    tokenizer = learn(["one text, the same for all"], TokenizerConfig(vocab_size=260))
    config = ModelConfig(
        vocab_size=512,
        d_model=256,
        n_layers=4,
        n_heads=4,
        n_kv_heads=2,
        max_seq_len=256,
        sliding_window=16,
        full_every=2,
        tie_embeddings=True,
    )
    model = Transformer(config)
    random = torch.Generator().manual_seed(0)
    initialise(model, random)
    with torch.no_grad():  # training begins with zeros, behind which anything could hide
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=random)
            parameter.add_(noise * parameter.shape[-1] ** -0.5)
    return Subject(model=model.to(device).eval(), tokenizer=tokenizer)


def farthest(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, in units of the root mean square of what is expected."""
    found, expected = found.double(), expected.double()
    return float((found - expected).abs().max() / expected.square().mean().sqrt())


def drift(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the length of the difference as a share of the length of what is expected."""
    pairs = list(zip(found, expected, strict=True))
    off = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return (off / sum(float(b.double().square().sum()) for _, b in pairs)) ** 0.5


@torch.inference_mode()
def _cached(subject: Subject) -> float:
    """Read half of a text at once, some more, then the rest one token at a time."""
    model, tokens_BT = subject.model, subject.tokens(1)
    T = tokens_BT.shape[1]
    cache = KVCache(model.config, capacity=T, device=subject.device)
    cuts = [T // 2, T - T // 2 - 6, *[1] * 6]
    parts = [model(part, cache) for part in tokens_BT.split(cuts, dim=1)]
    return farthest(torch.cat(parts, dim=1), model(tokens_BT))


@torch.inference_mode()
def _batched(subject: Subject) -> float:
    """Run rows together and each by itself."""
    tokens_BT = subject.tokens(TOGETHER)
    alone = torch.cat([subject.model(row) for row in tokens_BT.split(1)])
    return farthest(subject.model(tokens_BT), alone)


@torch.inference_mode()
def _packed(subject: Subject) -> float:
    """Run three texts end to end in one row, and each by itself."""
    model, tokens_BT = subject.model, subject.tokens(1)
    T = tokens_BT.shape[1]
    lengths = [T // 2, T // 4, T - T // 2 - T // 4]
    alone = [model(part) for part in tokens_BT.split(lengths, dim=1)]
    packed = model.head(model.hidden(tokens_BT, lengths=lengths))
    return farthest(packed, torch.cat(alone, dim=1))


def _accumulated(subject: Subject) -> float:
    """Take the gradient of eight rows in one part, and in eight."""
    model, tokens_BT = subject.model, subject.tokens(ROWS, LEARNED)
    learned = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    check_memory(2 * learned, subject.device, "comparing gradients", "the model")
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # it draws for each part anew
            module.p = 0.0
    whole = Batch(tokens_BT=tokens_BT, targets_BT=tokens_BT.roll(-1, 1))
    rows = zip(whole.tokens_BT.split(1), whole.targets_BT.split(1), strict=True)
    parts = [Batch(tokens_BT=tokens, targets_BT=targets) for tokens, targets in rows]
    gradients = [_gradient(model, [whole]), _gradient(model, parts)]
    return drift(*gradients)


def _gradient(model: Transformer, parts: list[Batch]) -> list[Tensor]:
    """Return the gradient of a batch as training works it out, and leave none on the model."""
    loss = partial(next_token_loss, chunk=LEARNED * 3)  # cuts through rows
    Share(model=model, batches=lambda _: parts, loss=loss, seed=0, dtype=torch.float32)(0)
    found = [p.grad for p in model.parameters() if p.grad is not None]
    model.eval().zero_grad(set_to_none=True)
    return found


@contextmanager
def _accelerated(subject: Subject, eight_bits: bool) -> Iterator[None]:
    """Compute by our kernels for a while."""
    assert subject.kernels
    subject.model.accelerate(subject.kernels, eight_bits)
    try:
        yield
    finally:
        subject.model.accelerate(Unavailable("done"))
        subject.model.eval()


def _native(subject: Subject) -> float | str:
    """Take the gradient of a batch by our kernels, and by torch."""
    if not subject.kernels:
        return subject.kernels.reason
    tokens_BT = subject.tokens(TOGETHER)
    batch = [Batch(tokens_BT=tokens_BT, targets_BT=tokens_BT.roll(-1, 1))]
    expected = _gradient(subject.model, batch)
    with _accelerated(subject, eight_bits=False):
        return drift(_gradient(subject.model, batch), expected)


def _decoded(subject: Subject, measure: Callable[..., float]) -> float | str:
    """Measure our own decoder, which computes in C."""
    if not subject.library:
        return subject.library.reason
    if subject.adapter or subject.device.type != "cpu":
        return "it runs whole models, on the processor"
    return measure(subject.model, subject.library, subject.tokens(TOGETHER).tolist())


@torch.inference_mode()
def _lower(subject: Subject, name: str) -> float | str:
    """Run a text with matrix products in a lower precision; with 8 bits, as training does."""
    tokens_BT = subject.tokens(1)
    expected = subject.model(tokens_BT)
    if name != "int8":
        with autocast(subject.device, pick_dtype(name, subject.device)):
            return drift([subject.model(tokens_BT)], [expected])
    if not subject.kernels:
        return subject.kernels.reason
    with _accelerated(subject, eight_bits=True):
        subject.model.train()
        return drift([subject.model(tokens_BT)], [expected])


def _precisions() -> Iterator[Question]:
    """Ask about every precision that a recipe may choose, but fp32."""
    for name in get_args(next(f.type for f in fields(RunConfig) if f.name == "dtype")):
        if name not in ("auto", "fp32"):
            yield Question(
                name=f"{name} drifts from fp32",
                limit=LOSSY.get(name, LOSSY_ELSE),
                meaning=f"logits with products in {name}",
                measure=partial(_lower, name=name),
            )


@torch.inference_mode()
def _rounded(subject: Subject) -> float | str:
    """Hold the matrices of a block in 8 bits.

    Rounding in steps of s moves an entry by s / √12 on average, so an output by s / √12 · |x|.
    """
    linears = [m for m in subject.model.blocks[0].modules() if isinstance(m, nn.Linear)]
    if not linears:
        return "its matrices are in 8 bits already"
    random = torch.Generator().manual_seed(0)
    worst = 0.0
    for linear in linears:
        x = torch.randn(ROWS, linear.in_features, generator=random).to(subject.device)
        step = linear.weight.abs().amax(1) / 127
        explained = x.norm(dim=1, keepdim=True) * step / 12**0.5
        worst = max(worst, float((Int8Linear(linear)(x) - linear(x)).norm() / explained.norm()))
    return worst


def _saved(subject: Subject) -> float | str:
    """Count the tensors that come back other than they were saved."""
    if subject.adapter:
        return "of an adapter; lm verify proves its files"
    snapshot = Snapshot(
        step=0,
        model=subject.model,
        tokenizer=subject.tokenizer,
        recipe_yaml="",
        sample=SampleConfig(),
        facts={},
        optimizer={},
        state={},
    )
    with tempfile.TemporaryDirectory() as run:
        folder = save(Path(run), snapshot, best=False)
        loaded, before = load_model(folder)[0].state_dict(), subject.model.state_dict()
        return float(sum(not torch.equal(loaded[k], v.cpu()) for k, v in before.items()))


@torch.inference_mode()
def _drawn(subject: Subject) -> float:
    """Count tokens that the same seed draws otherwise; that another seed draws alike is one too."""
    logits_V = subject.model(subject.tokens(1))[0, -1].float().cpu().numpy()
    logits_V = logits_V / logits_V.std()

    def draw(seed: int) -> list[int]:
        """Draw a few tokens."""
        random, settings = seeded(seed), SampleConfig(temperature=1.0)
        return [sample(logits_V, [], settings, random) for _ in range(DRAWS)]

    first = draw(1)
    return float(sum(a != b for a, b in zip(first, draw(1), strict=True)) + (first == draw(2)))


@torch.inference_mode()
def _threaded(subject: Subject) -> float | str:
    """Run a text with one thread and with all."""
    threads = torch.get_num_threads()
    if threads == 1 or subject.device.type != "cpu":
        return "torch has one thread" if threads == 1 else "not on the processor"
    tokens_BT = subject.tokens(1)
    together = subject.model(tokens_BT)
    torch.set_num_threads(1)
    try:
        return farthest(together, subject.model(tokens_BT))
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def _compiled(subject: Subject, slow: bool, compiler: str) -> float | str:
    """Run a text through torch.compile."""
    if not compiler and subject.device.type == "cpu":
        return "needs a C++ compiler"
    if not slow:
        return "compiling takes a minute; --all does it"
    tokens_BT = subject.tokens(1)
    return farthest(torch.compile(subject.model)(tokens_BT), subject.model(tokens_BT))


CHECKS = tuple(
    Question(name=name, limit=limit, meaning=meaning, measure=measure)
    for name, limit, meaning, measure in (
        ("cached = uncached", ROUNDING, "one token at a time = all at once", _cached),
        ("batch = single", ROUNDING, "a row among others = by itself", _batched),
        ("packed = alone", ROUNDING, "texts in one row = each by itself", _packed),
        ("1 × 8 = 8 × 1", ROUNDING, "gradient of a batch = of its parts", _accumulated),
        ("ours = torch's", ROUNDING, "gradient of a batch by our kernels", _native),
        (
            "C cached = uncached",
            0,
            "by our own decoder, to the bit",
            partial(_decoded, measure=decoding.cached),
        ),
        (
            "C batch = single",
            0,
            "by our own decoder, to the bit",
            partial(_decoded, measure=decoding.batched),
        ),
        (
            "C = torch",
            ROUNDING,
            "logits by our own decoder in fp32",
            partial(_decoded, measure=decoding.beside_torch),
        ),
        ("1 thread = all", ROUNDING, "however the work is shared", _threaded),
        ("saved = loaded", 0, "tensors that a checkpoint changed", _saved),
        ("same seed = same draw", 0, "tokens one seed drew otherwise", _drawn),
        ("int8 ≈ fp32", 1.5, "error ÷ that of rounding to 8 bits", _rounded),
    )
)
