"""The llama.cpp side of inference.py, for an interpreter that has llama-cpp-python and no lm.

PYTHON llama_cpp_side.py FILE.gguf 20,7939,15858 NEW REPEATS
"""

import json
import os
import resource
import sys
import time

from llama_cpp import Llama


def main(file: str, ids: str, new: str, repeats: str) -> None:
    """Time prefill and greedy decode, and say what they took, the first time left out."""
    prompt = [int(number) for number in ids.split(",")]
    threads = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    context = len(prompt) + int(new) + 1
    model = Llama(file, n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False)
    found = {"prefill": [], "decode": []}
    for _ in range(1 + int(repeats)):
        model.reset()
        began = time.perf_counter()
        model.eval(prompt)
        read = time.perf_counter()
        for _ in range(int(new)):
            model.eval([model.sample(temp=0.0)])
        found["prefill"].append(read - began)
        found["decode"].append((time.perf_counter() - read) / int(new))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    timed = {key: seconds[1:] for key, seconds in found.items()}
    print(json.dumps({**timed, "peak_memory": peak * (1 if sys.platform == "darwin" else 1024)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
