"""`lm generate --batch`: a file of requests in, a file of answers out, line for line, resumable."""

import dataclasses
import hashlib
import itertools
import json
import secrets
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.batch_lines import Defaults, name_of, parse, read_lines, read_request
from cli.batch_output import Failed, opened, refuse_itself, replaced, write, written
from cli.generation import Request, load_for, read_prompt, result_of, settle
from cli.inputs import STDIN, Source
from cli.render import say
from engine.errors import InputError, LimitError, RecipeError
from engine.generate.decode import fit_prompt
from engine.generate.decoder import Decoder
from engine.generate.schedule import PIECE, Finished, Job, Totals, complete
from engine.peak import peak_memory
from engine.sampling_defaults import sample_defaults
from engine.text.chat import render
from engine.text.renderer import Renderer
from engine.text.tokenizer import Tokenizer

SCHEMA = "lm/batch/1"
NAMED = 5  # lines that failed, in the last word
OFTEN, SELDOM = 0.25, 10.0  # seconds between two words on how it goes: to a terminal, to a file


@dataclass(frozen=True, slots=True)
class Key:
    """What an answer is written under."""

    line: int
    name: str | int | float | None
    digest: str  # of the line and the settings
    seed: int | None = None
    cut: int = 0  # prompt tokens that did not fit


class Maker:
    """Makes jobs of lines."""

    def __init__(
        self, defaults: Defaults, decoder: Decoder, tokenizer: Tokenizer, stack: ExitStack
    ) -> None:
        self.defaults, self.tokenizer = defaults, tokenizer
        self.context = decoder.config.max_seq_len
        self.seed = defaults.seed
        self._stack = stack
        self._renderer: Renderer | None = None
        model = [decoder.name, decoder.identity, tokenizer.digest, tokenizer.template]
        usual = dataclasses.asdict(sample_defaults(defaults.request.folder))
        asked = dataclasses.asdict(defaults)
        for name in ("folder", "how"):  # what came of them is in `model`
            del asked["request"][name]
        settings = json.dumps([model, usual, asked], default=str)
        self._settings = hashlib.sha256(settings.encode()).digest()

    def digest(self, line: bytes) -> str:
        """Return what tells a line, answered with these settings, from all others."""
        return hashlib.sha256(self._settings + line).hexdigest()[:16]

    def job(self, number: int, line: bytes) -> Job | Finished:
        """Return what a line asks for, or why that cannot be had."""
        key = Key(number, None, self.digest(line))
        try:
            value = parse(line)
            key = dataclasses.replace(key, name=name_of(value))
            request = read_request(value, self.defaults)
            whole = self._ids(request)
            settings = settle(request, whole, self.context)
        except (InputError, LimitError, RecipeError) as error:
            return Finished(key=key, error=error)
        try:
            ids = fit_prompt(whole, settings.max_tokens, self.context, request.on_overflow)
        except LimitError:
            ids = whole  # refused where it begins, in the words of a line
        seed = self._seed_of(number) if request.seed is None else request.seed
        return Job(
            key=dataclasses.replace(key, seed=seed, cut=len(whole) - len(ids)),
            ids=ids,
            settings=settings,
            seed=seed,
            stops=request.stops,
            logprobs=request.logprobs,
        )

    def learn(self, number: int, line: bytes, record: dict[str, Any]) -> None:
        """Go on with the seeds of an earlier run, which it chose at random.

        Raises: ValueError if it cannot have written such a record.
        """
        if "seed" not in record:
            return
        seed = record["seed"]
        if type(seed) is not int or not 0 <= seed < 2**62 + number:
            raise ValueError(f"{seed} is no seed")
        if self.seed is None and read_request(parse(line), self.defaults).seed is None:
            if seed < number - 1:
                raise ValueError(f"{seed} is no seed of line {number}")
            self.seed = seed - number + 1

    def _seed_of(self, number: int) -> int:
        if self.seed is None:
            self.seed = secrets.randbelow(1 << 31)
        return self.seed + number - 1

    def _ids(self, request: Request) -> list[int]:
        if request.messages is None:
            return read_prompt(request, self.tokenizer)[1]
        self._renderer = self._renderer or self._stack.enter_context(Renderer())
        found = render(
            request.messages,
            self.tokenizer,
            variables=request.variables,
            renderer=self._renderer,
        )
        return found.ids


