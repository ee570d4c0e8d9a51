"""Exact laws of edited processes: density ratios by brute force, Theorem 3.1 on random pairs, Theorem 3.2, messages."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from scipy.optimize import OptimizeResult

from tests import tolerances
from tests.cases import assert_close, rotated_covariance
from tests.problems import BETA, ZERO, asymmetric, both, gaussians_in_plane, in_plane, pair, paper
from theory import flows
from theory.contraction import contraction_curve
from theory.divergences import (
    KL,
    by_quadrature,
    gaussian_chi2,
    gaussian_dirichlet,
    gaussian_fisher,
    gaussian_kl,
    gaussian_w2,
)
from theory.flows import Flow, flow, flow_map, kl_ode
from theory.line import quantile, tails
from theory.mixtures import GaussianMixture, gaussian, mixture, mixture_1d
from theory.problems import Curve, Problem, problem
from theory.quadrature import covering_rule, interval, legendre_panels, panel_edges
from theory.ratios import law_gaussian, ratio_ode, ratio_of_laws, ratio_sde
from theory.schedules import CosineVP

SHARP = mixture_1d([0.5, 0.5], [-2.0, 2.0], [0.2, 0.2])  # modes apart: at small t0, 1 / p has poles near the line


def split(law: GaussianMixture, k: int) -> GaussianMixture:
    """The same law on the line as k components: copies of the first, so that all compile to one shape."""
    copies = [k - len(law.weights) + 1, *[1] * (len(law.weights) - 1)]
    weights, means, stds = (np.repeat(part, copies) for part in parts(law))
    return mixture_1d(weights / np.repeat(copies, copies), means, stds)


def parts(law: GaussianMixture):
    return np.array(law.weights), np.array(law.means[:, 0]), np.array(law.variances[:, 0]) ** 0.5


STARTS = {
    "narrow": (asymmetric().target, gaussian([0.4], [[0.02**2]])),
    "wide": (asymmetric().target, gaussian([0.2], [[0.9]])),
    "mixture": (asymmetric().target, asymmetric().start),
    "in the gap": (SHARP, gaussian([0.1], [[0.15]])),
}


def times_of(name):
    """t0 of a start: the wide one is refused at small t0, where the marginal is narrow."""
    return (0.6, 1.0) if name == "wide" else (0.12, 0.3, 1.0)


def density(law: GaussianMixture | tuple, x):
    """The density of a mixture or of its parts; scipy's is the same and slow in an integrand."""
    w, m, s = parts(law) if isinstance(law, GaussianMixture) else law
    return np.exp(-(((np.asarray(x)[..., None] - m) / s) ** 2) / 2) @ (w / s) / np.sqrt(2 * np.pi)


def transition(given: Problem, s: float):
    """c and tau² of x_t0 | x_s: from the signal and noise scales at both times."""
    alpha, sigma = zip(*((float(BETA.alpha(t)), float(BETA.sigma(t))) for t in (given.t0, jnp.array(s))), strict=True)
    c = alpha[0] / alpha[1]
    return c, sigma[0] ** 2 - c**2 * sigma[1] ** 2


def brute_force(given: Problem, s: float, x: float) -> float:
    """E[h_t0(x_t0) | x_s = x] by scipy's adaptive quadrature of p~(y) / p(y) N(y; c x, tau²)."""
    (c, tau2), start, marginal = transition(given, s), parts(given.start), parts(given.marginal(given.t0))
    _, means, stds = start

    def integrand(y):
        return density(start, y) / density(marginal, y) * np.exp(-((y - c * x) ** 2) / (2 * tau2))

    # The Gaussian product of each start component and the kernel, in whose reach all the mass is.
    var = 1 / (1 / stds**2 + 1 / tau2)
    centres = var * (means / stds**2 + c * x / tau2)
    breaks = np.sort(np.concatenate([centres + k * var**0.5 for k in (-20, -10, -6, -3, 0, 3, 6, 10, 20)]))
    pieces = pairwise(breaks)
    total = sum(scipy.integrate.quad(integrand, a, b, epsabs=1e-30, epsrel=1e-11)[0] for a, b in pieces if b > a)
    return total / np.sqrt(2 * np.pi * tau2)


