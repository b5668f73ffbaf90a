"""Mutation testing: change one thing in a module, run its tests, and list the changes that no test notices.

    python scripts/mutation.py                      # all mutants of all modules below
    python scripts/mutation.py --sample 60          # 60 of each module, drawn with a fixed seed
    python scripts/mutation.py masking _split:12    # of one module, and one mutant by its number

Changed are comparisons, arithmetic, `and` and `or`, signs and negations, conditions, constants and defaults, pairs of
functions such as `min` and `max`, what is returned, and statements (an assignment only where the name keeps an earlier
value). Docstrings, annotations, decorators, messages of errors and logging stay. Packages are imported once; each
mutant is a fork of this process, in which the changed code is what tests import. It is killed when a test fails, or
when it takes more than `CPU` seconds (listed as `time`). Exit status 1 if any survives.
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
from functools import cache
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
CPU, MEMORY = 40, 24 * 2**30
# Modules: files of their tests, and which tests of these.
MODULES = {
    "nn.likelihoods": ("likelihoods properties", "test_likelihoods or probabilities_of_counts"),
    "nn.gamma_poisson": ("gamma_poisson properties", "test_gamma_poisson or a_posterior"),
    "nn.masking": ("masking missing properties", "test_masking or corruption or hidden_genes or shown_and"),
    "data._graph": ("graph", "test_graph"),
    "data._split": (
        "split missing training properties",
        "test_split or held_out or measured_nowhere or last_counts or typical_values_are or gene_shares",
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
    yield from (operator() for operator in OPERATORS.get(type(node), ()))
    match node:
        case ast.UnaryOp():
            yield node.operand
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int()):
            yield from (ast.Constant(node.value + 1), ast.Constant(node.value - 1))
        case ast.Constant(value=float()):
            yield from (ast.Constant(node.value * factor or 1.0) for factor in (2.0, 0.5))
        case ast.Constant(value=str()):
            yield ast.Constant(node.value + "_")
        case ast.Name() if node.id in NAMES:
            yield ast.Name(NAMES[node.id], node.ctx)
        case ast.Attribute() if node.attr in NAMES:
            yield ast.Attribute(node.value, NAMES[node.attr], node.ctx)
        case ast.Return(value=ast.AST()) if ast.unparse(node.value) != "None":
            yield ast.Return(ast.Constant(None))
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise() | ast.Assign():
            yield ast.Pass()


def mutated(node: ast.AST, bound: frozenset[str] = frozenset()) -> Iterator[tuple[int, str, str]]:
    """Change a tree in place, one thing at a time: line, what was there, and what is there while this is yielded."""
    for field, value in ast.iter_fields(node):
        for at, child in enumerate(items := value if isinstance(value, list) else [value]):
            if field in UNTOUCHED or not isinstance(child, ast.AST) or is_text(child):
                continue
            targets = names(child.targets[0]) if isinstance(child, ast.Assign) else frozenset()
            news = [] if targets and not targets & bound else list(replacements(child))
            if field in ("test", "ifs") and not isinstance(child, ast.Compare | ast.UnaryOp):
                news.append(ast.UnaryOp(ast.Not(), child))
            shown = node if isinstance(child, ast.operator | ast.cmpop | ast.boolop) else child
            for new in news:
                before = ast.unparse(shown)
                setattr(node, field, [*items[:at], new, *items[at + 1 :]] if isinstance(value, list) else new)
                yield shown.lineno, before, ast.unparse(node if shown is node else new)
                setattr(node, field, value)
            arguments = ast.walk(child.args) if isinstance(child, ast.FunctionDef) else ()
            yield from mutated(child, frozenset(a.arg for a in arguments if isinstance(a, ast.arg)) or bound)
            bound |= targets


def names(target: ast.AST) -> frozenset[str]:
    """Names that a target of an assignment binds or changes."""
    return frozenset(n.id for n in ast.walk(target) if isinstance(n, ast.Name))


def is_text(node: ast.AST) -> bool:
    """Whether a node is a docstring, a message, logging, a type or a list of names."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) or ast.unparse(node).startswith("logger.")
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0]) in ("__all__", "Corruption")
    return isinstance(node, ast.JoinedStr)


