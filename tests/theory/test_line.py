"""Distribution functions, quantiles and W2 on the line against scipy and sorted quantile couplings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats

from tests import tolerances
from tests.cases import assert_close
from tests.problems import both
from theory import line
from theory.divergences import gaussian_w2
from theory.mixtures import gaussian, mixture_1d
from theory.quadrature import legendre_panels, panel_edges, piecewise

pytestmark = pytest.mark.hasty

WEIGHTS, MEANS, STDS = np.array([0.4, 0.6]), np.array([-1.0, 1.5]), np.array([0.5, 0.3])
LAW = mixture_1d(WEIGHTS, MEANS, STDS)
GAP = mixture_1d([0.3, 0.7], [-4.0, 5.0], [0.1, 0.2])  # the middle has probability 1e-300


def log_cdf(x, side=1.0):
    """log of the lower tail (side 1) or the upper one (side -1), by scipy."""
    return scipy.special.logsumexp(scipy.stats.norm.logcdf(side * (x[:, None] - MEANS) / STDS), b=WEIGHTS, axis=1)


def test_tails():
    """Logarithms of both tails, down to 1e-190 and below; 1 - F has no upper tail left beyond 8 deviations."""
    x = np.array([-23.0, -3.0, -1.0, 0.3, 1.5, 4.5, 14.0])
    tails = line.tails(LAW, jnp.asarray(x))
    np.testing.assert_allclose(tails.log_lower, log_cdf(x), rtol=tolerances.IDENTITY, atol=tolerances.ROUNDING)
    np.testing.assert_allclose(tails.log_upper, log_cdf(x, -1.0), rtol=tolerances.IDENTITY, atol=tolerances.ROUNDING)
    assert tails.log_lower[0] < -900 and tails.log_upper[-1] < -440
    assert 1 - jnp.exp(tails.log_lower[-2]) == 0 != jnp.exp(tails.log_upper[-2])


def tails_of(log_lower) -> line.Tails:
    return line.Tails(log_lower, jnp.log(-jnp.expm1(log_lower)))


@pytest.mark.parametrize("log10", [-200.0, -20.0, -3.0, -0.4, -0.01])
def test_quantiles_invert_the_distribution_function(log10):
    """In either tail, as far out as 1e-200; against a root of scipy's log-cdf; another probability is told apart."""
    log_u = log10 * np.log(10)
    u = tails_of(jnp.array([log_u]))
    for tails, side in ((u, 1.0), (line.Tails(u.log_upper, u.log_lower), -1.0)):
        root = scipy.optimize.brentq(lambda x, s=side: log_cdf(np.array([x]), s)[0] - log_u, -30, 30, xtol=1e-14)
        x = line.quantile(LAW, tails)
        assert_close(x, [root], tolerances.IDENTITY)
        back = line.tails(LAW, x)
        assert_close(back.log_lower if side > 0 else back.log_upper, [log_u], tolerances.IDENTITY)
    shifted = tails_of(jnp.array([log_u * 1.001]))
    with pytest.raises(AssertionError):
        assert_close(line.quantile(LAW, shifted), line.quantile(LAW, u), tolerances.IDENTITY)


def test_quantiles_jump_across_a_gap():
    """Just below and above the weight of the left mode the quantile is in one mode and in the other."""
    ends = line.quantile(GAP, tails_of(jnp.log(jnp.array([0.3 - 1e-9, 0.3 + 1e-9]))))
    assert -4 < ends[0] < -3 and 3.5 < ends[1] < 5


@jax.jit
def w2(p, q):
    edges = panel_edges(both(p, q), 80)
    x = legendre_panels(edges).nodes
    return line.w2(*(piecewise(edges, jnp.exp(law.log_prob(x))) for law in (p, q)))


def test_w2_of_gaussians():
    """The closed form, within the reported error and to 1e-8; a wider law is told apart."""
    p, q = gaussian([0.3], [[0.25]]), gaussian([-1.0], [[1.0]])
    value = w2(p, q)
    exact = (1.3**2 + 0.5**2) ** 0.5
    assert_close(gaussian_w2(p, q), exact, tolerances.ROUNDING)
    assert_close(value.value, exact, tolerances.QUADRATURE)
    assert abs(w2(p, gaussian([-1.0], [[1.01]])).value - exact) > 1e-4


