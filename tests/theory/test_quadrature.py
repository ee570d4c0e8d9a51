"""Quadrature rules against closed forms and scipy's adaptive integrator; their error estimates against true errors."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats

from tests import tolerances
from tests.cases import assert_close, plane, rotated_covariance
from theory.mixtures import gaussian, mixture, mixture_1d
from theory.quadrature import (
    absolute,
    coarsened,
    covering_rule,
    cumulative,
    interval,
    legendre,
    legendre_panels,
    length,
    normal_grid,
    panel_edges,
    panel_errors,
    piecewise,
)

pytestmark = pytest.mark.hasty

NARROW = mixture_1d([0.3, 0.2, 0.5], [-3.0, 0.0, 0.3], [0.5, 2e-4, 1.0])


@pytest.mark.parametrize("order", [8, 12])
def test_legendre(order):
    """Exact for x^n up to degree 2 order - 1, the coarse rule up to order - 3, and running integrals to order - 1."""
    nodes, weights, coarse, matrix = legendre(order)
    for n in range(2 * order):
        exact = (1 - (-1) ** (n + 1)) / (n + 1)
        assert abs(weights @ nodes**n - exact) < tolerances.ROUNDING
        if n <= order - 3:
            assert abs(coarse @ nodes**n - exact) < tolerances.ROUNDING
        if n <= order - 1:
            running = (nodes ** (n + 1) - (-1) ** (n + 1)) / (n + 1)
            np.testing.assert_allclose(matrix @ nodes**n, running, atol=tolerances.IDENTITY)
    assert abs(weights @ nodes ** (2 * order) - 2 / (2 * order + 1)) > tolerances.ROUNDING
    assert abs(coarse @ nodes ** (order - 2) - (1 - (-1) ** (order - 1)) / (order - 1)) > tolerances.ROUNDING


def test_interval():
    """exp on [-1, 3] and, with the ends exchanged, its negative."""
    nodes, weights = interval(-1.0, 3.0, 16)
    exact = np.exp(3) - np.exp(-1)
    assert_close(weights @ np.exp(nodes), exact, tolerances.ROUNDING)
    nodes, weights = interval(3.0, -1.0, 16)
    assert_close(weights @ np.exp(nodes), -exact, tolerances.ROUNDING)


def moments(law, rule):
    """E[x^n] for n = 0..3 on the line."""
    return [rule.integrate(jnp.exp(law.log_prob(rule.nodes)) * rule.nodes[:, 0] ** n).value for n in range(4)]


def exact_moments(law):
    components = zip(law.weights, law.means[:, 0], law.variances[:, 0] ** 0.5, strict=True)
    terms = [[w * scipy.stats.norm(m, s).moment(n) for n in (1, 2, 3)] for w, m, s in components]
    return [1.0, *np.sum(terms, axis=0)]


def test_panels_resolve_narrow_components():
    """Moments of a mixture with std from 2e-4 to 1; negative control: equal panels miss the narrow one."""
    edges = panel_edges(NARROW, 40)
    assert np.all(np.diff(edges) > 0)
    assert_close(moments(NARROW, legendre_panels(edges)), exact_moments(NARROW), tolerances.ROUNDING)
    equal = jnp.linspace(edges[0], edges[-1], 41)
    with pytest.raises(AssertionError):
        assert_close(moments(NARROW, legendre_panels(equal)), exact_moments(NARROW), tolerances.QUADRATURE)


@pytest.mark.parametrize("panels", [2, 4, 6, 9, 14])
def test_error_of_panels_is_honest(panels):
    """The reported error bounds the true one at every resolution, and is below 1e-12 once the value is exact."""
    rule = legendre_panels(panel_edges(NARROW, panels))
    mass = rule.integrate(jnp.exp(NARROW.log_prob(rule.nodes)))
    assert abs(mass.value - 1) <= mass.error + tolerances.ROUNDING
    if panels == 2:  # negative control: there is an error to be seen
        assert abs(mass.value - 1) > 1e-3
    fine = legendre_panels(panel_edges(NARROW, 40))
    assert fine.integrate(jnp.exp(NARROW.log_prob(fine.nodes))).error < 1e-9


def test_gaps_count_for_nothing():
    """Modes 16 apart of std 0.02: all panels but one are in the modes, and the moments are right."""
    law = mixture_1d([0.5, 0.5], [-8.0, 8.0], [0.02, 0.02])
    assert_close(length(law), 37.0, tolerances.ROUNDING)  # 18 deviations each, and the gap counts as one
    edges = panel_edges(law, 40)
    assert np.sum(np.diff(edges) > 0.1) == 2 and abs(length(NARROW) - length(law)) > 1
    assert_close(moments(law, legendre_panels(edges))[::2], exact_moments(law)[::2], tolerances.ROUNDING)
    equal = jnp.linspace(edges[0], edges[-1], 41)
    assert abs(moments(law, legendre_panels(equal))[0] - 1) > 1e-3  # negative control


def test_errors_of_panels():
    """Panel by panel they bound what is missed: of a pole at every distance, and of a kink; and are small at last."""
    for distance in (0.05, 0.2, 0.5, 1.0):
        edges = jnp.linspace(-1.0, 1.0, 5)
        rule = legendre_panels(edges)
        values = 1 / (rule.nodes[:, 0] ** 2 + distance**2)
        exact = np.diff(np.arctan(np.asarray(edges) / distance)) / distance
        found = (rule.weights * values).reshape(-1, 12).sum(1)
        errors = panel_errors(rule, values)
        assert np.all(abs(found - exact) <= errors + tolerances.ROUNDING * exact)
        assert distance > 0.05 or np.max(abs(found - exact)) > 1e-6  # negative control: there is something to bound
    assert np.all(errors < 1e-9 * exact)
    kinked = panel_errors(rule, jnp.abs(rule.nodes[:, 0] - 0.1))
    assert kinked[2] > 1e-3 and np.all(kinked[jnp.array([0, 1, 3])] < 1e-15)


def test_piecewise():
    """sin on [0, 10] by polynomials: its values, its integrals from either end, and |sin| with its kinks cut."""
    edges = jnp.linspace(0.0, 10.0, 12)
    rule = legendre_panels(edges)
    sine = piecewise(edges, jnp.sin(rule.nodes[:, 0]))
    x = jnp.array([0.0, 0.3, 4.4, 9.9, 10.0])
    for found, exact in (
        (sine(x), np.sin(x)),
        (sine.below(x), 1 - np.cos(x)),
        (sine.above(x), np.cos(x) - np.cos(10.0)),
    ):
        np.testing.assert_allclose(found, exact, atol=tolerances.IDENTITY)
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(1.01 * found, exact, atol=tolerances.IDENTITY)
    exact = 7 + np.cos(10.0 - 3 * np.pi) * -1  # three arches of 2, and one from 3 pi to 10
    assert_close(absolute(sine), exact, tolerances.IDENTITY)
    assert abs(rule.weights @ jnp.abs(jnp.sin(rule.nodes[:, 0])) - exact) > 1e-4  # negative control


def test_coarsened_values_have_the_integral_of_the_coarse_rule():
    """To rounding; and they are other values."""
    rule = legendre_panels(jnp.linspace(0.0, 20.0, 6))
    values = jnp.cos(rule.nodes[:, 0])
    assert_close(rule.weights @ coarsened(values), rule.coarse @ values, 1e-9)
    assert abs(rule.weights @ (coarsened(values) - values)) > 1e-6


def test_cumulative():
    """Both tails to 1e-5, down to 1e-14 (the panels start at 1e-19); one minus the other loses the small one."""
    law = mixture_1d([0.4, 0.6], [-1.0, 1.5], [0.5, 0.3])
    rule = legendre_panels(panel_edges(law, 40))
    x = np.array(rule.nodes[:, 0])
    left, right = cumulative(rule, jnp.exp(law.log_prob(rule.nodes)))

    def exact(side):
        return 0.4 * scipy.stats.norm.cdf(side * (x + 1.0) / 0.5) + 0.6 * scipy.stats.norm.cdf(side * (x - 1.5) / 0.3)

    for tail, side in ((left, 1), (right, -1)):
        seen = exact(side) > 1e-14
        np.testing.assert_allclose(tail[seen], exact(side)[seen], rtol=1e-5)
        np.testing.assert_allclose(tail, exact(side), atol=tolerances.ROUNDING)
    small = (exact(1) > 1e-14) & (exact(1) < 1e-12)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(1 - right[small], exact(1)[small], rtol=1e-5)


@pytest.mark.parametrize(("dim", "points"), [(1, 49), (2, 31)])
def test_normal_grid(dim, points):
    """E[exp(a z)] = exp(a² / 2), coarse rule too; the weights of another standard deviation are told apart."""
    nodes, weights, coarse = normal_grid(points, dim)
    a = np.full(dim, 0.6)
    exact = np.exp(a @ a / 2)
    assert_close(weights @ np.exp(nodes @ a), exact, 1e-10)
    assert abs(coarse @ np.exp(nodes @ a) - exact) < 1e-4
    assert abs(weights @ np.exp(1.001 * nodes @ a) - exact) > 1e-4


def second_moment(law, rule):
    """E[x x^T] in the plane."""
    p = jnp.exp(law.log_prob(rule.nodes))
    return [[rule.integrate(p * rule.nodes[:, i] * rule.nodes[:, j]).value for j in range(2)] for i in range(2)]


def test_covering_rule():
    """Second moments of a mixture in the plane; a cover that lacks a component is told apart."""
    law = plane()
    exact = np.einsum("k,kij->ij", law.weights, law.covariances) + np.einsum(
        "k,ki,kj->ij", law.weights, law.means, law.means
    )
    assert_close(second_moment(law, covering_rule(law, 101)), exact, tolerances.IDENTITY)
    partial = mixture([0.5, 0.5], law.means[:2], law.covariances[:2])
    with pytest.raises(AssertionError):
        assert_close(second_moment(law, covering_rule(partial, 101)), exact, tolerances.IDENTITY)


@pytest.mark.parametrize("points", [15, 21, 31, 51])
def test_error_of_the_covering_rule_is_honest(points):
    """A narrow Gaussian inside a wide one, the hard case: the reported error bounds the true one, and both vanish."""
    wide, narrow = gaussian([0.0, 0.0], np.eye(2)), gaussian([0.3, 0.2], rotated_covariance(0.5, (0.04, 0.09)))
    law = mixture([0.5, 0.5], [wide.means[0], narrow.means[0]], [wide.covariances[0], narrow.covariances[0]])
    rule = covering_rule(law, points)
    value = rule.integrate(jnp.exp(law.log_prob(rule.nodes)) * jnp.exp(-jnp.sum(rule.nodes**2, axis=1)))
    # E exp(-|x|²) = det(I + 2 C)^-1/2 exp(-m^T (I + 2 C)^-1 m)
    C, m = np.eye(2) + 2 * np.array(law.covariances), np.array(law.means)
    terms = np.exp(-np.einsum("ki,kij,kj->k", m, np.linalg.inv(C), m)) / np.sqrt(np.linalg.det(C))
    error = abs(value.value - terms.mean())
    assert error <= value.error + tolerances.ROUNDING
    assert points != 15 or error > 1e-8  # negative control: at 15 points there is an error to be seen


def test_adaptive_quadrature_agrees():
    """The entropy of a mixture, which has no closed form, against scipy."""
    law = mixture_1d([0.4, 0.6], [-1.0, 1.5], [0.5, 0.3])
    rule = legendre_panels(panel_edges(law, 40))
    log_p = law.log_prob(rule.nodes)

    def integrand(x):
        p = 0.4 * scipy.stats.norm.pdf(x, -1.0, 0.5) + 0.6 * scipy.stats.norm.pdf(x, 1.5, 0.3)
        return -scipy.special.xlogy(p, p)

    expected = scipy.integrate.quad(integrand, -6, 5, points=[-1.0, 0.5, 1.5], epsabs=0, epsrel=1e-11)[0]
    assert_close(rule.integrate(-jnp.exp(log_p) * log_p).value, expected, tolerances.QUADRATURE)
    assert abs(expected - rule.integrate(-jnp.exp(log_p) * log_p / jnp.log(2.0)).value) > 0.1  # bits are not nats
