"""Numbers known from outside: closed forms worked out by hand, and quadratures made independently of this code.

Each is met to one unit of the last digit it is given with, at most nine digits.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.stats

from tests.problems import ZERO, assert_golden, pair, paper
from theory.beyond import two_chain_moments
from theory.chains import line_chain
from theory.contraction import contraction_curve
from theory.divergences import gaussian_kl
from theory.gaussians import Offset, clock, cycle_edited, inexact_score, path_covariance, recorded_noise
from theory.heat import heat_curve
from theory.inequalities import chi2_factor, log_sobolev, poincare
from theory.mixtures import gaussian, mixture_1d
from theory.processes import forward_path
from theory.solve import time_grid
from theory.solvers import DDIM
from theory.theorems import to_start

TOY_TIMES = (1.0, 0.9, 0.7, 0.5, 0.3, 0.1, 0.0)


@pytest.fixture(scope="module")
def toy():
    given = paper()
    return contraction_curve(given.target, given.start, given.schedule, jnp.array(TOY_TIMES))


def test_the_kl_of_the_toy_along_the_sde(toy):
    """1/2 N(-2, .2²) + 1/2 N(2, .2²) from N(.5, .5²), beta = 0.1 + 9.9 t."""
    published = (".448052683986", ".0773149860", ".0130700301", ".0054100855", ".0037252159", ".0032756802")
    for value, digits in zip(toy.kl.value, (*published, ".00322556396747"), strict=True):
        assert_golden(value, digits)
    with pytest.raises(AssertionError):
        assert_golden(toy.kl.value[1] * (1 + 1e-7), published[1])


def test_the_other_divergences_of_the_toy(toy):
    """Fisher, chi2, total variation and the weight of the upper mode at the end, and alpha at the start."""
    assert_golden(toy.fisher.value[-1], ".00163424336904")
    assert_golden(toy.chi2.value[-1], ".00644227781292")
    assert_golden(toy.tv.value[-1], ".0399342511712")
    assert_golden(toy.mode_weights[-1, 1], ".539934251171")
    assert_golden(paper().schedule.alpha(jnp.ones(())), ".0800583128")


@pytest.mark.parametrize(("index", "rate"), [(2, ".0814016646"), (4, ".0040711191"), (5, ".0009460956")])
def test_the_rate_of_the_toy(toy, index, rate):
    """dKL/dt = 1/2 g² I."""
    beta = paper().schedule.beta(toy.ts[index])
    assert_golden(beta * toy.fisher.value[index] / 2, rate)


def test_the_ode_of_the_toy():
    """The KL divergence stays, and the weight of the upper mode is Phi(1), for any schedule."""
    given = paper()
    curve = contraction_curve(given.target, given.start, given.schedule, jnp.array([1.0, 0.5, 0.0]), lam=0.0)
    assert_golden(curve.kl.value[-1], ".448052683986")
    assert_golden(curve.mode_weights[-1, 1], ".841344746069")


@pytest.mark.parametrize(
    ("lam", "kl", "weight"), [(0.25, ".2333", ".7673"), (0.5, ".0641", ".6602"), (0.75, ".01562", ".5858")]
)
def test_other_noise_levels_of_the_toy(lam, kl, weight):
    """By the heat equation."""
    curve = heat_curve(paper(), jnp.array([1.0, 0.0]), lam, cells=200, steps=100)
    assert_golden(curve.kl.value[-1], kl)
    assert_golden(curve.mode_weights[-1, 1], weight)
    assert curve.kl.error[-1] < 0.01 * curve.kl.value[-1]


def test_gaussian_pairs():
    """N(1.3, .2²) from N(.5, .5²): the clock, and the contraction by exp(-lam² A)."""
    given = pair()
    assert_golden(clock(given, ZERO), "8.262703857")
    assert_golden(inexact_score(given, given.t0, 1.0).kl(), ".3946983042")
    assert_golden(inexact_score(given, ZERO, 0.5).kl(), ".0123970154")
    assert_golden(inexact_score(given, ZERO, 1.0).kl(), ".0000203529221")
    assert_golden(inexact_score(given, jnp.array(0.3), 1.0).kl(), ".0003324396")
    assert_golden(inexact_score(given, jnp.array(0.7), 1.0).kl(), ".0064334611")


@pytest.mark.parametrize(
    ("error", "published"),
    [
        (0.1, (".692761676", ".0445071202", ".00783421736", ".0033359623", ".00236852465")),
        (-0.1, (".244477076", ".0566979352", ".0134002592", ".00466287512", ".00312828128")),
    ],
)
def test_inexact_scores(error, published):
    """(1 + error) score at lam = 0, 1/2, 1, 2, 5."""
    for lam, digits in zip((0.0, 0.5, 1.0, 2.0, 5.0), published, strict=True):
        assert_golden(inexact_score(pair(), ZERO, lam, error).kl(), digits)


@pytest.mark.parametrize(
    ("eta", "steps", "between", "to_data"),
    [
        (1.0, 10, "6.53425e-5", ".238835"),
        (1.0, 100, "2.51112e-5", ".0103335"),
        (1.0, 1000, "2.09530e-5", ".00023205"),
        (0.0, 10, ".3946983042", ".785192"),
        (0.0, 100, ".3946983042", ".427626"),
    ],
)
def test_discretised_chains(eta, steps, between, to_data):
    """DDIM(eta) from the start and from the marginal: how far apart they end, and how far from the data."""
    edited, right = two_chain_moments(pair(), eta, steps)
    assert_golden(gaussian_kl(edited, right), between)
    assert_golden(gaussian_kl(edited, pair().target), to_data)


@pytest.mark.parametrize("steps", [5, 20, 100])
def test_cycle_sde_has_no_discretisation_bias_on_gaussian_data(steps):
    """KL to the data in the limit of the last time: the continuum's at any number of steps."""
    given = pair()
    ts = time_grid(given.schedule, steps, end=1e-12)
    law = cycle_edited(DDIM(given.schedule, 1.0), given, ts, to_start(given))
    offset = Offset((law.mean[0] - 1.3) / 0.2, law.covariance[0, 0] / 0.04)
    assert_golden(offset.kl(), "2.0352922102606e-5")