@jax.jit
def h_of_the_code(given: Problem, s, x):
    return jnp.exp(jax.vmap(ratio_sde(given, s))(x[:, None]).log_h)


@pytest.mark.hasty
@pytest.mark.parametrize("name", STARTS)
def test_ratio_of_the_sde(name):
    """The defining integral by scipy, for starts narrower and wider than the marginal; another time is told apart."""
    target, start = STARTS[name]
    x = jnp.array([-1.6, -0.2, 0.5, 1.9])
    for t0 in times_of(name):
        given = problem(split(target, 3), split(start, 2), BETA, t0)
        for fraction in (0.0, 0.5, 0.97):
            expected = np.array([brute_force(given, fraction * t0, float(y)) for y in x])
            actual = h_of_the_code(given, jnp.array(fraction * t0), x)
            np.testing.assert_allclose(actual, expected, rtol=tolerances.IDENTITY, atol=1e-30)
        with pytest.raises(AssertionError):
            later = h_of_the_code(given, jnp.array(0.971 * t0), x)
            np.testing.assert_allclose(later, expected, rtol=tolerances.IDENTITY, atol=1e-30)


@pytest.mark.hasty
def test_poles_need_finer_kernels(monkeypatch):
    """Negative control of the start in the gap: with one copy of the kernel's grid the ratio is off."""
    given = problem(*STARTS["in the gap"], BETA, 0.12)
    x = jnp.array([-1.6, -0.2, 0.5, 1.9])
    expected = [brute_force(given, 0.0, float(y)) for y in x]
    monkeypatch.setattr("theory.ratios._copies", lambda *_: jnp.array(1))
    actual = jax.jit(lambda given: jax.vmap(ratio_sde(given, ZERO))(x[:, None]).log_h)(given)
    assert np.abs(np.exp(actual) / expected - 1).max() > 1e-6


@pytest.mark.hasty
@pytest.mark.parametrize("given", [asymmetric(0.3), in_plane()], ids=["line", "plane"])
def test_gradients(given):
    """Of the SDE's log h, and of the ratio of two laws, against autodiff-free central differences."""
    step, d = 1e-5, given.target.dim
    points = np.array([[-0.4, 0.3], [0.8, -0.1], [1.5, 0.9]])[:, :d]
    shifts = step * np.concatenate([np.zeros((1, d)), np.eye(d), -np.eye(d)])

    @jax.jit
    def ratios(given, x):
        s = 0.4 * given.t0
        found = {"sde": ratio_sde(given, s), "laws": ratio_of_laws(given.start, given.marginal(given.t0))}
        found |= {"ode": ratio_ode(given, s)} if d == 1 else {}
        return {name: jax.vmap(jax.vmap(ratio))(x) for name, ratio in found.items()}

    def assert_gradients(found, scale=1.0):
        for log_h, grad in zip(*map(np.asarray, found[:2]), strict=True):
            assert_close(scale * grad[0], (log_h[1 : d + 1] - log_h[d + 1 :]) / (2 * step), tolerances.QUADRATURE)

    found = ratios(given, jnp.asarray(points[:, None] + shifts))
    for ratio in found.values():
        assert_gradients(ratio)
    with pytest.raises(AssertionError):
        assert_gradients(found["sde"], 1.001)


