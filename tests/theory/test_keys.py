"""The unrolled generator draws what JAX's own draws."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from tests import tolerances
from theory.keys import unrolled_threefry
from theory.schedules import LinearVP
from theory.solve import sample, time_grid
from theory.solvers import EulerMaruyama


def keys(seed):
    return jr.key(seed, impl=unrolled_threefry), jr.key(seed)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.uint16, jnp.uint32, jnp.uint64])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 1, 5)])
def test_bits(dtype, shape):
    ours, jax_own = keys(2**31 - 1)
    np.testing.assert_array_equal(jr.bits(ours, shape, dtype), jr.bits(jax_own, shape, dtype))


def test_split_fold_in_and_vmap():
    ours, jax_own = (jr.split(jr.fold_in(key, 5), 4) for key in keys(3))
    draw = jax.vmap(lambda key: jr.normal(key, (6,)))
    np.testing.assert_array_equal(draw(ours), draw(jax_own))


def test_another_seed_draws_another_number():
    assert jr.normal(keys(0)[0]) != jr.normal(keys(1)[0])


def test_sample_draws_the_same_path():
    schedule, x = LinearVP(), jnp.linspace(-1.0, 1.0, 5)
    eps_fn = jax.tree_util.Partial(lambda x, t: x)
    ours, jax_own = (sample(EulerMaruyama(schedule), eps_fn, x, time_grid(schedule, 4), key) for key in keys(7))
    np.testing.assert_allclose(ours, jax_own, rtol=tolerances.ROUNDING)
