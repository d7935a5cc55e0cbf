"""`lm train`: train a model from nothing, watch it, stop it, go on."""

from typing import Annotated

import typer

from cli.options import Cache, Force, Json, Out, Overrides, Quiet, Resume, VerifyResume


def train(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe (lm recipes) or a .yaml file.")],
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    force: Force = False,
    verify_resume: VerifyResume = False,
    as_json: Json = False,
    quiet: Quiet = False,
    cache: Cache = None,
) -> None:
    """Train a model on text and say how good it is.

    Ctrl-C finishes the step, saves and prints how to go on; twice stops at once. The result is a
    Hugging Face folder, checkpoints/NAME/best.

    \b
    lm train stdlib
    lm train stdlib model.n_layers=8 train.budget=10m -o checkpoints/deep
    lm train text data.train='notes/**/*.md'
    cat *.md | lm train text data.train=-
    """
    import sys

    from cli.options import CHECKPOINTS, cache_folder, load_recipe
    from cli.training import Stop, resume_command, show_run
    from engine.errors import CheckFailed, RecipeError

    resolved = load_recipe(recipe, overrides)
    folder = out or CHECKPOINTS / resolved.run.name
    if verify_resume:
        from cli.verify_resume import verify_resume as prove

        if not prove(resolved, cache or cache_folder(), as_json, "train"):
            raise CheckFailed("the resumed run differs from the one that was never stopped")
        return
    if force and resume:
        raise RecipeError("--force starts over and --resume continues; choose one")

    from cli.pretraining import PretrainingStory
    from engine.train.pretrain import run

    with Stop() as stop:
        events = run(
            resolved,
            folder,
            cache or cache_folder(),
            resume=resume,
            force=force,
            stdin=sys.stdin.buffer if resolved.data.train == "-" else None,
            stop=lambda: stop.asked,
        )
        command = resume_command("train", [recipe, *(overrides or [])], out, cache)
        finished = show_run(events, stop, command, PretrainingStory(), as_json=as_json, quiet=quiet)
    if not finished:
        raise typer.Exit(130)
