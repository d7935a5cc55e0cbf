"""`make bench`: every figure of the README's performance table beside its peers, in one run.

    make bench                              all rows, some 40 minutes on two cores
    make bench ROWS="train-13m nanogpt"     some of them
    make bench ROWS=--list                  what there is

Each line is printed as it is found and written, with every repetition and a description of the
machine, to a file of JSON lines. A row whose peer is not installed says so and is left out.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from cli.options import CHECKPOINTS, cache_folder
from tests.bench.pairs import Rounds
from tests.bench.report import Missing, Options, Result, line, machine, record
from tests.bench.rows import ROWS

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("rows", nargs="*", metavar="ROW", help="rows to measure; all without any")
    add("--list", action="store_true", help="name the rows and end")
    add("--out", type=Path, default=CHECKPOINTS / "bench.jsonl", help="where JSON lines go")
    add("--model", type=Path, default=CHECKPOINTS / "smollm2", help="SmolLM2-135M")
    add("--gguf", type=Path, default=cache_folder() / "wheels" / GGUF, help="its Q4_1 file")
    add("--llama-python", default="", help="a Python that has llama-cpp-python; this one else")
    add("--rounds", type=int, default=Rounds().most, help="repetitions of each side")
    add("--seconds", type=float, default=Rounds().seconds, help="no more rounds after so long")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="for lm train stdlib")
    chosen = parser.parse_args()
    if unknown := [name for name in chosen.rows if name not in ROWS]:
        parser.error(f"no row {unknown[0]}; there are: {', '.join(ROWS)}")
    return chosen


def main() -> None:
    """Measure the rows that were asked for."""
    chosen = arguments()
    if chosen.list:
        for name, row in ROWS.items():
            print(f"{name:<20} {row.about}" + (f" (asked {row.asked})" if row.asked else ""))
        return
    options = Options(
        model=chosen.model.resolve(),
        gguf=chosen.gguf,
        llama_python=chosen.llama_python or sys.executable,
        rounds=Rounds(most=chosen.rounds, seconds=chosen.seconds),
        overrides=tuple(chosen.set),
    )
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    about = machine()
    print(
        f"{about['machine']['cpu']}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    with chosen.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(about) + "\n")
        for name in chosen.rows or ROWS:
            row = ROWS[name]
            try:
                for result in row.measure(options):
                    print(line(name, result, row.asked), flush=True)
                    file.write(record(name, result, row.asked) + "\n")
            except Missing as error:
                result = Result(ours="skipped", note=str(error))
                print(line(name, result, row.asked), flush=True)
                file.write(record(name, result, row.asked) + "\n")
            file.flush()
    print(f"every repetition is in {chosen.out}")


if __name__ == "__main__":
    main()