@pytest.mark.hasty
def test_ratio_in_the_plane():
    """Against a dense grid of scipy's densities; a start turned by a right angle is told apart."""
    given, s = in_plane(), 0.25
    c, tau2 = transition(given, s)
    axis, step = np.linspace(-7, 7, 561, retstep=True)
    y = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)

    def in_scipy(law):
        laws = zip(np.array(law.weights), np.array(law.means), np.array(law.covariances), strict=True)
        return sum(w * scipy.stats.multivariate_normal(m, C).pdf(y) for w, m, C in laws)

    h = in_scipy(given.start) / in_scipy(given.marginal(given.t0))
    points = jnp.array([[-1.2, 0.4], [0.3, 0.1], [1.0, -0.9]])
    expected = [step**2 * h @ scipy.stats.multivariate_normal(c * x, tau2 * np.eye(2)).pdf(y) for x in points]

    def assert_ratio(given):
        actual = np.exp(jax.jit(lambda given: jax.vmap(ratio_sde(given, jnp.array(s)))(points).log_h)(given))
        np.testing.assert_allclose(actual, expected, rtol=tolerances.IDENTITY)

    assert_ratio(given)
    with pytest.raises(AssertionError):
        assert_ratio(given._replace(start=given.start._replace(variances=given.start.variances[:, ::-1])))


@pytest.mark.hasty
@pytest.mark.parametrize("given", [pair(), gaussians_in_plane()], ids=["line", "plane"])
def test_gaussian_law_has_the_ratio_of_the_sde(given):
    """Affine map plus noise, and forward-kernel average: two derivations of one law; lam = 0.9 is another."""
    s, points = jnp.array(0.3), jnp.array([[-0.4, 0.3], [0.8, -0.1], [1.5, 0.9]])[:, : given.target.dim]

    @jax.jit
    def ratios(given):
        laws = (law_gaussian(given, s, lam) for lam in (1.0, 0.9))
        return [
            jax.vmap(f)(points) for f in (ratio_sde(given, s), *(ratio_of_laws(p, given.marginal(s)) for p in laws))
        ]

    expected, actual, other = ratios(given)
    assert_close(actual.log_h, expected.log_h, tolerances.IDENTITY)
    assert_close(actual.grad, expected.grad, tolerances.IDENTITY)
    assert np.abs(other.log_h - expected.log_h).max() > 1e-3


@pytest.mark.hasty
@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0, 2.0])
def test_gaussian_law_solves_the_fokker_planck_equation(lam):
    """d log p~/dt of a mixture start in the plane by autodiff, with the drift and noise of the reverse lambda-SDE."""
    target, start = gaussians_in_plane().target, in_plane().start
    given = problem(target, start, BETA)

    def log_prob(x, t, lam):
        return law_gaussian(given, t, lam).log_prob(x)

    @partial(jax.jit, static_argnames="law_lam")
    def residual(x, t, law_lam):
        def drift(x):
            score = given.marginal(t).score(x)
            return BETA.f(t) * x - (1 + lam**2) / 2 * BETA.beta(t) * score

        score = jax.grad(log_prob)(x, t, law_lam)
        transport = jnp.trace(jax.jacfwd(drift)(x)) + drift(x) @ score
        spread = lam**2 * BETA.beta(t) / 2 * (jnp.trace(jax.hessian(log_prob)(x, t, law_lam)) + score @ score)
        return jnp.stack([jax.grad(log_prob, 1)(x, t, law_lam), transport, spread])

    for x in jnp.array([[-0.4, 0.3], [0.8, -0.1]]):
        terms = residual(x, jnp.array(0.4), lam)
        assert abs(terms.sum()) < tolerances.IDENTITY * abs(terms).max()
        terms = residual(x, jnp.array(0.4), lam + 0.1)
        assert abs(terms.sum()) > 1e-7 * abs(terms).max()


# --- Theorem 3.1 on random pairs ---------------------------------------------------------------------------------


def random_law(rng: np.random.Generator, widest: float) -> GaussianMixture:
    """One to three components, std from .05 to `widest`."""
    k = int(rng.integers(1, 4))
    weights = 0.9 * rng.dirichlet(np.ones(k)) + 0.1 / k
    means, stds = rng.uniform(-3, 3, k), np.exp(rng.uniform(np.log(0.05), np.log(widest), k))
    return split(mixture_1d(weights, means, stds), 3)


def random_problem(rng: np.random.Generator, schedule) -> Problem:
    while True:
        try:
            return problem(random_law(rng, 1.5), random_law(rng, 1.2), schedule, rng.uniform(0.15, 1))
        except ValueError:  # heavier tails than the marginal can bear
            continue


