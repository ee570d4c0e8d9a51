"""Inexact scores on Gaussian data: closed forms against moment equations, quadrature and each other."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from tests import tolerances
from tests.cases import assert_close
from tests.problems import BETA, ZERO, pair
from theory.divergences import gaussian_kl
from theory.gaussians import Offset, clock, inexact_score
from theory.quadrature import interval
from theory.ratios import law_gaussian

pytestmark = pytest.mark.hasty

PAIR = pair()


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
