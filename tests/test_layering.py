"""The directions of dependence, read from the syntax trees: toys -> theory <- sd_port, and nothing else but

    sd_port.experiments -> toys.{runner, store, results, style},

which make, keep, tabulate and draw experiments, and themselves know nothing of the toys.
"""

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NUMERICS = {"jax", "numpy", "scipy", "jaxtyping"}
COMMAND_LINE = {"rich", "tyro", "matplotlib"}
READING = {"theory/reading.py", "theory/__main__.py"}  # what may read text files from outside
COMMANDS = {"theory/__main__.py", "theory/command.py", "theory/progress.py"}  # what may show things
COMMANDS = {  # what may show things
    "theory/__main__.py",
    "theory/command.py",
    "theory/command_line.py",
    "theory/progress.py",
}
SHARED = {"toys.runner", "toys.store", "toys.results", "toys.style"}  # what sd_port.experiments may import of toys
LOOPS = {"scan", "fori_loop", "while_loop", "map", "associative_scan"}

STEPPING = {"theory/solve.py", "theory/chains.py", "theory/line_cycles.py"}


@cache
def modules() -> dict[str, ast.AST]:
    """The syntax trees of all modules, by their path from the root."""
    paths = sorted(path for package in ("theory", "toys", "sd_port") for path in (ROOT / package).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in paths}


def imports(tree: ast.AST) -> set[str]:
    """Dotted names of all imported modules, also inside functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "."} | {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {"."} if node.level else set()
    return names


def forbidden_imports(tree: ast.AST, module: str) -> set[str]:
    """Top-level packages that this module, such as toys/drag.py, may not import."""
    names, package = imports(tree), module.split("/")[0]
    used = {name.split(".")[0] for name in names}
    if package == "theory":
        allowed = {"theory"} | NUMERICS | (COMMAND_LINE if module in COMMANDS else set())
        allowed |= {"msgspec"} if module in READING else set()
        return used - allowed - sys.stdlib_module_names
    if module.startswith("sd_port/experiments/") and not toys_beyond(names, SHARED):
        used -= {"toys"}
    return used & ({"toys", "sd_port"} - {package})


def toys_beyond(names: set[str], shared: set[str]) -> set[str]:
    """The names of toys that are none of these modules, nor in them."""
    return {name for name in names if name.split(".")[0] == "toys" and ".".join(name.split(".")[:2]) not in shared}


def calls(tree: ast.AST, name: str) -> bool:
    """Whether something called `name` is called, as a function or as a method."""
    return any(isinstance(node, ast.Call) and called_name(node) == name for node in ast.walk(tree))


def called_name(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def loops_over_steps(tree: ast.AST) -> list[int]:
    """Lines of Python or lax loops whose body calls a solver's kernel, directly or through functions of the module."""
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    steppers = {"kernel"}
    while new := {n for n, f in functions.items() if any(calls(f, s) for s in steppers)} - steppers:
        steppers |= new

    def steps(node: ast.AST) -> bool:
        named = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        return bool(named & steppers & set(functions)) or any(calls(node, s) for s in steppers)

    lines = []
    for node in ast.walk(tree):
        python_loop = isinstance(node, ast.For | ast.While | ast.ListComp | ast.GeneratorExp)
        lax_loop = isinstance(node, ast.Call) and called_name(node) in LOOPS
        if (python_loop and steps(node)) or (lax_loop and any(steps(argument) for argument in node.args)):
            lines.append(node.lineno)
    return lines


def test_imports_point_one_way():
    """theory needs nothing but numerics; toys and sd_port do not know each other, but for what experiments share."""
    offenders = {module: wrong for module, tree in modules().items() if (wrong := forbidden_imports(tree, module))}
    assert not offenders and len(modules()) > 100


def test_what_is_shared_knows_no_toy():
    """The runner, the store, results and style import each other alone of toys."""
    trees = {module: modules()[f"{module.replace('.', '/')}.py"] for module in SHARED}
    assert {name for tree in trees.values() for name in toys_beyond(imports(tree), SHARED | {"toys"})} == set()


def test_only_solve_loops_over_solver_steps():
    """Everybody else calls sample, replay or record; chains.py and line_cycles.py step laws, not points."""
    stepping = {module: lines for module, tree in modules().items() if (lines := loops_over_steps(tree))}
    assert set(stepping) == STEPPING, stepping


def test_solvers_do_not_draw():
    """A kernel computes: jax.random is neither imported nor reached as an attribute."""
    assert not draws(modules()["theory/solvers.py"])


def draws(tree: ast.AST) -> bool:
    reached = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return "random" in reached or any("random" in name for name in imports(tree))


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("theory/solvers.py", "import flax.nnx as nnx\nimport math", {"flax"}),
        ("theory/solve.py", "def f():\n    from sd_port.pipeline import x", {"sd_port"}),
        ("theory/figures.py", "import matplotlib.pyplot as plt", {"matplotlib"}),
        ("theory/__main__.py", "import matplotlib.pyplot as plt, toys", {"toys"}),
        ("toys/a.py", "import sd_port.lora\nimport flax, theory.solve", {"sd_port"}),
        ("sd_port/a.py", "from toys import figure\nfrom PIL import Image", {"toys"}),
        ("sd_port/edits/a.py", "from toys.results import Row", {"toys"}),
        ("sd_port/experiments/a.py", "from toys.results import Row\nimport toys.style", set()),
        ("sd_port/experiments/a.py", "from toys.results import Row\nfrom toys.drag import places", {"toys"}),
        ("sd_port/experiments/a.py", "import toys", {"toys"}),
        ("toys/runner.py", "from sd_port.experiments import dragging", {"sd_port"}),
    ],
)
def test_wrong_imports_are_seen(module, source, expected):
    """Negative control of the import rules."""
    assert forbidden_imports(ast.parse(source), module) == expected


def test_a_toy_in_what_is_shared_is_seen():
    names = imports(ast.parse("from toys import store\nfrom toys.drag import places"))
    assert toys_beyond(names, SHARED | {"toys"}) == {"toys.drag", "toys.drag.places"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def step(c, i):\n    return solver.kernel(e, c, t, s, ())\njax.lax.scan(step, x, ts)", [3]),
        ("def k(x):\n    return solver.kernel(x)\ndef step(c, i):\n    return k(c)\nlax.fori_loop(0, 9, step, x)", [5]),
        ("lax.scan(lambda c, i: solver.kernel(c, i), x, ts)", [1]),
        ("for t in ts:\n    x, _ = solver.kernel(e, x, t, s, ())", [1]),
        ("q, _ = solver.kernel(e, x, t, s, ())", []),
        ("lax.scan(step, x, ts)\nfor t in ts:\n    y = sample(solver, e, x, ts, key)", []),
    ],
)
def test_wrong_loops_are_seen(source, expected):
    """Negative control of the loop rule, and what it allows: one kernel, and loops over whole solutions."""
    assert loops_over_steps(ast.parse(source)) == expected


@pytest.mark.parametrize("source", ["import jax.random as jr", "from jax import random", "x = jax.random.normal(k)"])
def test_wrong_draws_are_seen(source):
    """Negative control of the rule that solvers do not draw."""
    assert draws(ast.parse(source))
