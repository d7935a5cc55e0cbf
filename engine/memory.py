"""What training takes of memory at its peak, part by part, before anything is made.

    weights, gradients, optimizer    counted, to the number
    activations                      what the blocks keep for their backward pass, and its scratch
    logits                           the chunk of the loss
    torch                            the program: code, threads, libraries

The constants below are all that is fitted rather than counted: `tests/engine/test_memory.py` trains
in fresh processes (slow) and prints what they took beside what is predicted here. When the step
computes otherwise, these are what changes, and nothing else in the project.
"""

from engine.config import ModelConfig, TrainConfig
from engine.cost import GATED, lora_parameters, parameters

TORCH = 400_000_000  # bytes of a run of a model of no size: program, libraries, data
# How much more the heap grows than is alive at once, by the precision of products. glibc leaves
# holes between aligned blocks that it cannot fill again; an allocator that can would be near 1.1.
HEAP = {"float32": 1.6, "bfloat16": 1.57, "int8": 1.6}
RECOMPUTED = 11  # numbers of width D a block takes per token if it computes the rest again
LOGITS = 15  # bytes per token of the loss's chunk and entry of the vocabulary
OUR_LOGITS = 8  # the same by our kernels, which turn logits into their gradient in place
ACCUMULATED = 8  # bytes per trained parameter, if a batch comes in parts


def training_memory(
    config: ModelConfig,
    train: TrainConfig,
    rows: int,
    length: int,
    dtype: str = "float32",
    ours: bool = False,
) -> dict[str, int]:
    """Return the bytes of each part at the peak, with `rows` × `length` tokens at a time.

    `dtype` is that of matrix products, as torch names it; `ours` is whether our kernels run. With
    several processes, all of them count: each has gradients, activations and a torch of its own; the weights are there once.
    """
    count = parameters(config)
    total, blocks = sum(count.values()), count["attention"] + count["mlp"]
    lora, processes, tokens = train.lora, train.processes, rows * length
    added = lora_parameters(config, lora.rank, lora.targets) if lora.rank else 0
    trained = added or total
    narrow = 3 * blocks if lora.rank and lora.base == "int8" else 0  # bytes that 8 bits save
    # Muon remembers one number of a matrix; AdamW two of everything, the factors of a LoRA too.
    remembered = 2 * trained - (blocks if train.optim.name == "muon" and not lora.rank else 0)
    block = _kept(config, length, ours, dtype == "int8")
    kept = config.n_layers * block
    if train.recompute:
        kept = block + RECOMPUTED * config.n_layers * config.d_model
    kept *= 4 * HEAP.get(dtype, HEAP["float32"])
    chunk = min(train.loss_chunk, tokens)
    gradients = 4 * trained + (ACCUMULATED * trained if train.accumulate > 1 else 0)
    return {
        "torch": processes * TORCH,
        "weights": 4 * (total + added) - narrow,
        "gradients": processes * gradients,
        "optimizer": 4 * remembered,
        "activations": processes * round(kept * tokens),
        "logits": processes * (OUR_LOGITS if ours else LOGITS) * chunk * config.vocab_size,
    }


def needed_memory(parts: dict[str, int]) -> int:
    """Return what a process that runs already still has to get."""
    return sum(parts.values()) - TORCH


def _kept(config: ModelConfig, length: int, ours: bool, eight_bits: bool) -> float:
    """Count the numbers per token that a block keeps for its backward pass.

    Of width D: the stream before each branch, and normalised. Queries and keys: as projected, if
    they are normalised, and as rotated; values; what attention returns. Of width F: what is read
    and written by the activation and by the product with the gate, which our kernels make one. In
    8 bits, what a matrix read is kept at a quarter of its size.
    """
    normed = config.qk_norm != "none"
    queries = (2 + normed) * config.n_heads * config.head_dim
    keys = (2 + normed) * config.n_kv_heads * config.head_dim
    hidden = (4 if config.activation in GATED else 2) * config.d_ff
    if ours and config.activation == "swiglu":
        hidden -= config.d_ff
    read = 0.0
    if eight_bits:  # two normalised streams and the last of F; what attention returned, once more
        read = config.n_heads * config.head_dim / 4 - 0.75 * (2 * config.d_model + config.d_ff)
    scores = 2 * config.n_heads * length if config.attention_softcap else 0  # no fused kernel
    return 4 * config.d_model + queries + keys + hidden + scores + read
