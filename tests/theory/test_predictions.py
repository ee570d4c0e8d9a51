"""Parametrisations against posterior expectations by quadrature, and against each other."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from tests import tolerances
from tests.cases import SCHEDULES, assert_close, scales
from theory.mixtures import gaussian, noise_fn
from theory.predictions import (
    eps_from_score,
    eps_from_v,
    eps_from_x0,
    guide,
    score_from_eps,
    v_from_eps,
    x0_from_eps,
)
from theory.schedules import LinearVP

pytestmark = pytest.mark.hasty

all_schedules = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)

TO_EPS = {
    "eps": lambda schedule, x, eps, t: eps,
    "x0": eps_from_x0,
    "score": lambda schedule, x, score, t: eps_from_score(schedule, score, t),
    "v": eps_from_v,
}
FROM_EPS = {
    "eps": lambda schedule, x, eps, t: eps,
    "x0": x0_from_eps,
    "score": lambda schedule, x, eps, t: score_from_eps(schedule, eps, t),
    "v": v_from_eps,
}
MEAN, STD = 0.7, 0.6  # the data law of the exact values, a Gaussian on the line


@jax.jit
@partial(jax.vmap, in_axes=(None, 0, 0, 0))
def round_trips(schedule, t, x, value):
    """here -> there -> here for every pair, from the same value of the prediction; and alpha and sigma."""
    back = {}
    for here in FROM_EPS:
        for there in FROM_EPS:
            other = FROM_EPS[there](schedule, x, TO_EPS[here](schedule, x, value, t), t)
            back[here, there] = FROM_EPS[here](schedule, x, TO_EPS[there](schedule, x, other, t), t)
    return back, schedule.alpha(t), schedule.sigma(t)


@all_schedules
def test_round_trips(schedule):
    """Every pair returns, but for the digits that a division by alpha or sigma may cost, at 200 places."""
    t, x, value = np.random.default_rng(0).uniform([[0.01], [-3], [-3]], [[0.99], [3], [3]], (3, 200))
    pairs, alpha, sigma = jax.tree.map(np.asarray, round_trips(schedule, jnp.array(t), jnp.array(x), jnp.array(value)))
    size = 10 * np.maximum(alpha, 1 / alpha) * np.maximum(sigma, 1 / sigma) ** 2
    for pair, back in pairs.items():
        off = np.abs(back - value) / size
        assert off.max() <= tolerances.ROUNDING, (pair, t[off.argmax()], x[off.argmax()], value[off.argmax()])


def test_round_trip_needs_the_same_parametrisation():
    """Negative control: v read as eps does not come back."""
    schedule, x, t, v = LinearVP(), jnp.ones(1), jnp.array(0.4), jnp.ones(1)
    assert abs(v_from_eps(schedule, x, v, t)[0] - 1) > 0.1


def posterior_expectations(schedule, x: float, t: float) -> dict[str, float]:
    """E[. | x_t = x] of x0, eps, v = alpha eps - sigma x0 and the conditional score, by quadrature over x0."""
    alpha, sigma = scales(schedule, t)
    integrands = {
        "one": lambda x0: 1.0,
        "x0": lambda x0: x0,
        "eps": lambda x0: (x - alpha * x0) / sigma,
        "v": lambda x0: alpha * (x - alpha * x0) / sigma - sigma * x0,
        "score": lambda x0: -(x - alpha * x0) / sigma**2,  # of q(x_t | x_0)
    }

    def integral(h):
        def weighted(x0):
            return h(x0) * np.exp(-(((x0 - MEAN) / STD) ** 2 + ((x - alpha * x0) / sigma) ** 2) / 2)

        return scipy.integrate.quad(weighted, MEAN - 9 * STD, MEAN + 9 * STD, epsabs=0, epsrel=1e-10, limit=200)[0]

    mass = integral(integrands.pop("one"))
    return {name: integral(h) / mass for name, h in integrands.items()}


@jax.jit
def exact_values(schedule, x, t):
    """All four from the exact noise prediction."""
    eps = noise_fn(gaussian([MEAN], [[STD**2]]), schedule)(x, t)
    return {name: from_eps(schedule, x, eps, t) for name, from_eps in FROM_EPS.items()}


@all_schedules
def test_exact_values_on_a_gaussian(schedule):
    """They equal posterior expectations; those at another time do not."""
    x = 0.4

    def assert_expectations(t, expected):
        for name, prediction in exact_values(schedule, jnp.array([x]), jnp.array(t)).items():
            assert_close(prediction, [expected[name]], tolerances.QUADRATURE)

    for t in (0.21, 0.7):
        assert_expectations(t, posterior_expectations(schedule, x, t))
        with pytest.raises(AssertionError):
            assert_expectations(t, posterior_expectations(schedule, x, t + 1e-3))


def test_guidance_extrapolates_gaussian_means():
    """p0^(1 - w) p1^w of two Gaussians of equal variance is the Gaussian with mean m0 + w (m1 - m0)."""
    schedule, x, t = LinearVP(), jnp.array([0.3, -0.2]), jnp.array(0.4)
    means = {w: np.array([-1.0, 0.5]) + w * np.array([2.0, 1.0]) for w in (0.0, 1.0, 3.5)}
    eps = {w: noise_fn(gaussian(mean, 0.3 * np.eye(2)), schedule)(x, t) for w, mean in means.items()}
    for w, expected in eps.items():
        assert_close(guide(eps[0.0], eps[1.0], w), expected, tolerances.ROUNDING)
    assert np.abs(guide(eps[1.0], eps[0.0], 3.5) - eps[3.5]).max() > 0.1  # negative control: prompts swapped
