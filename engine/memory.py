"""What training takes of memory at its peak, part by part, before anything is made.

    weights, gradients, optimizer    counted, to the number
    activations                      what the blocks keep for their backward pass, and its scratch
    logits                           the chunk of the loss, and the gradients of the head
    torch                            the program: code, threads, libraries

The constants below are all that is fitted rather than counted: `tests/engine/test_memory.py` trains
in fresh processes (slow) and prints what they took beside what is predicted here. When the step
computes otherwise, these are what changes, and nothing else in the project.
"""

from engine.config import ModelConfig, TrainConfig
from engine.cost import lora_parameters, parameters

TORCH = 340_000_000  # bytes of a process that has taken a step of a model of no size
# Bytes that a block keeps per token and number of width D, of width F: by precision.
KEPT = {"float32": (76.0, 22.0), "bfloat16": (76.0, 22.0)}
SCRATCH = 0.0  # of one more block, while its gradient is worked out
LOGITS = 12  # bytes per token of the loss's chunk and entry of the vocabulary
HEAD = 8  # bytes per number of the head, for its gradient in the making


def training_memory(
    config: ModelConfig, train: TrainConfig, tokens: int, dtype: str = "float32"
) -> dict[str, int]:
    """Return the bytes of each part at the peak, with `tokens` in the largest part of a batch.

    `dtype` is that of matrix products, as torch names it. With several processes, all of them
    count: each has a gradient, activations and a torch of its own; the weights are there once.
    """
    count = parameters(config)
    total, blocks = sum(count.values()), count["attention"] + count["mlp"]
    lora, processes = train.lora, train.processes
    added = lora_parameters(config, lora.rank, lora.targets) if lora.rank else 0
    trained = added or total
    narrow = 3 * blocks if lora.rank and lora.base == "int8" else 0  # bytes that 8 bits save
    # Muon remembers one number of a matrix; AdamW two of everything, the factors of a LoRA too.
    remembered = 2 * trained - (blocks if train.optim.name == "muon" and not lora.rank else 0)
    width, hidden = KEPT.get(dtype, KEPT["float32"])
    block = width * config.d_model + hidden * config.d_ff
    kept = config.n_layers * block
    if train.recompute:
        kept = block + 4 * config.n_layers * config.d_model
    chunk = min(train.loss_chunk, tokens)
    head = 0 if lora.rank else HEAD * config.vocab_size * config.d_model
    return {
        "torch": processes * TORCH,
        "weights": 4 * (total + added) - narrow,
        "gradients": processes * 4 * trained,
        "optimizer": 4 * remembered,
        "activations": processes * round(kept * tokens),
        "logits": processes * (LOGITS * chunk * config.vocab_size + head),
    }


def needed_memory(parts: dict[str, int]) -> int:
    """Return what a process that runs already still has to get."""
    return sum(parts.values()) - TORCH