def test_recorded_noise_against_sampled_paths():
    """The covariance of the forward path, from which the law of the noise follows, within 4 standard errors."""
    given = pair()
    ts, draws = time_grid(given.schedule, 5, end=0.05), 40_000
    x = given.target.marginal(given.schedule, ts[-1]).sample(jax.random.key(0), (draws,))
    paths = forward_path(given.schedule, x, ts, jax.random.key(1))[..., 0]
    exact = path_covariance(given, ts)
    error = np.sqrt((np.outer(np.diag(exact), np.diag(exact)) + exact**2) / draws)
    assert np.all(np.abs(np.cov(paths) - exact) < 4 * error)
    assert not np.all(np.abs(np.cov(paths) - path_covariance(given, ts, independent=True)) < 4 * error)


def test_edit_friendly_noise_is_not_white():
    """Neighbours correlate by -1/2, where those of Cycle-SDE do not correlate."""
    given = pair()
    ts = time_grid(given.schedule, 100, end=1e-3)
    for independent, expected in ((False, 0.0), (True, -0.5)):
        covariance = recorded_noise(DDIM(given.schedule, 1.0), given, ts, independent=independent).covariance
        scale = jnp.sqrt(jnp.diag(covariance))
        assert abs(covariance[50, 51] / scale[50] / scale[51] - expected) < 1e-3


@pytest.mark.parametrize(
    ("t", "published"),
    [(1.0, "1.02"), (0.7, "1.25"), (0.5, "1.99"), (0.3, "8.43"), (0.2, "154"), (0.1, "1.2e7"), (0.0, "4.1e19")],
)
def test_poincare_constants_of_the_toy(t, published):
    """Both bounds."""
    bounds = poincare(paper().marginal(jnp.array(t)))
    assert_golden(bounds.lower, published)
    assert_golden(bounds.upper, published)


