"""The paper's statements as checks. Equation and theorem numbers are those of arXiv 2311.01410."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from theory import line
from theory.checks import Check, Study, at, at_most, difference, equal, gaussian_problem, largest_growth, less, scaled
from theory.flows import flow, kl_ode
from theory.gaussians import Linear, Offset, cycle_edited, inexact_score, recorded_noise
from theory.mixtures import GaussianMixture, noise_fn
from theory.problems import Problem
from theory.processes import forward_path, transition
from theory.solve import invert, record, replay, time_grid
from theory.solvers import DDIM, DPMSolverPP2M, EulerMaruyama
from theory.types import PRNGKey, Solver, Time, Times, X


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
    before = study.sde.kl.value[0]
    for fraction in (0.5, 0.0):
        s = fraction * float(p.t0)
        yield equal(
            f"The ODE leaves the KL divergence as it is, down to t = {s:g}",
            "KL(s) = KL(t0)",
            kl_ode(p, s).value,
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


def cycle_contraction(study: Study) -> Iterator[Check]:
    """Theorem 3.3: recorded noise is white and independent of x_t0, so Cycle-SDE has the marginals of the SDE."""
    g, p = gaussian_problem(), study.problem
    solver = DDIM(g.schedule, eta=1.0)
    ts = time_grid(g.schedule, 64, end=1e-3)
    same, fresh = (correlation(recorded_noise(solver, g, ts, independent).covariance) for independent in (False, True))
    off = np.abs(same - np.diag(np.diag(same)))
    yield at_most(
        "Recorded noise is white (Gaussian data, any number of steps)",
        "Cor(w_i, w_j) = 0",
        off[:-1, :-1].max(),
        0.0,
        1e-11,
    )
    yield at_most(
        "Recorded noise is independent of the latent it is recorded from",
        "Cor(w_i, x_t0) = 0",
        off[-1, :-1].max(),
        0.0,
        1e-11,
    )

    steps = np.array([32, 64])
    excess = [_variance_at_half(solver, g, n) - 1 for n in steps.tolist()]
    yield equal(
        "Its variance tends to 1 with the step size (measured order)",
        "Var(w) = 1 + O(1/N)",
        -np.polyfit(np.log(steps), np.log(excess), 1)[0],
        1.0,
        0.1,
    )
    end = jnp.asarray(1e-3, float)
    for n in (5, 64):
        edited = cycle_edited(solver, g, time_grid(g.schedule, n, end=1e-3), to_start(g))
        yield equal(
            f"With Gaussian data {n} steps of Cycle-SDE have the KL of the exact SDE: no discretisation bias",
            "KL(p~_s | p_s), Cycle = SDE",
            end_offset(edited, g, end).kl(),
            inexact_score(g, end, 1.0).kl(),
            1e-9,
        )
    means = _means_of_a_step(p, jr.key(0))
    yield at_most(
        "Recorded noise has mean zero given x_t, for any data",
        "E[w | x_t] = 0",
        np.max(np.abs(np.subtract(*means))),
        0.0,
        1e-12,
    )

    neighbours = np.diag(fresh[:-1, :-1], 1)
    yield equal(
        'Counter-example: "edit-friendly" noise, drawn independently for each t, is not white',
        "Cor(w_i, w_{i+1}) -> -1/2",
        neighbours[len(neighbours) // 2],
        -0.5,
        0.02,
    )
    if study.on_line:
        yield cycle_by_sampling(p)


@jax.jit
def _means_of_a_step(p: Problem, key: PRNGKey) -> tuple[Float[Array, "50 d"], Float[Array, "50 d"]]:
    """E[x_s | x_t] by DDIM and by the reverse kernel, at 50 draws of the start."""
    t, s = 0.6 * p.t0, 0.5 * p.t0
    x = p.start.sample(key, (50,))
    q, _ = DDIM(p.schedule, eta=1.0).kernel(noise_fn(p.target, p.schedule), x, t, s, ())
    return q.mean, jax.vmap(lambda x: p.target.reverse_kernel(p.schedule, x, t, s).mean())(x)


def cycle_by_sampling(p: Problem, independent: bool = False, particles: int = 20_000, steps: int = 150) -> Check:
    """Cycle-SDE on the mixture itself: x_t0 is edited by the monotone map to the start, and the noise replayed.

    `independent` noises the data anew for every time, as "edit-friendly" inversion does.
    """
    solver, eps_fn = DDIM(p.schedule, eta=1.0), noise_fn(p.target, p.schedule)
    ts = time_grid(p.schedule, steps, start=float(p.t0), end=1e-3)
    rule_weights, z = _hermite(80)

    @jax.jit
    def member_and_expected(p: Problem, key: PRNGKey) -> tuple[Array, Array]:
        """P(top mode) at the end of every draw, and its mean by the SDE."""
        data_key, path_key = jr.split(key)
        x = p.marginal(ts[-1]).sample(data_key, (particles,))
        path = forward_path(p.schedule, x, ts, path_key)
        if independent:
            noised = jax.vmap(lambda t: transition(p.schedule, x, ts[-1], t))(ts[:-1])
            fresh = jax.vmap(jnp.multiply)(noised.std, jr.normal(path_key, noised.mean.shape))
            path = jnp.concatenate([noised.mean + fresh, x[None]])
        latent = line.quantile(p.start, line.tails(p.marginal(p.t0), path[0][:, 0]))[:, None]
        end = replay(solver, eps_fn, latent, ts, record(solver, eps_fn, path, ts))[-1]
        top = jnp.argmax(p.target.means[:, 0])
        y = p.start.means[:, None] + jnp.sqrt(p.start.variances)[:, None] * z[None, :, None]
        by_sde = p.start.weights[:, None] * rule_weights[None] * p.marginal(p.t0).responsibilities(y)[top]
        return p.marginal(ts[-1]).responsibilities(end)[top], by_sde.sum()

    member, expected = jax.device_get(member_and_expected(p, jr.key(0)))
    standard_error = member.std() / np.sqrt(particles)
    return equal(
        f"Cycle-SDE on the mixture ends in the modes as the SDE does ({particles} draws, 4 standard errors)",
        "P(top mode), Cycle = SDE",
        member.mean(),
        expected,
        float(4 * standard_error / expected),
    )


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


@jax.jit
def to_start(g: Problem) -> Partial:
    """The affine edit of x_t0 that turns the Gaussian marginal into the Gaussian start."""
    marginal = g.marginal(g.t0)
    scale = jnp.sqrt(g.start.variances[0] / marginal.variances[0])
    return Partial(_affine, scale, g.start.means[0] - scale * marginal.means[0])


def _affine(scale: Float[Array, "1"], shift: Float[Array, "1"], x: Float[Array, "1"]) -> Float[Array, "1"]:
    return scale * x + shift


def correlation(covariance: Float[Array, "n n"]) -> Float[np.ndarray, "n n"]:
    """Correlation matrix of a covariance matrix."""
    scale = 1 / np.sqrt(np.diag(covariance))
    return np.asarray(covariance) * scale[:, None] * scale


def _variance_at_half(solver: DDIM, g: Problem, steps: int) -> float:
    """Variance of the noise recorded in the step that ends at t = 1/2."""
    ts = np.asarray(time_grid(g.schedule, steps, end=1e-3))
    at = np.argmin(np.abs(ts - 0.5))
    return float(np.asarray(recorded_noise(solver, g, ts[at - 1 : at + 1]).covariance)[0, 0])


@jax.jit
def end_offset(end: Linear, g: Problem, s: Time) -> Offset:
    """The first coordinate of a joint law, relative to p_s."""
    marginal = g.marginal(s)
    return Offset(
        (end.mean[0] - marginal.means[0, 0]) / jnp.sqrt(marginal.variances[0, 0]),
        end.covariance[0, 0] / marginal.variances[0, 0],
    )


def _hermite(points: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights and nodes of E[F(z)], z ~ N(0, 1)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    return weights / np.sqrt(2 * np.pi), nodes


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
