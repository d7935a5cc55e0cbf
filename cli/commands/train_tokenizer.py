"""`lm train-tokenizer`: learn byte-pair merges from text."""

from pathlib import Path
from typing import Annotated

import typer

from cli.options import Json, Overrides


def train_tokenizer(
    source: Annotated[str, typer.Argument(help="stdlib, pydoc, a file, folder, glob or -.")],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for tokenizer.json.")] = Path(
        "checkpoints/tokenizer"
    ),
    as_json: Json = False,
) -> None:
    """Learn a byte-level BPE tokenizer from text.

    Held-out documents are left out, as in training. Use it with tokenizer.path=FOLDER.

    \b
    lm train-tokenizer stdlib tokenizer.vocab_size=8192 -o checkpoints/tok8k
    cat *.md | lm train-tokenizer - tokenizer.vocab_size=1000
    """
    import sys

    from cli.render import emit_json, say
    from engine.data.corpora import open_corpus, scan, spool
    from engine.data.pack import sides
    from engine.errors import RecipeError, ResourceError
    from engine.recipe import load, override
    from engine.text.tokenizer import learn

    recipe = load("", "defaults", overrides or [])
    recipe = override(recipe, data={"train": source})
    if (out / "tokenizer.json").exists():
        raise RecipeError(f"{out} already holds a tokenizer; choose another folder with -o")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"{out}: cannot be written: {error.strerror or error}") from None
    piped = spool(sys.stdin.buffer, out / "stdin") if source == "-" else None
    train = scan(open_corpus(source, recipe.data, piped), recipe.data.holdout)
    texts = (p.text for side, p in sides(train, None, recipe.data.holdout) if side == "train")
    tokenizer = learn(texts, recipe.tokenizer)
    tokenizer.save(out, recipe.model.max_seq_len)
    if piped:
        piped.unlink()
    found = train[1]
    used = found.documents - found.held_out * found.splits_by_name
    if as_json:
        facts = {"folder": str(out), "vocab_size": tokenizer.vocab_size}
        emit_json("train-tokenizer", facts | {"documents": used, "bytes": found.bytes})
    say(f"learned {tokenizer.vocab_size:,} tokens from {used:,} documents of {source}")
    say(f'saved {out}/tokenizer.json · try: lm tokenize "Hello" -m {out}')
