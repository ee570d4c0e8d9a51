"""Divergences three ways: closed form, quadrature, Monte Carlo; and the closed forms against scipy."""

from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.optimize
import scipy.stats

from tests import tolerances
from tests.cases import assert_close, rotated_covariance
from tests.problems import both
from theory.divergences import (
    CHI2,
    DIRICHLET,
    FISHER,
    KL,
    TV,
    by_monte_carlo,
    by_quadrature,
    gaussian_chi2,
    gaussian_fisher,
    gaussian_kl,
    gaussian_renyi,
    gaussian_tv,
    gaussian_w2,
    renyi,
)
from theory.mixtures import gaussian, mixture_1d
from theory.quadrature import covering_rule, legendre_panels, panel_edges

pytestmark = pytest.mark.hasty

LINE = gaussian([0.3], [[0.25]]), gaussian([-0.2], [[0.64]])
PLANE = (
    gaussian([0.3, -0.5], rotated_covariance(0.4, (0.3, 0.6))),
    gaussian([0.0, 0.2], rotated_covariance(1.3, (1.1, 0.7))),
)
PAIRS = {"line": LINE, "plane": PLANE}
CLOSED = {
    "kl": (KL, gaussian_kl),
    "fisher": (FISHER, gaussian_fisher),
    "chi2": (CHI2, gaussian_chi2),
    "renyi(0.5)": (renyi(0.5), lambda p, q: gaussian_renyi(p, q, 0.5)),
    "renyi(2)": (renyi(2.0), lambda p, q: gaussian_renyi(p, q, 2.0)),
    "renyi(3)": (renyi(3.0), lambda p, q: gaussian_renyi(p, q, 3.0)),
}
ALL = {name: divergence for name, (divergence, _) in CLOSED.items()} | {"tv": TV, "dirichlet": DIRICHLET}
all_pairs = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)


def rule_for(p, q, panels=60):
    return legendre_panels(panel_edges(both(p, q), panels)) if p.dim == 1 else covering_rule(both(p, q), 101)


@partial(jax.jit, static_argnames="panels")
def quadrature(p, q, panels=60):
    """Every divergence, compiled at once."""
    rule = rule_for(p, q, panels)
    return {name: by_quadrature(divergence, p.log_prob, q.log_prob, rule) for name, divergence in ALL.items()}


@partial(jax.jit, static_argnames="samples")
def monte_carlo(p, q, key, samples):
    keys = dict(zip(CLOSED, jr.split(key, len(CLOSED)), strict=True))
    return {name: by_monte_carlo(ALL[name], p, q, keys[name], samples) for name in CLOSED}


@jax.jit
def closed_forms(p, q):
    """Every closed form, compiled at once."""
    return {name: closed(p, q) for name, (_, closed) in CLOSED.items()}


def closed_w2(p, q) -> float:
    return float(jax.jit(gaussian_w2)(p, q))


def closed_tv(p, q) -> float:
    return float(jax.jit(gaussian_tv)(p, q))


@all_pairs
def test_quadrature_of_gaussians(pair):
    """Against the closed forms, and within the reported errors; those of the exchanged laws are told apart."""
    p, q = pair
    found, closed, exchanged = jax.tree.map(float, (quadrature(p, q), closed_forms(p, q), closed_forms(q, p)))
    for name, exact in closed.items():
        estimate = found[name]
        assert_close(estimate.value, exact, tolerances.IDENTITY)
        assert abs(estimate.value - exact) <= estimate.error + tolerances.IDENTITY * exact
        if name != "renyi(0.5)":  # that one is symmetric
            with pytest.raises(AssertionError):
                assert_close(estimate.value, exchanged[name], tolerances.IDENTITY)


def scipy_integrals(p, q):
    """KL, Fisher, chi2 and Renyi 0.5, 2 and 3 from scipy's densities: adaptive on the line, a grid in the plane."""
    laws = [scipy.stats.multivariate_normal(np.array(law.means[0]), np.array(law.covariances[0])) for law in (p, q)]

    def log_densities(x):
        return (law.logpdf(x) for law in laws)

    def log_gradient(x):
        pulls = [np.linalg.solve(law.cov, (x - law.mean).reshape(-1, p.dim).T).T for law in laws]
        return np.sum((pulls[1] - pulls[0]) ** 2, axis=-1)

    integrands = [
        lambda x, a, b: np.exp(a) * (a - b),
        lambda x, a, b: np.exp(a) * log_gradient(x),
        lambda x, a, b: np.exp(2 * a - b),
        lambda x, a, b: np.exp((a + b) / 2),
        lambda x, a, b: np.exp(3 * a - 2 * b),
    ]
    if p.dim == 1:
        sums = [
            scipy.integrate.quad(
                lambda x, f=f: float(np.squeeze(f(np.array([x]), *log_densities([x])))), -9, 9, epsrel=1e-11
            )[0]
            for f in integrands
        ]
    else:
        axis, step = np.linspace(-9, 9, 401, retstep=True)
        x = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
        sums = [step**2 * np.sum(f(x, *log_densities(x))) for f in integrands]
    kl, fisher, second, root, third = sums
    return [kl, fisher, second - 1, -2 * np.log(root), np.log(second), np.log(third) / 2]


