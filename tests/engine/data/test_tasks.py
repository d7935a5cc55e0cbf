"""Questions from code: right answers, honest sides, and no answer that guessing would get."""

import inspect
import json
import shutil
import sysconfig
import warnings
from collections import Counter
from pathlib import Path

import pytest

from engine.config import DataConfig
from engine.data.corpora import held_out, open_corpus
from engine.data.tasks import ROWS, TASKS, code_tasks, shuffle_answers, task_rows

CODE = '''
import functools


class Reader(io.Base, metaclass=Meta):
    """Read things.

    Slowly.
    """

    def next_line(self, size=-1):
        """Return a line.

        Or nothing.
        """
        found = self.file.readline(size)
        if not found:
            raise EOFError("no more")
        return found.rstrip("\\\\n")

    def close(self): self.file = None


@functools.wraps(Reader)
@other
async def plain(first, /, *rest, key: int = 3, **more):
    def inner(unseen):
        return unseen
    self.hidden = inner
'''

EXPECTED = {
    "next_line": {
        "name": "next_line",
        "arguments": "self, size",
        "count": "2",
        "default": "-1",
        "signature": '{"name": "next_line", "args": ["self", "size"]}',
        "decorators": "none",
        "docstring": "Return a line.",
        "return": "yes",
        "returned": r'found.rstrip("\\n")',
        "raises": "EOFError",
        "owner": "Reader",
        "last": "size",
        "assigned": "found",
    },
    "plain": {
        "name": "plain",
        "arguments": "first, rest, key, more",
        "count": "4",
        "signature": '{"name": "plain", "args": ["first", "rest", "key", "more"]}',
        "decorators": "functools.wraps(Reader), other",
        "return": "no",
        "last": "more",
        "assigned": "self.hidden",
    },
}


@pytest.fixture
def library(tmp_path):
    (tmp_path / "one.py").write_text(CODE, encoding="utf-8")
    (tmp_path / "broken.py").write_text("def f(:\n    pass\n", encoding="utf-8")
    return tmp_path


def asked(rows, beginning):
    return {
        row["task"]: row["completion"].strip()
        for row in rows
        if row["prompt"].startswith(beginning) and row["task"] != "parses"
    }


def test_answers_are_those_a_reader_would_give(library):
    rows = list(code_tasks(library))
    owner = "class Reader(io.Base, metaclass=Meta):\n    def next_line"
    found = asked(rows, "def next_line") | asked(rows, owner)
    assert found == EXPECTED["next_line"]
    assert asked(rows, "@functools.wraps(Reader)\n@other") == EXPECTED["plain"]
    inner = asked(rows, "def inner")
    assert (inner["arguments"], inner["returned"]) == ("unseen", "unseen")
    assert {row["module"] for row in rows} == {"one.py"}


def test_a_long_class_is_shown_by_its_first_lines(library):
    lines = ["class A(B[0], C):", "    def f(self): ...", *(f"    x{k} = 'xyz'" for k in range(30))]
    (library / "one.py").write_text("\n".join(lines), encoding="utf-8")
    rows = [row for row in code_tasks(library) if row["task"] in ("bases", "methods", "class")]
    assert {row["completion"] for row in rows} == {" B[0], C", " f", " A"}
    assert {code_of(row) for row in rows} == {"\n".join(lines[:4])}


def test_a_prompt_is_code_a_question_and_the_beginning_of_its_answer(library):
    row = next(row for row in code_tasks(library) if row["task"] == "count")
    assert row["prompt"].endswith("\n\n# How many arguments does it take?\n#")
    assert row["completion"][0] == " "
    assert row.keys() == {"prompt", "completion", "task", "module"}


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    """A part of the real library large enough that files of it are held out."""
    root = tmp_path_factory.mktemp("library")
    for name, path in open_corpus("stdlib", DataConfig()).files:
        if held_out(name, 20) or hash_of(name) % 10 == 0:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, root / name)
    return root


def hash_of(name):
    return sum(name.encode())


