"""Breaks core.py and kl.py one sign, index, constant or call at a time; says what no test notices.

    python tests/mutate_core.py            # every mutant, survivors listed
    python tests/mutate_core.py gae        # those inside functions or classes of that name

A mutant is run in this process: its module takes the place of the real one in the test module,
whose tests run until one fails. test_mutations runs a part in the suite, all of it with -m slow.
"""

from __future__ import annotations

import ast
import copy
import itertools
import sys
import types
import warnings
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

SWAPPED_OPERATORS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.Lt: ast.Gt,
    ast.Gt: ast.Lt,
    ast.Eq: ast.NotEq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
SWAPPED_NAMES = {
    "maximum": "minimum",
    "minimum": "maximum",
    "min": "max",
    "max": "min",
    "sum": "mean",
    "rsqrt": "sqrt",
    "exp": "expm1",
    "expm1": "exp",
    "zeros_like": "ones_like",
    "softmax": "log_softmax",
}
REMOVABLE_CALLS = {
    "masked_fill",
    "clamp",
    "flip",
    "cumsum",
    "abs",
    "exp",
    "log_softmax",
    "reversed",
}

Change = Callable[[ast.AST], ast.AST]


@dataclass(frozen=True)
class Mutant:
    """A broken copy of a module: in which function or class, the broken statement, the source."""

    owner: str
    statement: str
    source: str

    def __str__(self) -> str:
        return f"{self.owner}: {self.statement}"


def mutants(source: str, *, every: int = 1) -> Iterator[Mutant]:
    """Every mutant of a module's source, or every n-th."""
    tree = ast.parse(source)
    for place, path, change in itertools.islice(_breaks(tree), 0, None, every):
        broken = copy.deepcopy(tree)
        statement = _replace(broken.body[place], path, change)
        written = ast.unparse(ast.fix_missing_locations(broken))
        yield Mutant(tree.body[place].name, statement, written)


def _breaks(tree: ast.Module) -> Iterator[tuple[int, tuple, Change]]:
    """Which function or class to break, where in it, and how."""
    for place, owner in enumerate(tree.body):
        if isinstance(owner, (ast.FunctionDef, ast.ClassDef)):
            for path, node in _sites(owner, ()):
                for change in _changes(node):
                    yield place, path, change


def _sites(node: ast.AST, path: tuple) -> Iterator[tuple[tuple, ast.AST]]:
    """Every expression that computes something, with its path; no annotations, asserts, texts."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "bases"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST) and not isinstance(child, (ast.Assert, ast.JoinedStr)):
                here = (*path, (field, index))
                yield here, child
                yield from _sites(child, here)


def _replace(place: ast.AST, path: tuple, change: Change) -> str:
    """Apply `change` to what stands at `path`; returns the statement's first line, changed."""
    *upper, (field, index) = path
    statement = place
    for step, i in upper:
        place = getattr(place, step) if i is None else getattr(place, step)[i]
        statement = place if isinstance(place, (ast.stmt, ast.arguments)) else statement
    old = getattr(place, field) if index is None else getattr(place, field)[index]
    new = change(old)
    if index is None:
        setattr(place, field, new)
    else:
        getattr(place, field)[index] = new
    return ast.unparse(new if isinstance(new, ast.stmt) else statement).splitlines()[0]


def _changes(node: ast.AST) -> Iterator[Change]:
    if isinstance(node, ast.BinOp):
        yield from _of_operation(node)
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPPED_OPERATORS:
        yield lambda n: _with(n, ops=[SWAPPED_OPERATORS[type(n.ops[0])]()])
    elif isinstance(node, ast.UnaryOp):
        yield lambda n: n.operand
    elif isinstance(node, ast.Constant):
        yield from _of_constant(node.value)
    elif isinstance(node, ast.IfExp):
        yield lambda n: n.body
        yield lambda n: n.orelse
    elif isinstance(node, ast.Call):
        yield from _of_call(node)
    elif isinstance(node, ast.AugAssign) and type(node.op) in SWAPPED_OPERATORS:
        yield lambda n: _with(n, op=SWAPPED_OPERATORS[type(n.op)]())


