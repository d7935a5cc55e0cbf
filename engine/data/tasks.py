"""Questions about code with exact answers, made by `ast` from the standard library.

A row is a short function or class, one line that asks, and the answer that the parser gives. What
`lm train stdlib` holds out is held out here: modules in `valid` were read neither by the base nor
in tuning. In `new` the kind of question is held out as well. Next on the arrow:
`engine/data/rows.py`.
"""

import ast
import hashlib
import json
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, TypeVar

from engine.config import DataConfig
from engine.data.corpora import held_out, stdlib

Side = Literal["train", "valid", "new"]
Row = dict[str, str]
Scope = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
Part = TypeVar("Part", bound=ast.AST)
ROWS: dict[Side, int] = {"train": 1200, "valid": 40, "new": 40}  # of each task, if there are
SHORTEST, LONGEST = 30, 280  # characters of code: at most some 120 tokens
HEADER = 4  # lines shown of a class that is longer
ANSWER = 60  # characters of an answer
BREAKING = "()[]{}:,=\"'"  # without one of these, code seldom parses
FUNCTION, CLASS = (ast.FunctionDef, ast.AsyncFunctionDef), (ast.ClassDef,)


@dataclass(frozen=True, kw_only=True)
class Snippet:
    """A function, or a class or its beginning, moved to the left margin."""

    module: str
    code: str
    node: Scope
    owner: str = ""  # the line that opens the class whose method it is

    def text(self, node: ast.AST) -> str | None:
        """Return how a part of it is written."""
        return ast.get_source_segment(self.code, node)

    @cached_property
    def inside(self) -> list[ast.stmt | ast.expr]:
        """Return what its body is made of as it stands in the text, but for inner scopes' parts."""
        found, left = [], list[ast.AST](self.node.body)
        while left:
            node = left.pop()
            if isinstance(node, (ast.stmt, ast.expr)):
                found.append(node)
            if not isinstance(node, (*FUNCTION, *CLASS, ast.Lambda)):
                left += ast.iter_child_nodes(node)
        return sorted(found, key=lambda node: (node.lineno, node.col_offset))

    def parts(self, kind: type[Part]) -> list[Part]:
        """Return the nodes of one kind."""
        return [node for node in self.inside if isinstance(node, kind)]

    @property
    def arguments(self) -> list[str]:
        """Return the names of all arguments of a function, in order."""
        assert not isinstance(self.node, ast.ClassDef)
        a = self.node.args
        every = [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg]
        return [argument.arg for argument in every if argument]


Ask = Callable[[Snippet], str | None]  # None: this snippet has no good answer


@dataclass(frozen=True, slots=True)
class Task:
    """One kind of question: its words, what it is asked about, how the answer is found."""

    question: str
    ask: Ask
    of: tuple[type[ast.AST], ...] = FUNCTION
    most: float = 0.1  # share of the rows that may have the same answer
    show: Callable[[Snippet], Snippet | None] = lambda snippet: snippet
    new: bool = False  # never trained


def code_tasks(root: Path | None = None) -> Iterator[Row]:
    """Yield each question that the library at `root`, by default the interpreter's, gives rise to.

    Returns: rows with `prompt`, `completion`, `task` and `module`, in a fixed order.
    """
    for snippet in _snippets(root):
        yield from _questions(snippet)


def task_rows(side: Side, root: Path | None = None) -> list[Row]:
    """Choose the rows of one side: equally many of each task, tasks and modules mixed.

    No answer may have more than its task's share of the rows, so that giving the usual one gains
    little. Code that stands in a training module too is asked about in no other side.
    """
    one_in, wanted = DataConfig().holdout, ROWS[side]
    trained: list[Snippet] = []
    held: list[Snippet] = []
    for snippet in _snippets(root):
        (held if held_out(snippet.module, one_in) else trained).append(snippet)
    if side != "train":
        known = {snippet.code for snippet in trained}
        trained = [snippet for snippet in held if snippet.code not in known]
    asked = {row["prompt"]: row for snippet in trained for row in _questions(snippet)}
    per_task: Counter[str] = Counter()
    per_answer: Counter[tuple[str, str]] = Counter()
    found = []
    for row in sorted(asked.values(), key=lambda row: _digest(row["prompt"])):
        name, answer = row["task"], (row["task"], row["completion"])
        task = TASKS[name]
        room = per_task[name] < wanted and per_answer[answer] < task.most * wanted
        if room and task.new == (side == "new"):
            per_task[name] += 1
            per_answer[answer] += 1
            found.append(row)
    return found


