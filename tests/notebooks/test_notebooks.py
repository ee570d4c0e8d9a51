"""The notebooks run, at their tiny size, and were saved after a whole run in order."""

import ast
from pathlib import Path

import jax
import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
every = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def execute(notebook) -> None:
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()


@pytest.fixture(autouse=True)
def compilations(monkeypatch):
    """Kernels compile in haste, and find what earlier runs compiled."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.values["jax_compilation_cache_dir"])
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


@every
@pytest.mark.filterwarnings("ignore")  # of the messaging between client and kernel
def test_it_runs(path):
    """Every cell, in order, with the small settings; a stale name is an error in its cell."""
    notebook = nbformat.read(path, as_version=4)
    switches = [cell for cell in code_cells(notebook) if "TINY = False" in cell.source]
    assert len(switches) == 1
    switches[0].source = switches[0].source.replace("TINY = False", "TINY = True")
    execute(notebook)


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
        lines = [line for line in cell.source.splitlines() if not line.startswith("%")]
        for node in ast.walk(ast.parse("\n".join(lines))):
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
def test_a_stale_name_is_seen():
    """Negative control."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("from theory.solve import no_such_name")])
    with pytest.raises(CellExecutionError, match="no_such_name"):
        execute(notebook)
