"""Mutation testing: change one thing in the code, run its tests, and list the changes that no test notices.

    python scripts/mutation.py                      # all mutants of all modules below
    python scripts/mutation.py --sample 60          # 60 of each module, drawn with a fixed seed
    python scripts/mutation.py masking _split:12    # of one module, and one mutant by its number

Changed are comparisons, arithmetic, `and` and `or`, signs and negations, conditions, constants and defaults, pairs of
functions such as `min` and `max`, what is returned, and statements (left out where a name keeps an earlier value).
Docstrings, annotations, decorators, messages of errors and logging stay. Packages are imported once; each mutant is a
fork of this process, in which the changed module is what tests import. A mutant is killed when a test fails or when it
takes more than CPU seconds; such are marked `time`. Exit status 1 if any survives.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gc
import importlib
import os
import random
import resource
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType

os.environ.update(PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1", NUMBA_NUM_THREADS="1")

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)
CPU = 40
MEMORY = 24 * 2**30
LAWS = "tests/test_properties.py::test_"
MODULES = {
    "likelihoods": ("nn", ["tests/test_likelihoods.py", LAWS + "probabilities_of_counts_sum_to_one"]),
    "gamma_poisson": (
        "nn",
        ["tests/test_gamma_poisson.py", LAWS + "a_posterior_grows_with_the_count_and_follows_the_surer_side"],
    ),
    "masking": (
        "nn",
        [
            "tests/test_masking.py",
            "tests/test_missing.py::test_each_cell_draws_its_corruption",
            "tests/test_missing.py::test_hidden_genes_are_hidden_in_the_whole_field_of_view",
            LAWS + "what_is_shown_and_what_is_asked_for_are_parts_of_what_there_is",
        ],
    ),
    "_graph": ("data", ["tests/test_graph.py"]),
    "_split": (
        "data",
        [
            "tests/test_split.py",
            "tests/test_missing.py::test_single_entries_are_held_out_among_the_measured",
            "tests/test_missing.py::test_missing_genes_of_a_field_of_view_are_held_out_as_such",
            "tests/test_missing.py::test_genes_that_are_measured_nowhere_are_no_pattern",
            "tests/test_missing.py::test_no_cell_loses_its_last_counts",
            "tests/test_missing.py::test_typical_values_are_means_over_measured_cells",
            "tests/test_training.py::test_held_out_parts_add_up_and_have_the_stated_shares",
            "tests/test_training.py::test_gene_shares_do_not_depend_on_where_a_gene_was_measured",
            LAWS + "held_out_parts_add_up",
            LAWS + "held_out_entries_were_measured_and_leave_no_cell_empty",
        ],
    ),
}
OPERATORS: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,), ast.And: (ast.Or,), ast.Or: (ast.And,), ast.Add: (ast.Sub,), ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,), ast.Div: (ast.Mult,), ast.FloorDiv: (ast.Mult,), ast.Pow: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,), ast.BitOr: (ast.BitAnd,), ast.LShift: (ast.RShift,),
}  # fmt: skip
PAIRS = [("min", "max"), ("minimum", "maximum"), ("floor", "ceil"), ("any", "all"), ("zeros", "ones")]
NAMES = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
UNTOUCHED = {"annotation", "returns", "decorator_list", "exc"}  # `exc` is what is raised


def replacements(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in the place of an expression, an operator or a statement."""
    for operator in OPERATORS.get(type(node), ()):
        yield operator()
    match node:
        case ast.UnaryOp():
            yield node.operand
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int()):
            yield from (ast.Constant(node.value + 1), ast.Constant(node.value - 1))
        case ast.Constant(value=float()):
            yield from (
                (ast.Constant(node.value * factor) for factor in (2.0, 0.5)) if node.value else [ast.Constant(1.0)]
            )
        case ast.Constant(value=str()):
            yield ast.Constant(node.value + "_")
        case ast.Name() if node.id in NAMES:
            yield ast.Name(NAMES[node.id], node.ctx)
        case ast.Attribute() if node.attr in NAMES:
            yield ast.Attribute(node.value, NAMES[node.attr], node.ctx)
        case ast.Return(value=ast.AST()):
            yield ast.Return(ast.Constant(None))
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise():
            yield ast.Pass()
        case ast.Assign(targets=[ast.Subscript() | ast.Name() | ast.Tuple()]):
            yield ast.Pass()