def random_interval(rng: np.random.Generator, given: Problem) -> tuple[float, float]:
    """t > s within [0, t0]; half of them end at t0, where the start is still narrow and everything moves fast."""
    t0 = float(given.t0)
    fast = float(given.start.variances.min() / given.schedule.beta(given.t0))  # the time in which the start doubles
    gap = t0 * rng.uniform() ** 4 * rng.integers(0, 2)
    t = t0 - gap
    return t, t - min(0.25 * t, gap + fast)


def between(given: Problem, t: float, s: float, nodes: int) -> tuple[Curve, np.ndarray]:
    """The curve at t0, t, nodes of an integral over [s, t], and s; and g² times their weights."""
    inner, weights = interval(t, s, nodes)
    # ts[0] must be t0; where t is t0 too, the second time is a rounding below.
    second = min(t, float(given.t0) * (1 - 1e-15))
    ts = jnp.asarray(np.concatenate([[float(given.t0), second], inner, [s]]))
    curve = contraction_curve(given.target, given.start, given.schedule, ts)
    return jax.tree.map(np.asarray, curve), -weights * np.array(given.schedule.beta(ts))[2:-1]


def identity(given: Problem, t: float, s: float) -> tuple[float, float, float]:
    """KL(t) - KL(s), 1/2 integral of g² I over [s, t], and the largest error of the mass."""
    curve, weights = between(given, t, s, nodes=12)
    return (
        curve.kl.value[1] - curve.kl.value[-1],
        weights @ curve.fisher.value[2:-1] / 2,
        abs(curve.mass.value - 1).max(),
    )


@pytest.mark.parametrize(
    ("schedule", "pairs"),
    [
        pytest.param(BETA, range(8), id="linear"),
        pytest.param(BETA, range(8, 100), id="linear, many", marks=pytest.mark.exhaustive),
        pytest.param(CosineVP(), range(100), id="cosine, many", marks=pytest.mark.exhaustive),
    ],
)
def test_sde_contracts_by_the_fisher_divergence_on_random_pairs(schedule, pairs):
    """Theorem 3.1, dKL/dt = 1/2 g² I, on random pairs of mixtures; without the 1/2 none would pass."""
    rngs = [np.random.default_rng(i) for i in pairs]
    problems = [random_problem(rng, schedule) for rng in rngs]
    results = [identity(given, *random_interval(rng, given)) for rng, given in zip(rngs, problems, strict=True)]
    lost, integral, mass = np.array(results).T
    worst = np.argmax(abs(lost / integral - 1))
    assert np.all(lost > 0)
    assert abs(lost / integral - 1)[worst] < tolerances.THEOREM, f"{pairs[worst]}: {results[worst]}, {problems[worst]}"
    assert np.max(mass) < tolerances.THEOREM, pairs[np.argmax(mass)]
    assert np.all(abs(lost / (2 * integral) - 1) > 0.4)  # negative control


def random_pair_in_plane(rng: np.random.Generator, k: int) -> Problem:
    """Two components of std from .3 to 1.2, from a start of k."""

    def law(k, widest):
        stds = np.exp(rng.uniform(np.log(0.3), np.log(widest), (k, 2)))
        covariances = [rotated_covariance(rng.uniform(0, np.pi), tuple(s**2)) for s in stds]
        weight = rng.uniform(0.1, 0.9)
        return mixture([weight, 1 - weight] if k == 2 else [1.0], rng.uniform(-2, 2, (k, 2)), covariances)

    while True:
        try:
            return problem(law(2, 1.2), law(k, 1.0), BETA, rng.uniform(0.3, 1))
        except ValueError:
            continue


several = [pytest.param(seed, 2, marks=pytest.mark.exhaustive) for seed in range(4)]


