"""Strict numerics for every test: float64, no silent rank promotion; warnings are errors (pyproject.toml)."""

import hypothesis
import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compiling is slow on the first example, and examples must be the same on every run.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None, max_examples=25)
hypothesis.settings.load_profile("tests")
