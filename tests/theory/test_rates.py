"""Rates from simple facts: attained on Gaussians, above constants that are known from both sides, and proven steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg

from tests import tolerances
from tests.cases import assert_close, rotated_covariance, scales
from tests.problems import BETA, ZERO, asymmetric, pair, paper
from theory.checks import Study
from theory.contraction import contraction_curve
from theory.divergences import gaussian_kl
from theory.gaussians import clock
from theory.inequalities import log_sobolev, poincare
from theory.mixtures import gaussian, mixture, mixture_1d
from theory.problems import Problem, problem
from theory.rate_statements import certified_constants, component_constants, linear_rate, mean_shift
from theory.rates import Fact, log_sobolev_bound, mixture_constants, rate
from theory.schedules import CosineVP, VarianceExploding

pytestmark = pytest.mark.hasty

ONE = jnp.ones(())
FACTS = {
    "convex": Fact(convexity=2.0),
    "convex, bounded": Fact(convexity=0.6, diameter=3.0),
    "slightly convex, bounded": Fact(convexity=0.2, diameter=3.0),
    "flat, bounded": Fact(convexity=0.0, diameter=3.0),
    "concave, bounded": Fact(convexity=-1.0, diameter=3.0),
    "bounded": Fact(diameter=3.0),
    "bounded, blurred": Fact(diameter=3.0, blur=0.2),
    "a point, blurred": Fact(diameter=0.0, blur=0.1),
}


def curvature(fact: Fact, tau):
    """The smaller of the two bounds on Hess log p_tau."""
    tau = tau + fact.blur
    bounded = (fact.diameter / 2 / tau) ** 2 - 1 / tau if np.isfinite(fact.diameter) else np.full_like(tau, np.inf)
    if not np.isfinite(fact.convexity):
        return bounded
    known = 1 + fact.convexity * tau > 0
    convex = np.where(known, -fact.convexity / np.where(known, 1 + fact.convexity * tau, 1.0), np.inf)
    return np.minimum(bounded, convex)


@pytest.mark.parametrize("fact", FACTS.values(), ids=FACTS)
def test_constants_by_integrating_the_curvature(fact):
    """C(tau) = -exp(integral of theta from tau to 1e6) / theta(1e6), and the exponent is the integral of 1 / C."""
    log_tau = np.linspace(np.log(0.05), np.log(1e6), 400_001)
    tau = np.exp(log_tau)
    theta = curvature(fact, tau)
    passed = scipy.integrate.cumulative_simpson(theta * tau, x=log_tau, initial=0)
    expected = np.exp(passed[-1] - passed) / -theta[-1]
    assert_close(fact.constant(jnp.asarray(tau[::1000])) / expected[::1000], 1.0, 1e-5)  # at 1e6 R^4 / tau is left
    end = np.searchsorted(tau, 20.0)
    exponent = scipy.integrate.simpson(tau[:end] / np.asarray(fact.constant(jnp.asarray(tau[:end]))), x=log_tau[:end])
    assert_close(fact.exponent(jnp.asarray(tau[0]), jnp.asarray(tau[end - 1])), exponent, tolerances.QUADRATURE)
    with pytest.raises(AssertionError):
        assert_close(fact.exponent(jnp.asarray(tau[0]), 1.01 * jnp.asarray(tau[end - 1])), exponent, 1e-4)
    with pytest.raises(AssertionError):
        assert_close(fact.constant(1.01 * jnp.asarray(tau[::1000])) / expected[::1000], 1.0, 1e-5)


def test_constants_of_data_itself():
    """At tau = 0: 1 / convexity, the constants of Mikulincer & Shenfeld with R, inf for what is only bounded."""
    assert_close(Fact(convexity=4.0).constant(ZERO), 0.25, tolerances.ROUNDING)
    for kappa in (-2.0, 0.0, 0.5):
        fact = Fact(convexity=kappa, diameter=2.4)
        assert_close(fact.constant(ZERO), 1.44 * np.exp(1 - 1.44 * kappa), tolerances.ROUNDING)
        assert np.isfinite(fact.exponent(ZERO, ONE))
    assert Fact(diameter=1.0).constant(ZERO) == np.inf
    assert 0 < Fact(diameter=1.0).exponent(ZERO, ONE) < np.inf
    steep = Fact(convexity=-1e6, diameter=2.0)  # exp(1e6)
    assert steep.constant(ZERO) == np.inf and np.isfinite(steep.exponent(ZERO, ONE))
    tau = jnp.geomspace(0.01, 100, 50)
    assert np.all(Fact(diameter=2.0).constant(tau) <= 6 * (4 + tau) * np.exp(4 / tau))  # Chen, Chewi & Niles-Weed


def truncated(kappa: float, r: float, n: int) -> float:
    """C_P of exp(-kappa x² / 2) on [-r, r], a lower bound of C: finite volumes on n cells."""
    edges = np.linspace(-r, r, n + 1)
    step, mass = edges[1] - edges[0], np.exp(-kappa * ((edges[1:] + edges[:-1]) / 2) ** 2 / 2)
    flow = np.exp(-kappa * edges[1:-1] ** 2 / 2) / step**2
    diagonal = (np.append(flow, 0) + np.append(0, flow)) / mass
    values = scipy.linalg.eigh_tridiagonal(
        diagonal, -flow / np.sqrt(mass[1:] * mass[:-1]), eigvals_only=True, select="i", select_range=(0, 1)
    )
    return float(1 / values[1])


@pytest.mark.parametrize("kappa", [-6.0, -1.0, 0.0, 0.7, 3.0])
def test_bounds_are_above_truncated_gaussians(kappa):
    """Convexity kappa on [-1, 1], wells at the ends for kappa < 0; uniform: (2 / pi)² <= e. Claimed as narrower: no."""
    exact = truncated(kappa, 1.0, 2000)
    bound = Fact(convexity=kappa, diameter=2.0).constant(ZERO)
    assert exact <= bound
    assert exact > Fact(convexity=kappa, diameter=0.6).constant(ZERO)
    if kappa == 0:
        assert_close(exact, 4 / np.pi**2, 1e-5)


def test_facts_that_say_nothing_are_refused():
    for bad in (
        {},
        {"convexity": 0.0},
        {"convexity": -1.0},
        {"diameter": -1.0},
        {"diameter": np.nan},
        {"convexity": np.nan, "diameter": 1.0},
        {"diameter": 1.0, "blur": np.inf},
    ):
        with pytest.raises(ValueError, match="Fact"):
            Fact(**bad)


@pytest.mark.parametrize("schedule", [BETA, CosineVP(), VarianceExploding(BETA)], ids=["linear", "cosine", "exploding"])
def test_rate_of_a_gaussian_is_its_clock(schedule):
    """exp(-integral g² / V): log(alpha² / V) at both ends, on every schedule; and 1 % of V is seen."""
    given = pair()._replace(schedule=schedule)
    for s in (0.0, 0.4):
        expected = np.exp(-float(clock(given, jnp.asarray(s))))
        for fact in (Fact(convexity=25.0), Fact(diameter=0.0, blur=0.04)):
            assert_close(rate(fact, schedule, jnp.asarray(s), given.t0), expected, tolerances.IDENTITY)
        with pytest.raises(AssertionError):
            assert_close(rate(Fact(convexity=25.25), schedule, jnp.asarray(s), given.t0), expected, 1e-6)
        alpha, sigma = scales(schedule, s)
        bound = log_sobolev_bound(Fact(convexity=25.0), schedule, jnp.asarray(s))
        assert_close(bound, 0.04 * alpha**2 + sigma**2, tolerances.IDENTITY)


@pytest.mark.parametrize("d", [2, 10, 100])
def test_rate_is_attained_whatever_the_dimension(d):
    """A mean shift of isotropic data; along a narrower axis of rotated data the SDE is faster, by the clock of that."""
    shift = mean_shift(BETA, 0.8, np.full(d, 0.3), np.linspace(-1, 1, d))
    assert_close(shift.after, shift.promised, 1e-11)
    variances = np.geomspace(1.0, 0.04, d)
    narrow = mean_shift(BETA, 0.8, variances, np.eye(d)[-1])
    exact = rate(Fact(convexity=1 / variances[-1]), BETA, ZERO, jnp.asarray(0.8)) * narrow.before
    assert_close(narrow.after, exact, 1e-10)
    assert narrow.after < 0.9 * narrow.promised
    with pytest.raises(AssertionError):
        assert_close(shift.after, (shift.promised / shift.before) ** 1.01 * shift.before, 1e-3)


LAWS = {
    "one": mixture_1d([1.0], [0.4], [0.7]),
    "equal": mixture_1d([0.5, 0.5], [-1.0, 1.0], [0.6, 0.6]),
    "rare": mixture_1d([1e-6, 1 - 1e-6], [-1.0, 1.0], [0.6, 0.6]),
    "unequal": mixture_1d([0.3, 0.7], [-0.5, 0.5], [0.6, 0.7]),
    "three": mixture_1d([0.2, 0.5, 0.3], [-0.6, 0.0, 0.5], [0.5, 0.55, 0.5]),
}


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_components_bound_the_constants(law):
    """Above what is certified from below, on the line and for products of it in the plane, turned."""
    bounds, (low_p, _), (low_s, _) = mixture_constants(law), poincare(law), log_sobolev(law)
    assert low_p * (1 - 1e-9) <= bounds.poincare <= bounds.log_sobolev and low_s <= bounds.log_sobolev
    # C_P of a product is the larger of the two: 0.09 is the smaller one here.
    Q = rotated_covariance(0.7, (1.0, 0.0)), rotated_covariance(0.7, (0.0, 1.0))
    axis = np.linalg.eigh(Q[0])[1][:, 1]
    covariances = [v * Q[0] + 0.09 * Q[1] for v in np.ravel(law.variances)]
    turned = mixture(law.weights, np.asarray(law.means) * axis, covariances)
    in_plane = mixture_constants(turned)
    assert_close(in_plane.poincare, bounds.poincare, 1e-9)
    assert_close(in_plane.log_sobolev, bounds.log_sobolev, 1e-9)


def test_constants_by_the_formulas():
    """Two components by hand: chi2 of Gaussians by quadrature; and closed forms for one variance."""
    law = mixture_1d([0.3, 0.7], [-0.5, 0.5], [0.6, 0.7])
    weights, means, stds = (np.array(a) for a in ([0.3, 0.7], [-0.5, 0.5], [0.6, 0.7]))
    x = np.linspace(-12, 12, 40_001)
    logs = -((x[:, None] - means) ** 2) / (2 * stds**2) - np.log(stds * np.sqrt(2 * np.pi))
    chi2 = {
        kl: scipy.integrate.simpson(np.exp(2 * logs[:, kl[0]] - logs[:, kl[1]]), x=x) - 1 for kl in ((0, 1), (1, 0))
    }
    costs = {(k, to): weights[k] * c * stds[to] ** 2 for (k, to), c in chi2.items()}
    (_, to), cost = min(costs.items(), key=lambda item: item[1])
    between = np.eye(2)[to] * cost
    c = np.log(0.7 / 0.3) / 0.4
    found = mixture_constants(law)
    assert_close(found.poincare, max(stds**2 + between), tolerances.QUADRATURE)
    log_sobolev_expected = max(stds**2 + c / 2 * (stds**2 * (1 - weights) + between))
    assert_close(found.log_sobolev, log_sobolev_expected, tolerances.QUADRATURE)
    with pytest.raises(AssertionError):
        assert_close(mixture_constants(law._replace(means=1.001 * law.means)).poincare, max(stds**2 + between), 1e-4)
    # One variance: v exp(D² / 4 v), the same from the means as a bounded law.
    three = mixture_1d([0.2, 0.5, 0.3], [-1.6, 0.0, 1.4], [0.5, 0.5, 0.5])
    assert_close(mixture_constants(three).log_sobolev, 0.25 * np.exp(9 / 4 / 0.25), tolerances.ROUNDING)
    fact = Fact(diameter=3.0, blur=0.25)
    for t in (0.0, 0.3, 1.0):
        at = jnp.asarray(t)
        marginal = three.marginal(BETA, at)
        assert_close(mixture_constants(marginal).log_sobolev, log_sobolev_bound(fact, BETA, at), tolerances.IDENTITY)
    # Turned axes of variances 1 and 4: no bound; noised, there is one.
    crossed = mixture([0.5, 0.5], [[0.0, 0.0], [0.0, 0.0]], [np.diag([1.0, 4.0]), np.diag([4.0, 1.0])])
    assert np.all(np.array(mixture_constants(crossed)) == np.inf)
    assert np.all(np.array(mixture_constants(crossed.marginal(BETA, ONE))) < 1.6)


def test_two_points():
    """Ent g² <= c Var g on weighted points, c = log(1/w - 1) / (1 - 2w), by search; it is attained with two."""
    rng = np.random.default_rng(0)
    for weights in ([0.5, 0.5], [0.1, 0.9], [0.2, 0.3, 0.5]):
        weights, w = np.array(weights), min(weights)
        c = 2.0 if w == 0.5 else np.log(1 / w - 1) / (1 - 2 * w)
        g = np.exp(rng.normal(size=(20_000, len(weights))) * rng.choice([0.01, 1.0, 3.0], size=(20_000, 1)))
        mean2 = g**2 @ weights
        entropy = g**2 * np.log(g**2) @ weights - mean2 * np.log(mean2)
        variance = mean2 - (g @ weights) ** 2
        worst = np.max(entropy / np.maximum(variance, 1e-300), where=variance > 1e-6 * mean2, initial=0.0)
        assert worst <= c * (1 + 1e-8)
        assert worst > 0.9 * c


def test_rate_lies_above_the_exact_curve():
    """The toy, at every time: the bound is true; that of modes at half the distance, or of none, is not."""
    given, fact = paper(), Fact(diameter=4.0, blur=0.04)
    ts = jnp.array([1.0, 0.9, 0.7, 0.5, 0.3, 0.1, 0.0])
    kl = np.asarray(contraction_curve(given.target, given.start, given.schedule, ts).kl.value)
    rates = lambda fact: np.array([float(rate(fact, BETA, s, ONE)) for s in ts])  # noqa: E731
    assert np.all(kl <= rates(fact) * kl[0] * (1 + 1e-12))
    assert rates(fact)[-1] < 0.045  # .0201 of .4481; the certified constant on the line makes it .407
    assert not np.all(kl <= rates(Fact(diameter=0.0, blur=0.04)) * kl[0])


TS = jnp.array([1.0, 0.5, 0.1, 0.0])


def far() -> Problem:
    """Modes of width 0.02 at ±8."""
    return problem(mixture_1d([0.5, 0.5], [-8.0, 8.0], [0.02, 0.02]), gaussian([1.0], [[0.36]]), BETA)


def test_constants_of_modes_far_apart():
    """A barrier that no float holds: no constant is nan or below the variance, and down to t = .5 they are finite."""
    (spectral, entropic), variances = certified_constants(far(), TS)
    bounds, _ = component_constants(far(), TS)
    for upper in (spectral.upper, entropic.upper, bounds.poincare, bounds.log_sobolev):
        assert not np.isnan(upper).any() and np.all(np.isfinite(1 / np.asarray(upper)))
        assert np.all(variances <= upper * (1 + 1e-12)) and np.all(np.isfinite(upper[:2]))
    assert not np.isfinite(entropic.upper[-1])
    assert np.any(variances > 0.99 * spectral.upper)  # a hundredth less is too little


@pytest.mark.exhaustive
@pytest.mark.parametrize("given", [far, asymmetric])
def test_rows_of_other_people_s_pairs(given):
    """Modes whose barrier no float holds, and three of different widths: everything holds, nothing is nan."""
    rows = list(linear_rate(Study(given())))
    assert [row.verdict for row in rows] == ["holds"] * len(rows)
    assert all(np.isfinite([row.lhs, row.rhs, row.residual]).all() for row in rows)


def test_rows_are_equalities_for_a_shifted_gaussian():
    """What is attained is seen: 1 % off any of the constants, the rows fail."""
    given = pair()
    marginal = jax.jit(lambda p: p.marginal(p.t0))(given)
    given = given._replace(start=marginal._replace(means=marginal.means + 0.01))
    rows = {row.equation: row for row in linear_rate(Study(given)) if row.about == "pair"}
    attained = [row for row in rows.values() if abs(row.residual) < 1e-3]
    assert len(attained) >= 6 and all(row.verdict == "holds" for row in rows.values())
    for row in attained:
        shrunk = row._replace(residual=(row.lhs - 0.99 * row.rhs) / (0.99 * row.rhs))
        assert shrunk.verdict == "fails"
    kl = float(gaussian_kl(given.start, marginal))
    assert_close(kl, 0.01**2 / 2 / float(marginal.variances[0, 0]), 1e-9)
