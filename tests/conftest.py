"""Strict numerics for every test: float64, no silent rank promotion; warnings are errors (pyproject.toml)."""

import os
from pathlib import Path

import hypothesis
import jax
import pytest

from theory.compilations import compile_hastily, keep_compilations

# There is a worker for every core: more threads of torch's would wait for one another, which it does by spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")

jax.config.update("jax_enable_x64", True)
jax.devices()  # what commands set in XLA_FLAGS is read with the first device: no test's for those that come after it
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compiling is slow on the first example, and examples must be the same on every run.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None, max_examples=25)
hypothesis.settings.load_profile("tests")

# Compiling takes most of the time: the workers share what they compile, and the next run finds it.
keep_compilations()

MAPS = Path("/proc/self/maps")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Tests marked `hasty` compile in haste, their fixtures too: where compiling takes longer than what is compiled."""
    compile_hastily(item.get_closest_marker("hasty") is not None)


@pytest.fixture(scope="module", autouse=True)
def few_mappings():
    """Every compiled function maps memory; Linux ends a process at some 65,000 mappings, and one worker has most."""
    yield
    if MAPS.exists() and MAPS.read_text().count("\n") > 25_000:
        jax.clear_caches()
