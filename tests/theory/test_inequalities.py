"""Certified constants: exact for Gaussians, against a finite-difference eigenvalue, and against a plain SVD."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.stats

from tests import tolerances
from tests.cases import assert_close
from tests.problems import ZERO, asymmetric, pair
from theory.inequalities import chi2_factor, log_sobolev, poincare
from theory.mixtures import gaussian, mixture_1d

pytestmark = pytest.mark.hasty

BIMODAL = mixture_1d([0.4, 0.6], [-1.0, 1.5], [0.6, 0.5])


@pytest.mark.parametrize(("mean", "variance"), [(0.0, 1.0), (-3.0, 0.04), (100.0, 25.0)])
def test_gaussian_constants(mean, variance):
    """C_P of N(m, v) is v, pinched from both sides; C is v, within its bracket of at most nine."""
    law = gaussian([mean], [[variance]])
    lower, upper = poincare(law)
    assert_close(lower, variance, 1e-6)  # the power method, 30 steps
    assert_close(upper, variance, 1e-6)
    assert lower <= variance * (1 + tolerances.IDENTITY) and upper >= variance * (1 - tolerances.IDENTITY)
    bracket = log_sobolev(law)
    assert bracket.lower <= variance <= bracket.upper <= 9 * bracket.lower
    with pytest.raises(AssertionError):
        assert_close(poincare(gaussian([mean], [[1.001 * variance]])).lower, variance, 1e-6)


def sturm_liouville(law, n: int) -> float:
    """1 / lambda_1 of -(p f')' = lambda p f with natural boundaries, by finite volumes on n equal cells."""
    edges = np.linspace(-6, 6, n + 1)
    weights, means, stds = np.array(law.weights), np.array(law.means[:, 0]), np.array(law.variances[:, 0]) ** 0.5

    def density(x):
        return scipy.stats.norm.pdf(x[:, None], means, stds) @ weights

    step, mass = edges[1] - edges[0], density((edges[1:] + edges[:-1]) / 2)
    flow = density(edges[1:-1]) / step**2
    diagonal = (np.append(flow, 0) + np.append(0, flow)) / mass
    eigenvalues = scipy.linalg.eigh_tridiagonal(
        diagonal, -flow / np.sqrt(mass[1:] * mass[:-1]), eigvals_only=True, select="i", select_range=(0, 1)
    )
    return 1 / eigenvalues[1]


@pytest.mark.parametrize("law", [BIMODAL, mixture_1d([0.8, 0.2], [0.0, 1.0], [1.0, 0.3])])
def test_poincare_of_mixtures(law):
    """The bracket holds the extrapolated finite-difference eigenvalue; that of half the gap is told apart."""
    coarse, fine = sturm_liouville(law, 1500), sturm_liouville(law, 3000)
    expected = (4 * fine - coarse) / 3
    lower, upper = poincare(law)
    assert_close(lower, expected, 1e-6)
    assert_close(upper, expected, 1e-6)
    with pytest.raises(AssertionError):
        assert_close(poincare(law._replace(means=0.99 * law.means)).upper, expected, 1e-6)


@pytest.mark.parametrize("law", [BIMODAL, asymmetric().target])
def test_brackets_are_consistent(law):
    """lower <= upper, C >= C_P, and both scale with the square of the law; the reflected law has the same ones."""
    (p_low, p_high), (s_low, s_high) = poincare(law), log_sobolev(law)
    assert p_low <= p_high * (1 + tolerances.IDENTITY) and s_low <= s_high and s_high >= p_low
    scaled = law._replace(means=-3 * law.means, variances=9 * law.variances)
    assert_close(poincare(scaled).upper, 9 * p_high, 1e-6)
    assert_close(log_sobolev(scaled).upper, 9 * s_high, 1e-3)  # a supremum over nodes
    assert abs(log_sobolev(law._replace(variances=9 * law.variances)).upper / (9 * s_high) - 1) > 1e-2


def test_log_sobolev_bracket_is_an_inequality():
    """Ent(f²) <= 2 C E f'² for f = exp(a x) at the upper bound; for a Gaussian it is an equality at C = v."""
    x, step = np.linspace(-12, 12, 20_001, retstep=True)

    def least(law, a):
        p = np.exp(np.array(law.log_prob(jnp.asarray(x)[:, None]))) * step
        f2 = np.exp(2 * a * x)
        return float((p @ (f2 * np.log(f2)) - (p @ f2) * np.log(p @ f2)) / (2 * p @ (a**2 * f2)))

    for a in (0.1, 0.5, -0.8):
        assert least(BIMODAL, a) <= log_sobolev(BIMODAL).upper
        assert_close(least(gaussian([0.2], [[0.5]]), a), 0.5, tolerances.IDENTITY)


@pytest.mark.parametrize("s", [0.0, 0.4])
def test_factor_of_gaussians_is_the_squared_correlation(s):
    """corr(x_s, x_t0)² = c² V_s / V_t0; another time has another one."""
    given = pair()

    def squared_correlation(s):
        alpha, sigma = (
            np.array([float(f(t)) for t in (given.t0, jnp.array(s))])
            for f in (given.schedule.alpha, given.schedule.sigma)
        )
        variances = 0.04 * alpha**2 + sigma**2
        return (alpha[0] / alpha[1]) ** 2 * variances[1] / variances[0]

    assert_close(chi2_factor(given, jnp.array(s)).value, squared_correlation(s), tolerances.QUADRATURE)
    with pytest.raises(AssertionError):
        assert_close(chi2_factor(given, jnp.array(s)).value, squared_correlation(s + 0.01), tolerances.QUADRATURE)


def test_factor_of_a_mixture():
    """The second singular value of the joint density on plain equal grids; the linear correlation is a lower bound."""
    given, s = asymmetric(), jnp.array(0.2)
    x, y = np.linspace(-5.5, 5.5, 900), np.linspace(-6, 6, 500)
    alpha, sigma = (
        np.array([float(f(t)) for t in (given.t0, s)]) for f in (given.schedule.alpha, given.schedule.sigma)
    )
    c = alpha[0] / alpha[1]
    tau = (sigma[0] ** 2 - c**2 * sigma[1] ** 2) ** 0.5
    p_s, p_t = (
        np.exp(np.array(given.marginal(t).log_prob(jnp.asarray(z)[:, None]))) for t, z in ((s, x), (given.t0, y))
    )
    kernel = scipy.stats.norm.pdf(y[:, None], c * x[None], tau) * np.sqrt(p_s[None] / p_t[:, None])
    values = np.linalg.svd(kernel * ((x[1] - x[0]) * (y[1] - y[0])) ** 0.5, compute_uv=False)
    assert_close(values[0], 1.0, 1e-6)
    assert_close(chi2_factor(given, s).value, values[1] ** 2, 1e-6)
    variances = [float(given.marginal(t).covariance()[0, 0]) for t in (s, given.t0)]
    linear = c**2 * variances[0] / variances[1]
    assert linear < chi2_factor(given, s).value < 1
    assert abs(chi2_factor(given, ZERO).value / values[1] ** 2 - 1) > 1e-3  # negative control: another time


def over_the_barrier(weights, means, stds) -> float:
    """w_1 w_2 times the integral of 1/p between the modes, by adaptive quadrature around the peak of 1/p.

    C_P of two modes far apart: what relaxes inside a mode changes it by C_P(mode) / C_P only. Laplace's method makes
    of it the law of Eyring and Kramers.
    """

    weights, means, stds = map(np.array, (weights, means, stds))

    def log_p(x):
        logs = -(((np.expand_dims(x, -1) - means) / stds) ** 2) / 2 + np.log(weights / stds / np.sqrt(2 * np.pi))
        return np.logaddexp(logs[..., 0], logs[..., 1])

    x = np.linspace(*means, 200_001)
    top = x[np.argmin(log_p(x))]
    width = np.diff(means)[0] / 2
    points = [top, *(top + sign * width * 2.0**-j for j in range(20) for sign in (-1, 1))]
    points = sorted(point for point in points if means[0] <= point <= means[1])
    parts = [
        scipy.integrate.quad(lambda x: np.exp(log_p(top) - log_p(x)), *ends, epsrel=1e-11)[0]
        for ends in itertools.pairwise(points)
    ]
    return weights[0] * weights[1] * sum(parts) * np.exp(-log_p(top))


BARRIERS = {
    "equal": ([0.5, 0.5], [-8.0, 8.0], [0.25, 0.25]),
    "unequal": ([0.3, 0.7], [-8.0, 8.0], [0.4, 0.3]),
    "hardly there": ([1e-12, 1 - 1e-12], [-8.0, 8.0], [0.4, 0.3]),
}


@pytest.mark.parametrize("modes", BARRIERS.values(), ids=BARRIERS)
def test_constants_of_modes_far_apart(modes):
    """The peak of 1/p is a thousandth of a standard deviation wide; and C lies between C_P and what weights make of it.

    C <= C_P log(1/w - 1) / (1 - 2 w) up to what relaxes inside a mode: the two-point space of Diaconis & Saloff-Coste.
    """
    law, expected = mixture_1d(*modes), over_the_barrier(*modes)
    lower, upper = poincare(law)
    assert lower <= upper
    assert_close(lower, expected, 1e-9)
    assert_close(upper, expected, 1e-9)
    w = min(modes[0])
    sobolev = expected * (2 if w == 0.5 else np.log(1 / w - 1) / (1 - 2 * w)) / 2
    bracket = log_sobolev(law)
    assert bracket.lower <= sobolev <= bracket.upper <= 16 * bracket.lower
    with pytest.raises(AssertionError):
        assert_close(poincare(law._replace(means=0.9999 * law.means)).upper, expected, 1e-9)


def test_constants_beyond_floats():
    """Modes of width 0.02 at ±8: C_P = e^79988. The upper bounds are inf, the lower ones true, and nothing is nan."""
    law = mixture_1d([0.5, 0.5], [-8.0, 8.0], [0.02, 0.02])
    for lower, upper in (poincare(law), log_sobolev(law)):
        assert lower == np.finfo(float).max and upper == np.inf
        assert np.exp(-1 / upper) == 1.0
    small = mixture_1d([0.5, 1e-40, 0.5], [-3.0, 0.3, 3.0], [0.3, 0.3, 0.3])  # a mode that nobody visits
    assert_close(poincare(small).upper, poincare(mixture_1d([0.5, 0.5], [-3.0, 3.0], [0.3, 0.3])).upper, 1e-9)
    assert np.isfinite(poincare(mixture_1d([0.5, 0.5], [-8.0, 8.0], [0.25, 0.25])).upper)