def by_coupling(p, q, n=400_000) -> float:
    """Sorted coupling: the midpoint rule in u for the squared distance of interpolated quantiles."""
    u, x = (np.arange(n) + 0.5) / n, np.linspace(-12, 12, 2_000_001)

    def quantiles(law):
        parts = zip(law.weights, law.means[:, 0], law.variances[:, 0] ** 0.5, strict=True)
        return np.interp(u, sum(float(w) * scipy.stats.norm.cdf(x, float(m), float(s)) for w, m, s in parts), x)

    return float(np.mean((quantiles(p) - quantiles(q)) ** 2) ** 0.5)


def test_w2_across_a_gap():
    """Two modes from one, and two from two others: the map jumps. Against the coupling of 400000 sorted quantiles."""
    middle, other = gaussian([0.2], [[0.09]]), mixture_1d([0.6, 0.4], [-3.0, 4.0], [0.3, 0.2])
    for p in (middle, other):
        expected = by_coupling(p, GAP)
        assert_close(w2(p, GAP).value, expected, 1e-5)  # the coupling cuts the extreme 1e-6 of either tail
        assert_close(w2(GAP, p).value, expected, 1e-5)
    gaps = gaussian([float(GAP.mean()[0])], GAP.covariance())
    assert abs(w2(middle, gaps).value / by_coupling(middle, GAP) - 1) > 1e-3  # moments alone do not give it


def test_tails_and_quantiles_of_a_law_known_by_its_density():
    """Both tails, and the points that have given tails, against the exact ones; another law is told apart."""
    edges = panel_edges(LAW, 60)
    x = legendre_panels(edges).nodes
    law = piecewise(edges, jnp.exp(LAW.log_prob(x)))
    known, exact = line.tails_of(law, x[:, 0]), line.tails(LAW, x[:, 0])
    np.testing.assert_allclose(np.exp(known.log_lower), np.exp(exact.log_lower), atol=tolerances.ROUNDING)
    np.testing.assert_allclose(np.exp(known.log_upper), np.exp(exact.log_upper), atol=tolerances.ROUNDING)
    u = tails_of(jnp.log(jnp.array([1e-9, 1e-6, 0.1, 0.39, 0.7, 0.999, 1 - 1e-9])))
    assert_close(line.inverse(law, u), line.quantile(LAW, u), tolerances.QUADRATURE)
    with pytest.raises(AssertionError):
        heavier = piecewise(edges, 1.001 * jnp.exp(LAW.log_prob(x)))
        assert_close(line.inverse(heavier, u), line.quantile(LAW, u), tolerances.QUADRATURE)


def test_derivatives_of_quantiles():
    """With respect to the law and to the probability, of both kinds, against central differences."""
    step = 1e-5

    def both_kinds(shift, log_lower):
        law = mixture_1d([0.4, 0.6], [-1.0, 1.5], [0.5, 0.3])
        law = law._replace(means=law.means + jnp.array([[1.0], [0.3]]) * shift)
        edges = jax.lax.stop_gradient(panel_edges(law, 60))
        density = piecewise(edges, jnp.exp(law.log_prob(legendre_panels(edges).nodes)))
        u = tails_of(log_lower)
        return jnp.concatenate([line.quantile(law, u), line.inverse(density, u)])

    at = jnp.zeros(()), jnp.log(jnp.array([1e-6, 0.2, 0.8]))
    along = jnp.ones(()), jnp.array([0.3, -0.2, 0.1])
    found = jax.jvp(both_kinds, at, along)[1]
    up, down = (both_kinds(*(x + sign * step * v for x, v in zip(at, along, strict=True))) for sign in (1, -1))
    assert_close(found, (up - down) / (2 * step), 1e-6)
    assert_close(found[:3], found[3:], tolerances.QUADRATURE)
    with pytest.raises(AssertionError):
        assert_close(found[:3], 1.01 * found[3:], tolerances.QUADRATURE)