@all_pairs
def test_closed_forms(pair):
    """Against scipy; a law off by 1e-3 in its mean is told apart."""
    p, q = pair
    expected = dict(zip(CLOSED, scipy_integrals(p, q), strict=True))
    shifted = p._replace(means=jnp.asarray(np.asarray(p.means) + 1e-3))
    found, same, other = closed_forms(p, q), closed_forms(p, p), closed_forms(shifted, q)
    for name, value in expected.items():
        assert_close(found[name], value, tolerances.QUADRATURE)
        assert float(same[name]) == pytest.approx(0, abs=tolerances.ROUNDING)
        with pytest.raises(AssertionError):
            assert_close(other[name], value, tolerances.QUADRATURE)


def optimal_map_w2(p, q) -> float:
    """E|x - T x|² with T the symmetric positive map that carries p to q, which is optimal (Brenier 1991)."""
    (m, C), (n, D) = ((np.array(law.means[0]), np.array(law.covariances[0])) for law in (p, q))
    root = scipy.linalg.sqrtm(C)
    inverse = np.linalg.inv(root)
    T = inverse @ scipy.linalg.sqrtm(root @ D @ root) @ inverse
    np.testing.assert_allclose(T @ C @ T.T, D, atol=tolerances.IDENTITY)
    rest = np.eye(len(m)) - T
    return float(((m - n) @ (m - n) + np.trace(rest @ C @ rest)) ** 0.5)


@all_pairs
def test_w2(pair):
    """Against the optimal map, and zero for equal laws; the map that pairs the axes by size alone costs more."""
    p, q = pair
    assert_close(closed_w2(p, q), optimal_map_w2(p, q), tolerances.IDENTITY)
    assert_close(closed_w2(q, p), optimal_map_w2(p, q), tolerances.IDENTITY)
    assert closed_w2(p, p) < 1e-7  # the square root of rounding
    (m, v), (n, w) = ((np.asarray(law.means), np.asarray(law.variances)) for law in pair)
    aligned = (np.sum((m - n) ** 2) + np.sum((v**0.5 - w**0.5) ** 2)) ** 0.5
    assert p.dim == 1 or abs(aligned - closed_w2(p, q)) > 1e-3


def crossings_tv(p, q) -> float:
    """Half the integral of |p - q| by scipy's cdf between the roots of p - q, found by bracketing on a fine grid."""
    (m, a), (n, b) = ((float(law.means[0, 0]), float(law.variances[0, 0]) ** 0.5) for law in (p, q))
    first, second = scipy.stats.norm(m, a), scipy.stats.norm(n, b)

    def gap(x):
        return first.logpdf(x) - second.logpdf(x)

    x = np.linspace(-60, 60, 100_001) + 1e-7
    at = np.flatnonzero(np.diff(np.sign(gap(x))))
    roots = [-np.inf, *(scipy.optimize.brentq(gap, x[i], x[i + 1], xtol=1e-15) for i in at), np.inf]
    return float(np.abs(np.diff(first.cdf(roots)) - np.diff(second.cdf(roots))).sum() / 2)


@pytest.mark.parametrize(
    ("q", "crossings"),
    [((-0.2, 0.8), 2), ((0.3, 0.8), 2), ((0.3, 0.01), 2), ((1.0, 0.5), 1), ((-1.0, 0.5), 1), ((30.0, 0.5001), 1)],
)
def test_total_variation(q, crossings):
    """Closed form, and quadrature on ordinary panels to its error, against the crossings of scipy's densities."""
    p, q = gaussian([0.3], [[0.25]]), gaussian([q[0]], [[q[1] ** 2]])
    expected = crossings_tv(p, q)
    assert_close(closed_tv(p, q), expected, tolerances.IDENTITY)
    assert_close(closed_tv(q, p), expected, tolerances.IDENTITY)
    estimate = jax.tree.map(float, quadrature(p, q))["tv"]
    assert abs(estimate.value - expected) <= estimate.error + tolerances.IDENTITY
    if crossings == 2:  # negative control: with one crossing alone the answer differs
        assert abs(2 * scipy.stats.norm.cdf(abs(float((p.means - q.means)[0, 0])) / 2 / 0.5) - 1 - expected) > 1e-3


