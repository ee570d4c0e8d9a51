"""Guidance and Girsanov's bound: closed forms against moment equations, published cases, sampling and brute force."""

from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy.integrate import solve_ivp

from tests import tolerances
from tests.cases import assert_close, scales
from tests.problems import BETA, ZERO, asymmetric, pair, paper
from theory.beyond import attained, extrapolated, least, whole_bound
from theory.chains import Moments, affine_chain, two_chains
from theory.fokker_planck import inexact_curve, inexact_flow
from theory.gaussians import Offset, clock, girsanov, girsanov_factor, inexact_score
from theory.guidance import (
    Guided,
    Normal,
    class_law,
    contracted,
    guided,
    guided_law,
    guided_ode_variance,
    guided_rho,
    guided_sde_law,
    normal,
    tilted,
)
from theory.mixtures import gaussian, mixture_1d, noise_fn
from theory.moment_equations import by_moment_equations
from theory.problems import Problem
from theory.quadrature import interval
from theory.schedules import LinearVP, VarianceExploding
from theory.solve import sample, time_grid
from theory.solvers import DDIM

pytestmark = pytest.mark.hasty


def case(scale: float, wide: float = 0.36) -> Guided:
    """The pair's data as a class among N(.7, wide)."""
    return Guided(pair(), gaussian([0.7], [[wide]]), jnp.array(scale))


@jax.jit
def rates(t):
    return jnp.stack([BETA.f(t), BETA.beta(t)])


def by_moments(scale, wide, lam, end):
    """Mean and variance of dx = [f x - (1+lam²)/2 g² s_w] dt + lam g dw from N(.5, .25), written out for scipy."""

    def slopes(t, state):
        alpha, sigma = scales(BETA, t)
        (f, g2), (mean, variance) = np.asarray(rates(t)).tolist(), state
        one, other = scale / (0.04 * alpha**2 + sigma**2), (1 - scale) / (wide * alpha**2 + sigma**2)
        pull = (1 + lam**2) / 2 * g2
        drift = f * mean + pull * (one * (mean - 1.3 * alpha) + other * (mean - 0.7 * alpha))
        return [drift, 2 * (f + pull * (one + other)) * variance - lam**2 * g2]

    return solve_ivp(slopes, (1.0, end), [0.5, 0.25], rtol=1e-11, atol=1e-14, method="DOP853").y[:, -1]


@pytest.mark.parametrize(
    ("scale", "wide", "lam"), [(2.0, 0.36, 0.0), (4.0, 0.36, 1.0), (1.5, 0.01, 2.0), (0.5, 0.04, 0.7)]
)
def test_the_law_of_a_guided_process(scale, wide, lam):
    """Against its moment equations: all wider, narrower than, and as wide as the class; a scale off by 1 % is told."""
    given, end = case(scale, wide), jnp.array(0.1)
    expected = by_moments(scale, wide, lam, 0.1)
    assert_close(guided_law(given, given.edited, end, lam), expected, tolerances.QUADRATURE)
    with pytest.raises(AssertionError):
        off = given._replace(scale=1.01 * given.scale)
        assert_close(guided_law(off, given.edited, end, lam), expected, tolerances.QUADRATURE)


@pytest.mark.parametrize("scale", [0.3, 1.5, 4.0, 7.5])
def test_elementary_forms(scale):
    """Powers of V_u / V_c for the SDE and the ODE against the integrals; another noise level is told apart."""
    given, s = case(scale), jnp.array(0.05)
    for start in (given.edited, given.right):
        noisy, still = (guided_law(given, start, s, lam) for lam in (1.0, 0.0))
        assert_close(guided_sde_law(given, start, s), noisy, tolerances.IDENTITY)
        assert_close(guided_ode_variance(given, start, s), still.variance, tolerances.IDENTITY)
        near = guided_law(given, start, s, 1.01)
        assert abs(near.variance / noisy.variance - 1) > 1e-5


