"""Recorded noise, Cycle-SDE and inexact scores on Gaussian data: closed forms against Monte Carlo and each other."""

from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy.integrate import solve_ivp

from tests import tolerances
from tests.cases import assert_close, scales
from tests.problems import BETA, ZERO, pair
from theory.divergences import gaussian_kl
from theory.gaussians import Offset, clock, cycle_edited, inexact_score, path_covariance, recorded_noise
from theory.mixtures import noise_fn
from theory.processes import forward_path
from theory.quadrature import interval
from theory.ratios import law_gaussian
from theory.solve import record, replay, time_grid
from theory.solvers import DDIM, EulerMaruyama

pytestmark = pytest.mark.hasty

DRAWS = 40_000
PAIR = pair()
TS = time_grid(BETA, 5, end=0.1)
SOLVERS = {"DDIM(1)": DDIM(BETA, 1.0), "DDIM(0.5)": DDIM(BETA, 0.5), "EulerMaruyama(1)": EulerMaruyama(BETA, 1.0)}


def paths(independent: bool):
    """Draws of the forward process on TS from data, (times, draws, 1); or each time noised afresh."""
    data, noise = jr.split(jr.key(0))
    x0 = pair().target.sample(data, (DRAWS,))
    if not independent:
        return forward_path(BETA, x0, jnp.append(TS, 0.0), noise)[:-1]
    alpha, sigma = np.array([scales(BETA, t) for t in np.asarray(TS)]).T[:, :, None, None]
    return jnp.asarray(alpha * np.asarray(x0) + sigma * np.asarray(jr.normal(noise, (len(TS), DRAWS, 1))))


def assert_moments(draws, law):
    """Mean and covariance of (n, DRAWS) within standard errors."""
    centred = np.array(draws) - np.array(law.mean)[:, None]
    assert np.all(np.abs(centred.mean(1)) <= tolerances.STANDARD_ERRORS * centred.std(1) / DRAWS**0.5)
    products = centred[:, None] * centred[None]
    error = products.std(2) / DRAWS**0.5
    assert np.all(np.abs(products.mean(2) - np.array(law.covariance)) <= tolerances.STANDARD_ERRORS * error)


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("name", SOLVERS)
def test_recorded_noise_against_monte_carlo(name, independent):
    """Noise recorded by five steps, and the latent; the noise of the other kind of path is told apart."""
    solver, path = SOLVERS[name], paths(independent)
    noise = record(solver, noise_fn(pair().target, BETA), path, TS)
    draws = np.concatenate([np.asarray(noise)[..., 0], np.asarray(path)[:1, :, 0]])
    assert_moments(draws, recorded_noise(solver, pair(), TS, independent))
    with pytest.raises(AssertionError):
        assert_moments(draws, recorded_noise(solver, pair(), TS, not independent))


def shift_and_stretch(x):
    return 0.5 + 0.4 * x


@pytest.mark.parametrize("name", SOLVERS)
def test_cycle_against_monte_carlo(name):
    """Edited and original end points of Cycle-SDE; 5 % in the covariance are told apart."""
    solver, path, eps_fn = SOLVERS[name], paths(False), noise_fn(pair().target, BETA)
    edited = replay(solver, eps_fn, shift_and_stretch(path[0]), TS, record(solver, eps_fn, path, TS))
    draws = np.stack([np.asarray(edited)[-1, :, 0], np.asarray(path)[-1, :, 0]])
    law = cycle_edited(solver, pair(), TS, Partial(shift_and_stretch))
    assert_moments(draws, law)
    with pytest.raises(AssertionError):
        assert_moments(draws, law._replace(covariance=1.05 * law.covariance))


@pytest.mark.parametrize("steps", [3, 20])
def test_recorded_noise_is_white(steps):
    """Theorem 3.3 on Gaussian data: uncorrelated with itself and the latent at any N, of variance above 1, mean 0.

    Negative controls: Euler-Maruyama's noise is not, nor is that of times noised afresh.
    """
    ts = time_grid(BETA, steps, end=0.01)

    def off_diagonal(solver, independent=False):
        covariance = np.array(recorded_noise(solver, pair(), ts, independent).covariance)
        scale = np.diag(covariance) ** 0.5
        return np.abs(covariance / np.outer(scale, scale) - np.eye(steps + 1)).max()

    law = recorded_noise(DDIM(BETA, 1.0), pair(), ts)
    assert off_diagonal(DDIM(BETA, 1.0)) < tolerances.IDENTITY
    assert np.abs(law.mean[:-1]).max() < tolerances.IDENTITY
    assert np.all(np.diag(law.covariance)[:-1] > 1)
    assert off_diagonal(EulerMaruyama(BETA, 1.0)) > 1e-3
    assert off_diagonal(DDIM(BETA, 1.0), independent=True) > 0.1