def test_total_variation_of_equal_laws():
    """Zero, and it is that of mirrored laws; ValueError in the plane."""
    p, q = LINE
    assert closed_tv(p, p) == 0
    mirrored = (law._replace(means=jnp.asarray(-np.asarray(law.means))) for law in (p, q))
    assert_close(closed_tv(*mirrored), closed_tv(p, q), 1e-13)
    with pytest.raises(ValueError, match=r"gaussian_tv needs d = 1, got d = 2"):
        gaussian_tv(*PLANE)


MIXED = mixture_1d([0.4, 0.6], [-1.0, 1.5], [0.5, 0.3]), mixture_1d([0.7, 0.3], [-0.5, 1.0], [0.8, 0.9])


def densities(x):
    """p and q of MIXED by scipy."""
    for law in MIXED:
        std = np.array(law.variances[:, 0]) ** 0.5
        yield float(np.array(law.weights) @ scipy.stats.norm.pdf(x, np.array(law.means[:, 0]), std))


def squared_gradient(x, h=1e-5):
    (a, b), (c, d) = (np.log(list(densities(z))) for z in (x + h, x - h))
    return ((a - b - c + d) / (2 * h)) ** 2


TEXTBOOK = {
    "kl": lambda x, p, q: p * np.log(p / q),
    "fisher": lambda x, p, q: p * squared_gradient(x),
    "chi2": lambda x, p, q: (p - q) ** 2 / q,
    "dirichlet": lambda x, p, q: p**2 / q * squared_gradient(x),
    "renyi(0.5)": lambda x, p, q: (p * q) ** 0.5,
    "renyi(2)": lambda x, p, q: p**2 / q,
}


@pytest.mark.parametrize("name", TEXTBOOK)
def test_mixtures(name):
    """What has no closed form, against scipy's integral of the textbook definition; the exchanged laws differ."""
    total = scipy.integrate.quad(
        lambda x: TEXTBOOK[name](x, *densities(x)), -11, 11, points=[-1, 0.3, 1.5], epsabs=0, epsrel=1e-9, limit=200
    )[0]
    expected = {"renyi(0.5)": lambda: -2 * np.log(total), "renyi(2)": lambda: np.log(total)}.get(name, lambda: total)()
    assert_close(quadrature(*MIXED)[name].value, expected, 1e-7)  # the finite differences are good to 1e-9
    assert name == "renyi(0.5)" or abs(quadrature(*MIXED[::-1])[name].value / expected - 1) > 1e-3


@pytest.mark.parametrize("width", [0.3, 0.02, 0.003])
def test_laws_far_apart(width):
    """Where one law vanishes to rounding the other still counts: all to 1e-9 for laws as narrow as std 0.003."""
    p, q = gaussian([0.5], [[width**2]]), gaussian([0.0], [[1.0]])
    for a, b in ((p, q), (q, p)):
        estimates, closed = jax.tree.map(float, (quadrature(a, b), closed_forms(a, b)))
        for name in ("kl", "fisher", "renyi(0.5)"):
            assert_close(estimates[name].value, closed[name], 1e-9)
        assert abs(estimates["tv"].value - closed_tv(a, b)) <= estimates["tv"].error + 1e-9
    assert_close(quadrature(p, q)["chi2"].value, closed_forms(p, q)["chi2"], 1e-9)
    rule = jax.jit(rule_for)(p, q)  # negative control: the mass of q where p > 0 is not all of it
    seen = np.where(np.exp(p.log_prob(rule.nodes)) > 0, np.exp(q.log_prob(rule.nodes)), 0.0)
    assert width == 0.3 or np.asarray(rule.weights) @ seen < 0.9


@pytest.mark.parametrize("panels", [4, 9, 20])
def test_reported_error_bounds_the_true_error(panels):
    """At every resolution of the line; at the poorest there is an error to be seen."""
    coarse, fine = jax.tree.map(float, (quadrature(*MIXED, panels=panels), quadrature(*MIXED)))
    for name in ("kl", "fisher", "chi2", "renyi(2)"):
        error = abs(coarse[name].value - fine[name].value)
        assert error <= coarse[name].error + tolerances.ROUNDING * fine[name].value
        assert panels != 4 or error > 1e-8


