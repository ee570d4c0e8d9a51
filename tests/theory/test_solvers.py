"""Solver kernels: order on exact flows and exact laws, exact posterior means, equivalences, limits.

Orders are measured, never assumed: deterministic solvers against the closed-form probability-flow ODE, stochastic
ones against the closed-form law of the reverse SDE on Gaussian data. There every step is affine in the point and in
the noise, so the law of the whole chain follows from the steps' derivatives (theory.chains), without sampling.
"""

from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from jax.tree_util import Partial

from tests import tolerances
from tests.cases import DETERMINISTIC, SCHEDULES, STOCHASTIC, assert_close, assert_order, normal, plane, scales
from theory.chains import Moments, gaussian_chain
from theory.mixtures import gaussian, mixture_1d, noise_fn
from theory.problems import Problem
from theory.schedules import CosineVP, LinearVP, VarianceExploding
from theory.solve import replay, sample, time_grid
from theory.solvers import DDIM, DPMSolverPP2M, EulerMaruyama, Heun
from theory.types import Solver

pytestmark = pytest.mark.hasty

SCHEDULE = LinearVP(0.1, 10.0)
END = 0.05  # orders are measured on [END, 1], where the exact noise prediction is smooth
STEPS = (48, 96, 192)
WEIGHTS, MEANS, STDS = np.array([0.4, 0.6]), np.array([-1.0, 1.5]), np.array([0.5, 0.7])
MEAN, VARIANCE = 1.3, 0.25  # Gaussian data
START_MEAN, START_VARIANCE = 0.5, 0.36  # a start that is not the noised data
DATA_AND_START = ((MEAN, VARIANCE), (START_MEAN, START_VARIANCE))


@jax.jit
def step(solver, eps, x, t, s, state):
    """One kernel, compiled as a whole."""
    return solver.kernel(eps, x, t, s, state)


one_step = pytest.mark.parametrize(
    "solver", [m(SCHEDULE) for m in (*DETERMINISTIC.values(), *STOCHASTIC.values())], ids=[*DETERMINISTIC, *STOCHASTIC]
)


def gaussian_flow(schedule, x: float, t: float, s: float) -> float:
    """(x - alpha m) / sqrt(alpha² v + sigma²) is constant along the probability-flow ODE of Gaussian data."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = scales(schedule, t), scales(schedule, s)
    z = (x - alpha_t * MEAN) / np.hypot(alpha_t * VARIANCE**0.5, sigma_t)
    return alpha_s * MEAN + np.hypot(alpha_s * VARIANCE**0.5, sigma_s) * z


def mixture_flow(schedule, x: float, t: float, s: float) -> float:
    """x_s = F_s^-1(F_t(x_t)): the ODE keeps quantiles on the line."""

    def cdf(y, time):
        alpha, sigma = scales(schedule, time)
        return WEIGHTS @ scipy.stats.norm.cdf(y, alpha * MEANS, np.hypot(alpha * STDS, sigma))

    return scipy.optimize.brentq(lambda y: cdf(y, s) - cdf(x, t), -50, 50, xtol=1e-14)


FLOWS = {
    "gaussian": (gaussian([MEAN], [[VARIANCE]]), gaussian_flow),
    "mixture": (mixture_1d(WEIGHTS, MEANS, STDS), mixture_flow),
}
ORDERS = {"DDIM(0)": 1, "EulerMaruyama(0)": 1, "Heun": 2, "DPMSolverPP2M(0)": 2}


def grid(schedule, steps: int):
    """Filled up with its last time to the longest of STEPS: steps of no length are left out, and compile once."""
    return jnp.asarray(np.pad(time_grid(schedule, steps, end=END), (0, max(STEPS) - steps), mode="edge"))


def flow_error(solver, law: str):
    """steps -> |solution - exact flow| at END from three points at t = 1."""
    data, flow = FLOWS[law]
    x = jnp.array([[-1.2], [0.3], [1.7]])
    exact = np.array([[flow(solver.schedule, float(p), 1.0, END)] for p in x[:, 0]])

    def error(steps):
        end = sample(solver, noise_fn(data, solver.schedule), x, grid(solver.schedule, steps), jr.key(0))
        return np.abs(np.asarray(end) - exact).max()

    return error


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("law", FLOWS)
def test_order_of_ode_solvers(name, law):
    """Strong order on the probability-flow ODE of Gaussian and of mixture data, in closed form."""
    assert_order(flow_error(DETERMINISTIC[name](SCHEDULE), law), ORDERS[name], STEPS)


@pytest.mark.parametrize("name", ["Heun", "DPMSolverPP2M(0)"])
def test_order_does_not_depend_on_the_schedule(name):
    """Second order also on the cosine schedule, stopped where alpha is not yet small."""
    assert_order(flow_error(DETERMINISTIC[name](CosineVP(end=0.9)), "mixture"), 2, STEPS)


def test_order_is_told_apart():
    """Negative control: DDIM is not of second order, Heun not of first."""
    for name, wrong in (("DDIM(0)", 2), ("Heun", 1)):
        with pytest.raises(AssertionError):
            assert_order(flow_error(DETERMINISTIC[name](SCHEDULE), "gaussian"), wrong, STEPS)


def exact_law(lam: float) -> tuple[float, float]:
    """Mean and variance at END of the reverse lambda-SDE of Gaussian data, from N(START_MEAN, START_VARIANCE) at 1.

    In units of the noised data, mean sqrt(rho) e and variance 1 + rho (r - 1), with
    rho = (snr_t / V_t)^lam² of 1 over that of END, V = alpha² v + sigma²: Ornstein-Uhlenbeck in the clock int g² / V.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = scales(SCHEDULE, 1.0), scales(SCHEDULE, END)
    v_t, v_s = alpha_t**2 * VARIANCE + sigma_t**2, alpha_s**2 * VARIANCE + sigma_s**2
    rho = (alpha_t**2 * v_s / (alpha_s**2 * v_t)) ** lam**2
    e, r = (START_MEAN - alpha_t * MEAN) / v_t**0.5, START_VARIANCE / v_t
    return alpha_s * MEAN + (rho * v_s) ** 0.5 * e, v_s * (1 + rho * (r - 1))


