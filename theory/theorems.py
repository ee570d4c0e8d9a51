"""The paper's statements as checks. Equation and theorem numbers are those of arXiv 2311.01410."""

from collections.abc import Iterator

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
from theory.solve import invert, record, replay, time_grid
from theory.solvers import DDIM, DPMSolverPP2M, EulerMaruyama
from theory.types import Solver, Times, X


def sde_contraction(study: Study) -> Iterator[Check]:
    """Theorem 3.1: dKL/dt = 1/2 g² I(p~_t | p_t) >= 0 along the reverse SDE."""
    curve = study.sde
    before, after = at(curve.kl, 0), at(curve.kl, -1)
    tolerance = 1e-12 if study.on_line else 1e-8
    yield equal(
        "What the SDE removes of the KL divergence is the integrated Fisher divergence",
        "KL(t0) - KL(0) = 1/2 ∫ g² I dt",
        difference(before, after),
        scaled(study.integral(at(curve.fisher, slice(1, -1))), 0.5),
        tolerance,
    )
    yield at_most(
        "The KL divergence never grows on the way back (largest change between times)",
        "max [KL(s) - KL(t)] <= 0, s < t",
        largest_growth(curve.kl),
        0.0,
    )
    mass = curve.mass
    yield equal(
        "The computed law is a law at every time",
        "∫ p~_s = 1",
        at(mass, int(np.argmax(np.abs(mass.value - 1) + mass.error))),
        1.0,
        tolerance,
    )
    yield less("The SDE ends closer to the data than it started", "KL(0) < KL(t0)", after, before)


def ode_invariance(study: Study) -> Iterator[Check]:
    """Theorem 3.2: KL is constant along the probability-flow ODE, here by the flow and its log-determinant."""
    p = study.problem
    before = at(study.sde.kl, 0)
    for fraction in (0.5, 0.0):
        s = fraction * float(p.t0)
        yield equal(
            f"The ODE leaves the KL divergence as it is, down to t = {s:g}",
            "KL(s) = KL(t0)",
            kl_ode(p, s),
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
    x, eps_fn = p.target.sample(jr.key(0), (20,)), noise_fn(p.target, p.schedule)
    ts = time_grid(p.schedule, 100, start=float(p.t0), end=1e-3)
    path = forward_path(p.schedule, x, ts, jr.key(1))

    @jax.jit
    def error(solver: Solver) -> Array:
        again = replay(solver, eps_fn, path[0], ts, record(solver, eps_fn, path, ts))
        return jnp.max(jnp.abs(again - path)) / jnp.max(jnp.abs(path))

    for solver in (DDIM(p.schedule, 1.0), EulerMaruyama(p.schedule, 1.0), DPMSolverPP2M(p.schedule, 1.0)):
        yield at_most(
            f"Cycle-SDE with {type(solver).__name__} returns the source, and its path",
            "x~_t = x_t",
            error(solver),
            0.0,
        )

    steps = np.array([100, 200, 400])
    errors = np.array([inversion_error(p, x, n, longest=400) for n in steps.tolist()])
    order = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    yield equal(
        "DDIM inversion returns it to first order only (measured order)", "|x~_0 - x_0| = O(1/N)", order, 1.0, 0.2
    )
    p, x = jax.device_put(jax.tree.map(np.float32, (p, x)))
    single = inversion_error(p, x, 100)
    yield equal(
        "That error is truncation: it is the same in float32", "error, float32 = float64", single, errors[0], 0.02
    )


def inversion_error(p: Problem, x: Array, steps: int, longest: int = 0) -> float:
    """Root-mean-square error of DDIM inversion and back, in the precision of x.

    Steps of no length fill the grid up to `longest` steps: one compilation.
    """
    ts = np.asarray(time_grid(p.schedule, steps, start=float(p.t0), end=1e-3), x.dtype)
    back = _there_and_back(p, x, np.pad(ts, (0, max(longest - steps, 0)), mode="edge"))
    return float(np.sqrt(np.mean((np.asarray(back) - np.asarray(x)) ** 2)))


@jax.jit
def _there_and_back(p: Problem, x: X, ts: Times) -> X:
    solver, eps_fn = DDIM(p.schedule), noise_fn(p.target, p.schedule)
    latent = invert(solver, eps_fn, x, ts)[0]
    return replay(solver, eps_fn, latent, ts, jnp.zeros((ts.size - 1, *x.shape), x.dtype))[-1]
