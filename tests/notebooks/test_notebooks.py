"""The notebooks take nothing that is not there, run at their tiny size, and were saved after a whole run in order."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
every = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
QUICK = NOTEBOOKS[:1]  # executed in every run of the tests: of the others pyright alone sees the names


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def code(notebook) -> str:
    """All code, without the lines that only IPython understands."""
    lines = [line for cell in code_cells(notebook) for line in cell.source.splitlines()]
    return "\n".join(line for line in lines if not line.startswith("%")) + "\n"


def execute(notebook) -> None:
    NotebookClient(notebook, timeout=1800, kernel_name="python3").execute()


@pytest.fixture
def compilations(monkeypatch):
    """Kernels find what earlier runs compiled."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.values["jax_compilation_cache_dir"])
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


# What pyright finds where a name, an attribute or a parameter is not there, or no longer. Types that it cannot see
# through, as a literal's that went through a tuple, are no fault of a notebook's.
STALE = {"reportAttributeAccessIssue", "reportCallIssue", "reportUndefinedVariable", "reportMissingImports"}
PROJECT = {"extraPaths": [str(ROOT)], "venvPath": str(Path(sys.prefix).parent), "venv": Path(sys.prefix).name}


def stale(folder: Path, sources: dict[str, str]) -> dict[str, list[str]]:
    """The lines of each source that take what is not there."""
    for name, source in sources.items():
        (folder / f"{name}.py").write_text("from IPython import get_ipython\n" + source)
    (folder / "pyrightconfig.json").write_text(json.dumps(PROJECT))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--project", str(folder)]
    quiet = os.environ | {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}  # of newer versions
    report = json.loads(subprocess.run(command, capture_output=True, text=True, env=quiet).stdout)
    assert report["summary"]["filesAnalyzed"] == len(sources)
    found = {name: [] for name in sources}
    for fault in report["generalDiagnostics"]:
        path, line = Path(fault["file"]), fault["range"]["start"]["line"]
        if fault.get("rule", "") in STALE | {""}:  # none: what does not parse
            found[path.stem].append(path.read_text().splitlines()[line])
    return found


WRONG = """
from theory.checks import Study, paper_problem
from theory.solve import no_such_name
from toys import learned, plane
for row in learned.rows(learned.run(learned.Config.tiny())):
    print(row.what, row.no_such_field)
print(plane.SHIFT, plane.no_such_constant)
curve = Study(paper_problem()).sde
print(curve.kl.value, curve.kl.no_such_number)
learned.Config(no_such_setting=3)
print(no_such_variable)
"""


def test_nothing_is_stale(tmp_path):
    """Every name, attribute and parameter that a notebook uses is there; what is not is found, in every line of it."""
    sources = {path.stem: code(nbformat.read(path, as_version=4)) for path in NOTEBOOKS}
    found = stale(tmp_path, sources | {"control": WRONG})
    wrong = [line for line in WRONG.splitlines() if "no_such" in line]
    assert sorted(set(found.pop("control"))) == sorted(wrong)  # negative control
    assert len(found) == 6 and not any(found.values()), found


@pytest.mark.filterwarnings("ignore")  # of the messaging between client and kernel
@pytest.mark.parametrize("path", QUICK, ids=lambda path: path.stem)
def test_it_runs(path, compilations, monkeypatch):
    """Every cell, in order, with the small settings; a stale name is an error in its cell."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    notebook = nbformat.read(path, as_version=4)
    switches = [cell for cell in code_cells(notebook) if "TINY = False" in cell.source]
    assert len(switches) == 1
    switches[0].source = switches[0].source.replace("TINY = False", "TINY = True")
    execute(notebook)


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
@every
def test_it_runs_at_full_length(path, compilations):
    """As it was saved."""
    execute(nbformat.read(path, as_version=4))


@every
def test_it_was_saved_whole(path):
    """Outputs are there, of one run from the top, without errors; at least three pictures or tables are shown."""
    cells = code_cells(nbformat.read(path, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs)
    assert len(outputs) >= 3
    shown = [output.data for output in outputs if output.output_type in ("display_data", "execute_result")]
    assert shown and all("image/png" in data for data in shown if data["text/plain"].startswith("<Figure"))


@every
def test_it_tells_and_does_not_define(path):
    """No function or class longer than ten lines; words in between; exercises at the end."""
    notebook = nbformat.read(path, as_version=4)
    for cell in code_cells(notebook):
        for node in ast.walk(ast.parse(code(nbformat.v4.new_notebook(cells=[cell])))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                assert node.end_lineno is not None and node.end_lineno - node.lineno < 10
    assert "## Exercises" in notebook.cells[-1].source


@every
def test_it_installs_from_the_checkout(path):
    """From the folder above, where the project lies; never by a name from an index, which is another's."""
    cell = nbformat.read(path, as_version=4).cells[1].source
    assert '"install --quiet .."' in cell and 'find_spec("theory.solvers")' in cell
    assert (path.parents[1] / "pyproject.toml").exists()


@every
def test_it_displays_an_equation(path):
    """On a line of its own, between pairs of dollars."""
    words = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    assert words.count("$$") >= 2 and words.count("$$") % 2 == 0


@pytest.mark.filterwarnings("ignore")
def test_an_error_in_a_cell_is_seen():
    """Negative control."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("from theory.types import no_such_name")])
    with pytest.raises(CellExecutionError, match="no_such_name"):
        execute(notebook)
