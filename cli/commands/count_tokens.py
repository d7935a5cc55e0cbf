"""`lm count-tokens`: how many tokens, does it fit, what does it cost."""

from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from cli.options import Json, Quiet

Models = Annotated[
    Optional[list[str]],
    typer.Option("-m", "--model", help="gpt-5, o200k_base, a tokenizer.json, a checkpoint …"),
]


def count_tokens(
    words: Annotated[
        Optional[list[str]],
        typer.Argument(metavar="[FILE|FOLDER|GLOB|-]...", help="What to count; - is the pipe."),
    ] = None,
    models: Models = None,
    text: Annotated[Optional[str], typer.Option("--text", help="Count this text.")] = None,
    chat: Annotated[
        Optional[Path],
        typer.Option("--chat", metavar="FILE", help="Count requests, a JSON line each."),
    ] = None,
    diff: Annotated[
        Optional[str],
        typer.Option("--git-diff", metavar="REV", help="Count the diff from REV, or --staged."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Hidden and git-ignored files of folders too.")
    ] = False,
    special: Annotated[
        Literal["text", "parse", "error"],
        typer.Option("--special", help="What looks like a control token is text, one, or refused."),
    ] = "text",
    by: Annotated[
        Optional[Literal["file", "folder", "ext"]],
        typer.Option("--by", help="Add up, largest first."),
    ] = None,
    top: Annotated[
        Optional[int], typer.Option("--top", min=1, help="Only the largest N, the rest as one.")
    ] = None,
    budget: Annotated[
        Optional[str], typer.Option("--budget", metavar="N", help="Exit 6 when over; 8000, 128k.")
    ] = None,
    cost: Annotated[
        bool, typer.Option("--cost", help="What it costs, cheapest model first.")
    ] = False,
    output: Annotated[
        Optional[str],
        typer.Option("--output-tokens", metavar="N", help="Assume an answer of N tokens."),
    ] = None,
    cached: Annotated[
        Optional[str], typer.Option("--cached", metavar="N", help="So many are read from a cache.")
    ] = None,
    cache_write: Annotated[
        Optional[str], typer.Option("--cache-write", metavar="N", help="So many are stored in it.")
    ] = None,
    reasoning: Annotated[
        Optional[str],
        typer.Option("--reasoning", metavar="N", help="So much of the answer is thinking."),
    ] = None,
    batch: Annotated[bool, typer.Option("--batch", help="At the price of batches.")] = False,
    price_file: Annotated[
        Optional[Path], typer.Option("--price-file", help="Your own prices, before all others.")
    ] = None,
    at: Annotated[
        Optional[datetime],
        typer.Option("--at", formats=["%Y-%m-%d"], help="At the prices of this day."),
    ] = None,
    usage: Annotated[
        Optional[list[Path]],
        typer.Option("--usage", metavar="FILE", help="Price what providers reported."),
    ] = None,
    fit_to: Annotated[
        Optional[str], typer.Option("--fit-to", metavar="N", help="Print the text cut to N tokens.")
    ] = None,
    strategy: Annotated[
        Optional[Literal["head", "tail", "middle"]],
        typer.Option("--strategy", help="What --fit-to keeps; the head, if not said."),
    ] = None,
    split: Annotated[
        Optional[str], typer.Option("--split", metavar="N", help="Cut into chunks of N tokens.")
    ] = None,
    overlap: Annotated[
        Optional[str], typer.Option("--overlap", metavar="N", help="Tokens that chunks share.")
    ] = None,
    out: Annotated[
        Optional[Path], typer.Option("-o", "--out", metavar="DIR", help="Folder for the chunks.")
    ] = None,
    as_json: Json = False,
    as_lines: Annotated[bool, typer.Option("--jsonl", help="A JSON line per input.")] = False,
    quiet: Quiet = False,
) -> None:
    """Count tokens, offline, for any model; see what fits and what it costs.

    In a pipe the answer is one integer, or lines of count, model and name. On a
    terminal it is a table. Every count says whether it is exact. Folders are read
    as git sees them. Several models: -m gpt-5,gpt-4 or -m gpt-5 -m gpt-4.
    N may be 8000, 8_000, 8k (thousands) or 8K (1024).

    \b
    git diff | lm count-tokens -m gpt-5 --cost
    lm count-tokens src docs --by ext
    lm count-tokens prompt.md -m gpt-5,gpt-4o --cost --output-tokens 800
    lm count-tokens --git-diff HEAD --budget 8k
    lm count-tokens book.txt --split 2000 --overlap 200 -o chunks
    lm count-tokens --chat requests.jsonl -m gpt-5 --cost
    """
    from cli import count_tasks as tasks
    from cli.count_costs import Pricing
    from cli.counting import number_of_tokens as tokens

    tasks.check_together(
        {"FILE": words, "--text": text, "--chat": chat, "--git-diff": diff, "--usage": usage}
        | {"--special": special != "text", "--by": by, "--top": top, "--budget": budget}
        | {"--cost": cost, "--output-tokens": output, "--cached": cached, "--batch": batch}
        | {"--price-file": price_file, "--at": at, "--fit-to": fit_to, "--split": split}
        | {"--cache-write": cache_write, "--reasoning": reasoning, "--all": everything}
        | {
            "--strategy": strategy,
            "--overlap": overlap,
            "-o": out,
            "--json": as_json,
            "--jsonl": as_lines,
        }
    )
    pricing = Pricing(
        tokens(output, "--output-tokens") or 0,
        tokens(cached, "--cached") or 0,
        tokens(cache_write, "--cache-write") or 0,
        tokens(reasoning, "--reasoning") or 0,
        batch,
        at.date() if at else None,
        price_file,
    )
    show = tasks.Showing(as_json, as_lines, quiet, by, top)
    if usage:
        tasks.price_usage(usage, models, pricing, show)
        return
    limit = tokens(budget, "--budget")
    if chat:
        report = tasks.count_chat(chat, models, quiet)
        tasks.present(report, show, pricing if cost else None, limit)
        return
    counters = tasks.counters_or_default(models, quiet)
    fitting, chunk = tokens(fit_to, "--fit-to"), tokens(split, "--split")
    if fitting is not None or chunk is not None:
        size = chunk if fitting is None else fitting
        assert size is not None
        shared = tokens(overlap, "--overlap") or 0
        cut = tasks.Cut(size, shared, strategy or "head", out, chunk is not None)
        tasks.cut(words or [], text, counters, cut, show)
        return
    if diff is not None:
        report = tasks.count_git_diff(diff, words or [], counters)
    else:
        report = tasks.count_texts(words or [], text, everything, counters, special)
    tasks.present(report, show, pricing if cost else None, limit)
