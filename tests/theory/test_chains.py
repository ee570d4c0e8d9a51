"""Laws of discretised samplers: Gaussian chains against Monte Carlo and Bayes, chains on the line against both."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.stats

from tests import tolerances
from tests.cases import assert_close, scales
from tests.problems import BETA, asymmetric, gaussians_in_plane, pair
from theory.chains import ChainLaws, Moments, gaussian_chain, line_chain
from theory.divergences import gaussian_kl
from theory.mixtures import from_covariances, gaussian, noise_fn
from theory.problems import Problem
from theory.solve import sample, time_grid
from theory.solvers import DDIM, DPMSolverPP2M, EulerMaruyama, Heun

pytestmark = pytest.mark.hasty

SOLVERS = {
    "DDIM(1)": DDIM(BETA, 1.0),
    "DDIM(0.5)": DDIM(BETA, 0.5),
    "DDIM(0)": DDIM(BETA, 0.0),
    "EulerMaruyama(1)": EulerMaruyama(BETA, 1.0),
    "Heun": Heun(BETA),
    "DPMSolverPP2M(0)": DPMSolverPP2M(BETA, 0.0),
    "DPMSolverPP2M(1)": DPMSolverPP2M(BETA, 1.0),
}


def moments_of(law) -> Moments:
    means, axes, variances = (np.asarray(part)[0] for part in (law.means, law.axes, law.variances))
    return Moments(jnp.asarray(means), jnp.asarray(axes * variances @ axes.T))


@jax.jit
def end_of_chain(solver, given: Problem, ts):
    start = Moments(given.start.means[0], given.start.covariances[0])
    return jax.tree.map(lambda a: a[-1], gaussian_chain(solver, given, start, ts))


def filled(ts, times: int):
    """The grid, filled up with its last time: steps of no length, which change nothing, and one program for all."""
    return jnp.asarray(np.pad(np.asarray(ts), (0, times - len(ts)), mode="edge"))


def assert_moments(draws, law: Moments):
    """Mean and covariance within standard errors of the draws."""
    centred = draws - np.array(law.mean)
    products = centred[:, :, None] * centred[:, None]
    for values, expected in ((centred, 0.0), (products, np.array(law.covariance))):
        error = values.std(0) / len(draws) ** 0.5
        assert np.all(np.abs(values.mean(0) - expected) <= tolerances.STANDARD_ERRORS * error)


@pytest.mark.parametrize("name", SOLVERS)
def test_gaussian_chain_against_monte_carlo(name):
    """Six steps of the sampler itself, 40000 draws in the plane; five steps have another law."""
    given, solver = gaussians_in_plane(), SOLVERS[name]
    ts, five = time_grid(BETA, 6, end=0.05), time_grid(BETA, 5, end=0.05)
    x = given.start.sample(jr.key(0), (40_000,))
    draws = np.array(sample(solver, noise_fn(given.target, BETA), x, ts, jr.key(1)))
    assert_moments(draws, end_of_chain(solver, given, ts))
    with pytest.raises(AssertionError):
        assert_moments(draws, end_of_chain(solver, given, filled(five, 7)))


@pytest.mark.parametrize("name", ["DDIM(1)", "DPMSolverPP2M(1)"])
def test_steps_of_no_length_change_nothing(name):
    """A grid filled up with its last time, even where that is 0."""
    given, solver = pair(), SOLVERS[name]
    ts = time_grid(BETA, 4)
    ends = (end_of_chain(solver, given, grid) for grid in (ts, filled(ts, 8)))
    for expected, found in zip(*ends, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("steps", [1, 4])
def test_ancestral_chain_is_regression(steps):
    """DDIM(1): the mean is E[x_s | x_t] = m_s + G (x - m_t), the noise sigma_{s|t}²: a chain by hand, in numpy."""
    given, ts = pair(), np.linspace(1.0, 0.05, steps + 1)
    alpha, sigma = np.array([scales(BETA, t) for t in ts]).T
    m0, v0 = 1.3, 0.04
    mean, variance = 0.5, 0.25
    for i in range(steps):
        ratio = alpha[i] / alpha[i + 1]
        v_t, v_s = (alpha[k] ** 2 * v0 + sigma[k] ** 2 for k in (i, i + 1))
        gain = ratio * v_s / v_t  # Cov(x_s, x_t) / Var(x_t)
        fresh = (sigma[i + 1] / sigma[i]) ** 2 * (1 - ratio**2)  # of q(x_s | x_t, x_0)
        mean, variance = alpha[i + 1] * m0 + gain * (mean - alpha[i] * m0), gain**2 * variance + fresh
    end = end_of_chain(DDIM(BETA, 1.0), given, filled(ts, 5))
    assert_close(end.mean, [mean], tolerances.IDENTITY)
    assert_close(end.covariance, [[variance]], tolerances.IDENTITY)
    other = end_of_chain(DDIM(BETA, 0.9), given, filled(ts, 5))
    with pytest.raises(AssertionError):
        assert_close(other.covariance, [[variance]], tolerances.IDENTITY)


@pytest.fixture(scope="module")
def chains():
    ts = time_grid(BETA, 12, end=0.02)
    return jax.tree.map(np.asarray, line_chain(DDIM(BETA, 1.0), pair(), ts)), np.asarray(ts)


def chain_of(start, ts) -> Moments:
    """All laws of the ancestral chain for the pair's target."""
    return jax.tree.map(np.asarray, gaussian_chain(DDIM(BETA, 1.0), pair(), moments_of(start), jnp.asarray(ts)))