def _of_operation(node: ast.BinOp) -> Iterator[Change]:
    if type(node.op) in SWAPPED_OPERATORS:
        yield lambda n: _with(n, op=SWAPPED_OPERATORS[type(n.op)]())
    if isinstance(node.op, (ast.Sub, ast.Div)):
        yield lambda n: _with(n, left=n.right, right=n.left)
    if not isinstance(node.op, ast.BitOr):
        yield lambda n: n.left
        yield lambda n: n.right


def _of_constant(value: object) -> Iterator[Change]:
    if isinstance(value, bool):
        yield lambda n: ast.Constant(not n.value)
    elif isinstance(value, (int, float)):
        yield lambda n: ast.Constant(n.value + 1)
        if value:
            yield lambda n: ast.Constant(type(n.value)(0))
            yield lambda n: ast.Constant(n.value * 2)
            yield lambda n: ast.UnaryOp(ast.USub(), ast.Constant(n.value))


def _of_call(node: ast.Call) -> Iterator[Change]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name in REMOVABLE_CALLS:
        method = isinstance(node.func, ast.Attribute)
        yield lambda n: n.func.value if method else n.args[0]
    if SWAPPED_NAMES.get(name, name) != name:
        yield lambda n: _with(n, func=_renamed(n.func, SWAPPED_NAMES[name]))
    if name == "where":
        yield lambda n: _with(n, args=[n.args[0], n.args[2], n.args[1]])
        yield lambda n: n.args[1]
        yield lambda n: n.args[2]
    for keyword in range(len(node.keywords)):
        yield lambda n, k=keyword: _with(n, keywords=n.keywords[:k] + n.keywords[k + 1 :])


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.deepcopy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _renamed(function: ast.AST, name: str) -> ast.AST:
    return _with(function, **{"attr" if isinstance(function, ast.Attribute) else "id": name})


# ---- Running


def loaded(name: str, source: str) -> types.ModuleType:
    """A module of this source."""
    module = types.ModuleType(name)
    exec(compile(source, f"<mutant of {name}>", "exec"), module.__dict__)
    return module


def killer(tests: types.ModuleType, names: list[str], mutant: Mutant) -> str | None:
    """The first test that fails with the mutant behind `names`; None if none does."""
    original = {name: getattr(tests, name) for name in names}
    try:
        module = loaded("mutant", mutant.source)
    except Exception:
        return "import"
    for name in names:
        setattr(tests, name, getattr(module, name, module))
    try:
        return next((test.__name__ for test in _tests(tests) if _fails(test)), None)
    finally:
        for name, value in original.items():
            setattr(tests, name, value)


def _tests(module: types.ModuleType) -> list[Callable[[], None]]:
    """The tests without arguments, quick ones first: property tests last."""
    found = [v for k, v in vars(module).items() if k.startswith("test_")]
    found = [test for test in found if not _arguments(test)]
    return sorted(found, key=lambda test: hasattr(test, "hypothesis"))


def _arguments(test: Callable[..., None]) -> int:
    return 0 if hasattr(test, "hypothesis") else test.__code__.co_argcount


def _fails(test: Callable[[], None]) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            test()
    except pytest.skip.Exception:
        return False
    except Exception:
        return True
    return False


def targets() -> list[tuple[str, types.ModuleType, list[str]]]:
    """Each file that is broken, the module of its tests, and the names by which they reach it."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    import test_core
    import test_kl

    return [
        ("ppo_lab/core.py", test_core, ["core"]),
        ("ppo_lab/kl.py", test_kl, ["FixedKLController", "AdaptiveKLController"]),
    ]


def survivors(
    *, only: str = "", spared: Container[str] = (), every: int = 1
) -> tuple[list[str], int]:
    """The mutants that no test notices, and how many were tried: `every` n-th, no `spared` ones."""
    alive, count = [], 0
    for file, tests, names in targets():
        for mutant in mutants((ROOT / file).read_text(), every=every):
            if only in mutant.owner and str(mutant) not in spared:
                count += 1
                if killer(tests, names, mutant) is None:
                    alive.append(str(mutant))
    return alive, count


if __name__ == "__main__":
    found, total = survivors(only="".join(sys.argv[1:2]))
    print(*found, f"{len(found)} of {total} mutants survive", sep="\n")