@jax.jit
def chain_law(solver, ts):
    """Mean and variance of the chain that the kernels make, exact because every step is affine."""
    given = Problem(*(gaussian([m], [[v]]) for m, v in DATA_AND_START), SCHEDULE, jnp.ones(()))
    laws = gaussian_chain(solver, given, Moments(given.start.means[0], given.start.covariances[0]), ts)
    return laws.mean[-1, 0], laws.covariance[-1, 0, 0]


def law_error(solver, lam: float):
    """steps -> Wasserstein-2 distance of the law of the chain from that of the reverse SDE."""
    exact_mean, exact_variance = exact_law(lam)

    def error(steps):
        mean, variance = map(float, chain_law(solver, grid(SCHEDULE, steps)))
        return np.hypot(mean - exact_mean, variance**0.5 - exact_variance**0.5)

    return error


@pytest.mark.parametrize(
    ("solver", "lam", "expected"),
    [
        (DDIM(SCHEDULE, 0.5), 0.5, 1),
        (DDIM(SCHEDULE, 1.0), 1.0, 1),
        (EulerMaruyama(SCHEDULE, 0.5), 0.5, 1),
        (EulerMaruyama(SCHEDULE, 1.0), 1.0, 1),
        (EulerMaruyama(SCHEDULE, 2.0), 2.0, 1),
        (DPMSolverPP2M(SCHEDULE, 0.5), 0.5, 2),
        (DPMSolverPP2M(SCHEDULE, 1.0), 1.0, 2),
    ],
    ids=lambda value: f"{type(value).__name__}" if isinstance(value, Solver) else None,
)
def test_order_of_sde_solvers(solver, lam, expected):
    """Order of the law on Gaussian data: eta plays lambda, and the two-step SDE solver keeps its second order."""
    assert_order(law_error(solver, lam), expected, STEPS)


def test_law_error_sees_the_noise_level():
    """Negative control: against the law of another lambda the error does not vanish at all."""
    with pytest.raises(AssertionError):
        assert_order(law_error(DDIM(SCHEDULE, 1.0), 0.5), 1, STEPS)


