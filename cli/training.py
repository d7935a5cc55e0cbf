"""Showing a training run: live on a terminal, a line per interval elsewhere, JSON on request."""

import contextlib
import os
import shlex
import signal
import statistics
import time
from collections import deque
from collections.abc import Iterator
from itertools import filterfalse
from pathlib import Path
from typing import Any, Protocol

from cli.plots import Curve, draw
from cli.render import clock, console, count, emit_json, say, size
from engine.data.pack import PackProgress
from engine.forecast import checkpoint_bytes
from engine.generate.decode import generate, prefill
from engine.generate.reference import TorchDecoder
from engine.peak import peak_memory
from engine.train.loop import TrainStep
from engine.train.plan import MEASURED, Plan
from engine.train.prepare import Doing
from engine.train.run import Evaluated, Event, Finished, Interrupted, Prepared, Saved

REFRESH = 0.25  # seconds between two pictures of the live display
CURVE = 1000  # points of the loss curve that are kept: enough for any terminal


class Stop:
    """A request to stop, from Ctrl-C, SIGTERM or a closed terminal.

    While steps are taken (`armed`) the first signal asks the run to finish its step and save; at
    any other time, and the second time, it ends the program at once.
    """

    def __init__(self) -> None:
        self.armed = False
        self.asked = False

    def __enter__(self) -> "Stop":
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        self.before = {number: signal.signal(number, self._ask) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self.asked or not self.armed:
            os._exit(128 + number)
        self.asked = True
        say("\nstopping after this step; again to stop at once")


def resume_command(name: str, words: list[str], out: Path | None, cache: Path | None) -> str:
    """Return the command that continues a run, ready to be pasted."""
    options = [("-o", out), ("--cache", cache)]
    given = [word for option, path in options if path for word in (option, str(path))]
    return shlex.join(["lm", name, *words, *given])


class Progress:
    """What is known of a run so far, from its events."""

    def __init__(self) -> None:
        self.prepared: Prepared | None = None
        self.plan: Plan | None = None
        self.step: TrainStep | None = None
        self.losses: list[tuple[float, float]] = []  # smoothed
        self.level = 0.0
        self.score: Evaluated | None = None
        self.recent: deque[TrainStep] = deque(maxlen=20)
        self.sample = ""
        self.doing = "preparing"
        self.began = time.perf_counter()

    def take(self, event: Event) -> None:
        """Update from one event."""
        if isinstance(event, Doing):
            self.doing = event.what
        elif isinstance(event, PackProgress):
            self.doing = f"tokenising {event.done / event.total:.0%} of {size(event.total)}"
        elif isinstance(event, Prepared):
            self.prepared = event
            self.began = time.perf_counter()
        elif isinstance(event, Plan):
            self.plan = event
        elif isinstance(event, TrainStep):
            self.step = event
            # A running mean over some twenty steps; when the curve is long, every other point goes.
            self.level += (event.loss - self.level) / min(len(self.losses) + 1, 20)
            self.losses.append((event.step, self.level))
            if len(self.losses) > 2 * CURVE:
                self.losses = self.losses[::2]
            self.recent.append(event)
        elif isinstance(event, Evaluated) and not event.final:
            self.score = event

    @property
    def steps(self) -> int | None:
        """The run's length, if it is known."""
        if self.prepared and self.prepared.recipe.train.steps:
            return self.prepared.recipe.train.steps
        return self.plan.steps if self.plan else None

    @property
    def speed(self) -> float:
        """Tokens per second over the last steps, by their median."""
        if not self.recent:
            return 0.0
        return self.recent[-1].seen / statistics.median(step.seconds for step in self.recent)

    @property
    def utilisation(self) -> float:
        """Model FLOPs utilisation: share of this machine's measured matmul peak."""
        assert self.prepared
        return self.speed * self.prepared.flops_per_token / self.prepared.peak_flops

    @property
    def trained(self) -> float:
        """Seconds since the first step of this process."""
        return time.perf_counter() - self.began

    @property
    def left(self) -> float | None:
        """Seconds to go, if the length is known."""
        if self.steps is None or self.step is None:
            return None
        return (self.steps - self.step.step) * self.step.seen / max(self.speed, 1e-9)


class Story(Protocol):
    """What is told of one kind of run: of `lm train`, of `lm finetune`."""

    @property
    def name(self) -> str:
        """The command, which JSON schemas begin with."""
        ...

    def header(self, prepared: Prepared) -> list[str]:
        """Say what is about to be learned, from what, on what."""
        ...

    def figure(self, event: Evaluated) -> str:
        """Say how good an evaluation found the model."""
        ...

    def sample(self, progress: "Progress") -> str:
        """Let the model write something, to see what was learned."""
        ...

    def take(self, event: Any) -> bool:
        """Take an event that only this kind of run has; tell whether it was one."""
        ...

    def report(self, finished: Finished, progress: "Progress", as_json: bool, quiet: bool) -> None:
        """Say how good the model is and what to do next."""
        ...


def show_run(
    events: Iterator[Any], stop: "Stop", command: str, story: Story, *, as_json: bool, quiet: bool
) -> bool:
    """Consume a run and show it; returns whether it came to its end."""
    screen = console(stderr=True)
    progress = Progress()
    live = None
    if screen.is_terminal and not as_json and not quiet:
        from rich.live import Live

        live = Live(console=screen, auto_refresh=False)
    last: Event | None = None
    shown, gone = 0.0, False
    with live or contextlib.nullcontext():
        for event in filterfalse(story.take, events):
            progress.take(event)
            stop.armed = _is_stepping(event)
            if as_json:
                gone = gone or not _json(event, story)
                stop.asked = stop.asked or gone  # nobody reads any more: stop, but save
            elif not quiet and isinstance(event, Evaluated) and not event.final:
                progress.sample = story.sample(progress)
            if live and (time.perf_counter() - shown > REFRESH or not isinstance(event, TrainStep)):
                live.update(_screen(progress, story, screen.width), refresh=True)
                shown = time.perf_counter()
            elif not live and not quiet:
                _plain(event, progress, story)
            last = event
    if isinstance(last, Interrupted):
        if as_json:
            emit_json(f"{story.name}/stopped", {"step": last.step, "folder": str(last.folder)})
        say(f"stopped at step {last.step}, saved {last.folder}/last")
        say(f"continue with: {command} --resume")
        if gone:
            raise SystemExit(128 + signal.SIGPIPE)
        return False
    assert isinstance(last, Finished)
    story.report(last, progress, as_json, quiet)
    return True


def _is_stepping(event: Event) -> bool:
    """Tell whether the run is among its steps, where it can stop and save."""
    if isinstance(event, Evaluated):
        return not event.final
    return isinstance(event, (TrainStep, Plan, Saved))


def _plain(event: Event, progress: Progress, story: Story) -> None:
    """Say one line about an event, for logs."""
    if isinstance(event, Doing) or (isinstance(event, PackProgress) and event.done < event.total):
        say(f"{progress.doing} …")
    elif isinstance(event, Prepared):
        for line in story.header(event):
            say(line)
    elif isinstance(event, Plan):
        say(f"plan: {event.steps} steps of {event.seconds_per_step:.3f} s fit the budget")
    elif isinstance(event, TrainStep):
        assert progress.prepared
        every = progress.prepared.recipe.eval.log_every
        if event.step % every == 0 or event.step == 1:
            total = f"/{progress.steps}" if progress.steps else ""
            left = f" · {clock(progress.left)} left" if progress.left is not None else ""
            say(
                f"step {event.step}{total} · loss {event.loss:.3f} · lr ×{event.lr:.2f}"
                f" · grad {event.grad_norm:.2f} · {progress.speed:,.0f} tok/s"
                f" · MFU {progress.utilisation:.0%}{left}"
            )
        if (
            event.step == progress.prepared.start + MEASURED
            and progress.prepared.recipe.train.steps
        ):
            say(f"plan: {progress.steps} steps take about {clock(progress.left or 0)} more")
    elif isinstance(event, Evaluated):
        mark = " · best so far" if event.best and not event.final else ""
        say(f"step {event.step} · held-out: {story.figure(event)}{mark}")
        if progress.sample and not event.final:
            say(f"  sample: {progress.sample!r}")


def _json(event: Event, story: Story) -> bool:
    """Write one event as a JSON line; returns whether somebody still reads them."""
    try:
        _emit_event(event, story.name)
    except SystemExit:
        return False
    return True


def _emit_event(event: Event, name: str) -> None:
    if isinstance(event, TrainStep):
        row = {"step": event.step, "loss": event.loss, "lr": event.lr}
        emit_json(f"{name}/step", row | {"grad_norm": event.grad_norm, "seconds": event.seconds})
    elif isinstance(event, Evaluated):
        row = {"step": event.step, "bits_per_byte": event.score.bits_per_byte}
        emit_json(f"{name}/eval", row | {"loss": event.score.loss, "final": event.final})
    elif isinstance(event, Saved):
        emit_json(f"{name}/saved", {"step": event.step, "folder": str(event.folder)})
    elif isinstance(event, Plan):
        row = {"at": event.at, "steps": event.steps}
        emit_json(f"{name}/plan", row | {"seconds_per_step": event.seconds_per_step})


def machine_lines(prepared: Prepared) -> list[str]:
    """Say which model is trained, on what machine, from which step on."""
    model, machine = prepared.recipe.model, prepared.machine
    lines = [
        f"model  {count(prepared.parameters)} parameters:"
        f" {model.n_layers} layers × {model.d_model},"
        f" {model.n_heads} heads, vocabulary {model.vocab_size:,}",
        f"on     {machine['device']} {machine['dtype']}, {_hands(machine)},"
        f" matmul peak {prepared.peak_flops / 1e12:.2f} TFLOP/s measured",
    ]
    memory = prepared.memory
    disk = size(checkpoint_bytes(prepared.recipe, memory))
    lines.append(
        f"takes  about {size(sum(memory.values()))} of memory at the peak,"
        f" {size(memory['activations'])} of it activations; {disk} of disk a checkpoint"
    )
    if prepared.start:
        lines.append(f"resume after step {prepared.start}")
    if prepared.changed:
        lines.append(f"note   no longer bit for bit: {'; '.join(prepared.changed)}")
    return lines


def _hands(machine: dict[str, str]) -> str:
    """Say how many work at once."""
    threads, processes = int(machine["threads"]), int(machine["processes"])
    each = max(1, threads // processes)
    hands = f"{each} thread{'s' * (each > 1)}"
    return hands if processes == 1 else f"{processes} processes × {hands}"


def written(prepared: Prepared, prompt: str | list[int], most: int = 40) -> str:
    """Continue a prompt a little, to see what was learned."""
    from dataclasses import replace

    model, tokenizer = prepared.model.eval(), prepared.tokenizer
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    room = min(most, model.config.max_seq_len - len(ids))
    if room < 1:
        return ""
    settings = replace(prepared.recipe.sample, max_tokens=room)
    decoder = TorchDecoder(model)
    start = prefill(decoder, ids, decoder.cache(len(ids) + room))
    tokens = generate(decoder, tokenizer, start, settings, seed=prepared.recipe.run.seed)
    return "".join(token.text for token in tokens)


def _screen(progress: Progress, story: Story, width: int):
    """Build the live display."""
    from rich.console import Group
    from rich.text import Text

    prepared, step = progress.prepared, progress.step
    if prepared is None:
        return Text(f"{progress.doing} …", style="dim")
    lines = [
        Text(line, style="dim", overflow="ellipsis", no_wrap=True)
        for line in story.header(prepared)
    ]
    if step is None:
        return Group(*lines, Text("first step …"))
    total = progress.steps
    share = step.step / total if total else 0.0
    bar = max(10, width - 34)
    full = round(bar * share)
    left = clock(progress.left) if progress.left is not None else "measuring"
    lines.append(
        Text.from_markup(
            f"[cyan]{'━' * full}[/][dim]{'─' * (bar - full)}[/]"
            f" {step.step}/{total or '?'} {share:4.0%} {left} left"
        )
    )
    valid = f"held-out {story.figure(progress.score)}" if progress.score else ""
    loss = progress.losses[-1][1]
    lines.append(Text(f"loss {loss:.3f}   {valid}   lr ×{step.lr:.2f}   grad {step.grad_norm:.2f}"))
    lines.append(
        Text(
            f"{progress.speed:,.0f} tok/s   MFU {progress.utilisation:.0%}"
            f"   memory {size(peak_memory())}   {clock(progress.trained)} so far"
        )
    )
    curve = Curve(name="loss", points=progress.losses)
    lines += [Text.from_markup(row) for row in draw([curve], min(width, 100), 10)]
    if progress.sample:
        one_line = progress.sample.replace("\n", "⏎ ")
        lines.append(Text(f"sample: {one_line}", style="dim"))
    return Group(*lines)
