"""What `lm plan` shows, and the line of it that every run begins with."""

from collections.abc import Iterator
from typing import Any

from cli.render import clock, count, emit, emit_json, say, size
from engine.forecast import Forecast, best_parameters
from engine.train.prepare import Doing


def show_plan(
    events: Iterator[Doing | Forecast],
    watts: float | None,
    price: float | None,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Consume a forecast and write it."""
    for event in events:
        if isinstance(event, Doing):
            say(f"{event.what} …", quiet)
        elif as_json:
            emit_json("plan", facts(event, watts, price))
        else:
            for line in lines(event, watts, price):
                emit(line)


def memory_line(memory: dict[str, int], peak: int | None = None) -> str:
    """Say what memory is predicted to go to, and what a measured run took."""
    parts = ", ".join(f"{size(number)} {part}" for part, number in memory.items())
    measured = f", {size(peak)} measured" if peak else ""
    return f"memory {size(sum(memory.values()))} at the peak{measured}: {parts}"


def lines(plan: Forecast, watts: float | None, price: float | None) -> Iterator[str]:
    """Lay the forecast out for a person."""
    model, total = plan.recipe.model, sum(plan.parameters.values())
    groups = ", ".join(f"{count(n)} {name}" for name, n in plan.parameters.items() if n)
    yield f"model  {model.n_layers} layers × {model.d_model}, vocabulary {model.vocab_size:,}"
    yield f"params {count(total)}: {groups}"
    if plan.trained != total:
        yield f"lora   {count(plan.trained)} parameters are trained beside them"
    whole = f", {plan.flops:.2g} in all" if plan.flops else ""
    yield f"FLOPs  {count(plan.flops_per_token)} a token{whole}"
    yield from _text_lines(plan)
    yield memory_line(plan.memory, plan.rehearsed and plan.rehearsed.peak_memory)
    yield f"disk   {size(plan.checkpoint)} a checkpoint, {size(plan.disk)} at the most"
    yield from _time_lines(plan, watts, price)
    for note in plan.notes:
        yield f"note   {note}"


def _text_lines(plan: Forecast) -> Iterator[str]:
    text, per_step = plan.text, f"{plan.tokens_per_step:,.0f} tokens a step"
    steps = f"{count(plan.tokens)} in {plan.steps:,} steps, " if plan.tokens and plan.steps else ""
    yield f"tokens {steps}{per_step}"
    if text is None:
        yield "text   from a pipe: how often it will be read is not known"
        return
    how = f" ({text.how})" if text.how else ""
    passes = f", read {plan.epochs:.2f} times" if plan.epochs else ""
    yield f"text   {'' if not text.how else 'about '}{text.tokens:,} tokens{passes}{how}"
    if plan.tokens and not plan.tuned:
        ratio = plan.tokens / sum(plan.parameters.values())
        yield f"size   {ratio:.1f} tokens per parameter; some 20 are best for the FLOPs"


def _time_lines(plan: Forecast, watts: float | None, price: float | None) -> Iterator[str]:
    if not (plan.rehearsed and plan.seconds):
        yield "time   not measured"
        return
    each = plan.rehearsed.seconds_per_step
    spread = (max(plan.rehearsed.seconds) - min(plan.rehearsed.seconds)) / each
    noisy = f" (noisy: they differed by {spread:.0%})" if spread > 0.25 else ""
    yield (
        f"time   {clock(plan.seconds)}: {plan.steps:,} steps of {each:.3g} s, the median of"
        f" {len(plan.rehearsed.seconds)} measured{noisy}, and {clock(plan.scoring or 0)} of scoring"
    )
    if watts is None:
        yield "energy not known: give --watts, and --price-kwh for money"
        return
    hours = watts * plan.seconds / 3.6e6  # kWh
    money = f", {price * hours:.2g} at {price:g} a kWh" if price is not None else ""
    yield f"energy {hours:.3g} kWh at {watts:g} W{money}"


def facts(plan: Forecast, watts: float | None, price: float | None) -> dict[str, Any]:
    """Return all of it for --json."""
    text, measured, total = plan.text, plan.rehearsed, sum(plan.parameters.values())
    kwh = watts * plan.seconds / 3.6e6 if watts is not None and plan.seconds else None
    best = best_parameters(plan.flops, plan.flops_per_token / total) if plan.flops else None
    return {
        "parameters": plan.parameters | {"total": total, "trained": plan.trained},
        "flops_per_token": plan.flops_per_token,
        "flops": plan.flops,
        "steps": plan.steps,
        "tokens_per_step": plan.tokens_per_step,
        "tokens": plan.tokens,
        "text_tokens": text and text.tokens,
        "text_estimated": text and text.how,
        "epochs": plan.epochs,
        "best_parameters": None if plan.tuned else best,
        "memory": plan.memory | {"peak": sum(plan.memory.values())},
        "measured_memory": measured and measured.peak_memory,
        "checkpoint_bytes": plan.checkpoint,
        "disk_bytes": plan.disk,
        "step_seconds": measured and measured.seconds,
        "seconds_per_step": measured and measured.seconds_per_step,
        "scoring_seconds": plan.scoring,
        "seconds": plan.seconds,
        "kwh": kwh,
        "money": None if kwh is None or price is None else kwh * price,
        "notes": plan.notes,
    }