@pytest.mark.parametrize("lam", [0.0, 0.5, 2.0])
def test_euler_maruyama_takes_its_coefficients_where_the_step_begins(lam):
    """Ito: drift and diffusion of beta(t) = 0.1 + 9.9 t at t, not at s. The order of the law is blind to which."""
    eps, x, t, s = np.array([0.3, -1.1]), np.array([0.8, -0.5]), 0.9, 0.35
    _, sigma = scales(SCHEDULE, t)

    def euler(beta):
        drift = -beta * x / 2 + (1 + lam**2) / 2 * beta * eps / sigma
        return [*(x + drift * (s - t)), lam * (beta * (t - s)) ** 0.5]

    kernel, _ = EulerMaruyama(SCHEDULE, lam).kernel(lambda x, t: jnp.array(eps), *map(jnp.array, (x, t, s)), ())
    found = [*np.asarray(kernel.mean), float(kernel.std)]
    assert_close(found, euler(0.1 + 9.9 * t), tolerances.ROUNDING)
    with pytest.raises(AssertionError):
        assert_close(found, euler(0.1 + 9.9 * s), tolerances.ROUNDING)


@jax.jit
def posterior(law, schedule, x, t, s):
    """Mean, and variances of the components, of q(x_s | x_t)."""
    kernel = law.reverse_kernel(schedule, x, t, s)
    return kernel.mean(), kernel.variances


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_ancestral_mean_is_the_posterior_mean(schedule):
    """DDIM(1) has mean E[x_s | x_t] for any data law, and std that of q(x_s | x_t, x_0); DDIM(0.9) has neither."""
    t, s, x = jnp.array(0.9), jnp.array(0.35), jnp.array([0.8, -0.5])

    def assert_posterior(eta):
        kernel, _ = step(DDIM(schedule, eta), noise_fn(plane(), schedule), x, t, s, ())
        mean, _ = posterior(plane(), schedule, x, t, s)
        assert_close(kernel.mean, mean, tolerances.IDENTITY)
        _, variances = posterior(gaussian([0.2, 0.1], 1e-14 * np.eye(2)), schedule, x, t, s)
        assert_close(np.full((1, 2), float(kernel.std) ** 2), variances, tolerances.IDENTITY)

    assert_posterior(1.0)
    with pytest.raises(AssertionError):
        assert_posterior(0.9)


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_first_dpm_solver_step_is_ddim(level):
    """Without history DPM-Solver++ is DDIM, as an ODE and as an SDE (arXiv 2211.01095, Sec. 4); later it is not."""
    eps, x = noise_fn(plane(), SCHEDULE), jnp.array([0.8, -0.5])
    t, s, r = jnp.array(0.9), jnp.array(0.7), jnp.array(0.5)
    solver, reference = DPMSolverPP2M(SCHEDULE, level), DDIM(SCHEDULE, level)
    first, state = step(solver, eps, x, t, s, solver.init(x))
    expected, _ = step(reference, eps, x, t, s, ())
    assert_close(first.mean, expected.mean, tolerances.ROUNDING)
    assert_close(first.std, expected.std, tolerances.IDENTITY)

    second, _ = step(solver, eps, first.mean, s, r, state)
    unlike, _ = step(reference, eps, first.mean, s, r, ())
    assert np.abs(second.mean - unlike.mean).max() > 1e-3


@jax.jit
def two_steps(solver, eps, x, ts, scale):
    """Kernels of two steps, so that history counts, the second from the mean of the first; in units of scale."""
    first, state = solver.kernel(eps, x, ts[0], ts[1], solver.init(x))
    second, _ = solver.kernel(eps, first.mean, ts[1], ts[2], state)
    return jnp.concatenate([second.mean, second.std[None]]) / scale


@pytest.mark.parametrize("name", [*DETERMINISTIC, *STOCHASTIC])
def test_variance_exploding_view_is_equivalent(name):
    """The same steps on y = x / alpha give the same result, but for Euler-Maruyama, which sees the coordinates."""
    make = (DETERMINISTIC | STOCHASTIC)[name]
    exploding, ts, x = VarianceExploding(SCHEDULE), jnp.array([0.9, 0.6, 0.4]), jnp.array([0.8, -0.5])
    (first, _), (last, _) = (scales(SCHEDULE, t) for t in (0.9, 0.4))
    vp = np.asarray(two_steps(make(SCHEDULE), noise_fn(plane(), SCHEDULE), x, ts, last))
    ve = np.asarray(two_steps(make(exploding), noise_fn(plane(), exploding), np.asarray(x) / first, ts, 1.0))
    if name.startswith("Euler"):
        assert np.abs(vp - ve).max() > 1e-2  # negative control
    else:
        assert_close(vp, ve, tolerances.IDENTITY)