def answer_lines(
    file: Path,
    out: Path | None,
    defaults: Defaults,
    *,
    rows: int,
    resume: bool,
    force: bool,
    quiet: bool,
) -> None:
    """Answer every line of a file as it would be answered alone, in the order of the lines.

    Raises: SystemExit 3 if any line failed, 130 after Ctrl-C; RecipeError if the output is there
    already; DataError if it was made from other lines or with other settings, or there are none.
    """
    source = Source(STDIN) if str(file) == STDIN else Source(str(file), file)
    out = None if out is None or str(out) == STDIN else out
    if resume and (force or out is None):
        raise RecipeError("--resume goes on with the file that -o names, which --force would empty")
    refuse_itself(source, out)
    lines = read_lines(source)
    lines = itertools.chain([next(lines)], lines)  # what is no batch at all ends here
    with ExitStack() as stack:
        output = stack.enter_context(opened(out, resume, force)) if out else None
        decoder, tokenizer = load_for(defaults.request.folder, **defaults.request.how, quiet=quiet)
        maker = Maker(defaults, decoder, tokenizer, stack)
        progress = Progress(quiet, alone=bool(output) or not sys.stdout.isatty())
        failed: Failed = {}
        if output and resume:
            for record in written(output, lines, maker, failed):
                progress.count(record)
            progress.before = progress.ok
        # Torch rounds differently when a prompt is cut elsewhere.
        grid = PIECE if decoder.name.startswith("torch") else 1

        def answers(lines: Iterable[tuple[int, bytes]]) -> Iterator[dict[str, Any]]:
            """Yield the record of each line."""
            jobs = (maker.job(number, line) for number, line in lines)
            how: dict[str, Any] = {"totals": progress.totals, "watch": progress.show}
            for finished in complete(decoder, tokenizer, jobs, rows, grid=grid, **how):
                yield _record(finished, tokenizer)

        with _interruptible(progress, out):
            if output and failed:
                again = dict(zip(failed, answers(failed.values()), strict=True))
                output = stack.enter_context(replaced(output, again))
                progress.recount(again.values())
            for record in answers(lines):
                write(output, record)
                progress.count(record)
    progress.close(maker.seed)
    if progress.failed:
        raise SystemExit(InputError.exit_code)


@contextmanager
def _interruptible(progress: "Progress", out: Path | None) -> Iterator[None]:
    """Let Ctrl-C end the work between two lines of output, and say what can be done then."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        way = f"; the same command with --resume goes on with {out}" if out else ""
        progress.say(f"stopped, {progress.ok + progress.failed:,} lines are written{way}")
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGINT, before)


def _record(finished: Finished, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what is written for a line."""
    key: Key = finished.key
    record = {"schema": SCHEMA, "id": key.name, "line": key.line}
    if finished.error is not None:
        error = finished.error
        record["error"] = {"message": str(error), "exit_code": error.exit_code}
    else:
        tokens = list(finished.tokens)
        record |= result_of(tokens, tokenizer) | {"tokens": len(tokens), "seed": key.seed}
        record |= {"prompt_tokens": finished.prompt_tokens, "cut_prompt_tokens": key.cut}
    return record | {"request": key.digest}


class Progress:
    """Counts lines, and says how it goes: in one place on a terminal, else seldom."""

    def __init__(self, quiet: bool, alone: bool) -> None:
        """Say it in one place only if stderr is `alone` on the terminal."""
        self.ok = self.failed = self.before = 0
        self.first: list[str] = []  # lines that failed
        self.totals = Totals()
        self.quiet = quiet
        self._live = alone and sys.stderr.isatty() and not quiet
        self._began = self._said = time.perf_counter()

    def count(self, record: dict[str, Any]) -> None:
        """Count a line of output."""
        failed = "error" in record
        self.failed += failed
        self.ok += not failed
        if failed and self.failed <= NAMED:
            self.first.append(str(record["line"]))

    def recount(self, records: Iterable[dict[str, Any]]) -> None:
        """Count what lines that failed have become."""
        self.failed, self.first = 0, []
        for record in records:
            self.count(record)

    def show(self, totals: Totals) -> None:
        """Say how far it is, if it is time to."""
        if time.perf_counter() - self._said < (OFTEN if self._live else SELDOM):
            return
        self._said = time.perf_counter()
        if self._live:
            print(f"\r\x1b[K{self._state()}", end="", file=sys.stderr, flush=True)
        else:
            say(self._state(), self.quiet)

    def say(self, text: str) -> None:
        """Write a line of its own, even if the rest is quiet."""
        say(("\r\x1b[K" if self._live else "") + text)

    def close(self, seed: int | None) -> None:
        """Say how it went."""
        totals = self.totals
        parts = [
            self._state(),
            f"{totals.rows} rows",
            f"prompts {totals.prompt:,} tok, {totals.shared:,} shared",
            f"peak {peak_memory() / 1e6:,.0f} MB",
        ]
        if self.before:
            parts.insert(1, f"{self.before:,} lines from before")
        if seed is not None:
            parts.append(f"seed {seed}")
        if self.failed:
            more = " …" if self.failed > NAMED else ""
            parts.append(f"failed lines: {', '.join(self.first)}{more}")
        if self.failed or not self.quiet:
            self.say(" · ".join(parts))

    def _state(self) -> str:
        rate = self.totals.made / max(time.perf_counter() - self._began, 1e-9)
        return f"{self.ok:,} ok, {self.failed:,} failed · {self.totals.made:,} tok at {rate:,.0f}/s"
