"""Reading recipes: types, ranges, places, suggestions, and the shipped files."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.options import recipes_folder
from engine.config import Recipe
from engine.errors import RecipeError
from engine.recipe import dump, duration, fields, find_recipe, load

SHIPPED = sorted(recipes_folder().glob("*.yaml"))


def refused(text: str = "", *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(text, "r.yaml", overrides)
    return str(caught.value)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", "+1e-4"])
def test_scientific_notation_is_a_number(text):
    """PyYAML alone reads 1e-4 as a string, as YAML 1.1 says (yaml/pyyaml#173)."""
    assert load(f"train: {{optim: {{lr: {text}}}}}", "r").train.optim.lr == 1e-4
    assert load("", "r", [f"train.optim.lr={text}"]).train.optim.lr == 1e-4


def test_command_line_beats_file_beats_default():
    text = "train: {steps: 5, batch_size: 6}"
    recipe = load(text, "r", ["train.steps=7"])
    assert (recipe.train.steps, recipe.train.batch_size, recipe.run.seed) == (
        7,
        6,
        Recipe().run.seed,
    )


def test_every_problem_is_reported_at_once_with_its_place():
    message = refused("train:\n  lrr: 3\nmodel:\n  d_model: wide\n", "data.seqlen=4", "nonsense")
    assert "train.lrr is not a recipe key (r.yaml:2); did you mean train.optim.lr?" in message
    assert "model.d_model='wide' must be a whole number (r.yaml:4)" in message
    assert "data.seqlen is not a recipe key (command line); did you mean data.seq_len?" in message
    assert "'nonsense' is not key=value" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: [1, 2]", "train must be a mapping of keys (r.yaml:1)"),
        ("trian: {steps: 3}", "trian is not a recipe section (r.yaml:1); did you mean train?"),
        ("- a", "a recipe must be a mapping"),
        ("train: {", "r.yaml:1: not valid YAML"),
        ("run: {seed: 1, seed: 2}", "run.seed is given twice"),
        ("model: {n_heads: 0}", "must be from 1 to 16384"),
        ("model: {n_heads: 2.5}", "must be a whole number"),
        ("train: {optim: {momentum: 2}}", "must be from 0 to 0.9999"),
        ("train: {optim: {lr: .nan}}", "must be finite"),
        ("train: {optim: {lr: true}}", "must be a number"),
        ("model: {tie_embeddings: maybe}", "must be true or false"),
        ("run: {name: [a]}", "must be text"),
        ("run: {name: no}", "must be text"),
        ("train: {optim: {name: adam}}", "must be one of muon, adamw; did you mean adamw?"),
        ("model: {d_model: 100, n_heads: 3}", "not divisible"),
        ("model: {n_heads: 4, n_kv_heads: 3}", "not a multiple"),
        ("model: {norm: layernorm, norm_offset: true}", "norm_offset is for rmsnorm"),
        ("model: {max_seq_len: 64}\ndata: {seq_len: 65}", "beyond model.max_seq_len=64"),
        ("train: {batch_size: 6, accumulate: 4}", "not a multiple of train.accumulate"),
        ("train: {accumulate: 2, processes: 3}", "train.accumulate=2 makes fewer; raise it"),
        ("train: {budget: soon}", "train.budget='soon' is not a time"),
        ("eval: {save_every: 0}", "eval.save_every='0' is not a time"),
        ("run: {name: ../x}", "not a plain name"),
        ("data: {valid: '-'}", "cannot be standard input"),
        ("eval: {save_every: 5x}", "eval.save_every='5x' is not a time"),
    ],
)
def test_what_is_wrong_is_said(text, expected):
    assert expected in refused(text)


@pytest.mark.parametrize("text", ["x = y", "-", "1e-4", "[a", "no", "'quoted'", "# x", ""])
def test_text_on_the_command_line_is_taken_as_it_stands(text):
    assert load("", "r", [f"eval.prompt={text}"]).eval.prompt == text


def test_the_rate_follows_the_optimizer_unless_given():
    rates = [load("", "r", [f"train.optim.name={n}"]).train.optim.lr for n in ("muon", "adamw")]
    assert rates == [0.015, 0.002]
    assert load("", "r", ["train.optim.name=adamw", "train.optim.lr=0.5"]).train.optim.lr == 0.5


def test_an_empty_recipe_is_the_defaults():
    assert load("", "r") == load("# only a comment\n", "r") == Recipe()


@given(
    st.fixed_dictionaries(
        {
            "run.seed": st.integers(0, 2**62),
            "run.name": st.text(
                st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="./"),
                max_size=8,
            ),
            "train.optim.lr": st.floats(0, 1e9, allow_nan=False),
            "model.tie_embeddings": st.booleans(),
            "eval.prompt": st.text(st.characters(blacklist_categories=("Cs",)), max_size=20),
        }
    )
)
def test_dump_and_load_are_inverse(values):
    import yaml

    tree: dict = {}
    for key, value in values.items():
        *path, last = key.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    recipe = load(yaml.safe_dump(tree, allow_unicode=True), "r")
    assert load(dump(recipe), "again") == recipe


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_says_how_to_run_it(path):
    text = path.read_text(encoding="utf-8")
    load(text, path.name)
    head = text.split("\n", 1)[0]
    assert head.startswith("# ") and len(head) <= 100
    for part in ("# What ", "# How long", "# Expect"):
        assert part in text, part
    assert f"lm train {path.stem}" in text or f"lm finetune {path.stem}" in text


def test_a_recipe_holds_only_differences():
    """A value equal to the default is noise, and would rot when the default changes."""
    import yaml

    for path in SHIPPED:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
        for key, field in fields().items():
            node = given
            for part in key.split("."):
                node = node.get(part) if isinstance(node, dict) else None
            # What a recipe is trained on is worth reading, even where it is the default.
            assert node is None or node != field.default or key == "data.train", (path.name, key)


def test_unknown_recipe_lists_the_known(tmp_path):
    with pytest.raises(RecipeError, match=r"stdlb; did you mean stdlib\?; there are: .*smoke"):
        find_recipe("stdlb", recipes_folder())
    with pytest.raises(RecipeError, match="no recipe file"):
        find_recipe(str(tmp_path / "none.yaml"), recipes_folder())


def test_durations():
    assert [duration(text) for text in ("90s", "5m", "1.5h")] == [90, 300, 5400]
    for wrong in ("5", "m", "0s", "-1s", "1d", ""):
        with pytest.raises(ValueError, match="write 90s"):
            duration(wrong)
