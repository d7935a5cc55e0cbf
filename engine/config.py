"""The whole vocabulary of a recipe: one frozen tree of settings, each with default and meaning.

A default lives here and nowhere else; a recipe file holds only its differences. `engine/recipe.py`
fills the tree from YAML and the command line.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal


def setting(default: Any, doc: str, *, low: float | None = None, high: float | None = None) -> Any:
    """Declare a recipe field: its default, its one-line meaning and its allowed range."""
    return dataclasses.field(default=default, metadata={"doc": doc, "low": low, "high": high})


def section(kind: type, doc: str) -> Any:
    """Declare a nested branch of the recipe."""
    return dataclasses.field(default_factory=kind, metadata={"doc": doc})


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Where a run lives and what it runs on."""

    name: str = setting("", "folder under checkpoints/ to write to; empty takes the recipe's name")
    seed: int = setting(1337, "fixes weights, data order and dropout", low=0, high=2**62)
    device: Literal["auto", "cpu", "cuda", "mps"] = setting(
        "auto", "where to compute; auto takes cuda, then mps, then cpu"
    )
    dtype: Literal["auto", "fp32", "bf16", "int8"] = setting(
        "auto", "matmul precision; auto: bf16 where it is native, else int8 by our kernels"
    )
    kernels: Literal["auto", "torch"] = setting(
        "auto", "auto: our own C kernels, built on this machine, where it can; torch: never"
    )
    threads: int = setting(0, "CPU threads; 0 takes one per core", low=0, high=1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched so that a model reads further than it first learned."""

    kind: Literal["none", "linear", "yarn", "llama3", "longrope"] = setting(
        "none", "none, all alike, by frequency (yarn, llama3), or by a factor each (longrope)"
    )
    factor: float = setting(1.0, "how much longer the context became", low=1)
    original_max_seq_len: int = setting(0, "context before the stretch, in tokens", low=0)
    low_freq_factor: float = setting(1.0, "llama3: fewer turns than this are stretched", low=0)
    high_freq_factor: float = setting(4.0, "llama3: more turns than this are left alone", low=0)
    beta_fast: float = setting(32.0, "yarn: more turns than this are left alone", low=0)
    beta_slow: float = setting(1.0, "yarn: fewer turns than this are stretched", low=0)
    attention_factor: float = setting(
        0.0, "multiplies cosine and sine; 0 takes what yarn or longrope derive", low=0
    )
    short_factors: tuple[float, ...] = setting((), "longrope: divisors up to the old context")
    long_factors: tuple[float, ...] = setting((), "longrope: divisors beyond the old context")

    def __post_init__(self) -> None:
        if self.kind in ("yarn", "llama3", "longrope") and not self.original_max_seq_len:
            raise ValueError(f"model.rope_scaling.kind={self.kind} needs original_max_seq_len")
        if self.kind == "longrope" and not min((2.0, *self.short_factors, *self.long_factors)) > 0:
            raise ValueError("model.rope_scaling: factors of longrope must be above 0")
        if self.kind == "longrope" and self.original_max_seq_len < 2 and not self.attention_factor:
            raise ValueError("model.rope_scaling.original_max_seq_len=1 has no attention_factor")
        if self.kind == "yarn" and not min(self.beta_fast, self.beta_slow) > 0:
            raise ValueError("model.rope_scaling: beta_fast and beta_slow must be above 0")
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError("model.rope_scaling.low_freq_factor is not below high_freq_factor")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape of the transformer. The defaults give a small Qwen3."""

    vocab_size: int = setting(
        0, "rows of the embedding; 0 takes the tokenizer's", low=0, high=1 << 24
    )
    d_model: int = setting(256, "width of the residual stream (D)", low=2, high=1 << 20)
    n_layers: int = setting(6, "transformer blocks (L)", low=1, high=1024)
    n_heads: int = setting(4, "query heads (N)", low=1, high=1 << 14)
    n_kv_heads: int = setting(0, "key/value heads (K); 0 takes n_heads", low=0, high=1 << 14)
    head_dim: int = setting(
        0, "width of a head (H); 0 takes d_model / n_heads", low=0, high=1 << 16
    )
    d_ff: int = setting(
        0, "hidden width of the MLP (F); 0 takes 8/3 d_model, to the next 32", low=0, high=1 << 22
    )
    max_seq_len: int = setting(
        1024, "longest context the model accepts, in tokens", low=1, high=1 << 27
    )
    norm: Literal["rmsnorm", "layernorm"] = setting("rmsnorm", "kind of normalisation")
    norm_eps: float = setting(1e-6, "added to the variance in normalisation", low=0)
    norm_offset: bool = setting(False, "norm weights are stored as their distance from one")
    norm_placement: Literal["pre", "post", "sandwich"] = setting(
        "pre", "normalise what a branch reads, what it adds to the stream, or both"
    )
    qk_norm: Literal["none", "head", "width"] = setting(
        "head", "normalise queries and keys: not, per head, or over all heads at once"
    )
    position: Literal["rope", "learned", "none"] = setting("rope", "how positions are encoded")
    rope_theta: float = setting(10000.0, "base of the rotary frequencies", low=1)
    local_rope_theta: float = setting(
        0.0, "base in windowed layers, unscaled; 0 treats them like the others", low=0
    )
    rotary_dim: int = setting(0, "leading numbers of a head that rotate; 0 takes head_dim", low=0)
    no_rope_every: int = setting(0, "every n-th layer knows no positions; 0 means none", low=0)
    rope_scaling: RopeScaling = section(RopeScaling, "context extension")
    activation: Literal["swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "relu2"] = setting(
        "swiglu", "MLP non-linearity; tanh names the approximation of GELU"
    )
    attention_bias: bool = setting(False, "biases on the q, k and v projections")
    output_bias: bool = setting(False, "bias on the attention output projection")
    mlp_bias: bool = setting(False, "biases in the MLP")
    attention_width: int = setting(
        0, "scores are divided by the root of this; 0 takes head_dim", low=0
    )
    attention_softcap: float = setting(0.0, "squash scores to ±this by tanh; 0 means off", low=0)
    sliding_window: int = setting(
        0, "tokens a windowed layer sees; 0 means no window", low=0, high=1 << 30
    )
    full_every: int = setting(0, "with a window, every n-th layer is full; 0 means none is", low=0)
    window_from: int = setting(0, "with a window, the first layer that may have it", low=0)
    tie_embeddings: bool = setting(False, "use the embedding matrix as output head too")
    scale_embeddings: bool = setting(False, "multiply embeddings by the root of d_model")
    logit_softcap: float = setting(0.0, "squash logits to ±this by tanh; 0 means off", low=0)

    def __post_init__(self) -> None:
        # Derived sizes are filled in here so that every reader sees real numbers, never the 0.
        fill = object.__setattr__
        if not self.n_kv_heads:
            fill(self, "n_kv_heads", self.n_heads)
        if not self.head_dim:
            if self.d_model % self.n_heads:
                raise ValueError(
                    f"model.d_model={self.d_model} is not divisible by model.n_heads="
                    f"{self.n_heads}; change one or set model.head_dim"
                )
            fill(self, "head_dim", self.d_model // self.n_heads)
        if not self.d_ff:
            fill(self, "d_ff", 32 * math.ceil(self.d_model * 8 / 3 / 32))
        if not self.rotary_dim:
            fill(self, "rotary_dim", self.head_dim)
        if not self.attention_width:
            fill(self, "attention_width", self.head_dim)
        if not self.sliding_window:  # without a window every layer is full
            fill(self, "full_every", 0)
            fill(self, "window_from", 0)
            fill(self, "local_rope_theta", 0.0)
        for problem in self._problems():
            raise ValueError(problem)

    def _problems(self) -> Iterator[str]:
        """Say what does not fit together."""
        if self.n_heads % self.n_kv_heads:
            yield (
                f"model.n_heads={self.n_heads} is not a multiple of model.n_kv_heads="
                f"{self.n_kv_heads}"
            )
        if self.norm_offset and self.norm == "layernorm":
            yield "model.norm_offset is for rmsnorm; layernorm stores its weights as they are"
        if self.position != "rope":
            return
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            yield (
                f"model.rotary_dim={self.rotary_dim} must be even and at most model.head_dim="
                f"{self.head_dim}, for rotary positions"
            )
        if self.rope_scaling.kind == "yarn" and self.rope_theta == 1:
            yield "model.rope_theta=1 turns all pairs alike; yarn cannot tell them apart"
        if self.rope_scaling.kind == "longrope":
            for factors in (self.rope_scaling.short_factors, self.rope_scaling.long_factors):
                if len(factors) != self.rotary_dim // 2:
                    yield (
                        f"model.rope_scaling has {len(factors)} factors; half of model.rotary_dim="
                        f"{self.rotary_dim} are needed"
                    )

    def window(self, layer: int) -> int:
        """Return how many tokens `layer` may look back over, itself included; 0 means all."""
        full = self.full_every and (layer + 1) % self.full_every == 0
        return 0 if full or layer < self.window_from else self.sliding_window

    def rotates(self, layer: int) -> bool:
        """Tell whether the queries and keys of `layer` are rotated by their positions."""
        skipped = self.no_rope_every and (layer + 1) % self.no_rope_every == 0
        return self.position == "rope" and not skipped


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer: an existing one, or one to learn from the training text."""

    path: str = setting("", "folder or tokenizer.json to use; empty learns a new one")
    vocab_size: int = setting(
        4096, "most tokens to learn, specials included", low=260, high=1 << 20
    )
    split: Literal["gpt4", "line", "none"] = setting(
        "gpt4", "where merges may not cross: word-like pieces, lines, or nowhere"
    )
    sample_bytes: int = setting(50_000_000, "bytes of training text to learn merges from", low=1)


FileFormat = Literal["auto", "text", "jsonl", "parquet"]
RowFormat = Literal["auto", "text", "prompt", "alpaca", "messages", "sharegpt", "tokens"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """The text to learn from and how it is cut up."""

    train: str = setting("stdlib", "stdlib, pydoc, a file, folder, glob, or - for standard input")
    valid: str = setting("", "text to evaluate on; empty holds documents out of data.train")
    holdout: int = setting(
        20, "hold out one document in this many, by hash of its name (of a row: its content)", low=2
    )
    format: Literal[FileFormat, RowFormat] = setting(
        "auto", "train: kind of file; finetune: kind of row; auto goes by what is there"
    )
    column: str = setting("text", "field of a JSONL or parquet row that holds the text")
    columns: str = setting("", "finetune: rename fields of rows, prompt=question,completion=answer")
    seq_len: int = setting(256, "tokens of context per training sequence (T)", low=1)
    chat: Literal["auto", "template", "plain"] = setting(
        "auto",
        "finetune: prompts by the chat template or as they are; auto: if it has one",
    )
    learn: Literal["answers", "last", "all"] = setting(
        "answers", "finetune: learn every answer, the last of each row, or prompts too"
    )
    overlong: Literal["error", "drop", "truncate", "split"] = setting(
        "error", "finetune: what becomes of rows longer than seq_len; answers are never cut off"
    )
    packing: bool = setting(True, "finetune: fill a sequence with several rows, each on its own")
    replay: str = setting("", "finetune: text not to be forgotten; empty takes the base's own")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """How gradients become updates."""

    name: Literal["muon", "adamw"] = setting("muon", "optimizer of the blocks' weight matrices")
    lr: float = setting(
        0.0, "peak rate of the matrices; 0 takes 0.015 for muon, 0.002 for adamw", low=0
    )
    embed_lr: float = setting(0.3, "peak AdamW rate of an embedding that is not tied", low=0)
    head_lr: float = setting(0.008, "peak AdamW rate of head, tied embedding, norms, biases", low=0)
    momentum: float = setting(0.95, "Muon's momentum", low=0, high=0.9999)
    beta1: float = setting(0.9, "AdamW's decay of the gradient mean", low=0, high=0.9999)
    beta2: float = setting(0.95, "AdamW's decay of the gradient square", low=0, high=0.9999)
    eps: float = setting(1e-10, "AdamW's guard against division by zero", low=0)
    weight_decay: float = setting(0.0, "decoupled decay of the weight matrices, times lr", low=0)
    clip: float = setting(1.0, "largest gradient norm; 0 means no clipping", low=0)

    def __post_init__(self) -> None:
        if not self.lr:
            object.__setattr__(self, "lr", {"muon": 0.015, "adamw": 0.002}[self.name])


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """A small trainable product beside each frozen matrix: W x + alpha / rank · B A x."""

    rank: int = setting(0, "width of the product (R); 0 trains all weights", low=0, high=4096)
    alpha: float = setting(0.0, "its weight, times rank; 0 takes 2 · rank", low=0)
    dropout: float = setting(0.0, "share of its input dropped in training", low=0, high=0.9)
    targets: Literal["all", "attention", "mlp"] = setting("all", "which matrices of a block get it")
    base: Literal["fp32", "int8"] = setting("fp32", "how the frozen matrices are held in memory")

    def __post_init__(self) -> None:
        if not self.alpha:
            object.__setattr__(self, "alpha", 2.0 * self.rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the run, as a factor of its peak."""

    name: Literal["wsd", "cosine", "constant"] = setting("wsd", "shape after the warm-up")
    warmup: int = setting(20, "steps of linear rise", low=0)
    decay: float = setting(0.5, "share of all steps spent falling, for wsd", low=0, high=1)
    floor: float = setting(0.0, "factor that the fall ends at", low=0, high=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How long and in what bites to train."""

    base: str = setting("", "finetune: the checkpoint to start from")
    steps: int = setting(0, "optimizer updates; 0 takes as many as fit train.budget", low=0)
    budget: str = setting("5m", "training time if steps is 0: 90s, 5m, 1h", low=None)
    batch_size: int = setting(32, "sequences per update", low=1)
    accumulate: int = setting(1, "parts a batch is computed in; same update, less memory", low=1)
    dropout: float = setting(
        0.0, "share of each branch's output dropped in training", low=0, high=0.9
    )
    loss_chunk: int = setting(1024, "tokens whose logits exist at once in the loss", low=1)
    recompute: bool = setting(False, "compute each block again for its gradient; less memory")
    processes: int = setting(1, "processes that share each batch's parts", low=1, high=64)
    replay: float = setting(
        0.0, "finetune: share of tokens taken from data.replay against forgetting", low=0, high=0.9
    )
    lora: LoraConfig = section(LoraConfig, "finetune: low-rank adaptation")
    optim: OptimConfig = section(OptimConfig, "optimizer")
    schedule: ScheduleConfig = section(ScheduleConfig, "learning-rate schedule")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """What is measured and kept while training."""

    every: int = setting(0, "steps between evaluations; 0 means five in a run", low=0)
    bytes: int = setting(100_000, "held-out bytes per evaluation on the way", low=1)
    final_bytes: int = setting(2_000_000, "held-out bytes of the evaluation at the end", low=1)
    seq_len: int = setting(0, "context when scoring; 0 takes data.seq_len", low=0)
    overlap: int = setting(
        4, "train: at the end, windows move on by seq_len / overlap tokens", low=1
    )
    save_every: str = setting("60s", "time or steps between checkpoints: 60s, 10m, 500")
    log_every: int = setting(10, "steps between lines when output is not a terminal", low=1)
    prompt: str = setting("", "text continued at each evaluation; empty means none")
    answers: int = setting(
        0, "finetune: held-out rows answered word for word at the end; 0 means none", low=0
    )
    texts: str = setting("", "finetune: more texts to score before and after: pydoc,notes.txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleConfig:
    """How the next token is chosen. Order: penalty, temperature, top-k, top-p, min-p."""

    temperature: float = setting(0.8, "divides the logits; 0 takes the most likely token", low=0)
    top_k: int = setting(0, "keep the k most likely tokens; 0 keeps all", low=0)
    top_p: float = setting(1.0, "keep the smallest set with this much probability", low=0, high=1)
    min_p: float = setting(0.0, "drop tokens below this share of the likeliest", low=0, high=1)
    repetition_penalty: float = setting(1.0, "divide the score of tokens already seen", low=0.01)
    max_tokens: int = setting(200, "most tokens to generate", low=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that determines a run."""

    run: RunConfig = section(RunConfig, "where it lives, what it runs on")
    model: ModelConfig = section(ModelConfig, "shape of the transformer")
    tokenizer: TokenizerConfig = section(TokenizerConfig, "text to token ids")
    data: DataConfig = section(DataConfig, "text to learn from")
    train: TrainConfig = section(TrainConfig, "length, batch, optimizer, schedule")
    eval: EvalConfig = section(EvalConfig, "measuring and saving on the way")
    sample: SampleConfig = section(SampleConfig, "defaults for generating")