def mutated(node: ast.AST, bound: frozenset[str] = frozenset()) -> Iterator[tuple[int, str, str]]:
    """Change a tree in place, one thing at a time: line, what was there, and what is there while this is yielded."""
    for field, value in ast.iter_fields(node):
        items = value if isinstance(value, list) else [value]
        for at, child in enumerate(items):
            if field in UNTOUCHED or not isinstance(child, ast.AST) or is_text(child):
                continue
            news = list(replacements(child))
            if field in ("test", "ifs") and not isinstance(child, ast.Compare | ast.UnaryOp):
                news.append(ast.UnaryOp(ast.Not(), child))
            if isinstance(child, ast.Assign) and not names(child.targets[0]) & bound:
                news = []
            shown = node if isinstance(child, ast.operator | ast.cmpop | ast.boolop) else child
            for new in news:
                before = ast.unparse(shown)
                setattr(node, field, [*items[:at], new, *items[at + 1 :]] if isinstance(value, list) else new)
                yield getattr(shown, "lineno", 0), before, ast.unparse(node if shown is node else new)
            setattr(node, field, value)
            inner = (
                {a.arg for a in ast.walk(child.args) if isinstance(a, ast.arg)}
                if isinstance(child, ast.FunctionDef)
                else bound
            )
            yield from mutated(child, frozenset(inner))
            if isinstance(child, ast.Assign):
                bound |= names(child.targets[0])


def names(target: ast.AST) -> set[str]:
    """Names that a target of an assignment binds or changes."""
    return {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}


def is_text(node: ast.AST) -> bool:
    """Whether a node is a docstring, a message, logging, or a list of names."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) or ast.unparse(node).startswith("logger.")
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Assign) and names(node.targets[0]) == {"__all__"})


def mutants(path: Path) -> list[tuple[int, str, str, CodeType]]:
    """All mutants of a file: line, before, after, code."""
    tree = ast.parse(path.read_text())
    code = lambda: compile(ast.fix_missing_locations(ast.parse(ast.unparse(tree))), str(path), "exec")  # noqa: E731
    return [(line, before, after, code()) for line, before, after in mutated(tree)]


def run(module: str, path: Path, code: CodeType, tests: list[str]) -> str:
    """Run tests in a fork, with the code in place of that of a module: ``survived``, ``killed`` or ``time``."""
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            resource.setrlimit(resource.RLIMIT_CPU, (CPU, CPU))
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            null = os.open(os.devnull, os.O_RDWR)
            for stream in range(3):
                os.dup2(null, stream)
            sys.meta_path.insert(0, Finder(module, path, code))
            status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--tb=no", "--assert=plain", *tests]))
        os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        return "time"
    return "killed" if status else "survived"


class Finder(SourceFileLoader):
    """Lets one module be imported from code in place of its file."""

    def __init__(self, module: str, path: Path, code: CodeType) -> None:
        super().__init__(module, str(path))
        self.code = code

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        return spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, fullname: str) -> CodeType:
        return self.code


def warm_up() -> None:
    """Import what tests and modules need, and forget the modules of the project."""
    warnings.simplefilter("ignore")
    for tests in {test.split("::")[0] for _, tests in MODULES.values() for test in tests}:
        importlib.import_module(tests.removesuffix(".py").replace("/", "."))
    graph = importlib.import_module("spaformer_sc.data._graph")
    graph.spatial_graph(np.random.default_rng(0).random((20, 2)), method="delaunay")
    stats.poisson.logpmf(1, 1)
    for name in [name for name in sys.modules if name.split(".")[0] in ("spaformer_sc", "tests")]:
        del sys.modules[name]
    gc.freeze()  # else each child looks through all that is imported


def main() -> int:
    parser = argparse.ArgumentParser(description="Mutation testing.")
    parser.add_argument("what", nargs="*", default=list(MODULES), help="modules, or mutants by their number")
    parser.add_argument("--sample", type=int, help="mutants of each module")
    parser.add_argument("--list", action="store_true", help="list mutants and run none")
    options = parser.parse_args()
    chosen = []
    for what in options.what:
        module, _, number = what.partition(":")
        every = list(enumerate(mutants(ROOT / "spaformer_sc" / MODULES[module][0] / f"{module}.py")))
        some = (
            [every[int(number)]]
            if number
            else random.Random(0).sample(every, min(options.sample or len(every), len(every)))
        )
        print(f"{what}: {len(some)} of {len(every)} mutants", flush=True)
        chosen += [(module, *mutant) for mutant in some]
    random.Random(0).shuffle(chosen)
    if not options.list:
        warm_up()
        for module in {module for module, *_ in chosen}:
            folder, tests = MODULES[module]
            path = ROOT / "spaformer_sc" / folder / f"{module}.py"
            if (
                run(f"spaformer_sc.{folder}.{module}", path, compile(path.read_text(), str(path), "exec"), tests)
                != "survived"
            ):
                sys.exit(f"The tests of {module} fail without a change: {' '.join(tests)}")
    results: Counter[tuple[str, str]] = Counter()
    for module, number, (line, before, after, code) in chosen:
        folder, tests = MODULES[module]
        path = ROOT / "spaformer_sc" / folder / f"{module}.py"
        result = "" if options.list else run(f"spaformer_sc.{folder}.{module}", path, code, tests)
        results[module, result] += 1
        if result != "killed":
            print(
                f"{result} {module}:{number} line {line}: {' '.join(before.split())} -> {' '.join(after.split())}",
                flush=True,
            )
    for module in MODULES:
        print(module, {result: n for (name, result), n in sorted(results.items()) if name == module})
    return int(any(result == "survived" for _, result in results))


if __name__ == "__main__":
    sys.exit(main())
