"""The exact curves against numbers from outside: the reference on random pairs, closed forms, quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from tests import tolerances
from tests.problems import BETA, ZERO, assert_golden, paper
from tests.theory.reference import linear_vp, random_pair, reference
from theory.checks import Study
from theory.contraction import contraction_curve, divergences_at
from theory.mixtures import GaussianMixture, gaussian, mixture, mixture_1d
from theory.problems import Curve, problem
from theory.theorems import sde_contraction

# --- the reference ---------------------------------------------------------------------------------------------------

KNOWN = 1e-9  # relative: what the curves are asked for
TINY = 1e-10  # mode weights below this are known to digits of the whole, not of their own


def by_name(curve: Curve, i: int) -> dict[str, tuple[float, float]]:
    """Value and error of everything at one time, under the names of the reference."""
    estimates = {name: getattr(curve, name) for name in ("kl", "fisher", "chi2", "dirichlet", "tv", "w2", "mass")}
    estimates |= {name: curve.f[name] for name in ("reverse_kl", "jensen_shannon")} | {
        "hellinger2": curve.f["hellinger"]
    }
    found = {name: (float(value[i]), float(error[i])) for name, (value, error) in estimates.items()}
    return found | {
        f"mode {k}": (v, e) for k, (v, e) in enumerate(zip(*(part[i] for part in curve.mode_weights), strict=True))
    }


def true_values(target, start, t0, s):
    """The same by the reference."""
    found = reference(target, start, linear_vp(t0), linear_vp(s) if s < t0 else None)
    modes = {f"mode {k}": weight for k, weight in enumerate(found.pop("mode_weights"))}
    return {name: each for name, each in found.items() if not name.startswith("renyi")} | modes


def in_three(start) -> GaussianMixture:
    """The same law as three components, so that all starts compile to one shape."""
    weights, means, stds = start
    copies = [4 - len(weights), *[1] * (len(weights) - 1)]
    return mixture_1d(*(np.repeat(part, copies) for part in (np.divide(weights, copies), means, stds)))


def distances(target, start, t0, times):
    """Of every value at every time: name, whether the errors cover the truth, its relative distance, relative error.

    And the same of the divergences of a start wider by 1e-6, which the curve is not of.
    """
    wider = start[0], start[1], (1 + 1e-6) * np.asarray(start[2])
    curve = jax.device_get(contraction_curve(mixture_1d(*target), in_three(start), BETA, jnp.array(times)))
    rows, other = [], []
    for i, s in enumerate(times):
        found = by_name(curve, i)
        for rows_of, law in ((rows, start), (other, wider)):
            for name, (true, its_error) in true_values(target, law, t0, s).items():
                (value, error), scale = found[name], max(true, TINY) if name.startswith("mode") else true
                same = value == true  # infinite, both
                distance, error = (0.0, 0.0) if same else (abs(value - true), error)
                rows_of.append((name, same or distance <= error + its_error, distance / scale, error / scale))
    return rows, [row for row in other if row[0] in ("kl", "fisher", "tv")]


def drawn(seeds):
    """Random pairs, those of one shape together."""
    pairs = {seed: random_pair(np.random.default_rng(seed))[:3] for seed in seeds}
    return dict(sorted(pairs.items(), key=lambda pair: len(pair[1][0][0])))


TOY, FAR = ([0.5, 0.5], [-2.0, 2.0], [0.2, 0.2]), ([0.5, 0.5], [-8.0, 8.0], [0.02, 0.02])
# Two components, starts narrower and wider than the marginal, weights of 1e-9, modes as narrow as 0.007 and far apart,
# a chi2 of 1e291, starts in the gap and of narrow components among wide ones.
FEW = [12, 22, 25, 33, 48, 60, 103, 30]
OWN = {"far": (FAR, ([1.0], [1.0], [0.6]), 1.0), "narrow": (TOY, ([1.0], [0.5], [0.02]), 1.0)}


@pytest.mark.hasty
@pytest.mark.parametrize(
    "pairs",
    [
        pytest.param(drawn(FEW) | OWN, id="few"),
        pytest.param(drawn(range(200)), id="many", marks=pytest.mark.exhaustive),
    ],
)
def test_errors_cover(pairs):
    """At t0, in the middle and at 0, every value: the error covers the truth in all pairs, 1e-9 in nearly all.

    In a gap of the data deeper than exp(-50) log h has few digits: reverse KL, which averages it over p, has as few,
    and says so. Negative control: a start wider by 1e-6 is told apart.
    """
    rows, other = [], []
    for name, (target, start, t0) in pairs.items():
        for each, found in zip((rows, other), distances(target, start, t0, [t0, t0 / 2, 0.0]), strict=True):
            each += [(name, *row) for row in found]
    assert not [row for row in rows if not row[2]]
    for k in (3, 4):  # distances, errors
        assert np.mean([row[k] <= KNOWN for row in rows]) >= 0.95
    assert np.mean([row[2] for row in other]) <= 0.05


# --- pairs of their own -----------------------------------------------------------------------------------------------


def curve_of(target, start, times=(1.0, 0.0)) -> Curve:
    return jax.device_get(contraction_curve(target, start, BETA, jnp.array(times)))


def assert_known(estimate, i, value, rtol=KNOWN):
    """Within the error, which is small."""
    found, error = (float(part[i]) for part in estimate)
    assert abs(found - value) <= error + tolerances.ROUNDING * abs(value) and error <= rtol * abs(value)


@pytest.mark.hasty
def test_modes_far_apart():
    """Modes 800 deviations apart, by published digits; a start 1 % off is told apart."""
    published = {"kl": "0.1410685483684", "w2": "8.126033318307"}
    curve, other = (curve_of(mixture_1d(*FAR), in_three(([1.0], [mean], [0.6]))) for mean in (1.0, 1.01))
    for name, number in published.items():
        assert_golden(getattr(curve, name).value[-1], number)
        with pytest.raises(AssertionError):
            assert_golden(getattr(other, name).value[-1], number)
    np.testing.assert_allclose(curve.mass.value, 1.0, rtol=tolerances.ROUNDING)
    for weight, number in zip(curve.mode_weights.value[-1], ("0.24087", "0.75913"), strict=True):
        assert_golden(weight, number)


@pytest.mark.hasty
def test_chi2_of_a_mixture_in_the_plane():
    """Two crossed ellipses from a round start, at t0, by the trapezoidal rule on a square."""
    covariances = [np.diag([2.0, 0.5]), np.diag([0.5, 2.0])]
    target = mixture([0.5, 0.5], np.zeros((2, 2)), covariances)
    alpha, sigma = linear_vp(0.01)
    axis, step = np.linspace(-12, 12, 961, retstep=True)
    x = np.stack(np.meshgrid(axis, axis), axis=-1)
    right = sum(
        scipy.stats.multivariate_normal(cov=alpha**2 * each + sigma**2 * np.eye(2)).pdf(x) / 2 for each in covariances
    )

    def expected(variance):
        return step**2 * np.sum((scipy.stats.multivariate_normal(cov=variance * np.eye(2)).pdf(x) - right) ** 2 / right)

    curve = curve_of(target, gaussian(np.zeros(2), 1.1 * np.eye(2)), (0.01,))
    assert_known(curve.chi2, 0, expected(1.1), 1e-7)  # the error is that of every other node
    assert abs(expected(1.101) / curve.chi2.value[0] - 1) > 1e-3


@pytest.mark.hasty
def test_a_start_with_heavy_tails():
    """N(0, 1.5²) for data N(0, 1): chi2 is infinite at t0 and finite after, KL finite; Theorem 3.1 holds."""
    given = problem(gaussian([0.0], [[1.0]]), gaussian([0.0], [[2.25]]), BETA)
    curve = curve_of(given.target, given.start)
    (alpha, _), excess = linear_vp(1.0), 1.25
    assert curve.chi2.value[0] == curve.dirichlet.value[0] == np.inf
    for i, wide in enumerate((excess, excess * alpha**2)):
        assert_known(curve.kl, i, (wide - np.log1p(wide)) / 2)
    assert_known(curve.chi2, 1, np.expm1(-np.log1p(-((excess * alpha**2) ** 2)) / 2))
    assert {row.verdict for row in sde_contraction(Study(given))} == {"holds"}


def in_numpy(target, start, s):
    """KL, reverse KL, Fisher and W2 of two Gaussians in any dimension, (mean, covariance): an affine map, and noise."""
    (m, C), (a, A), (alpha0, sigma0), (alpha, sigma) = target, start, linear_vp(1.0), linear_vp(s)
    unit, c = np.eye(len(m)), alpha0 / alpha
    V, U = alpha0**2 * C + sigma0**2 * unit, alpha**2 * C + sigma**2 * unit
    gain = c * U @ np.linalg.inv(V)
    mean, A = alpha * m + gain @ (a - alpha0 * m), gain @ A @ gain.T + U - c * gain @ U
    shift = mean - alpha * m

    def kl(A, U):
        ratio = np.linalg.solve(U, A)
        return (np.trace(ratio) - len(m) + shift @ np.linalg.solve(U, shift) - np.linalg.slogdet(ratio)[1]) / 2

    difference, pull = np.linalg.inv(U) - np.linalg.inv(A), np.linalg.solve(U, shift)
    root = scipy.linalg.sqrtm(U).real
    cross = np.trace(scipy.linalg.sqrtm(root @ A @ root).real)
    return {
        "kl": kl(A, U),
        "reverse_kl": kl(U, A),
        "fisher": np.trace(difference @ A @ difference) + pull @ pull,
        "w2": np.sqrt(shift @ shift + np.trace(A) + np.trace(U) - 2 * cross),
    }


@pytest.mark.hasty
@pytest.mark.parametrize("d", [3, 10, 100])
def test_gaussians_in_many_dimensions(d):
    """By NumPy, at t0 and at 0; a start 1e-4 wider is told apart."""
    rng = np.random.default_rng(d)

    def law():
        root = rng.normal(size=(d, d)) / np.sqrt(d)
        return rng.normal(size=d), 0.2 * root @ root.T + 0.1 * np.eye(d)

    target, start = law(), law()
    curve = curve_of(gaussian(*target), gaussian(*start))
    for i, s in enumerate((1.0, 0.0)):
        expected, other = (in_numpy(target, (start[0], scale * start[1]), s) for scale in (1.0, 1.0001))
        found = {name: getattr(curve, name) for name in ("kl", "fisher", "w2")} | {"reverse_kl": curve.f["reverse_kl"]}
        for name, estimate in found.items():
            np.testing.assert_allclose(estimate.value[i], expected[name], rtol=tolerances.IDENTITY, err_msg=name)
        assert abs(curve.kl.value[i] / other["kl"] - 1) > tolerances.IDENTITY


@pytest.mark.hasty
def test_gradient_of_the_toy():
    """dKL(0) / d(mean of the start), in reverse and jitted: known to nine digits, and by central differences."""
    given = paper()

    @jax.jit
    def kl(mean):
        start = given.start._replace(means=mean[None, None])
        return divergences_at(given._replace(start=start), ZERO, copies=1).kl.value

    gradient, h = jax.grad(kl)(jnp.array(0.5)), 1e-3
    assert_golden(gradient, "0.0128542778")
    ends, inner = ((kl(jnp.array(0.5 + k * h)) - kl(jnp.array(0.5 - k * h))) / (2 * k * h) for k in (2, 1))
    np.testing.assert_allclose(gradient, (4 * inner - ends) / 3, rtol=tolerances.IDENTITY)
    assert abs(inner / gradient - 1) > tolerances.IDENTITY  # a formula of second order is told apart
