"""The proof behind `lm generate --verify`: the same ids in every way, in every precision."""

import copy
import dataclasses
from collections.abc import Iterator
from functools import partial

from cli.generation import Request, check_template, load_for, read_prompt
from cli.render import emit, emit_json, say
from engine.errors import CheckFailed, EngineError
from engine.generate.agreement import Way, agree, distance, long_enough
from engine.generate.decode import fit_prompt
from engine.generate.decoder import Weighed
from engine.text.tokenizer import Tokenizer

MOST = 64  # tokens that are compared, where nobody said how many
PRECISIONS = ("fp32", "bf16", "int8", "int4")  # that our own C computes in
TOLERANCE = 0.01  # of the largest logit: torch adds in another order, and keeps keys in more bits


def verify_ways(request: Request, *, as_json: bool, quiet: bool) -> None:
    """Continue the prompt in every way and show whether the ids are the same.

    Raises: CheckFailed naming the first difference; LimitError if the prompt is too long.
    """
    if request.messages is not None:
        check_template(request.folder)
    found: dict[str, list[Way]] = {}
    torch = _Torch(request)
    for decoder, tokenizer in _decoders(request, quiet):
        tokenizer = copy.copy(tokenizer)
        tokenizer.ends = frozenset()  # whatever the model says next, it must say every way
        context = decoder.config.max_seq_len
        most = request.wishes.get("max_tokens", min(MOST, context // 2))
        _, whole = read_prompt(request, tokenizer)
        prompt = fit_prompt(whole, most, context, request.on_overflow)
        repeated = long_enough(prompt, context - most)
        how = f", repeated from {len(prompt):,}" if len(repeated) > len(prompt) else ""
        say(f"{decoder.name}: {len(repeated):,} tokens{how}, continued by up to {most:,}", quiet)
        ways = found[decoder.name] = []
        for way in agree(decoder, tokenizer, repeated, most):
            ways.append(way)
            if not as_json:
                emit(_row(decoder.name, way))
        torch.hold(decoder, repeated + ways[0].ids[:-1], len(ways[0].ids))
        if not as_json:
            emit(f"{decoder.name:<12} {'torch':<10} {torch.said[decoder.name]}")
    _conclude(found, torch, as_json=as_json, quiet=quiet)


def _conclude(found: dict[str, list[Way]], torch: "_Torch", *, as_json: bool, quiet: bool) -> None:
    """Say for which decoders it holds, and what that rests on. Raises: CheckFailed."""
    wrong = {name: [way for way in ways if way.same is False] for name, ways in found.items()}
    if as_json:
        facts = [
            {
                "name": name,
                "ok": not wrong[name] and torch.near(name),
                "ways": [dataclasses.asdict(way) for way in ways],
                "torch": {"distance": torch.apart.get(name), "note": torch.said[name]},
            }
            for name, ways in found.items()
        ]
        emit_json("verify-generate", {"ok": all(fact["ok"] for fact in facts), "decoders": facts})
    holds = [name for name in found if not wrong[name]]
    exact = [name for name in holds if all(way.exact for way in found[name] if way.same)]
    tried = dict.fromkeys(way.name for ways in found.values() for way in ways if way.ids)
    say(f"tried: {', '.join(tried)}", quiet)
    for name, ways in found.items():
        for way in ways:
            if way.same is None:
                say(f"skipped: {way.name} by {name}: {way.note}", quiet)
    say(f"the ids are the same in every way tried for: {', '.join(holds) or 'none'}", quiet)
    say(f"the logits are, to the bit, for: {', '.join(exact) or 'none'}", quiet)
    for name, ways in wrong.items():
        if ways:
            raise CheckFailed(f"{name}: {_difference(ways[0], found[name][0])}")
        if not torch.near(name):
            raise CheckFailed(f"{name}: {torch.said[name]}; lm doctor examines the kernels alone")


class _Torch:
    """Holds decoders against torch, in full precision, where both have the same weights."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.apart: dict[str, float] = {}
        self.said: dict[str, str] = {}
        self._stored = ""  # the precision of the file, which comes first
        self._decoder: Weighed | None = None

    def hold(self, decoder: Weighed, tokens: list[int], most: int) -> None:
        """Compare the last logits of a text, or note why not."""
        name = decoder.name
        kind, precision = name.split()
        if self.request.how["dtype"] == "auto":
            self._stored = self._stored or precision
        if why := self._without(kind, precision, decoder):
            self.said[name] = f"not compared: {why}"
            return
        try:
            self._decoder = self._decoder or self._load()
        except EngineError as error:
            self.said[name] = f"not compared: {error}"
            return
        apart = self.apart[name] = distance(decoder, self._decoder, tokens, most)
        self.said[name] = f"logits within {apart:.1e} of the largest, {TOLERANCE:.0%} is allowed"

    def near(self, name: str) -> bool:
        """Tell whether nothing speaks against a decoder."""
        return self.apart.get(name, 0.0) <= TOLERANCE  # which what is no number is not

    def _without(self, kind: str, precision: str, decoder: Weighed) -> str:
        if kind == "torch":
            return "it is torch itself"
        if precision in PRECISIONS[2:]:
            return f"torch has no {precision}"
        if precision not in ("fp32", self._stored):
            return f"here weights are rounded to {precision}"
        return "here keys and values are rounded to int8" if decoder.kv == "int8" else ""

    def _load(self) -> Weighed:
        return load_for(self.request.folder, device="cpu", dtype="fp32", kernels="torch")[0]


def _decoders(request: Request, quiet: bool) -> Iterator[tuple[Weighed, Tokenizer]]:
    """Load the model as it was asked for and, if nobody asked, in each precision of our C."""
    load = partial(load_for, request.folder, **request.how, quiet=quiet)
    decoder, tokenizer = load()
    name = decoder.name
    yield decoder, tokenizer
    stored = name.removeprefix("native ")
    if (
        request.how["dtype"] == "auto"
        and name.startswith("native")
        and stored not in PRECISIONS[2:]
    ):
        for dtype in PRECISIONS:
            if dtype != stored:
                yield load(dtype=dtype)


def _row(decoder: str, way: Way) -> str:
    """Lay out one way as a line of the table."""
    if way.same is None:
        return f"{decoder:<12} {way.name:<10} skipped: {way.note}"
    ids = "same" if way.same else f"other from {way.first_difference}"
    logits = "to the bit" if way.exact else f"within {way.largest:.1e}"
    return f"{decoder:<12} {way.name:<10} {len(way.ids):>4} ids {ids:<14} logits {logits}"


def _difference(way: Way, first: Way) -> str:
    """Say where a way left the others."""
    place = way.first_difference or 0
    ours, theirs = (
        str(each.ids[place]) if place < len(each.ids) else "the end" for each in (way, first)
    )
    return (
        f"{way.name} gives {ours} as new token {place + 1} where {first.name} gives {theirs}"
        f" (logits differ by up to {way.largest:.1e}); --dtype fp32 rounds least"
    )