class Mutant(SourceFileLoader):
    """A changed module: what an import of its name gives, and what its tests make of it."""

    def __init__(self, module: str, code: CodeType) -> None:
        super().__init__(f"spaformer_sc.{module}", str(path_of(module)))
        files, self.chosen = MODULES[module]
        self.files = [f"tests/test_{name}.py" for name in files.split()]
        self.code = code

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        return spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, fullname: str) -> CodeType:
        return self.code

    def result(self) -> str:
        """Run the tests in a fork: ``survived``, ``killed`` or ``time``."""
        child = os.fork()
        if child == 0:
            status = 1
            with contextlib.suppress(BaseException):
                resource.setrlimit(resource.RLIMIT_CPU, (CPU, CPU))
                resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
                for stream in range(3):
                    os.dup2(os.open(os.devnull, os.O_RDWR), stream)
                sys.meta_path.insert(0, self)
                plainly = ["-x", "-q", "--tb=no", "--assert=plain", "-p", "no:cacheprovider"]
                status = int(pytest.main([*plainly, "-k", self.chosen, *self.files]))
            os._exit(status)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
            return "time"
        return "killed" if status else "survived"


def path_of(module: str) -> Path:
    """File of a module."""
    return ROOT / "spaformer_sc" / f"{module.replace('.', '/')}.py"


@cache
def mutants(module: str) -> list[tuple[str, Mutant]]:
    """All mutants of a module, with what was changed where."""
    tree = ast.parse(path_of(module).read_text())
    found = []
    for line, before, after in mutated(tree):
        code = compile(ast.unparse(tree), str(path_of(module)), "exec")
        change = " ".join(f"line {line}: {before} -> {after}".split())
        found.append((f"{module.split('.')[1]}:{len(found)} {change}", Mutant(module, code)))
    return found


def warm_up() -> None:
    """Import what tests and modules need, forget the modules of the project, and see that their tests pass."""
    warnings.simplefilter("ignore")
    for name in {name for files, _ in MODULES.values() for name in files.split()}:
        importlib.import_module(f"tests.test_{name}")
    graph = importlib.import_module("spaformer_sc.data._graph")
    graph.spatial_graph(np.random.default_rng(0).random((20, 2)), method="delaunay")
    stats.poisson.logpmf(1, 1)
    for name in [name for name in sys.modules if name.split(".")[0] in ("spaformer_sc", "tests")]:
        del sys.modules[name]
    gc.freeze()  # else each child looks through all that is imported
    for module in MODULES:
        if Mutant(module, compile(path_of(module).read_text(), str(path_of(module)), "exec")).result() != "survived":
            sys.exit(f"The tests of {module} fail without a change.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    short = {module.split(".")[1]: module for module in MODULES}
    parser.add_argument("what", nargs="*", default=list(short), help="modules, or mutants by their number")
    parser.add_argument("--sample", type=int, help="mutants of each module")
    options = parser.parse_args()
    chosen: list[tuple[str, Mutant]] = []
    for what in options.what:
        name, _, number = what.partition(":")
        every = mutants(short[name])
        n = len(every) if options.sample is None else min(options.sample, len(every))
        chosen += [every[int(number)]] if number else random.Random(0).sample(every, n)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    warm_up()
    counts: dict[str, Counter[str]] = {name: Counter() for name in short}
    for label, mutant in chosen:
        result = mutant.result()
        counts[label.partition(":")[0]][result] += 1
        if result != "killed":
            print(result, label, flush=True)
    for name, count in counts.items():
        if count:
            print(
                f"{name}: {count.total()} mutants, " + ", ".join(f"{n} {result}" for result, n in sorted(count.items()))
            )
    return int(any(count["survived"] for count in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
