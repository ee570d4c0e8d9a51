"""The forward process composes, and the reverse family has the forward marginals (Fokker-Planck, by autodiff)."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.integrate
from hypothesis import assume, given
from hypothesis import strategies as st

from tests import tolerances
from tests.cases import SCHEDULES, assert_close, plane
from theory.mixtures import noise_fn
from theory.processes import forward_path, marginal, of_ou_time, ou_time, reverse_diffusion, reverse_drift, transition
from theory.schedules import LinearVP
from theory.types import Kernel

pytestmark = pytest.mark.hasty

all_schedules = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
X0 = jnp.array([1.5, -0.7])


def compose(first: Kernel, step) -> Kernel:
    """The law of y when x ~ first and y | x ~ step(x), affine in x."""
    mean, std = step(first.mean)
    scale = jax.jacfwd(lambda x: step(x).mean)(first.mean)[0, 0]
    return Kernel(mean, jnp.hypot(std, scale * first.std))


@jax.jit
def to_the_end(schedule, s, t, u):
    """q(x_u | x_s) and q(x_u | x_0), each by every way there."""
    by_t = compose(transition(schedule, X0, s, t), lambda x: transition(schedule, x, t, u))
    by_s = compose(marginal(schedule, X0, s), lambda x: transition(schedule, x, s, u))
    at_once = transition(schedule, X0, jnp.zeros_like(u), u)
    return (by_t, transition(schedule, X0, s, u)), (by_s, marginal(schedule, X0, u)), (at_once, by_s)


@all_schedules
@given(times=st.lists(st.floats(1e-3, 1.0), min_size=3, max_size=3, unique=True))
def test_transitions_compose(schedule, times):
    """Chapman-Kolmogorov: s -> t -> u is s -> u, and starting from 0 it is the marginal."""
    s, t, u = sorted(times)
    assume(min(t - s, u - t) > 1e-3)
    for composed, direct in to_the_end(schedule, *map(jnp.array, (s, t, u))):
        assert_close(composed.mean, direct.mean, tolerances.IDENTITY)
        assert_close(composed.std, direct.std, tolerances.IDENTITY)


@all_schedules
def test_time_of_the_noise(schedule):
    """The OU process has this signal-to-noise ratio at `ou_time`, g² dt adds up to it, and steps cancel in dt."""
    t = jnp.array([0.0, 0.1, 1 / 3, 0.5, 0.9, 1.0])
    at = ou_time(schedule, t)
    assert_close(jnp.log(jnp.expm1(at[1:])), -schedule.log_snr(t[1:]), 1e-12)
    assert_close(of_ou_time(schedule, at[1:])[0], t[1:], 1e-12)
    middles = (jnp.arange(30_000) + 0.5) / 30_000  # exact for steps, else of second order
    passed = jnp.concatenate([jnp.zeros(1), jnp.cumsum(schedule.beta(middles)) / 30_000])
    nodes, weights = np.polynomial.legendre.leggauss(40)
    for i in range(len(t) - 1):
        times, dt = of_ou_time(schedule, (at[i] + at[i + 1]) / 2 + (at[i + 1] - at[i]) / 2 * nodes)
        found = (at[i + 1] - at[i]) / 2 * weights @ (dt * schedule.beta(times))
        here, there = (passed[round(float(30_000 * t[k]))] for k in (i, i + 1))
        assert_close(found, there - here, 2e-6)  # the cosine grows fast at its end
        assert abs(found / (there - here) - 1.001) > 1e-4  # negative control


@all_schedules
def test_transitions_are_not_marginals(schedule):
    """Negative control of the composition: a "transition" that noises afresh does not compose."""

    @jax.jit
    def stds(s, t):
        fresh = compose(marginal(schedule, X0, s), lambda x: marginal(schedule, x, t))
        return fresh.std, marginal(schedule, X0, t).std

    with pytest.raises(AssertionError):
        assert_close(*stds(jnp.array(0.2), jnp.array(0.7)), tolerances.IDENTITY)


@all_schedules
def test_transition_solves_the_forward_sde(schedule):
    """Var(x_t | x_s) = int g² exp(2 int f) by quadrature of f and g²; an SDE with half of g² is told apart."""
    s, t = 0.4102, 0.4108  # inside one step of either table, where f and g² are smooth; composing does the rest

    rates = jax.jit(lambda u: (schedule.f(u), schedule.beta(u)))

    def scale(r):
        return np.exp(scipy.integrate.quad(lambda u: float(rates(u)[0]), r, t, epsrel=1e-10)[0])

    def integrand(r):
        return float(rates(r)[1]) * scale(r) ** 2

    kernel = jax.tree.map(np.asarray, jax.jit(transition)(schedule, X0, jnp.array(s), jnp.array(t)))
    variance = scipy.integrate.fixed_quad(np.vectorize(integrand), s, t, n=8)[0]
    assert_close(kernel.mean, scale(s) * X0, tolerances.QUADRATURE)
    assert_close(kernel.std**2, variance, tolerances.QUADRATURE)
    with pytest.raises(AssertionError):
        assert_close(kernel.std**2, variance / 2, tolerances.QUADRATURE)


@jax.jit
def law_of_path(schedule, start, s, ts):
    """Means and covariance of x on the decreasing grid ts, from start at s: Cov(x_t, x_u) for u <= t is
    Var(x_u) d E[x_t | x_u] / d x_u."""
    kernels = jax.vmap(lambda t: transition(schedule, start, s, t))(ts)

    def gain(u, t):
        return jax.grad(lambda x: transition(schedule, x, u, t).mean)(start)

    gains = jax.vmap(lambda t: jax.vmap(lambda u: gain(u, t))(ts))(ts)  # [t, u]
    above = jnp.triu(gains * kernels.std[None] ** 2, 1)
    return kernels.mean, above + above.T + jnp.diag(kernels.std**2)


def assert_covariance(path, schedule, ts):
    """Means and covariance over the draws, axis 1, within standard errors."""
    draws = path.shape[1]
    means, expected = map(np.asarray, law_of_path(schedule, jnp.array(path[-1, 0]), ts[-1], ts[:-1]))
    path, stds = path[:-1], np.sqrt(np.diag(expected))
    assert np.all(np.abs(path.mean(1) - means) <= tolerances.STANDARD_ERRORS * stds / draws**0.5)
    error = np.sqrt((np.outer(stds, stds) ** 2 + expected**2) / draws)
    assert np.all(np.abs(np.cov(path) - expected) <= tolerances.STANDARD_ERRORS * error)


@pytest.mark.parametrize("end", [0.0, 0.3])
@all_schedules
def test_forward_path_has_the_joint_law_of_the_forward_process(schedule, end):
    """From data or from a later time; negative control: independent noise at every time, same marginals."""
    ts, draws = jnp.array([1.0, 0.7, 0.35, end]), 20_000
    x = jnp.full(draws, 1.3)
    path = np.asarray(forward_path(schedule, x, ts, jr.key(0)))
    np.testing.assert_array_equal(path[-1], x)
    assert_covariance(path, schedule, ts)

    shuffled = np.random.default_rng(0).permuted(path, axis=1)
    with pytest.raises(AssertionError):
        assert_covariance(shuffled, schedule, ts)


@jax.jit
def fokker_planck_residual(schedule, lam, drift_lam):
    """d log p / dt + (div b + b . score) + lam² g² / 2 (lap log p + |score|²), zero if the reverse SDE keeps p_t.

    b is the drift; the density and all derivatives of it are autodiff of the mixture's log_prob.
    """
    target, eps = plane(), noise_fn(plane(), schedule)

    def log_prob(x, t):
        return target.marginal(schedule, t).log_prob(x)

    def residual(x, t):
        def drift(x):
            return reverse_drift(schedule, eps, x, t, drift_lam)

        score = jax.grad(log_prob)(x, t)
        laplacian = jnp.trace(jax.hessian(log_prob)(x, t))
        transport = jnp.trace(jax.jacfwd(drift)(x)) + drift(x) @ score
        diffusion = reverse_diffusion(schedule, t, lam) ** 2 / 2
        terms = jnp.stack([jax.grad(log_prob, 1)(x, t), transport, diffusion * (laplacian + score @ score)])
        return jnp.abs(terms.sum()) / jnp.abs(terms).max()

    points = 1.5 * jr.normal(jr.key(1), (6, 2))
    return jax.vmap(lambda t: jax.vmap(lambda x: residual(x, t))(points))(jnp.array([0.105, 0.45, 0.9])).max()


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0, 2.0])
@all_schedules
def test_reverse_family_keeps_the_marginals(schedule, lam):
    """Eqs. (4), (5) and between: every lam solves the same Fokker-Planck equation; a mixed pair does not."""
    assert fokker_planck_residual(schedule, jnp.array(lam), jnp.array(lam)) < tolerances.IDENTITY
    assert fokker_planck_residual(schedule, jnp.array(lam), jnp.array(lam + 0.1)) > 1e-3


def test_reverse_sde_is_the_forward_sde_with_a_score_correction():
    """Anderson 1982: the drift of lam = 1 is f x - g² score, here with the score by autodiff."""
    schedule, target = LinearVP(), plane()

    @jax.jit
    def drifts(x, t):
        score = jax.grad(target.marginal(schedule, t).log_prob)(x)
        drift = reverse_drift(schedule, noise_fn(target, schedule), x, t, 1.0)
        return drift, schedule.f(t) * x - reverse_diffusion(schedule, t) ** 2 * score

    assert_close(*drifts(X0, jnp.array(0.3)), tolerances.ROUNDING)
