"""The parts of the fit: its linear equations, scenes as vectors, and pictures spread over devices."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_port.nano.least_squares import FLOOR, robust, solved, to_scene, to_units, weight_of
from tests.sd_port.seascapes import drawn

pytestmark = pytest.mark.hasty

ROOT = Path(__file__).parents[3]


def test_equations_are_solved():
    """As by numpy, for matrices like those of the fit: of low rank, with a floor on the diagonal, some rows empty."""
    rng = np.random.default_rng(0)
    for rank in (28, 10):
        factor = rng.normal(size=(28, rank)) * rng.choice([1.0, 1e-2], (28, 1))
        factor[3:5] = 0  # parameters that change nothing
        matrix, right = factor @ factor.T + FLOOR * np.eye(28), rng.normal(size=28)
        found = jax.jit(solved)(jnp.asarray(matrix), jnp.asarray(right))
        np.testing.assert_allclose(found, np.linalg.solve(matrix, right), rtol=1e-9, atol=1e-9)
        single = jax.jit(solved)(jnp.asarray(matrix, jnp.float32), jnp.asarray(right, jnp.float32))
        assert np.linalg.norm(matrix @ np.asarray(single) - right) < 1e-2 * np.linalg.norm(right)
        assert np.linalg.norm(matrix @ np.asarray(found)[::-1] - right) > np.linalg.norm(right)  # control


def test_scenes_are_vectors():
    """There and back, and a middle is a middle."""
    scene = jax.tree.map(lambda leaf: leaf[0], drawn(0, 1))
    back = to_scene(to_units(scene))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), back, scene)
    assert float(to_scene(jnp.full(28, 0.5)).sun_x) == 0.5


def test_weights_are_the_derivative_of_the_loss():
    squares = jnp.asarray([1e-4, 0.01, 0.3])
    np.testing.assert_allclose(weight_of(squares), jax.vmap(jax.grad(robust))(squares), rtol=1e-12)


PROGRAM = """
import jax, numpy as np
from sd_port.nano.read_out import CHUNK, in_chunks

seen = []

def function(rows):
    seen.append(next(iter(rows.devices())))
    assert rows.shape == (CHUNK, 3)
    return {"twice": 2 * rows}

inputs = np.random.default_rng(0).normal(size=(3 * CHUNK + 5, 3)).astype(np.float32)
np.testing.assert_array_equal(in_chunks(function, inputs)["twice"], 2 * inputs)
assert len(seen) == 4 and len(set(seen)) == 2, seen
print("in order")
"""


def test_chunks_are_spread_over_devices_and_come_back_in_order():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == "in order", run.stderr[-3000:]
