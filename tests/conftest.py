"""Strict numerics for every test: float64, no silent rank promotion; warnings are errors (pyproject.toml)."""

import os
import sys
import warnings
from importlib.abc import MetaPathFinder
from pathlib import Path

import hypothesis
import jax
import pytest

from theory.compilations import (
    LITTLE_MEMORY,
    OLD_EMITTERS,
    collect_rarely,
    compile_hastily,
    keep_compilations,
    set_flags,
)

# There is a worker for every core: more threads of torch's would wait for one another, which it does by spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# As the commands do. Flags are read with the first device; what is set later only changes the names under which
# compiled programs are kept, so that they are not found again.
collect_rarely()
set_flags(OLD_EMITTERS, LITTLE_MEMORY)
FLAGS = os.environ["XLA_FLAGS"]
jax.config.update("jax_enable_x64", True)
jax.devices()
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compiling is slow on the first example, and examples must be the same on every run.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None, max_examples=25)
hypothesis.settings.load_profile("tests")

# Compiling takes most of the time: the workers share what they compile, and the next run finds it.
keep_compilations()

PEERS = {"torch", "diffusers", "transformers", "peft"}  # what results are compared with


class NotInstalled(MetaPathFinder):
    """The last that is asked for a module: the tests that import a peer which is not installed are skipped."""

    def find_spec(self, name, path=None, target=None):
        if name in PEERS and sys._getframe(1).f_code.co_name == "_find_spec":  # an import, not a question
            pytest.skip(f"{name} is not installed", allow_module_level=True)


if "WITHOUT_PEERS" in os.environ:  # said by every_python.py alone: elsewhere one that is missing is an error
    sys.meta_path.append(NotInstalled())

MAPS = Path("/proc/self/maps")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Tests marked `hasty` compile in haste, their fixtures too: where compiling takes longer than what is compiled.

    Kept programs have the same names, and torch the same random numbers, whichever test ran before.
    """
    os.environ["XLA_FLAGS"] = FLAGS
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    compile_hastily(item.get_closest_marker("hasty") is not None)


@pytest.fixture(scope="module", autouse=True)
def few_mappings():
    """Every compiled function maps memory; Linux ends a process at some 65,000 mappings, and one worker has most."""
    yield
    if MAPS.exists() and MAPS.read_text().count("\n") > 40_000:
        jax.clear_caches()


@pytest.fixture
def command_folder(monkeypatch, tmp_path) -> Path:
    """A new folder as the current one; what a command's main() sets in its process goes back to what it was."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    monkeypatch.chdir(tmp_path)
    return tmp_path
