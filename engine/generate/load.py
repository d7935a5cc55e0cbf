"""The one place where what generates is chosen: our own C, or torch.

Torch is imported only where it is needed: that takes longer than an answer of a small model.
"""

from pathlib import Path

from engine.errors import RecipeError
from engine.generate.decoder import Decoder
from engine.text.tokenizer import Tokenizer


def load_decoder(
    folder: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    kernels: str = "auto",
    kv: str = "auto",
    cache: Path,
    threads: int = 0,
) -> tuple[Decoder, Tokenizer]:
    """Load a checkpoint to generate with.

    `dtype` auto computes in the precision of the file; `kernels` torch keeps to torch; `kv` is how
    keys and values lie in memory; `cache` is where libraries built for this machine are kept.

    Raises: CheckpointError if the checkpoint is not whole; RecipeError for what torch cannot do.
    """
    for option, value, usual in (("dtype", dtype, ("auto", "fp32", "bf16")), ("kv", kv, ("auto",))):
        if value not in usual:
            raise RecipeError(
                f"--{option} {value} needs our own kernels, which are not in use here"
            )
    from engine.generate.reference import load_reference

    return load_reference(folder, device, dtype, threads)