@pytest.mark.parametrize("scale", [1.5, 2.0, 3.0, 5.0])
def test_published_limits_of_ddim_and_ddpm(scale):
    """N(0, 1) among N(0, 2), variance exploding: 2^(1-w) under the ODE, (2 - 2^(2-2w)) / (2w - 1) under the SDE.

    The Gaussian counterexample of Bradley & Nakkiran 2024 (arXiv 2408.09000): neither is 2 / (w + 1), the tilted law's.
    """
    schedule = VarianceExploding(LinearVP(0.1, 45.0))  # up to sigma = 8e4: the start is forgotten
    problem = Problem(gaussian([0.0], [[1.0]]), gaussian([0.0], [[1.0]]), schedule, jnp.ones(()))
    given = Guided(problem, gaussian([0.0], [[2.0]]), jnp.array(scale))
    expected = 2 ** (1 - scale), (2 - 2 ** (2 - 2 * scale)) / (2 * scale - 1)
    for lam, variance in zip((0.0, 1.0), expected, strict=True):
        found = guided_law(given, given.right, ZERO, lam).variance
        assert_close(found, variance, tolerances.QUADRATURE)
        assert (
            abs(found / guided_law(given._replace(scale=jnp.array(1.01 * scale)), given.right, ZERO, lam).variance - 1)
            > 1e-3
        )
    assert_close(tilted(given, ZERO).variance, 2 / (scale + 1), tolerances.ROUNDING)


def test_the_ode_narrows_more_than_the_sde_where_guidance_extrapolates():
    """Once the start is forgotten v_SDE / v_ODE = sinh((w - 1/2) L) / [(2w - 1) sinh(L / 2)], L = log(v_u / v_c).

    More than 1 for w outside [0, 1], less inside: sinh(a L) / a increases in a.
    """
    schedule = VarianceExploding(LinearVP(0.1, 45.0))
    L = np.log(9.0)
    for scale in (-1.0, 0.2, 0.7, 1.3, 4.0):
        given = case(scale)
        given = given._replace(problem=given.problem._replace(schedule=schedule))
        still, noisy = (guided_law(given, given.right, ZERO, lam).variance for lam in (0.0, 1.0))
        expected = np.sinh((scale - 0.5) * L) / ((2 * scale - 1) * np.sinh(L / 2))
        assert_close(noisy / still, expected, tolerances.QUADRATURE)
        assert (expected > 1) == (not 0 <= scale <= 1)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_without_guidance_it_is_theorem_3_1(lam):
    """w = 1: the law, rho and KL of the exact score; w = 1.01 is told apart, whose SDE does not end at the class."""
    s = jnp.array(0.2)
    one, near = case(1.0), case(1.01)
    expected = inexact_score(pair(), s, lam).kl()
    edited, right = (guided_law(one, start, s, lam) for start in (one.edited, one.right))
    assert_close(edited.kl(one.of_class(s)), expected, tolerances.QUADRATURE)
    assert_close(edited.kl(right), expected, tolerances.QUADRATURE)
    assert_close(guided_rho(one, s, lam), np.exp(-(lam**2) * float(clock(pair(), s))), tolerances.IDENTITY)
    assert right.kl(one.of_class(s)) < 1e-15
    assert guided_law(near, near.right, s, lam).kl(one.of_class(s)) > 1e-6


def test_two_guided_runs_contract():
    """The KL of two runs in closed form, falling all the way, and faster with w; of an ODE it stays."""
    times = jnp.linspace(1.0, 0.0, 21)

    @jax.jit
    @partial(jax.vmap, in_axes=(None, 0, None))
    def between(given, s, lam):
        edited, right = (guided_law(given, start, s, lam) for start in (given.edited, given.right))
        return edited.kl(right), contracted(guided_rho(given, s, lam), given.edited.relative_to(given.right))

    ends = []
    for scale in (1.0, 2.0, 4.0):
        kl, closed = between(case(scale), times, 1.0)
        np.testing.assert_allclose(kl, closed, rtol=1e-6, atol=1e-16)
        assert np.all(np.diff(kl) < 0)
        ends.append(float(kl[-1]))
        still, _ = between(case(scale), times, 0.0)
        np.testing.assert_allclose(still, still[0], rtol=tolerances.IDENTITY)
    assert ends[0] > 10 * ends[1] > 100 * ends[2]