def test_poincare_against_a_finite_difference_eigenvalue():
    """-(p f')' = p f / C_P on a fine grid, for an asymmetric law."""
    law = mixture_1d([0.3, 0.7], [-1.2, 0.8], [0.5, 0.6])
    x, step = np.linspace(-5, 5, 4001, retstep=True)
    p, between = (np.exp(np.asarray(law.log_prob(jnp.asarray(a)[:, None]))) for a in (x, (x[1:] + x[:-1]) / 2))
    flows = np.concatenate([[0], between, [0]]) / step**2
    diagonal, off = (flows[1:] + flows[:-1]) / p, -between / step**2 / np.sqrt(p[1:] * p[:-1])
    gap = scipy.linalg.eigh_tridiagonal(diagonal, off, select="i", select_range=(1, 1), eigvals_only=True)[0]
    bounds = poincare(law)
    assert bounds.lower <= bounds.upper * (1 + 1e-12)
    assert abs(bounds.upper * gap - 1) < 1e-4  # second order in the step of 1/400
    assert abs(poincare(gaussian([0.0], [[1.0]])).upper * gap - 1) > 0.1


def test_log_sobolev_brackets():
    """The constant of N(m, v) is v; the bracket of the standard normal; never below Poincaré's."""
    unit = log_sobolev(gaussian([0.3], [[1.0]]))
    assert_golden(unit.lower, ".426")
    assert_golden(unit.upper, "3.77")
    wide = log_sobolev(gaussian([0.3], [[4.0]]))
    assert wide.lower <= 4.0 <= wide.upper and not unit.upper >= 4.0
    assert log_sobolev(paper().target).upper >= poincare(paper().target).lower


def test_the_sharp_chi2_factor():
    """Of the toy; and of Gaussians, where it is the squared correlation of x_0 and x_t0."""
    assert_golden(chi2_factor(paper(), ZERO), ".0254089")
    given = pair()
    correlation2 = given.schedule.alpha(given.t0) ** 2 * 0.04 / given.marginal(given.t0).variances[0, 0]
    assert abs(chi2_factor(given, ZERO) / correlation2 - 1) < 1e-9


def test_chains_on_the_line_against_moments():
    """Chapman-Kolmogorov for a Gaussian target has the mean and variance of the affine recursion, and mass 1."""
    given = pair()
    ts = time_grid(given.schedule, 8, end=0.2)
    laws = line_chain(DDIM(given.schedule, 1.0), given, ts)
    x, weights = laws.rule.nodes[-1, :, 0], laws.rule.weights[-1]
    mass, mean = weights @ laws.edited[-1], weights @ (laws.edited[-1] * x)
    assert abs(mass - 1) < 1e-12 and np.all(np.diff(laws.kl()) < 0)

    moments = np.array([0.5, 0.25])  # by the two-moment recursion of DDPM's posterior, in plain numbers
    alpha, sigma = (np.asarray(f(ts)) for f in (given.schedule.alpha, given.schedule.sigma))
    for a_t, s_t, a_s, s_s in zip(alpha[:-1], sigma[:-1], alpha[1:], sigma[1:], strict=True):
        c = a_t / a_s
        tau2, v_s = s_t**2 - c**2 * s_s**2, a_s**2 * 0.04 + s_s**2
        gain = c * v_s / (c**2 * v_s + tau2)
        noise = s_s**2 / s_t**2 * tau2
        moments = np.array([a_s * 1.3 + gain * (moments[0] - a_t * 1.3), gain**2 * moments[1] + noise])
    assert abs(mean - moments[0]) < 1e-10
    assert abs(weights @ (laws.edited[-1] * (x - mean) ** 2) - moments[1]) < 1e-10


def test_heat_against_the_kernel_average():
    """Two independent methods at lam = 1, on three unequal modes; the error reported covers the difference."""
    target = mixture_1d([0.5, 0.2, 0.3], [-1.5, 0.2, 1.4], [0.3, 0.15, 0.4])
    start, ts = mixture_1d([0.4, 0.6], [-0.3, 0.9], [0.5, 0.3]), jnp.array([0.6, 0.3, 0.0])
    given = paper()._replace(target=target, start=start, t0=ts[0])
    exact = contraction_curve(target, start, given.schedule, ts)
    for lam, agrees in ((1.0, True), (0.9, False)):
        heat = heat_curve(given, ts, lam, cells=120, steps=40)
        assert bool(np.all(np.abs(heat.kl.value - exact.kl.value) <= heat.kl.error + 1e-3 * exact.kl.value)) == agrees
    assert np.all(np.abs(heat_curve(given, ts, 0.0, cells=120, steps=40).kl.value - exact.kl.value[0]) < 1e-2)