@pytest.mark.parametrize(("seed", "k"), [(1, 1), *several])
def test_sde_contracts_in_the_plane(seed, k):
    """The same for random pairs in the plane, and chi2 by the Dirichlet form."""
    given = random_pair_in_plane(np.random.default_rng(seed), k)
    curve, weights = between(given, 0.8 * float(given.t0), 0.78 * float(given.t0), nodes=3)
    assert abs(curve.mass.value - 1).max() < tolerances.THEOREM_PLANE
    for divergence, rate in ((curve.kl, curve.fisher.value / 2), (curve.chi2, curve.dirichlet.value)):
        lost, integral = divergence.value[1] - divergence.value[-1], weights @ rate[2:-1]
        assert abs(lost / integral - 1) < tolerances.THEOREM_PLANE
        assert abs(lost / (2 * integral) - 1) > 0.4  # negative control


# --- curves ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def curve():
    given = asymmetric()
    return contraction_curve(given.target, split(given.start, 3), BETA, jnp.linspace(0.6, 0.0, 15))


@pytest.fixture(scope="module")
def ode_curve():
    given = asymmetric()
    return contraction_curve(given.target, given.start, BETA, jnp.array([0.6, 0.4, 0.1, 0.0]), lam=0.0)


def test_curves_satisfy_the_inequalities(curve):
    """Mass 1, everything falls, Pinsker, KL <= log(1 + chi2); negative control: upwards nothing does."""
    assert abs(curve.mass.value - 1).max() < tolerances.ROUNDING
    for name in ("kl", "chi2", "tv"):
        assert np.all(np.diff(getattr(curve, name).value) < 0), name
        assert not np.all(np.diff(getattr(curve, name).value[::-1]) < 0)
    assert np.all(curve.tv.value <= (curve.kl.value / 2) ** 0.5)
    assert np.all(curve.kl.value <= np.log1p(curve.chi2.value))
    assert np.all(curve.kl.value[:, None] > curve.kl.error[:, None])


@pytest.mark.hasty
def test_mode_weights_are_a_martingale(curve, ode_curve):
    """P(mode | x_t) is a martingale of the SDE, so the mean stays; along the ODE it does not."""
    assert_close(curve.mode_weights.value, np.tile(curve.mode_weights.value[:1], (15, 1)), tolerances.IDENTITY)
    assert_close(curve.mode_weights.value.sum(1), np.ones(15), tolerances.ROUNDING)
    assert np.abs(np.diff(ode_curve.mode_weights.value, axis=0)).max() > 1e-2


def test_curve_against_brute_force(curve):
    """KL, chi2, TV and W2 at one time from scipy's densities and h on a dense grid, nothing of the curve's rules."""
    given, i = asymmetric(), 7
    s = float(curve.ts[i])
    x, step = np.linspace(-7, 7, 4001, retstep=True)
    (c, tau2), y = transition(given, s), np.linspace(-9, 9, 4001)
    h0 = density(given.start, y) / density(given.marginal(given.t0), y)
    h = np.array([h0 @ scipy.stats.norm.pdf(y, c * a, tau2**0.5) for a in x]) * (y[1] - y[0])
    p = density(given.marginal(jnp.array(s)), x)
    assert_close(curve.kl.value[i], step * p @ (h * np.log(h)), tolerances.IDENTITY)
    assert_close(curve.chi2.value[i], step * p @ (h - 1) ** 2, tolerances.IDENTITY)
    assert_close(curve.tv.value[i], step * p @ abs(h - 1) / 2, 1e-5)  # a kink on the grid
    below, right = (step * (np.cumsum(q) - q / 2) for q in (p * h, p))  # both trapezoidal cdfs at x
    w2 = (step * (p * h) @ (x - np.interp(below, right, x)) ** 2) ** 0.5
    assert_close(curve.w2.value[i], w2, 1e-4)
    assert abs(curve.kl.value[i] / curve.kl.value[i + 1] - 1) > 1e-3  # negative control: the next time is another