def test_the_tilted_law():
    """p_c^w p_u^(1-w), normalised by quadrature; that of w = 2.02 is told apart. Noise without bound ends there."""
    given = case(2.0)
    nodes, weights = interval(-1.0, 4.0, 200)
    x = jnp.asarray(nodes)[:, None]
    one, other = (np.asarray(law.log_prob(x)) for law in (given.problem.target, given.unconditional))
    density = weights * np.exp(2 * one - other)
    mean = density @ nodes / density.sum()
    expected = mean, density @ (nodes - mean) ** 2 / density.sum()
    assert_close(tilted(given, ZERO), expected, tolerances.QUADRATURE)
    with pytest.raises(AssertionError):
        assert_close(tilted(case(2.02), ZERO), expected, tolerances.QUADRATURE)
    gaps = [abs(guided_law(given, given.right, ZERO, lam).variance - expected[1]) for lam in (20.0, 40.0)]
    assert_close(gaps[0] / gaps[1], 4.0, 0.05)  # O(1/lam²)


def test_guided_noise_prediction():
    """-sigma grad[w log p_t(x|c) + (1 - w) log p_t(x)] by differentiation; a class is those components, reweighted."""
    law, t = asymmetric().target, jnp.array(0.3)
    one = class_law(law, np.array([0, 2]))
    np.testing.assert_allclose(one.weights, [0.625, 0.375], rtol=tolerances.ROUNDING)
    np.testing.assert_array_equal(one.means, law.means[np.array([0, 2])])
    x = jnp.linspace(-3.0, 3.0, 11)[:, None]

    def log_density(x):
        densities = (p.marginal(BETA, t).log_prob(x) for p in (one, law))
        return 2.5 * next(densities) - 1.5 * next(densities)

    expected = -BETA.sigma(t) * jax.vmap(jax.grad(log_density))(x)
    assert_close(guided(one, law, BETA, 2.5)(x, t), expected, tolerances.IDENTITY)
    with pytest.raises(AssertionError):
        assert_close(guided(one, law, BETA, 2.51)(x, t), expected, 1e-3)
    with pytest.raises(ValueError, match="needs a Gaussian on the line"):
        normal(law)


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_the_line_solvers_agree(lam):
    """KL to the class by finite volumes and by characteristics, w = 2; that of w = 2.1 is told apart."""
    given, ts = case(2.0), jnp.array([1.0, 0.5, 0.2, 0.05])
    closed, near = ([float(guided_law(g, g.edited, t, lam).kl(g.of_class(t))) for t in ts] for g in (given, case(2.1)))
    solved = inexact_curve(given.problem, given.eps_fn, ts, jnp.array(lam), 400, 160) if lam else None
    found = (solved or inexact_flow(given.problem, given.eps_fn, ts)).kl.value
    assert_close(found, closed, tolerances.HEAT)
    with pytest.raises(AssertionError):
        assert_close(found, near, tolerances.HEAT)


TS = time_grid(BETA, 20, "log_snr", end=0.02)


def test_two_chains_of_gaussians():
    """Chapman-Kolmogorov on the line against the affine chain, masses and KL; that of DDIM(.99) is told apart."""
    given = case(2.0)

    def by_moments(eta):
        starts = (Moments(law.mean[None], law.variance[None, None]) for law in (given.edited, given.right))
        ends = (affine_chain(DDIM(BETA, eta), given.eps_fn, start, TS) for start in starts)
        edited, right = (Normal(end.mean[:, 0], end.covariance[:, 0, 0]) for end in ends)
        return jax.vmap(Normal.kl)(edited, right)

    laws = given.problem.start, given.problem.marginal(given.problem.t0)
    chains = two_chains(DDIM(BETA, 1.0), given.eps_fn, laws, TS, 9.0)
    for density in (chains.edited, chains.right):
        np.testing.assert_allclose(jnp.sum(density * chains.rule.weights, -1), 1, rtol=1e-6)
    np.testing.assert_allclose(chains.kl(), by_moments(1.0), rtol=1e-5)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(chains.kl(), by_moments(0.99), rtol=1e-5)


