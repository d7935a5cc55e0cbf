"""Recipes in and out: YAML and `key=value` to a checked `Recipe`, and back to text.

    lm train stdlib model.n_layers=8      defaults ← stdlib.yaml ← model.n_layers=8

Every problem of a recipe is reported at once, with file, line and the nearest good key. The next
stop on the arrow is `engine/data/corpora.py`, which turns `data.train` into documents.
"""

import dataclasses
import re
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

from engine.config import Recipe
from engine.errors import RecipeError
from engine.values import convert, nearest


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads 1e-4 as a float, as YAML 1.2 does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.[\d_]+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load(text: str, where: str, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Build a recipe from YAML text and `key=value` overrides, in that order over the defaults.

    Raises: RecipeError naming every problem at once, each with its place and the nearest key.
    """
    problems: list[str] = []
    values: dict[str, tuple[Any, str]] = {}  # dotted key → (value, where it was said)
    try:
        root = yaml.compose(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or "cannot be read"
        raise RecipeError(f"{where}{line}: not valid YAML: {what}") from None
    if root is not None:
        _collect(root, "", where, values, problems)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            problems.append(f"{override!r} is not key=value; for example train.steps=100")
            continue
        field = fields().get(key)
        if field is not None and field.type is str:  # text is taken as it stands: - and 1e-4 too
            values[key] = (value, "command line")
            continue
        try:
            node = yaml.compose(value, Loader=_Loader)
            parsed = _construct(node) if node is not None else ""
        except yaml.YAMLError:
            parsed = value
        values[key] = (parsed, "command line")
    recipe = _build(Recipe, "", values, problems)
    known = set(fields())
    for key, (_, place) in values.items():
        if key not in known:
            problems.append(f"{key} is not a recipe key ({place}){nearest(key, known)}")
    if problems:
        raise RecipeError("\n".join(problems))
    _cross_check(recipe)
    return recipe


def _construct(node: yaml.Node) -> Any:
    loader = _Loader("")
    return loader.construct_document(node)


def _collect(node, prefix, where, values, problems) -> None:
    """Flatten a YAML mapping into dotted keys, remembering lines and refusing duplicates."""
    if not isinstance(node, yaml.MappingNode):
        line = node.start_mark.line + 1
        problems.append(f"{prefix or 'a recipe'} must be a mapping of keys ({where}:{line})")
        return
    for key_node, value_node in node.value:
        key = f"{prefix}.{key_node.value}" if prefix else str(key_node.value)
        place = f"{where}:{key_node.start_mark.line + 1}"
        if isinstance(value_node, yaml.MappingNode) or key in _sections():
            if key in _sections():
                _collect(value_node, key, where, values, problems)
            else:
                problems.append(
                    f"{key} is not a recipe section ({place}){nearest(key, _sections())}"
                )
            continue
        if key in values:
            problems.append(f"{key} is given twice ({values[key][1]} and {place}); keep one")
        values[key] = (_construct(value_node), place)


def _build(kind: type, prefix: str, values, problems) -> Any:
    """Make one dataclass of the tree, converting each value by its field's type."""
    chosen = {}
    for field in dataclasses.fields(kind):
        key = f"{prefix}.{field.name}" if prefix else field.name
        if dataclasses.is_dataclass(field.type):
            chosen[field.name] = _build(typing.cast(type, field.type), key, values, problems)
        elif key in values:
            value, place = values[key]
            try:
                chosen[field.name] = convert(value, field)
            except ValueError as error:
                problems.append(f"{key}={value!r} {error} ({place})")
    try:
        return kind(**chosen)
    except ValueError as error:
        problems.append(str(error))
        return kind()


def _cross_check(recipe: Recipe) -> None:
    """Refuse combinations that no single field can see."""
    problems = []
    longest = max(recipe.data.seq_len, recipe.eval.seq_len)
    if longest > recipe.model.max_seq_len and not recipe.train.base:  # which has its own
        problems.append(
            f"data.seq_len or eval.seq_len is {longest}, beyond model.max_seq_len="
            f"{recipe.model.max_seq_len}; raise model.max_seq_len"
        )
    if recipe.train.batch_size % recipe.train.accumulate:
        problems.append(
            f"train.batch_size={recipe.train.batch_size} is not a multiple of train.accumulate="
            f"{recipe.train.accumulate}"
        )
    if recipe.train.processes > recipe.train.accumulate:
        problems.append(
            f"train.processes={recipe.train.processes} share the parts of a batch, and"
            f" train.accumulate={recipe.train.accumulate} makes fewer; raise it"
        )
    if "/" in recipe.run.name or recipe.run.name in (".", ".."):
        problems.append(f"run.name={recipe.run.name!r} is not a plain name; use -o for a folder")
    if recipe.data.valid == "-":
        problems.append("data.valid cannot be standard input; give a file")
    for key, value in (
        ("train.budget", recipe.train.budget),
        ("eval.save_every", recipe.eval.save_every),
    ):
        try:
            duration(value)
        except ValueError as error:
            if not (key == "eval.save_every" and value.isdigit() and int(value) > 0):
                problems.append(f"{key}={value!r} {error}")
    if problems:
        raise RecipeError("\n".join(problems))


def duration(text: str) -> float:
    """Read 90s, 5m or 1h as seconds. Raises: ValueError if it is none of these."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)", text)
    if not match or float(match[1]) <= 0:
        raise ValueError("is not a time; write 90s, 5m or 1h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def fields(kind: type = Recipe, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Return every leaf field of the tree by dotted key, in order."""
    found: dict[str, dataclasses.Field] = {}
    for field in dataclasses.fields(kind):
        key = f"{prefix}.{field.name}" if prefix else field.name
        if dataclasses.is_dataclass(field.type):
            found |= fields(typing.cast(type, field.type), key)
        else:
            found[key] = field
    return found


def _sections(kind: type = Recipe, prefix: str = "") -> list[str]:
    """Return the dotted names of all branches."""
    found = []
    for field in dataclasses.fields(kind):
        key = f"{prefix}.{field.name}" if prefix else field.name
        if dataclasses.is_dataclass(field.type):
            found += [key, *_sections(typing.cast(type, field.type), key)]
    return found


def choices(field: dataclasses.Field) -> str:
    """Name what a field accepts: its choices, or its type and range."""
    kind: Any = field.type
    if typing.get_origin(kind) is Literal:
        return "|".join(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return "numbers"
    low, high = field.metadata["low"], field.metadata["high"]
    limits = "" if low is None else f" ≥ {low:g}" if high is None else f" {low:g}…{high:g}"
    return kind.__name__ + limits


def to_dict(config: Any) -> dict[str, Any]:
    """Turn a recipe or a branch into plain nested dicts, for YAML and JSON."""
    return dataclasses.asdict(config)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested dicts into one of dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        inner = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return flat


def dump(recipe: Recipe) -> str:
    """Write the whole resolved recipe as YAML that `load` reads back to the same recipe."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True)


def override(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    """Return a copy with some fields replaced: `override(r, model={"vocab_size": 512})`."""
    parts = {
        name: dataclasses.replace(getattr(recipe, name), **values)
        for name, values in sections.items()
    }
    return dataclasses.replace(recipe, **parts)


def find_recipe(name: str, shipped: Path) -> Path:
    """Find a recipe by path, or by name among the shipped ones.

    Raises: RecipeError listing the names there are.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise RecipeError(f"no recipe file {name}; `lm recipes` lists the shipped ones")
    if (shipped / f"{name}.yaml").is_file():
        return shipped / f"{name}.yaml"
    names = sorted(file.stem for file in shipped.glob("*.yaml"))
    raise RecipeError(
        f"no recipe named {name}{nearest(name, names)}; there are: {', '.join(names)}"
        " (or give a .yaml file)"
    )
