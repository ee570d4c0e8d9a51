"""Schedules, data laws and the order measurement that the tests share."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from tests import tolerances
from theory.mixtures import mixture
from theory.schedules import CosineVP, DiscreteVP, LinearVP, ScaledLinearVP, VarianceExploding
from theory.solvers import DDIM, DPMSolverPP2M, EulerMaruyama, Heun

VP_SCHEDULES = {
    "linear": LinearVP(),
    "cosine": CosineVP(),
    "scaled_linear": ScaledLinearVP(),
    "three_steps": DiscreteVP((0.8, 0.4, 0.05)),
}
SCHEDULES = VP_SCHEDULES | {"exploding": VarianceExploding(LinearVP(0.1, 10.0))}


@jax.jit
def _scales(schedule, t):
    return schedule.alpha(t), schedule.sigma(t)


def scales(schedule, t: float) -> tuple[float, float]:
    """alpha and sigma at a time, as numbers."""
    alpha, sigma = _scales(schedule, np.asarray(t, float))
    return float(alpha), float(sigma)


def rotated_covariance(angle: float, variances: tuple[float, float]) -> np.ndarray:
    """Q diag(variances) Q^T with Q a rotation of the plane."""
    q = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return q @ np.diag(variances) @ q.T


def plane():
    """Three overlapping components of the plane with different, rotated covariances."""
    covariances = [rotated_covariance(a, v) for a, v in ((0.3, (0.5, 0.1)), (1.2, (0.2, 0.4)), (2.5, (0.3, 0.3)))]
    return mixture([0.5, 0.3, 0.2], [[-1.0, 0.5], [1.0, 1.0], [0.3, -1.2]], covariances)


def normal(*shape: int) -> jax.Array:
    """Unit normals for a test's points and noise: the same for the same shape, and nothing to compile."""
    return jnp.asarray(np.random.default_rng(shape).normal(size=shape))


def two_wells(schedule, wells=1.0, variance=0.3) -> Partial:
    """The exact noise prediction of data N(±wells, variance) in every coordinate; it compiles faster than a mixture."""
    return Partial(_two_wells_eps, schedule, jnp.asarray(wells), jnp.asarray(variance))


def _two_wells_eps(schedule, wells, variance, x, t):
    alpha, sigma = schedule.alpha(t).astype(x.dtype), schedule.sigma(t).astype(x.dtype)
    wells, total = alpha * wells.astype(x.dtype), alpha**2 * variance.astype(x.dtype) + sigma**2
    return sigma / total * (x - wells * jnp.tanh(wells * x / total))


def assert_close(actual, expected, rtol: float) -> None:
    """Largest error relative to the largest magnitude expected."""
    actual, expected = np.asarray(actual, float), np.asarray(expected, float)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * np.abs(expected).max())


def order(error_of, steps=(32, 64, 128, 256)) -> float:
    """The slope p of error ~ steps^-p, by least squares in the logarithms."""
    errors = [float(error_of(n)) for n in steps]
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


def assert_order(error_of, expected: float, steps=(32, 64, 128, 256)) -> None:
    """The error falls like steps^-expected."""
    measured = order(error_of, steps)
    assert abs(measured - expected) <= tolerances.ORDER, f"order {measured:.3f}, expected {expected}"


STOCHASTIC = {
    f"{method.__name__}({level})": partial(method, **{name: level})
    for method, name in ((DDIM, "eta"), (EulerMaruyama, "lam"), (DPMSolverPP2M, "lam"))
    for level in (0.5, 1.0)
}
DETERMINISTIC = {
    "DDIM(0)": partial(DDIM, eta=0.0),
    "EulerMaruyama(0)": partial(EulerMaruyama, lam=0.0),
    "Heun": Heun,
    "DPMSolverPP2M(0)": partial(DPMSolverPP2M, lam=0.0),
}