def test_line_chain_is_the_gaussian_chain(chains):
    """For a Gaussian target both laws stay Gaussian, at every time; the chain of another start is told apart."""
    laws, ts = chains

    def assert_gaussian(density, start):
        exact = chain_of(start, ts)
        for i in range(len(ts)):
            std = float(exact.covariance[i, 0, 0]) ** 0.5
            expected = scipy.stats.norm.pdf(laws.rule.nodes[i, :, 0], float(exact.mean[i, 0]), std)
            assert_close(density[i], expected, tolerances.QUADRATURE)

    assert_gaussian(laws.edited, pair().start)
    assert_gaussian(laws.right, pair().marginal(pair().t0))
    with pytest.raises(AssertionError):
        assert_gaussian(laws.edited, gaussian([0.5], [[0.26]]))


@jax.jit
@jax.vmap
def kl_of_moments(p: Moments, q: Moments):
    return gaussian_kl(*(from_covariances(jnp.zeros(1), law.mean[None], law.covariance[None]) for law in (p, q)))


def test_kl_of_line_chains(chains):
    """Between two Gaussian chains it is that of their moments; it falls at every step; masses are one."""
    laws, ts = chains
    starts = (pair().start, pair().marginal(pair().t0))
    ends = [chain_of(law, ts) for law in starts]
    expected = kl_of_moments(*ends)
    np.testing.assert_allclose(laws.kl(), expected, rtol=1e-6)
    assert np.all(np.diff(laws.kl()) < 0)
    masses = [np.sum(laws.rule.weights * density, axis=1) for density in (laws.edited, laws.right)]
    assert_close(masses, np.ones((2, len(ts))), tolerances.IDENTITY)
    swapped = laws._replace(edited=laws.right, right=laws.edited).kl()
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(swapped, expected, rtol=1e-6)


def off_one(laws: ChainLaws) -> float:
    """The largest error of a mass."""
    return np.abs(np.sum(np.asarray(laws.rule.weights) * np.asarray(laws.edited), axis=1) - 1).max()


def test_line_chain_of_a_mixture():
    """The sampler itself: share below each quantile of 40000 draws; KL falls; too few panels lose the mass."""
    given, ts = asymmetric(), time_grid(BETA, 10, start=0.6, end=0.03)
    laws = jax.tree.map(np.asarray, line_chain(DDIM(BETA, 1.0), given, ts))
    x = given.start.sample(jr.key(0), (40_000,))
    draws = np.array(sample(DDIM(BETA, 1.0), noise_fn(given.target, BETA), x, ts, jr.key(1)))[:, 0]
    nodes, weights = np.array(laws.rule.nodes[-1, :, 0]), np.array(laws.rule.weights[-1])

    def assert_shares(density):
        cdf = np.cumsum(weights * np.array(density[-1]))
        for u in (0.1, 0.3, 0.5, 0.7, 0.9):
            i = np.searchsorted(cdf, u)
            expected = cdf[i] - weights[i] * density[-1][i] / 2
            error = (u * (1 - u) / len(draws)) ** 0.5 + weights[i] * density[-1][i] / 10
            assert abs(np.mean(draws < nodes[i]) - expected) <= tolerances.STANDARD_ERRORS * error

    assert_shares(laws.edited)
    with pytest.raises(AssertionError):
        assert_shares(laws.right)
    assert np.all(np.diff(laws.kl()) < 0)
    assert off_one(laws) < tolerances.QUADRATURE
    assert off_one(line_chain(DDIM(BETA, 1.0), given, ts, panels=3)) > 1e-6  # negative control: the masses tell