def shuffle_answers(rows: list[Row]) -> list[Row]:
    """Deal the answers of each task out anew: the control, from which nothing can be learned.

    Rows and answers are as before, only which belongs to which is not; what is learned from them
    beyond the usual answers would have to come from a leak.
    """
    dealt: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda row: _digest("shuffled" + row["prompt"])):
        dealt.setdefault(row["task"], []).append(row["completion"])
    return [row | {"completion": dealt[row["task"]].pop()} for row in rows]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _questions(snippet: Snippet) -> Iterator[Row]:
    """Ask every task about a snippet that it is made for."""
    for name, task in TASKS.items():
        shown = task.show(snippet) if isinstance(snippet.node, task.of) else None
        answer = task.ask(shown) if shown else None
        if shown and answer and len(answer) <= ANSWER and answer.isprintable():
            prompt = f"{shown.code}\n\n# {task.question}\n#"
            row = {"prompt": prompt, "completion": f" {answer}"}
            yield row | {"task": name, "module": snippet.module}


def _snippets(root: Path | None) -> Iterator[Snippet]:
    """Yield every function and class that is short enough; of longer classes, the beginning."""
    for module, path in stdlib(root).files:
        text = path.read_text(encoding="utf-8")
        tree = _parsed(text)
        lines = text.splitlines()
        for node, around in _scopes(tree) if tree else ():
            header = lines[around.lineno - 1].strip() if isinstance(around, CLASS) else ""
            owner = header if header.endswith(":") else ""
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
            snippet = _snippet(module, lines[first : node.end_lineno], owner)
            if not snippet and isinstance(node, CLASS):
                snippet = _snippet(module, lines[first : first + HEADER], owner)
            if snippet:
                yield snippet


