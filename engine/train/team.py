"""Several processes of one machine that work out a gradient together.

    leader   batch k ─┬─ parts 0, n, 2n, …  → gradient ──────(+)─ clip, optimizer step ─ batch k + 1
    worker 1          ├─ parts 1, n + 1, …  → gradient, sums ─┤
    worker 2          └─ parts 2, n + 2, …  → gradient, sums ─┘

The model lies in memory that all of them see. Only the leader changes it, while the others wait for
the number of the next step; each of those writes gradients to memory of its own, which the leader
reads in a fixed order. So there is one optimizer and nothing to keep in step, and a run with as
many processes gives the same bits. Source: Li et al. 2020, arXiv:2006.15704 (data parallelism,
there with a model in each process).
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from multiprocessing.connection import Connection, Pipe
from queue import SimpleQueue
from threading import Thread

import torch
from torch import Tensor

from engine.config import Recipe
from engine.errors import RecipeError, ResourceError
from engine.hardware import keep_heap, use_threads
from engine.model.transformer import Transformer
from engine.train.gradient import Share, Sums
from engine.train.shared import Shared, move, numbers, with_numbers, without_numbers

PROGRAM = (
    "import sys; sys.path[:] = sys.argv[4:]; from engine.train.team import serve;"
    " serve(*map(int, sys.argv[1:4]))"
)
NOTHING = Sums(nats=0.0, targets=0, tokens=0)


def check_processes(recipe: Recipe, device: torch.device) -> None:
    """Refuse several processes where they would not help. Raises: RecipeError."""
    if recipe.train.processes > 1 and device.type != "cpu":
        raise RecipeError(
            f"train.processes={recipe.train.processes} shares out the work of a CPU; on {device}"
            " leave it at 1, or set run.device=cpu"
        )


def together(
    share: Share, processes: int, threads: int
) -> AbstractContextManager[Callable[[int], Sums]]:
    """Return a share of everything as it is, or a team where several processes are to work it out.

    Raises: ResourceError if one of them does not start.
    """
    return Team(share, processes, threads) if processes > 1 else nullcontext(share)


class Team:
    """A gradient like that of a `Share` of everything, by several processes."""

    def __init__(self, share: Share, processes: int, threads: int) -> None:
        """Move the model to shared memory and start the other processes.

        `share.batches` and `share.loss` are sent to them, pickled.

        Raises: ResourceError if one of them does not start.
        """
        self.share, self.threads = replace(share, of=processes), threads
        self.each = max(1, threads // processes)  # threads of a process
        self.trained = _trained(share.model)
        weights = move(share.model)
        self.workers: list[_Worker] = []
        try:
            for rank in range(1, processes):
                self.workers.append(_Worker(f"{rank + 1} of {processes}", weights, self.trained))
            sent = replace(self.share, model=without_numbers(share.model))
            for rank, worker in enumerate(self.workers, start=1):
                worker.send((replace(sent, rank=rank), self.each))
            for worker in self.workers:
                worker.receive()
        except BaseException:
            self.close()
            raise
        finally:
            weights.close()

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, step: int) -> Sums:
        """Add the gradient of batch `step` to that on the parameters.

        Raises: ResourceError if a process failed or is gone.
        """
        for worker in self.workers:
            worker.send(step)
        use_threads(self.each)
        try:
            sums = self.share(step)
        finally:
            use_threads(self.threads)  # between gradients the others are idle
        gradients = [p.grad for p in self.trained if p.grad is not None]
        for worker in self.workers:  # in this order each time: floats add up differently in others
            sums += worker.receive()
            torch._foreach_add_(gradients, worker.gradients)
        self.share.clock.lap("other processes")
        return sums

    def close(self) -> None:
        """End the other processes."""
        for worker in self.workers:
            worker.close()


def _trained(model: Transformer) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class _Worker:
    """A process with its own share, seen from the leader."""

    def __init__(self, name: str, weights: Shared, trained: Sequence[Tensor]) -> None:
        self.name = name
        shared = Shared(trained)
        self.gradients = shared.tensors
        self.connection, theirs = Pipe()
        files = (theirs.fileno(), weights.file, shared.file)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *map(str, files), *sys.path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=files,
                start_new_session=True,  # Ctrl-C is the leader's, who finishes the step and saves
            )
        except OSError as error:
            raise ResourceError(f"cannot start process {name}: {error}") from None
        finally:
            theirs.close()
            shared.close()

    def send(self, message: object) -> None:
        """Send what is to be done."""
        try:
            self.connection.send(message)
        except OSError:
            raise self._ended() from None

    def receive(self) -> Sums:
        """Wait for the sums of a share whose gradient is done."""
        try:
            reply = self.connection.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        if isinstance(reply, str):
            raise ResourceError(f"process {self.name} failed: {reply}")
        return reply

    def _ended(self) -> ResourceError:
        code = self.process.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        return ResourceError(
            f"process {self.name} {how}, perhaps for want of memory; go on with --resume, where a"
            " smaller train.processes takes less"
        )

    def close(self) -> None:
        """End the process; it has nothing that would be lost."""
        self.process.kill()
        self.process.wait()
        self.connection.close()


def serve(channel: int, weights: int, gradients: int) -> None:
    """Work out a share of each batch until the leader is gone: what the other processes run.

    The arguments are numbers of open files: of the connection, and of shared memory.
    """
    connection = Connection(channel)
    with suppress(EOFError, OSError):
        share, threads = connection.recv()
        orders = SimpleQueue[int]()
        Thread(target=_listen, args=(connection, orders), daemon=True).start()
        keep_heap()
        use_threads(threads)
        model = with_numbers(share.model, Shared(numbers(share.model), weights).tensors)
        share = replace(share, model=model)
        own = Shared(_trained(model), gradients).tensors
        for parameter, gradient in zip(_trained(model), own, strict=True):
            parameter.grad = gradient
        connection.send(NOTHING)
        while True:
            step = orders.get()
            torch._foreach_zero_(own)
            connection.send(_work(share, step))


def _listen(connection: Connection, orders: "SimpleQueue[int]") -> None:
    """Pass on the leader's orders, and end at once when it ends, in the middle of a step too."""
    with suppress(EOFError, OSError):
        while True:
            orders.put(connection.recv())
    os._exit(0)


def _work(share: Share, step: int) -> Sums | str:
    """Return the sums of a share, or why there are none."""
    try:
        return share(step)
    except (RuntimeError, MemoryError) as error:  # torch has no type of its own for want of memory
        return f"{type(error).__name__}: {error}".splitlines()[0]