def test_two_chains_of_a_mode_by_sampling():
    """Three components, of which two are the class: mean and variance of draws of guided DDPM; w = 4 is told from 3."""
    given = asymmetric()
    one = class_law(given.target, np.array([0, 2]))
    ts = time_grid(BETA, 20, "log_snr", start=0.6, end=0.02)
    solver, draws = DDIM(BETA, 1.0), 40_000
    x = sample(solver, guided(one, given.target, BETA, 3.0), given.start.sample(jr.key(0), (draws,)), ts, jr.key(1))
    x = np.asarray(x)[:, 0]

    def off(scale):
        """Distance of mean and second moment from the density's, in standard errors."""
        eps_fn = guided(one, given.target, BETA, scale)
        chains = two_chains(solver, eps_fn, (given.start, one.marginal(BETA, given.t0)), ts, 8.0)
        nodes, weights = chains.rule.nodes[-1, :, 0], chains.rule.weights[-1] * chains.edited[-1]
        return max(abs((x**k).mean() - weights @ nodes**k) / (x**k).std() * draws**0.5 for k in (1, 2))

    assert off(3.0) < tolerances.STANDARD_ERRORS
    assert off(4.0) > tolerances.STANDARD_ERRORS


def test_guided_chains_of_a_mode_contract():
    """On a mode of the toy KL of two chains falls at every step; towards the class it does not, for w = 4."""
    toy = paper()
    one = class_law(toy.target, np.array([1]))
    eps_fn, ts = guided(one, toy.target, BETA, 4.0), time_grid(BETA, 40, "log_snr", end=0.01)
    chains = two_chains(DDIM(BETA, 1.0), eps_fn, (toy.start, one.marginal(BETA, toy.t0)), ts, 9.0)
    assert np.all(np.diff(chains.kl()) < 0)
    marginals = jax.jit(jax.vmap(lambda t: one.marginal(BETA, t).log_prob(chains.rule.nodes[0])))(ts)
    edited = jnp.maximum(chains.edited, 1e-300)
    to_class = jnp.sum(chains.rule.weights * edited * (jnp.log(edited) - marginals), -1)
    assert np.any(np.diff(to_class) > 0.01)


# --- Girsanov's bound -----------------------------------------------------------------------------------------------


def path_kl(start: Offset, A: float, lam: float, error: float, steps: int) -> float:
    """KL of the joint laws at steps + 1 times, inexact against exact, equal steps of the clock A.

    In deviations of p_t a step of length a multiplies by exp(-k a / 2) and adds lam²/k [1 - exp(-k a)] of variance,
    k = lam² for the exact score; the KL of the chains is the mean KL of their steps.
    """
    a, exact, k = A / steps, lam**2, lam**2 + (1 + lam**2) * error
    shrink, fresh = np.exp(-k * a / 2), lam**2 * (a if k == 0 else -np.expm1(-k * a) / k)
    right, right_fresh = np.exp(-exact * a / 2), -np.expm1(-exact * a)
    total, second = 0.0, float(start.r + start.e**2)
    for _ in range(steps):
        ratio = fresh / right_fresh
        total += (ratio - 1 - np.log(ratio) + (shrink - right) ** 2 * second / right_fresh) / 2
        second = shrink**2 * second + fresh
    return total


