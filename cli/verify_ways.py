"""The proof behind `lm generate --verify`: the same ids in every way, in every precision."""

import copy
import dataclasses
from collections.abc import Iterator
from functools import partial

from cli.generation import Request, check_template, load_for, read_prompt
from cli.render import emit, emit_json, say
from engine.errors import CheckFailed
from engine.generate.agreement import Way, agree
from engine.generate.decode import fit_prompt
from engine.generate.decoder import Decoder
from engine.text.tokenizer import Tokenizer

MOST = 64  # tokens that are compared, where nobody said how many
PRECISIONS = ("fp32", "bf16", "int8", "int4")  # that our own C computes in


def verify_ways(request: Request, *, as_json: bool, quiet: bool) -> None:
    """Continue the prompt in every way and show whether the ids are the same.

    Raises: CheckFailed naming the first difference; LimitError if the prompt is too long.
    """
    if request.messages is not None:
        check_template(request.folder)
    found: dict[str, list[Way]] = {}
    for decoder, tokenizer in _decoders(request, quiet):
        tokenizer = copy.copy(tokenizer)
        tokenizer.ends = frozenset()  # whatever the model says next, it must say every way
        context = decoder.config.max_seq_len
        most = request.wishes.get("max_tokens", min(MOST, context // 2))
        _, whole = read_prompt(request, tokenizer)
        prompt = fit_prompt(whole, most, context, request.on_overflow)
        say(f"{decoder.name}: {len(prompt):,} tokens continued by up to {most:,}", quiet)
        ways = found[decoder.name] = []
        for way in agree(decoder, tokenizer, prompt, most):
            ways.append(way)
            if not as_json:
                emit(_row(decoder.name, way))
    wrong = {name: [way for way in ways if way.same is False] for name, ways in found.items()}
    if as_json:
        facts = [
            {"name": name, "ok": not wrong[name], "ways": [dataclasses.asdict(way) for way in ways]}
            for name, ways in found.items()
        ]
        emit_json("verify-generate", {"ok": not any(wrong.values()), "decoders": facts})
    holds = [name for name in found if not wrong[name]]
    exact = [name for name in holds if all(way.exact for way in found[name] if way.same)]
    say(f"the ids are the same in every way for: {', '.join(holds) or 'none'}", quiet)
    say(f"the logits are, to the bit, for: {', '.join(exact) or 'none'}", quiet)
    for name, ways in wrong.items():
        if ways:
            raise CheckFailed(f"{name}: {_difference(ways[0], found[name][0])}")


def _decoders(request: Request, quiet: bool) -> Iterator[tuple[Decoder, Tokenizer]]:
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