def test_chi2_falls_by_the_dirichlet_form():
    """d chi2/dt = g² E_p |grad h|² along the SDE, by quadrature in time; the Fisher divergence is not that rate."""
    given = asymmetric()
    inner, weights = interval(0.5, 0.35, 12)
    ts = jnp.asarray(np.concatenate([[0.6, 0.5], inner, [0.35]]))
    curve = contraction_curve(given.target, split(given.start, 3), BETA, ts)
    lost = curve.chi2.value[1] - curve.chi2.value[-1]
    rates = [-weights @ np.array(BETA.beta(ts) * e.value)[2:-1] for e in (curve.dirichlet, curve.fisher)]
    assert_close(rates[0], lost, tolerances.THEOREM)
    assert abs(rates[1] / lost - 1) > 1e-2


@pytest.mark.hasty
def test_reported_errors_bound_the_true_ones():
    """In the plane, for Gaussians, whose divergences are known: no error is larger than reported.

    What lies beyond the disc of the nodes is most of it. Negative control: against a start a little wider all are.
    """
    given = gaussians_in_plane()
    ts = jnp.array([1.0, 0.6, 0.2])
    curve = contraction_curve(given.target, given.start, BETA, ts)
    closed = {"kl": gaussian_kl, "fisher": gaussian_fisher, "chi2": gaussian_chi2, "dirichlet": gaussian_dirichlet}
    wider = given._replace(start=given.start._replace(variances=(1 + 1e-7) * given.start.variances))
    for i, s in enumerate(ts):
        right, law, other = given.marginal(s), *(p.start if i == 0 else law_gaussian(p, s, 1.0) for p in (given, wider))
        for name, formula in closed.items():
            value, error = (part[i] for part in getattr(curve, name))
            exact = formula(law, right)
            assert abs(value - exact) <= error <= tolerances.QUADRATURE * exact
            assert abs(value - formula(other, right)) > error
        assert abs(curve.mass.value[i] - 1) <= curve.mass.error[i] + 1e-15 <= tolerances.IDENTITY
    np.testing.assert_allclose(curve.w2.value[0], gaussian_w2(given.start, given.marginal(given.t0)), rtol=1e-12)


# --- Theorem 3.2 -------------------------------------------------------------------------------------------------


@pytest.mark.hasty
@pytest.mark.parametrize("given", [asymmetric(), in_plane()], ids=["line", "plane"])
def test_ode_keeps_the_divergence(given, monkeypatch):
    """Theorem 3.2 by the flow and its log-determinant; without the determinant, KL would change."""
    start, marginal = given.start, given.marginal(given.t0)
    cover = both(start, marginal)
    rule = legendre_panels(panel_edges(cover, 60)) if given.target.dim == 1 else covering_rule(cover, 121)
    before = jax.jit(lambda p, q: by_quadrature(KL, p.log_prob, q.log_prob, rule).value)(start, marginal)
    for fraction in (0.5, 0.0):
        value, error = kl_ode(given, fraction * float(given.t0), points=57, rtol=1e-10)
        assert abs(value - before) <= error <= tolerances.QUADRATURE * before
    without = lambda *args: Flow(flow(*args).x, jnp.zeros(len(args[1])))  # noqa: E731
    monkeypatch.setattr("theory.flows.flow", without)
    assert abs(kl_ode(given, 0.0, points=57, rtol=1e-10).value - before) > 1e-2


def in_space() -> Problem:
    """Two components in three dimensions, from one in a third place."""
    wide, flat = np.diag([0.5, 0.2, 0.3]), np.diag([0.1, 0.4, 0.2])
    wide[:2, :2] = rotated_covariance(0.7, (0.5, 0.2))
    target = mixture([0.3, 0.7], [[-1.0, 0.3, 0.0], [0.9, -0.4, 0.5]], [wide, flat])
    return problem(target, gaussian([0.2, 0.4, -0.3], np.diag([0.5, 0.3, 0.6])), BETA, 0.8)