@pytest.mark.parametrize(("lam", "error"), [(0.5, 0.1), (1.0, -0.1), (2.0, 0.1), (1.0, -0.5)])
def test_girsanov_is_the_divergence_of_paths(lam, error):
    """The limit of joint laws on ever finer grids, from the edited start; a factor off by 1 % is told apart.

    (1, -.5) is the case k = 0.
    """
    g = pair()
    start, A = inexact_score(g, g.t0, lam, error), float(clock(g, ZERO))
    expected = extrapolated(np.array([path_kl(start, A, lam, error, n) for n in (2000, 4000, 8000)]))
    found = float(girsanov(g, ZERO, lam, error))
    assert_close(found, expected, 1e-6)
    with pytest.raises(AssertionError):
        assert_close(1.01 * found, expected, 1e-3)


@pytest.mark.parametrize("lam", [0.5, 1.0, 2.0])
def test_girsanov_is_attained_by_a_push(lam):
    """To the factor 1 - rho; with a factor 1 % off it is not, and a push that is the same at all times does less."""
    assert attained(pair(), lam).verdict == "holds"
    assert attained(pair(), lam, lambda lam: 1.01 * girsanov_factor(lam)).verdict == "fails"
    assert attained(pair(), lam, lambda lam: 0.99 * girsanov_factor(lam)).verdict == "fails"
    right = pair()._replace(start=pair().marginal(pair().t0))
    [found] = by_moment_equations(right, Partial(constant_push, right), [lam], [1.0])
    rho = np.exp(-(lam**2) * float(clock(pair(), ZERO)))
    assert float(found.end.kl()) < 0.9 * (1 - rho) * girsanov_factor(lam) * found.squared


def constant_push(g, size, x, t):
    return noise_fn(g.target, g.schedule)(x, t) - g.schedule.sigma(t) * size


def test_the_bound_from_the_right_start_can_fail():
    """KL(0) is more than a third of the bound at lam = 1/2: without its error term, or with a half, it is false."""
    right = pair()._replace(start=pair().marginal(pair().t0))
    kl, bound = inexact_score(right, ZERO, 0.5, 0.1).kl(), girsanov(right, ZERO, 0.5, 0.1)
    assert bound / 2 < kl < bound


def test_where_the_whole_bound_is_least():
    """By brute force on a fine grid: not at lam = 1, on either side, where its factor is."""
    g, levels = pair(), np.geomspace(0.3, 3.0, 2001)
    right = g._replace(start=g.marginal(g.t0))
    of = jax.jit(jax.vmap(whole_bound, in_axes=(None, 0, None)))
    for given, error, side in ((g, 0.1, -1), (right, 0.1, -1), (right, -0.1, 1)):
        best = least(lambda lam, given=given, error=error: whole_bound(given, lam, error))
        assert_close(best, levels[np.argmin(of(given, levels, error))], 2e-3)
        assert side * (best - 1) > 0.01
    assert_close(least(girsanov_factor), 1.0, 1e-6)


def test_extrapolation():
    """1 + 1/N + 1/N² has the limit 1, exactly; what has a third term has not."""
    n = np.array([10.0, 20.0, 40.0])
    assert_close(extrapolated(1 + 1 / n + 1 / n**2), 1.0, tolerances.ROUNDING)
    assert abs(extrapolated(1 + 1 / n**3) - 1) > 1e-5


def test_a_mixture_s_own_class_is_guided_to_itself():
    """All components as the class: guidance changes nothing, at any scale."""
    law, x, t = mixture_1d([0.3, 0.7], [-1.0, 1.0], [0.2, 0.4]), jnp.linspace(-2.0, 2.0, 9)[:, None], jnp.array(0.4)
    whole = class_law(law, np.arange(2))
    assert_close(guided(whole, law, BETA, 7.5)(x, t), noise_fn(law, BETA)(x, t), tolerances.IDENTITY)
    part = class_law(law, np.arange(1))
    assert np.abs(guided(part, law, BETA, 7.5)(x, t) - noise_fn(law, BETA)(x, t)).max() > 0.1
