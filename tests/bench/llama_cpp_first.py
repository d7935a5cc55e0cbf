"""The llama.cpp side of the row about a cold start: load, read a prompt, write what comes first.

PYTHON llama_cpp_first.py FILE.gguf PROMPT NEW
"""

import os
import sys

from llama_cpp import Llama


def main(file: str, prompt: str, new: str) -> None:
    """Continue a prompt greedily and write each piece at once."""
    threads = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    model = Llama(file, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    for piece in model(prompt, max_tokens=int(new), temperature=0.0, stream=True):
        print(piece["choices"][0]["text"], end="", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
