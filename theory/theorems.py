"""The paper's statements as checks. Equation and theorem numbers are those of arXiv 2311.01410."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from theory import line
from theory.checks import Check, Study, at, at_most, difference, equal, largest_growth, less, scaled
from theory.flows import flow, kl_ode
from theory.mixtures import GaussianMixture, noise_fn
from theory.problems import Problem
from theory.processes import forward_path
from theory.ratios import ratio_sde
from theory.solve import invert, record, replay, time_grid
from theory.solvers import DDIM, DPMSolverPP2M, EulerMaruyama
from theory.types import Estimate, PRNGKey, Solver, Time, Times, X


def sde_contraction(study: Study) -> Iterator[Check]:
    """Theorem 3.1: dKL/dt = 1/2 g² I(p~_t | p_t) >= 0 along the reverse SDE."""
    curve = study.sde
    before, after = at(curve.kl, 0), at(curve.kl, -1)
    yield equal(
        "What the SDE removes of the KL divergence is the integrated Fisher divergence",
        "KL(t0) - KL(0) = 1/2 ∫ g² I dt",
        difference(before, after),
        scaled(study.integral(at(curve.fisher, slice(1, -1))), 0.5),
        study.tolerance,
    )
    yield at_most(
        "The KL divergence never grows on the way back (largest change between times)",
        "max [KL(s) - KL(t)] <= 0, s < t",
        largest_growth(curve.kl),
        0.0,
    )
    mass, weights = curve.mass, curve.mode_weights
    yield equal(
        "The computed law is a law at every time",
        "∫ p~_s = 1",
        at(mass, int(np.argmax(np.abs(mass.value - 1) + mass.error))),
        1.0,
        study.tolerance,
    )
    yield less("The SDE ends closer to the data than it started", "KL(0) < KL(t0)", after, before)
    worst = np.argmax(np.abs(weights.value / weights.value[0] - 1))
    time, mode = map(int, np.unravel_index(worst, weights.value.shape))
    yield equal(
        "The SDE leaves the weights of the modes as they are (the worst, at any time)",
        "E_p~[P(mode | x_s)] = E_p~[P(mode | x_t0)]",
        at(weights, (time, mode)),
        at(weights, (0, mode)),
        study.tolerance,
    )
    yield at_most(
        "The density ratio solves the Fokker-Planck equation of the reverse SDE, Eq. (4)",
        "∂r/∂t + f x·∇r + g²/2 (Δr + |∇r|²) = 0, r = log h",
        off_equation(study.problem),
        0.0,
        1e-11 if study.on_line else 1e-8,
    )


def off_equation(p: Problem, scale: float = 1.0, half: float = 0.5) -> Estimate:
    """How far log h is from solving Eq. (4)'s equation, at draws of the marginal at two times, of its largest term.

    The Fokker-Planck equation of dx = (f x - g² grad log p) dt + g dw for p~ = h p, less that for p, is the one above.
    h(scale x), and g² times `half`, do not solve it.
    """
    off, size, unknown = jax.device_get(_off_equation(p, jr.key(0), np.float64(scale), np.float64(half)))
    return Estimate(np.max(np.abs(off)) / size.max(), unknown.max())


@jax.jit
def _off_equation(p: Problem, key: PRNGKey, scale: Time, half: Time) -> tuple[Times, Times, Times]:
    """The sum of the terms and of their sizes at every draw, and the relative error of the gradient of h."""

    def at(t: Time, x: Float[Array, " d"]) -> tuple[Time, Time, Time]:
        def ratio(point: Float[Array, " t_x"]) -> tuple[Array, tuple[Array, Array]]:
            found = ratio_sde(p, point[0])(scale * point[1:])
            grad = scale * found.grad
            return jnp.concatenate([found.log_h[None], grad]), (grad, found.grad_error)

        slopes, (grad, unknown) = jax.jacfwd(ratio, has_aux=True)(jnp.concatenate([t[None], x]))
        half_g2 = half * p.schedule.beta(t)
        moved = p.schedule.f(t) * (x @ grad)
        terms = jnp.stack([slopes[0, 0], moved, half_g2 * jnp.trace(slopes[1:, 1:]), half_g2 * (grad @ grad)])
        return terms.sum(), jnp.abs(terms).sum(), jnp.linalg.norm(unknown) / (jnp.linalg.norm(grad) + 1e-3)

    ts = p.t0 * jnp.repeat(jnp.array([0.7, 0.2]), 32)
    x = jax.vmap(lambda t, key: p.marginal(t).sample(key))(ts, jr.split(key, len(ts)))
    return jax.lax.map(lambda point: at(*point), (ts, x))


def ode_invariance(study: Study) -> Iterator[Check]:
    """Theorem 3.2: KL is constant along the probability-flow ODE, here by the flow and its log-determinant."""
    p = study.problem
    before = at(study.sde.kl, 0)
    half = float(p.t0) / 2
    for s, after in ((half, kl_ode(p, half)), (0.0, study.ode)):
        yield equal(
            f"The ODE leaves the KL divergence as it is, down to t = {s:g}",
            "KL(s) = KL(t0)",
            after,
            before,
            1e-9 if study.on_line else 1e-8,
        )
    if study.on_line:
        y = _around(p.start)
        before, after = (
            np.exp(line.tails(law, x).log_lower)
            for law, x in ((p.marginal(p.t0), y[:, 0]), (p.target, flow(p, y, 0.0).x[:, 0]))
        )
        yield at_most(
            "On the line the ODE is the monotone map between marginals",
            "F_0(x_0) = F_t0(x_t0)",
            np.max(np.abs(after - before)),
            0.0,
            1e-9,
        )


def _around(law: GaussianMixture) -> Float[Array, "n 1"]:
    """Points within four standard deviations of each component."""
    centred = np.sqrt(law.variances) * np.linspace(-4, 4, 33)
    return jax.device_put((np.asarray(law.means) + centred).reshape(-1, 1))


def reconstruction(study: Study) -> Iterator[Check]:
    """Appendix A: without an edit, Cycle-SDE returns the source to rounding, ODE inversion to O(1/N)."""
    p = study.problem
    x = jax.jit(lambda p: p.target.sample(jr.key(0), (20,)))(p)
    for solver, by_hand in ((DDIM(p.schedule, 1.0), by_bayes), (EulerMaruyama(p.schedule, 1.0), by_score)):
        yield at_most(
            f"Noise that is recorded without a solver, replayed by {type(solver).__name__}, returns the source's path",
            f"x~_t = x_t, {by_hand.equation}",
            reconstruction_error(p, x, solver, by_hand),
            0.0,
            REPLAYED,
        )
    yield at_most(
        "What one solver records it replays, with several steps too: DPMSolverPP2M",
        "x~_t = x_t",
        reconstruction_error(p, x, DPMSolverPP2M(p.schedule, 1.0)),
        0.0,
        REPLAYED,
    )

    steps = (100, 200, 400)
    errors = np.array([inversion_error(p, x, n, longest=400) for n in steps])
    coarse, order = np.log2(errors[:-1] / errors[1:])
    yield equal(
        "DDIM inversion returns it to first order only (measured order)",
        "|x~_0 - x_0| = O(1/N)",
        Estimate(order, np.abs(order - coarse)),
        1.0,
        0.2,
    )
    p, x = jax.device_put(jax.tree.map(np.float32, (p, x)))
    single = inversion_error(p, x, 100, longest=400)
    yield equal(
        "That error is truncation: it is the same in float32", "error, float32 = float64", single, errors[0], 0.02
    )


REPLAYED = 1e-11  # rounding in a hundred steps, of kernels that are computed in two ways


class ByHand(NamedTuple):
    """What a step is, (p, x_t, t, s) -> (mean, std), from the law of the data, without a solver."""

    step: Callable[[Problem, X, Time, Time], tuple[X, Time]]
    equation: str


def _conditional(p: Problem, x: X, t: Time, s: Time) -> tuple[X, Time]:
    schedule = p.schedule
    mean = jax.vmap(lambda x: p.target.reverse_kernel(schedule, x, t, s).mean())(x)
    return mean, schedule.sigma(s) * jnp.sqrt(-jnp.expm1(schedule.log_snr(t) - schedule.log_snr(s)))


def _euler(p: Problem, x: X, t: Time, s: Time) -> tuple[X, Time]:
    f, g2 = p.schedule.f(t), p.schedule.beta(t)
    return x - (f * x - g2 * p.marginal(t).score(x)) * (t - s), jnp.sqrt(g2 * (t - s))


by_bayes = ByHand(_conditional, "w = (x_s - E[x_s | x_t]) / [σ_s sqrt(1 - snr_t/snr_s)]")
by_score = ByHand(_euler, "w = [x_s - x_t + (f x_t - g² ∇log p) Δt] / [g sqrt(Δt)]")


def reconstruction_error(p: Problem, x: X, solver: Solver, by_hand: ByHand | None = None, off: float = 0.0) -> float:
    """How far replay ends from a noised source's path, in 100 steps, relative to it.

    The noise is recorded by hand, with means that are `off` so much, relatively; or by the solver itself.
    """
    step = by_hand.step if by_hand else None
    ts = time_grid(p.schedule, 100, start=float(p.t0), end=1e-3 * float(p.t0))
    return float(_reconstruction_error(p, x, ts, np.float64(off), solver, step))


@partial(jax.jit, static_argnames="step")
def _reconstruction_error(p: Problem, x: X, ts: Times, off: Time, solver: Solver, step: Callable | None) -> Time:
    eps_fn = noise_fn(p.target, p.schedule)
    path = forward_path(p.schedule, x, ts, jr.key(1))
    if step is None:
        noise = record(solver, eps_fn, path, ts)
    else:
        mean, std = jax.vmap(lambda x, t, s: step(p, x, t, s))(path[:-1], ts[:-1], ts[1:])
        noise = jax.vmap(jnp.divide)(path[1:] - (1 + off) * mean, std)
    again = replay(solver, eps_fn, path[0], ts, noise)
    return jnp.max(jnp.abs(again - path)) / jnp.max(jnp.abs(path))


def inversion_error(p: Problem, x: Array, steps: int, longest: int = 0) -> float:
    """Root-mean-square error of DDIM inversion and back, in the precision of x.

    Steps of no length fill the grid up to `longest` steps: one compilation.
    """
    ts = np.asarray(time_grid(p.schedule, steps, start=float(p.t0), end=1e-3 * float(p.t0)), x.dtype)
    back = _there_and_back(p, x, np.pad(ts, (0, max(longest - steps, 0)), mode="edge"))
    return float(np.sqrt(np.mean((np.asarray(back) - np.asarray(x)) ** 2)))


@jax.jit
def _there_and_back(p: Problem, x: X, ts: Times) -> X:
    solver, eps_fn = DDIM(p.schedule), noise_fn(p.target, p.schedule)
    latent = invert(solver, eps_fn, x, ts)[0]
    return replay(solver, eps_fn, latent, ts, jnp.zeros((ts.size - 1, *x.shape), x.dtype))[-1]