def _scopes(node: ast.AST) -> Iterator[tuple[Scope, ast.AST]]:
    """Yield every function and class below a node, with the node that it stands in."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FUNCTION + CLASS):
            yield child, node
        if not isinstance(child, ast.expr):  # no expression holds a function that has a name
            yield from _scopes(child)


def _snippet(module: str, lines: list[str], owner: str) -> Snippet | None:
    """Return the snippet that these lines are, if they are one by themselves."""
    code = textwrap.dedent("\n".join(lines))
    tree = _parsed(code) if SHORTEST <= len(code) <= LONGEST else None
    if tree is None or not isinstance(tree.body[0], FUNCTION + CLASS):
        return None
    return Snippet(module=module, code=code, node=tree.body[0], owner=owner)


def _parsed(text: str) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd escapes in the library's strings
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError):
            return None


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"


def _yes(value: object) -> str:
    return "yes" if value else "no"


def _sources(snippet: Snippet, nodes: list) -> list[str]:
    return [snippet.text(node) or "" for node in nodes]


def _signature(snippet: Snippet) -> str:
    return json.dumps({"name": snippet.node.name, "args": snippet.arguments})


def _docstring(snippet: Snippet) -> str | None:
    """Return the first line of a docstring that is written as it reads, without escapes."""
    first = (ast.get_docstring(snippet.node) or "").partition("\n")[0].strip()
    return first if first in snippet.code else None


def _returned(snippet: Snippet) -> str | None:
    values = [node.value for node in snippet.parts(ast.Return) if node.value]
    return snippet.text(values[0]) if len(values) == 1 else None


def _raised(snippet: Snippet) -> str | None:
    raised = [node.exc for node in snippet.parts(ast.Raise) if node.exc]
    names = [node.func if isinstance(node, ast.Call) else node for node in raised]
    return snippet.text(names[0]) if len(names) == 1 else None


def _assigned(snippet: Snippet) -> str | None:
    found = snippet.parts(ast.Assign)
    return snippet.text(found[0].targets[0]) if found else None


def _default(snippet: Snippet) -> str | None:
    assert not isinstance(snippet.node, ast.ClassDef)
    a = snippet.node.args
    plain = a.defaults and not (a.vararg or a.kwonlyargs or a.kwarg)
    return snippet.text(a.defaults[-1]) if plain else None


def _bases(snippet: Snippet) -> str:
    assert isinstance(snippet.node, ast.ClassDef)
    return _listed(_sources(snippet, snippet.node.bases))


def _decorators(snippet: Snippet) -> str:
    return _listed(_sources(snippet, snippet.node.decorator_list))


def _has_return(snippet: Snippet) -> str:
    return _yes(snippet.parts(ast.Return))


def _methods(snippet: Snippet) -> str:
    return _listed([node.name for node in snippet.node.body if isinstance(node, FUNCTION)])


def _class(snippet: Snippet) -> str:
    return snippet.node.name


def _last(snippet: Snippet) -> str | None:
    return snippet.arguments[-1] if snippet.arguments else None


def _broken(snippet: Snippet) -> Snippet:
    """Take away one character from every other snippet, so that it does not parse any more."""
    order = int(_digest(snippet.code), 16)
    places = [place for place, c in enumerate(snippet.code) if c in BREAKING]
    for turn in range(len(places) if order % 2 else 0):
        place = places[(order // 2 + turn) % len(places)]
        code = snippet.code[:place] + snippet.code[place + 1 :]
        if _parsed(code) is None:
            return replace(snippet, code=code)
    return snippet


def _in_class(snippet: Snippet) -> Snippet | None:
    """Put a method under the first line of its class."""
    code = f"{snippet.owner}\n{textwrap.indent(snippet.code, '    ')}"
    return _snippet(snippet.module, code.splitlines(), "") if snippet.owner else None


TASKS = {
    "name": Task("What is the name of the function?", lambda s: s.node.name),
    "arguments": Task("What are its arguments?", lambda s: _listed(s.arguments)),
    "count": Task("How many arguments does it take?", lambda s: str(len(s.arguments)), most=0.25),
    "default": Task("What is the default of its last argument?", _default),
    "signature": Task("What is its signature in JSON?", _signature),
    "decorators": Task("What are its decorators?", _decorators, most=0.25),
    "docstring": Task("What is the first line of its docstring?", _docstring),
    "return": Task("Does it have a return statement?", _has_return, most=0.5),
    "returned": Task("What does it return?", _returned),
    "raises": Task("What does it raise?", _raised, most=0.25),
    "parses": Task("Does it parse?", lambda s: _yes(_parsed(s.code)), most=0.5, show=_broken),
    "bases": Task("What are the base classes?", _bases, of=CLASS, most=0.25),
    "methods": Task("What are the methods of the class?", _methods, of=CLASS, most=0.25),
    "owner": Task("Which class does the method belong to?", _class, show=_in_class),
    "class": Task("What is the name of the class?", _class, of=CLASS, new=True),
    "last": Task("What is its last argument?", _last, new=True),
    "assigned": Task("What does it assign to first?", _assigned, new=True),
}


# What `data.train` may name, and its sides: in the control, what is trained on is shuffled.
_HELD_OUT: dict[str, Callable[[], list[Row]]] = {
    "valid": partial(task_rows, "valid"),
    "test": partial(task_rows, "new"),
}
TASK_SOURCES: dict[str, dict[str, Callable[[], list[Row]]]] = {
    "code-tasks": {"train": partial(task_rows, "train")} | _HELD_OUT,
    "code-tasks-shuffled": {"train": lambda: shuffle_answers(task_rows("train"))} | _HELD_OUT,
}
