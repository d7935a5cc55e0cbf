"""`lm finetune`: adapt a checkpoint to your own rows, and see what it learned and forgot."""

from typing import Annotated

import typer

from cli.options import Cache, Force, Json, Model, Out, Overrides, Quiet, Resume, VerifyResume


def finetune(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe (lm recipes) or a .yaml file.")],
    overrides: Overrides = None,
    model: Model = None,
    out: Out = None,
    resume: Resume = False,
    force: Force = False,
    verify_resume: VerifyResume = False,
    as_json: Json = False,
    quiet: Quiet = False,
    cache: Cache = None,
) -> None:
    """Finetune a checkpoint, all of it or LoRA beside it, on rows of JSONL, JSON, CSV or parquet.

    Rows are text, prompts with completions, Alpaca, chat messages, ShareGPT or
    token ids; the kind is found out. Look at them first: lm data check ROWS -m NAME.
    At the end the model is held against its base: on the rows held out, and on
    what the base had learned.

    \b
    lm finetune sft -m smollm2 data.train=rows.jsonl
    lm finetune sft-lora -m smollm2 data.train=rows.jsonl train.lora.rank=8
    lm finetune domain -m stdlib
    lm finetune code-tasks
    """
    import sys

    from cli.finetuning import FinetuningStory
    from cli.options import CHECKPOINTS, cache_folder, load_recipe
    from cli.training import Stop, resume_command, show_run
    from engine.errors import CheckFailed, RecipeError

    given = [*(overrides or []), *([f"train.base={model}"] if model else [])]
    resolved = load_recipe(recipe, given)
    folder = out or CHECKPOINTS / resolved.run.name
    if force and resume:
        raise RecipeError("--force starts over and --resume continues; choose one")
    if verify_resume:
        from cli.verify_resume import verify_resume as prove

        if not prove(resolved, cache or cache_folder(), as_json, "finetune"):
            raise CheckFailed("the resumed run differs from the one that was never stopped")
        return

    from engine.finetune.run import run

    with Stop() as stop:
        events = run(
            resolved,
            folder,
            cache or cache_folder(),
            CHECKPOINTS,
            resume=resume,
            force=force,
            stdin=sys.stdin.buffer if resolved.data.train == "-" else None,
            stop=lambda: stop.asked,
        )
        command = resume_command("finetune", [recipe, *given], out, cache)
        finished = show_run(events, stop, command, FinetuningStory(), as_json=as_json, quiet=quiet)
    if not finished:
        raise typer.Exit(130)