@pytest.fixture(scope="module")
def sides(part):
    return {side: task_rows(side, part) for side in ROWS}


def code_of(row):
    return row["prompt"].rsplit("\n\n", 1)[0]


def test_sides_share_neither_modules_nor_code_nor_new_tasks(sides):
    for side, rows in sides.items():
        assert {held_out(row["module"], 20) for row in rows} == {side != "train"}
        assert {TASKS[row["task"]].new for row in rows} == {side == "new"}
        prompts = [row["prompt"] for row in rows]
        assert len(prompts) == len(set(prompts))
    trained = {code_of(row) for row in sides["train"]}
    assert not trained & {code_of(row) for side in ("valid", "new") for row in sides[side]}
    assert {row["task"] for row in sides["valid"]} == {n for n in TASKS if not TASKS[n].new}
    assert {row["task"] for row in sides["new"]} == {n for n in TASKS if TASKS[n].new}


def test_what_is_held_out_is_what_training_the_base_holds_out(sides):
    """The very rule of `lm train stdlib`, from the file's name below the library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for row in sides["valid"]:
        assert (library / row["module"]).is_file() and held_out(row["module"], DataConfig().holdout)


def test_guessing_the_usual_answer_gains_little(sides):
    for side, rows in sides.items():
        tasks = Counter(row["task"] for row in rows)
        answers = Counter((row["task"], row["completion"]) for row in rows)
        for (task, _), count in answers.items():
            assert count <= TASKS[task].most * ROWS[side] + 1
        assert max(tasks.values()) <= ROWS[side]
    yes = Counter(row["completion"] for row in sides["valid"] if row["task"] == "parses")
    assert 0.4 < yes[" yes"] / yes.total() < 0.6


def compiled(code):
    """What the compiler, rather than `ast`, makes of a function: None if it refuses."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = compile(code, "", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return None
    while made.co_consts and not made.co_flags & inspect.CO_OPTIMIZED:
        made = next((c for c in made.co_consts if inspect.iscode(c)), None)
        if made is None:
            break
    return made


def test_the_compiler_agrees(sides):
    seen = Counter()
    for row in [*sides["train"], *sides["valid"]]:
        answer, task = row["completion"][1:], row["task"]
        if "lambda" in row["prompt"] or "nonlocal" in row["prompt"]:
            continue  # code of its own; and what parses alone but means nothing alone
        code = compiled(code_of(row))
        if task == "parses":
            assert (answer == "yes") == (code is not None)
        elif task in ("arguments", "count", "name", "signature"):
            count = code.co_argcount + code.co_kwonlyargcount
            count += bool(code.co_flags & inspect.CO_VARARGS)
            count += bool(code.co_flags & inspect.CO_VARKEYWORDS)
            names = sorted(code.co_varnames[:count])
            match task:
                case "count":
                    assert answer == str(count), row
                case "name":
                    assert answer == code.co_name, row
                case "arguments":
                    assert sorted(answer.split(", ")) == (names or ["none"]), row
                case "signature":
                    assert sorted(json.loads(answer)["args"]) == names, row
        else:
            continue
        seen[task] += 1
    assert min(seen.values()) > 50 and len(seen) == 5


def test_shuffling_keeps_rows_and_answers_and_parts_them(sides):
    rows = sides["train"]
    dealt = shuffle_answers(rows)
    assert [row["prompt"] for row in dealt] == [row["prompt"] for row in rows]

    def pairs(rows):
        return Counter((row["task"], row["completion"]) for row in rows)

    assert pairs(dealt) == pairs(rows)
    same = sum(a == b for a, b in zip(rows, dealt, strict=True)) / len(rows)
    # What chance leaves together: the sum of squares of each answer's share, task by task.
    tasks = Counter(row["task"] for row in rows)
    chance = sum(n * n / tasks[task] for (task, _), n in pairs(rows).items()) / len(rows)
    assert same == pytest.approx(chance, abs=0.03) and same < 0.3
    assert dealt == shuffle_answers(rows)