def gaussians_of(dim: int):
    """A pair in `dim` dimensions with finite variances of every Monte Carlo estimate, from a fixed seed."""
    rng = np.random.default_rng(dim)
    a, b = rng.normal(size=(2, dim, dim)) / dim**0.5
    cov = 0.3 * np.eye(dim) + 0.1 * a @ a.T
    return gaussian(0.3 * rng.normal(size=dim), cov), gaussian(np.zeros(dim), np.eye(dim) + 0.2 * b @ b.T)


@partial(jax.jit, static_argnums=(0, 4))
def by_mean(divergence, p, q, key, samples):
    """The plain mean over draws of p, which never sees where q / p is large; a negative control."""
    x = p.sample(key, (samples,))
    r = p.log_prob(x) - q.log_prob(x)
    values = divergence.integrand(r, jnp.zeros_like(r))
    return values.mean(), values.std() / samples**0.5


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_monte_carlo(dim):
    """Within four standard errors of the closed forms; the exchanged laws are told apart."""
    p, q = gaussians_of(dim)
    estimates = jax.tree.map(float, monte_carlo(p, q, jr.key(dim), 40_000))
    closed, exchanged = jax.tree.map(float, (closed_forms(p, q), closed_forms(q, p)))
    for name, (value, error) in estimates.items():
        assert abs(value - closed[name]) <= tolerances.STANDARD_ERRORS * error
        assert error < 0.05 * closed[name]
        if name != "renyi(0.5)":  # that one is symmetric
            assert abs(value - exchanged[name]) > tolerances.STANDARD_ERRORS * error


def test_monte_carlo_of_a_narrow_law():
    """A start of std 0.05 in dimension 1 and 2; averaging q / p over draws of p misses all of it."""
    for dim in (1, 2):
        p, q = gaussian(np.full(dim, 0.4), 0.05**2 * np.eye(dim)), gaussian(np.zeros(dim), np.eye(dim))
        exact = float(closed_forms(p, q)["kl"])
        value, error = map(float, monte_carlo(p, q, jr.key(dim), 40_000)["kl"])
        assert abs(value - exact) <= tolerances.STANDARD_ERRORS * error
        value, error = map(float, by_mean(KL, p, q, jr.key(dim), 20_000))
        assert abs(value - exact) > tolerances.STANDARD_ERRORS * error


def test_standard_errors_are_honest():
    """The spread over 50 keys is the reported error, up to the 10 % that 50 keys leave open, times four."""
    p, q = gaussians_of(2)
    exact = closed_forms(p, q)
    for name, (values, errors) in jax.vmap(lambda key: monte_carlo(p, q, key, 2000))(jr.split(jr.key(0), 50)).items():
        spread, typical = np.std(values, ddof=1), np.mean(errors)
        assert abs(spread / typical - 1) < 0.4
        assert abs(np.mean(values) - float(exact[name])) <= tolerances.STANDARD_ERRORS * typical / 50**0.5
        assert abs(spread / (typical / 2) - 1) > 0.4  # negative control: the errors of four times the draws


@pytest.mark.parametrize("order", [0.0, -1.0, 1.0])
def test_bad_orders(order):
    """ValueError with the order."""
    with pytest.raises(ValueError, match=rf"renyi: order must be positive and not 1.*{order}"):
        renyi(order)


def test_renyi_is_infinite_where_the_integral_is():
    """2 C~^-1 - C^-1 not positive definite: order 2 diverges, 1/2 does not."""
    p, q = gaussian([0.0], [[2.5]]), gaussian([0.0], [[1.0]])
    found = closed_forms(p, q)
    assert found["renyi(2)"] == np.inf == found["chi2"]
    assert 0 < found["renyi(0.5)"] < 1


@pytest.mark.parametrize(
    "closed", [gaussian_kl, gaussian_fisher, gaussian_chi2, gaussian_w2, gaussian_tv, CLOSED["renyi(3)"][1]]
)
def test_closed_forms_refuse_mixtures(closed):
    """ValueError with the number of components, on either side."""
    for pair in ((MIXED[0], LINE[0]), (LINE[0], MIXED[0])):
        with pytest.raises(ValueError, match="a closed form needs a Gaussian, got a mixture of 2 components"):
            closed(*pair)