@pytest.mark.hasty
def test_ode_keeps_the_divergence_in_space(monkeypatch):
    """In three dimensions by draws: what the same draws give at t0, to the solver's error; and a closed form.

    A drift 1 % off is told apart.
    """
    given, key, n = in_space(), jr.key(1), 500
    gaussians = given._replace(target=gaussian([0.9, -0.4, 0.5], given.target.covariances[0]))

    @jax.jit
    def before(given):
        y = given.start.sample(key, (n,))
        return jnp.mean(given.start.log_prob(y) - given.marginal(given.t0).log_prob(y))

    def after(given):
        return kl_ode(given, 0.0, key=key, samples=n)

    mixed, (value, error) = after(given), after(gaussians)
    np.testing.assert_allclose(mixed.value, before(given), rtol=tolerances.IDENTITY)
    np.testing.assert_allclose(value, before(gaussians), rtol=tolerances.IDENTITY)
    exact = gaussian_kl(gaussians.start, gaussians.marginal(gaussians.t0))
    assert abs(value - exact) <= tolerances.STANDARD_ERRORS * error <= exact
    right = flows._flow_velocity
    monkeypatch.setattr(flows, "_flow_velocity", lambda p, t, state: 1.01 * right(p, t, state))
    assert abs(after(given).value - mixed.value) > 1e-3


def test_ode_curve_is_constant_on_the_line(ode_curve):
    """KL, chi2 and TV along the curve of lam = 0; W2 and the Fisher divergence do change."""
    curve = ode_curve
    for name in ("kl", "chi2", "tv"):
        value = getattr(curve, name).value
        assert_close(value, np.full(4, value[0]), tolerances.IDENTITY)
    assert np.ptp(curve.w2.value) > 1e-2 and np.ptp(curve.fisher.value) > 1e-2


@pytest.mark.hasty
def test_flow_is_the_monotone_map():
    """The ODE solver and the quantiles agree in position, probability and slope; a later time is told apart."""
    given = asymmetric()
    y = jnp.linspace(-2.5, 2.5, 15)[:, None]
    carried = flow(given, y, 0.1)
    x, s = carried.x[:, 0], jnp.array(0.1)
    assert_close(x, flow_map(given, given.t0, s, y[:, 0]), tolerances.QUADRATURE)
    u, v = tails(given.marginal(given.t0), y[:, 0]), tails(given.marginal(s), x)
    np.testing.assert_allclose(np.exp(v.log_lower), np.exp(u.log_lower), atol=tolerances.QUADRATURE)
    slope = jnp.exp(given.marginal(given.t0).log_prob(y) - given.marginal(s).log_prob(carried.x))
    assert_close(np.exp(carried.log_det), slope, tolerances.QUADRATURE)
    assert_close(quantile(given.marginal(s), u), x, tolerances.QUADRATURE)
    with pytest.raises(AssertionError):
        assert_close(x, flow_map(given, given.t0, s + 1e-4, y[:, 0]), tolerances.QUADRATURE)


@pytest.mark.hasty
def test_determinant_of_the_flow():
    """Against central differences of the carried points in the plane; that of the opposite map is told apart."""
    given, step = in_plane(), 1e-4
    y = jnp.array([[0.3, -0.2], [-0.9, 0.5]])
    log_det = flow(given, y, 0.05).log_det
    shifts = step * jnp.eye(2)[:, None]
    columns = [(flow(given, y + e, 0.05).x - flow(given, y - e, 0.05).x) / (2 * step) for e in shifts]
    expected = np.linalg.slogdet(np.stack(columns, axis=-1))[1]
    assert_close(log_det, expected, 1e-6)  # step² and rtol / step
    with pytest.raises(AssertionError):
        assert_close(-log_det, expected, 1e-6)


