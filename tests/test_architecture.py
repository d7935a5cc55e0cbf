"""The shape of the project, held by reading every file: floors, sizes, bans, nothing unread."""

import ast
import sys
from pathlib import Path

import pytest

from engine.recipe import fields
from tests.conftest import ROOT

# A row may import rows above it and itself. `errors` is the lowest floor, `cli` the highest.
FLOORS = [
    ("engine.errors", "engine.clock", "engine.peak"),
    ("engine.pages",),
    ("engine.config", "engine.files", "engine.tensors", "engine.values"),
    ("engine.runs", "engine.recipe", "engine.cost", "engine.text"),
    ("engine.memory",),
    ("engine.hardware", "engine.kernels"),
    ("engine.machine",),
    ("engine.model", "engine.weights", "engine.quantize"),
    ("engine.manifest", "engine.calibrate"),
    ("engine.matrices",),
    ("engine.adapter_config",),
    ("engine.adapter", "engine.sampling_defaults"),
    ("engine.checkpoint",),
    ("engine.data",),
    ("engine.interop",),
    ("engine.train", "engine.generate"),
    ("engine.finetune",),
    ("engine.bench", "engine.doctor"),
    ("engine.rehearsal",),
    ("engine.forecast",),
    ("cli",),
]
SOURCES = sorted([*ROOT.glob("engine/**/*.py"), *ROOT.glob("cli/**/*.py")])
MODULES = [path for path in SOURCES if path.name != "__init__.py"]
# Optional packages are imported where they are needed, so that the rest works without them.
LATE_IMPORTS = {"pyarrow", "pyppmd", "pydoc_data", "matplotlib", "gguf", "huggingface_hub"}
LATE_IMPORTS |= {"genai_prices"}
# So are these, because counting tokens has to start at once: text that is ASCII needs no regex, and
# only a tokenizer of a file needs the package that reads it.
LATE_IMPORTS |= {"regex", "tiktoken", "engine.text.fromfile"}
# Importing torch takes longer than a small model's answer, so what needs it waits until it is sure.
LATE_IMPORTS |= {"engine.generate.reference"}
# So does what few calls need: the first letter waits for every import.
LATE_IMPORTS |= {"engine.generate.speculate", "concurrent.futures"}


def floor_of(module: str) -> tuple[int, str]:
    for height, row in enumerate(FLOORS):
        for name in row:
            if module == name or module.startswith(name + "."):
                return height, name
    raise AssertionError(f"{module} is on no floor; add it to FLOORS")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_only_from_floors_below(path):
    height, own = floor_of(name_of(path))
    for imported in imports(path):
        if imported.split(".")[0] in ("engine", "cli"):
            other_height, other = floor_of(imported)
            assert other_height < height or other == own, f"{name_of(path)} imports {imported}"


def test_train_and_generate_do_not_know_each_other():
    for path in MODULES:
        own = floor_of(name_of(path))[1]
        others = {floor_of(name)[1] for name in imports(path) if name.startswith("engine.")}
        assert not (own == "engine.train" and "engine.generate" in others), path
        assert not (own == "engine.generate" and "engine.train" in others), path


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_sizes(path):
    """400 lines a file, 60 a function; help texts and option lists of a command do not count."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400, path
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if body:
                lines = (body[-1].end_lineno or 0) - body[0].lineno + 1
                assert lines <= 60, f"{path}: {node.name} has {lines} lines"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_public_thing_says_what_it_is(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{path} has no module docstring"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            nested = node.name in ("ask", "size")  # helpers inside a function
            assert nested or ast.get_docstring(node), f"{path}: {node.name}"


def test_packages_hold_nothing_in_init():
    for path in ROOT.glob("**/__init__.py"):
        if ".venv" not in path.parts:
            assert not path.read_text(encoding="utf-8").strip(), path


def test_the_engine_neither_prints_nor_exits_nor_reads_the_environment():
    for path in MODULES:
        if path.is_relative_to(ROOT / "engine"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                assert not isinstance(node, ast.Global), path
                if isinstance(node, ast.Call):
                    called = ast.unparse(node.func)
                    assert called not in ("print", "exit", "quit", "sys.exit"), path
                if isinstance(node, ast.Attribute):
                    assert ast.unparse(node) not in ("os.environ", "os.getenv"), path
            assert not {i.split(".")[0] for i in imports(path)} & {"rich", "typer", "pickle"}, path


def test_the_engine_imports_at_the_top():
    """Only optional packages are imported inside functions."""
    for path in MODULES:
        if path.is_relative_to(ROOT / "engine"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for function in ast.walk(tree):
                if isinstance(function, ast.FunctionDef):
                    for node in ast.walk(function):
                        if isinstance(node, (ast.Import, ast.ImportFrom)):
                            name = getattr(node, "module", None) or node.names[0].name
                            assert LATE_IMPORTS & {name, name.split(".")[0]}, f"{path}: {name}"


def test_no_module_shadows_the_standard_library_beside_main():
    for path in (ROOT / "cli").glob("*.py"):
        assert path.stem not in sys.stdlib_module_names, path


def test_every_engine_module_has_its_test():
    missing = []
    for path in MODULES:
        if path.is_relative_to(ROOT / "engine") and path.stem not in ("errors", "config"):
            relative = path.relative_to(ROOT)
            if not (ROOT / "tests" / relative.parent / f"test_{relative.stem}.py").is_file():
                missing.append(str(relative))
    whole_runs = ["job", "prepare", "pretrain"]  # tested through test_run.py
    assert missing == [f"engine/train/{name}.py" for name in whole_runs]


def test_every_recipe_field_is_read_by_something():
    """A setting that nothing reads is a lie: each must appear as `<section or config>.field`."""
    read = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = ast.unparse(node.value).rsplit(".", 1)[-1]
                if path.name == "config.py" and owner == "self":
                    owner = "config"
                read.add((owner, node.attr))
    unread = []
    for key in fields():
        section, name = key.split(".")[-2:]
        if not any((owner, name) in read for owner in (section, "config", "settings")):
            unread.append(key)
    assert not unread
