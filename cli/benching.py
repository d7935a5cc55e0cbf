"""From the options of `lm bench` to cases, and from measurements to the screen and the files."""

import signal
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from cli.bench_views import Money, check_picture, picture, show_json, show_tables
from cli.options import cache_folder, load_recipe, the_model
from cli.render import count, say, size
from engine.bench.cases import Case, Grid, What, expand, read_numbers, read_whats
from engine.bench.measure import measure
from engine.bench.price import BESIDE, offer
from engine.bench.record import Recorder
from engine.bench.result import Limits, Measured, Repetition, Result
from engine.bench.subject import Subject, from_checkpoint, from_recipe, settings
from engine.errors import EngineError, RecipeError, ResourceError
from engine.generate.load import FORMATS
from engine.generate.native_cache import KINDS
from engine.hardware import use_threads
from engine.machine import Machine, describe
from engine.recipe import fields
from engine.train.prepare import Doing


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What `lm bench` was asked for."""

    recipe: str | None
    overrides: list[str]
    model: str | None
    what: str | None
    prompt: str | None
    depth: str | None
    batch: str
    tokens: int
    dtype: str
    kernels: str
    kv: str
    threads: str | None
    temperature: float | None
    repeats: int
    warm_up: int
    record: Path | None
    plot: Path | None
    watts: float | None
    price_kwh: float | None
    beside: list[str] | None
    device: str


def bench(request: Request, *, as_json: bool, quiet: bool) -> None:
    """Measure and show; what ends the measuring is raised when the rest was shown."""
    check_picture(request.plot)
    money = _money(request, quiet)
    use_threads(0)
    subject = _subject(request)
    cases = _cases(request, subject, quiet)
    machine = describe()
    if subject.folder is None:
        say("random weights and tokens: as fast as real ones, but no text to read", quiet)
    elif any(case.what == "train" for case in cases):
        say("training on random tokens: as fast as real ones", quiet)
    events = measure(subject, cases, warm_up=request.warm_up, repeats=request.repeats)
    found = _Findings(len(cases))
    with _recording(request.record, machine) as record, _interruptible() as stopped:
        for event in events:
            found.take(event, request.repeats, quiet)
            if isinstance(event, Repetition):
                record(event)
    results = [Result(repetitions) for repetitions in found.repetitions.values()]
    if stopped and not results:
        raise stopped[0]
    if stopped:
        many = f"{len(results)} of {found.cases} cases"
        say(f"stopped: {many} were measured, the last perhaps in part")
    (show_json if as_json else show_tables)(results, machine, found.limits, money)
    if request.plot:
        picture(results, request.plot)
        say(f"wrote {request.plot}", quiet)
    if stopped:
        raise stopped[0]
    if request.record:
        say(f"recorded in {request.record}; lm bench compare holds two such files together", quiet)


class _Findings:
    """What was measured so far."""

    def __init__(self, cases: int) -> None:
        self.cases = cases  # there are, as far as is known
        self.limits: list[Limits] = []
        self.repetitions: dict[Case, list[Repetition]] = {}

    def take(
        self, event: Doing | Limits | Measured | Repetition, repeats: int, quiet: bool
    ) -> None:
        """Keep what an event found, and say how far that is."""
        if isinstance(event, Limits):
            self.limits.append(event)
            return
        if isinstance(event, Doing):
            say(f"{event.what} …", quiet)
            return
        name = f"{event.case.what} {event.case.name}"
        if isinstance(event, Measured):
            self.cases -= 1
            say(f"{name}: {event.wish} is what auto took; measured once", quiet)
            return
        self.repetitions.setdefault(event.case, []).append(event)
        if event.number == repeats:
            who = f"{event.case.kernels} {event.case.dtype}"
            rate = Result(self.repetitions[event.case]).rate
            speed = f"{size(rate)}/s" if event.case.what == "load" else f"{count(rate)} tok/s"
            say(f"{len(self.repetitions)}/{self.cases} {name}, {who}: {speed}", quiet)


@contextmanager
def _recording(path: Path | None, machine: Machine) -> Iterator[Callable[[Repetition], None]]:
    """Give a function that adds a repetition to the record, if there is to be one."""
    if path is None:
        yield lambda repetition: None
        return
    recorder = Recorder(path, machine)
    try:
        yield recorder.write
    finally:
        recorder.close()


@contextmanager
def _interruptible() -> Iterator[list[BaseException]]:
    """Let Ctrl-C or an error end the block alone, and list it: what was measured is to be told."""
    stopped: list[BaseException] = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield stopped
    except (KeyboardInterrupt, EngineError) as reason:
        stopped.append(reason)
    finally:
        signal.signal(signal.SIGINT, before)


def _subject(request: Request) -> Subject:
    """Find what is to be measured."""
    recipe = None
    if request.recipe:
        resolved = load_recipe(request.recipe, request.overrides)
        recipe = from_recipe(resolved, cache_folder(), request.device)
        if request.model is None:
            return _at_temperature(recipe, request.temperature)
    folder = the_model(request.model)
    name = request.model or folder.name
    subject = from_checkpoint(name, folder, cache_folder(), request.device)
    if recipe:
        subject = replace(subject, recipe=recipe.recipe)
    return _at_temperature(subject, request.temperature)


def _at_temperature(subject: Subject, temperature: float | None) -> Subject:
    """Change how the subject chooses its tokens, if asked."""
    if temperature is None:
        return subject
    return replace(subject, sample=replace(subject.sample, temperature=temperature))


def _cases(request: Request, subject: Subject, quiet: bool) -> list[Case]:
    """Return what to measure, and say which of the usual cases do not fit."""
    whats = _whats(request, subject)
    wanted = _words(request.dtype, "--dtype", {d for what in whats for d in _choices(what)})
    threads = read_numbers(request.threads or str(use_threads(0)), "--threads")
    if threads[-1] > 1024:
        raise RecipeError(f"--threads {threads[-1]}: at most 1024")
    grid = Grid(
        prompt=read_numbers(request.prompt, "--prompt") if request.prompt else None,
        depth=read_numbers(request.depth, "--depth", low=0) if request.depth else None,
        batch=read_numbers(request.batch, "--batch"),
        kernels=_words(request.kernels, "--kernels", ("auto", "torch")),
        kv=_words(request.kv, "--kv", ("auto", *KINDS)),
        threads=threads,
        tokens=request.tokens,
    )
    cases: list[Case] = []
    for what in whats:
        one = replace(grid, dtype=[dtype for dtype in wanted if dtype in _choices(what)])
        if what == "train":
            cases += _training(subject, one)
        else:
            found, notes = expand(what, one, subject.name, subject.config.max_seq_len)
            if one.dtype and not found:
                raise RecipeError(
                    f"--dtype {request.dtype} --kv {request.kv}: torch has none of it"
                )
            cases += found
            for note in notes:
                say(note, quiet)
    cases = [replace(case, settings=settings(subject, case.what)) for case in cases]
    # Those that share a model come together, so that it is loaded once.
    return sorted(cases, key=lambda case: (case.what in ("train", "load"), case.how))


def _words(text: str, option: str, known: Collection[str]) -> list[str]:
    """Read a comma list, each word once. Raises: RecipeError for one that is not known."""
    wanted = list(dict.fromkeys(word.strip() for word in text.split(",")))
    if odd := [word for word in wanted if word not in known]:
        raise RecipeError(f"{option} {odd[0]!r} is not one of {', '.join(sorted(known))}")
    return wanted


def _whats(request: Request, subject: Subject) -> list[What]:
    """Return the works to measure. Raises: RecipeError for one that lacks what it needs."""
    needs = {
        "load": "" if subject.folder else "a checkpoint: lm bench -m NAME",
        "train": "" if subject.recipe else "a recipe: lm bench stdlib --what train",
    }
    if not request.what:
        return [what for what in get_args(What) if not needs.get(what)]
    wanted = read_whats(request.what)
    for what in wanted:
        if needs.get(what):
            raise RecipeError(f"--what {what} needs {needs[what]}")
    return wanted


def _training(subject: Subject, grid: Grid) -> list[Case]:
    """Return the training step of a recipe in every precision and with all threads."""
    assert subject.recipe
    recipe = subject.recipe
    return [
        Case(
            what="train",
            model=recipe.run.name,
            dtype=dtype,
            threads=threads,
            batch=recipe.train.batch_size,
            prompt=recipe.data.seq_len,
        )
        for dtype in grid.dtype
        for threads in grid.threads
    ]


def _choices(what: What) -> tuple[str, ...]:
    """Return the precisions that a work has."""
    if what == "train":
        return get_args(fields()["run.dtype"].type)
    return tuple(FORMATS)


def _money(request: Request, quiet: bool) -> Money | None:
    """Look up prices to set beside what tokens cost here, before anything takes time."""
    if request.watts is None or request.price_kwh is None:
        if request.watts is not None or request.price_kwh is not None or request.beside:
            raise RecipeError("what a token costs takes both --watts and --price-kwh")
        return None
    offers = []
    try:
        offers = [offer(name) for name in request.beside or BESIDE]
    except ResourceError as error:
        if request.beside:
            raise
        say(f"without the prices of others: {error}", quiet)
    return Money(watts=request.watts, price_kwh=request.price_kwh, offers=offers)