def test_flow_from_the_edge_between_two_modes(monkeypatch):
    """There the map stretches by exp(1250), which no float holds; a solver that gives up returns nan, not a number."""
    sixth = mixture_1d([1 / 6] * 6, [-5.0, -3.0, -1.0, 1.0, 3.0, 5.0], [0.02] * 6)
    given, y = problem(sixth, gaussian([0.5], [[0.25]]), BETA), np.linspace(-1.5, 2.5, 33)[:, None]
    carried = flow(given, jax.device_put(y), 0.0)
    before, after = (
        np.exp(tails(law, x).log_lower)
        for law, x in ((given.marginal(given.t0), y[:, 0]), (given.target, carried.x[:, 0]))
    )
    np.testing.assert_allclose(after, before, atol=tolerances.IDENTITY)
    assert np.isfinite(carried.log_det).all() and carried.log_det[12] > 30
    gave_up = OptimizeResult(success=False, y=np.zeros((66, 1)))
    monkeypatch.setattr(flows, "solve_ivp", lambda *_, **__: gave_up)
    gone = flow(given, jax.device_put(y), 0.0)
    assert np.isnan(gone.x).all() and np.isnan(gone.log_det).all()


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((SHARP, gaussian([0.0], [[1.0]]), BETA, 0.0), r"t0 must lie in \(0, 1\], got 0"),
        ((SHARP, gaussian([0.0], [[1.0]]), BETA, 1.1), r"t0 must lie in \(0, 1\], got 1\.1"),
        ((SHARP, gaussian([0.0, 0.0], np.eye(2)), BETA), r"one dimension, got d = 1 and d = 2"),
    ],
)
def test_bad_problems_are_named(arguments, match):
    """ValueError that says what is wrong."""
    with pytest.raises(ValueError, match=match):
        problem(*arguments)
    assert problem(SHARP, gaussian([2.0], [[0.04]]), BETA, 0.1).t0 == 0.1


def test_without_float64_exact_laws_are_refused():
    """One line that says how to switch it on."""
    with jax.enable_x64(False), pytest.raises(ValueError, match=r'exact laws need float64: call .*"jax_enable_x64"'):
        problem(SHARP, gaussian([2.0], [[0.04]]), BETA)


PLANE, CUBE = in_plane(), gaussian(np.zeros(3), np.eye(3))
BOXES = mixture([0.5, 0.5], np.stack([np.ones(3), -np.ones(3)]), 0.5 * np.stack([np.eye(3)] * 2))


@pytest.mark.parametrize(
    ("target", "start", "ts", "lam", "match"),
    [
        (SHARP, gaussian([0.5], [[0.25]]), [0.1, 0.5], 1.0, "ts must decrease"),
        (SHARP, gaussian([0.5], [[0.25]]), [0.5, 0.5], 1.0, "ts must decrease"),
        (SHARP, gaussian([0.5], [[0.25]]), [0.5, -0.1], 1.0, r"stay in \[0, 1\]"),
        (SHARP, gaussian([0.5], [[0.25]]), [1.5, 0.1], 1.0, r"t0 must lie in \(0, 1\]"),
        (
            SHARP,
            gaussian([0.5], [[0.25]]),
            [1.0, 0.1],
            -0.5,
            r"curve: lam must be finite and not negative, got -0\.5",
        ),
        (PLANE.target, PLANE.start, [0.7, 0.1], 0.5, "a mixture target needs lam = 1 in two dimensions"),
        (PLANE.target, PLANE.start, [0.7, 0.1], 0.0, "see kl_ode for lam = 0"),
        (SHARP, gaussian([0.5], [[0.25]]), [1.0, 0.1], np.nan, "lam must be finite and not negative, got nan"),
        (SHARP, gaussian([0.5], [[0.25]]), [1.0, 0.1], np.inf, "lam must be finite and not negative, got inf"),
        (CUBE, BOXES, [0.7, 0.1], 1.0, "one or two dimensions, got d = 3"),
    ],
)
def test_bad_curves_are_named(target, start, ts, lam, match):
    """ValueError for grids, noise levels and dimensions that no exact method covers."""
    with pytest.raises(ValueError, match=match):
        contraction_curve(target, start, BETA, jnp.array(ts), lam)


def test_closed_form_refuses_mixtures():
    """A mixture target has no affine law."""
    with pytest.raises(ValueError, match="law_gaussian needs a target of one component"):
        law_gaussian(paper(), ZERO, 1.0)