@pytest.mark.parametrize("method", [partial(DDIM, eta=0.0), partial(DDIM, eta=1.0), Heun, DPMSolverPP2M])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_last_step_returns_the_clean_prediction(method, dtype):
    """At s = 0, where log_snr is infinite, the mean is E[x_0 | x_t] and nothing is added, with history or without."""
    law = jax.tree.map(lambda a: a.astype(dtype), plane())
    solver, x = method(SCHEDULE), jnp.array([0.8, -0.5], dtype)
    r, t, s = (jnp.array(time, dtype) for time in (0.5, 0.3, 0.0))
    clean, _ = posterior(law, SCHEDULE, x, t, jnp.array(1e-12, dtype))
    _, state = step(solver, noise_fn(law, SCHEDULE), x, r, t, solver.init(x))
    for state in (solver.init(x), state):  # noqa: B020
        kernel, _ = step(solver, noise_fn(law, SCHEDULE), x, t, s, state)
        assert kernel.mean.dtype == kernel.std.dtype == dtype and kernel.std == 0
        assert_close(kernel.mean, clean, tolerances.IDENTITY if dtype == jnp.float64 else tolerances.PARITY_32)
        assert np.abs(kernel.mean - x).max() > 0.1  # negative control: the step did something


@one_step
def test_kernels_keep_the_type_and_the_promises(solver):
    """float32 stays float32, std > 0 exactly for stochastic solvers, and the solver is static and hashable."""
    x, (t, s) = jnp.ones((3, 2), jnp.float32), (jnp.array(time, jnp.float32) for time in (0.9, 0.6))
    law = jax.tree.map(lambda a: a.astype(jnp.float32), plane())
    kernel, state = step(solver, noise_fn(law, solver.schedule), x, t, s, solver.init(x))
    assert isinstance(solver, Solver) and jax.tree.leaves(solver) == [] and hash(solver) == hash(solver)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((kernel, state)))
    assert (kernel.std > 0) == solver.stochastic


@pytest.mark.parametrize("solver", [DDIM(SCHEDULE, 1.0), Heun(SCHEDULE), DPMSolverPP2M(SCHEDULE, 1.0)])
def test_steps_batch(solver):
    """A batch of points is the points one by one; the clean prediction uses no other point."""
    x, ts, eps = normal(3, 2), jnp.array([0.9, 0.6, 0.4]), noise_fn(plane(), SCHEDULE)
    paths = [np.asarray(replay(solver, eps, p, ts, np.ones((2, *p.shape)))) for p in (x, *np.asarray(x))]
    assert_close(paths[0], np.stack(paths[1:], axis=1), tolerances.ROUNDING)


@pytest.mark.parametrize(("method", "name"), [(DDIM, "eta"), (EulerMaruyama, "lam"), (DPMSolverPP2M, "lam")])
@pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan")])
def test_bad_noise_levels_are_named(method, name, value):
    """ValueError with the solver, the parameter and the value."""
    with pytest.raises(ValueError, match=f"{method.__name__}.*{name}.*{value}"):
        method(SCHEDULE, value)


def test_noise_function_may_be_any_partial():
    """Kernels call eps_fn(x, t) and nothing else: an atom at a, whose noise prediction is (x - alpha a) / sigma."""

    def atom_eps(a, x, t):
        return (x - SCHEDULE.alpha(t) * a) / SCHEDULE.sigma(t)

    x, t, s, a = jnp.array([2.0]), jnp.array(0.8), jnp.array(0.1), jnp.array([0.3])
    kernel, _ = DDIM(SCHEDULE, 0.0).kernel(Partial(atom_eps, a), x, t, s, ())
    path = SCHEDULE.alpha(s) * a + SCHEDULE.sigma(s) / SCHEDULE.sigma(t) * (x - SCHEDULE.alpha(t) * a)
    assert_close(kernel.mean, path, tolerances.ROUNDING)