def test_edit_friendly_noise_has_lag_one_correlation():
    """It tends to -1/2 as the steps shrink; that of the forward path is 0 at any number."""

    def lag_one(steps, independent):
        ts = time_grid(BETA, steps, end=1e-3)
        covariance = np.array(recorded_noise(DDIM(BETA, 1.0), pair(), ts, independent).covariance)[:-1, :-1]
        scale = np.diag(covariance) ** 0.5
        return (np.diag(covariance, 1) / (scale[1:] * scale[:-1]))[steps // 2]

    gaps = [lag_one(n, True) + 0.5 for n in (40, 160)]
    assert abs(gaps[1]) < 0.02 and abs(gaps[1]) < abs(gaps[0]) / 2
    assert abs(lag_one(40, False)) < tolerances.IDENTITY


def test_path_covariance():
    """On the diagonal the variance of the marginal, off it by regression; afresh, alpha_t alpha_s V_0."""
    covariance, fresh = (
        np.array(jax.jit(path_covariance, static_argnums=2)(pair(), TS, kind)) for kind in (False, True)
    )
    alpha, sigma = np.array([scales(BETA, t) for t in np.asarray(TS)]).T
    variances = 0.04 * alpha**2 + sigma**2
    for i in range(len(TS)):
        for j in range(i, len(TS)):  # TS[j] <= TS[i]
            assert_close(covariance[i, j], alpha[i] / alpha[j] * variances[j], tolerances.IDENTITY)
            assert_close(fresh[i, j], variances[i] if i == j else 0.04 * alpha[i] * alpha[j], tolerances.IDENTITY)
    assert_close(covariance, covariance.T, tolerances.ROUNDING)
    assert np.abs(covariance - fresh).max() > 0.1


@partial(jax.jit, static_argnums=1)
@partial(jax.vmap, in_axes=(0, None))
def gaussian_laws(s, lam):
    """At time s the law's offset from the marginal by law_gaussian, with its KL, and by inexact_score without error
    and with 1 %, with the KL of the former."""
    law, marginal = law_gaussian(PAIR, s, lam), PAIR.marginal(s)
    std = jnp.sqrt(marginal.variances[0, 0])
    known = Offset((law.means - marginal.means)[0, 0] / std, (law.variances / marginal.variances)[0, 0])
    found, wrong = (inexact_score(PAIR, s, lam, error) for error in (0.0, 0.01))
    return known, gaussian_kl(law, marginal), found, found.kl(), wrong


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0, 2.0])
def test_exact_score_is_the_gaussian_law(lam):
    """error = 0 gives law_gaussian, hence its KL; a score off by 1 % does not."""
    known, kl, found, found_kl, wrong = jax.tree.map(np.asarray, gaussian_laws(jnp.array([0.0, 0.3, 0.7]), lam))
    np.testing.assert_allclose(found.e, known.e, rtol=0, atol=tolerances.ROUNDING)
    np.testing.assert_allclose(found.r, known.r, rtol=tolerances.IDENTITY)
    large = found_kl > 1e-6
    assert large.any()
    np.testing.assert_allclose(found_kl[large], kl[large], rtol=tolerances.QUADRATURE)
    assert np.all(np.abs(wrong.r / found.r - 1) > 1e-4)


@partial(jax.jit, static_argnums=(1, 2))
def offset_of(s, lam, error):
    return inexact_score(PAIR, s, lam, error)


@jax.jit
def rates(t):
    return jnp.stack([quantity(t) for quantity in (BETA.alpha, BETA.sigma, BETA.f, BETA.beta)])


@pytest.mark.parametrize(("lam", "error"), [(0.0, 0.1), (0.5, -0.2), (1.0, 0.1), (1.0, -0.5), (2.0, -0.1)])
def test_inexact_score_solves_the_moment_equations(lam, error):
    """m' and v' of dx = [f x - (1+lam²)/2 g² (1+error) s] dt + lam g dw by scipy; (1.0, -0.5) is the case k = 0."""
    given, end = pair(), 0.2

    def slopes(t, state):
        alpha, sigma, f, g2 = np.asarray(rates(t)).tolist()
        pull = (1 + lam**2) / 2 * g2 * (1 + error) / (0.04 * alpha**2 + sigma**2)
        mean, variance = state
        return [f * mean + pull * (mean - 1.3 * alpha), 2 * (f + pull) * variance - lam**2 * g2]

    mean, variance = solve_ivp(slopes, (1.0, end), [0.5, 0.25], rtol=1e-11, atol=1e-13, method="DOP853").y[:, -1]
    marginal = given.marginal(jnp.array(end))
    m, v = float(marginal.means[0, 0]), float(marginal.variances[0, 0])
    offset, other = (jax.tree.map(float, offset_of(jnp.array(end), lam, off)) for off in (error, error + 1e-4))
    assert_close(offset.e, (mean - m) / v**0.5, tolerances.QUADRATURE)
    assert_close(offset.r, variance / v, tolerances.QUADRATURE)
    with pytest.raises(AssertionError):
        assert_close(other.r, variance / v, tolerances.QUADRATURE)


def test_clock_is_the_integral_of_the_rate():
    """A = integral of g² / V, by quadrature; A of another time is told apart."""
    nodes, weights = interval(0.0, 1.0, 60)
    alpha, sigma, _, g2 = np.array([rates(t) for t in nodes]).T
    expected = weights @ (g2 / (0.04 * alpha**2 + sigma**2))
    assert_close(jax.jit(clock)(pair(), ZERO), expected, tolerances.QUADRATURE)
    assert abs(float(jax.jit(clock)(pair(), jnp.array(0.01))) / expected - 1) > 1e-3


def test_kl_of_an_offset():
    """Against gaussian_kl of the two laws."""
    given = pair()
    marginal = given.marginal(given.t0)
    std = marginal.variances[0, 0] ** 0.5
    e, r = (given.start.means - marginal.means)[0, 0] / std, (given.start.variances / marginal.variances)[0, 0]
    assert_close(Offset(e, r).kl(), gaussian_kl(given.start, marginal), tolerances.ROUNDING)
    assert abs(Offset(e, 1.01 * r).kl() / gaussian_kl(given.start, marginal) - 1) > 1e-4
