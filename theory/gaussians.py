"""Closed forms for Gaussian data that go beyond the exact score: moments under an inexact one, and of recorded noise.

For data N(m_0, V_0) everything in the paper is affine-Gaussian, so the laws of edited samples, of recorded noise and of
inexact samplers are a mean and a covariance.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float

from theory.arguments import level, prepared
from theory.mixtures import noise_fn
from theory.problems import Problem
from theory.solve import record, replay
from theory.types import Solver, Time, Times

Scalar = Float[Array, ""]


class Offset(NamedTuple):
    """A Gaussian relative to p_t = N(m_t, V_t), d = 1: e = (mean - m_t) / sqrt(V_t), r = variance / V_t."""

    e: Scalar
    r: Scalar

    @jax.jit
    def kl(self) -> Scalar:
        """KL(p~ | p) = 1/2 [e² + r - 1 - log r]."""
        return (self.e**2 + (self.r - 1) - jnp.log(self.r)) / 2


@jax.jit
def clock(problem: Problem, s: Time) -> Scalar:
    """A(s) = integral of g² / V from s to t0 = log[(alpha_s² / V_s) / (alpha_t0² / V_t0)], d = 1."""

    def log_signal(t: Time) -> Scalar:
        return 2 * problem.schedule.log_alpha(t) - jnp.log(problem.marginal(t).variances[0, 0])

    return log_signal(s) - log_signal(problem.t0)


@prepared(lam=level)
@jax.jit
def inexact_score(problem: Problem, s: Time, lam: float | Time, error: float | Time = 0.0) -> Offset:
    """The law at s of the reverse lambda-SDE run with (1 + error) score, for a Gaussian start and target, d = 1.

    With k = lam² + (1 + lam²) error and A = `clock`:  e_s = e exp(-k A / 2),  r_s = lam²/k + (r - lam²/k) exp(-k A).
    error = 0 gives rho = exp(-lam² A), the contraction of Theorem 3.1. Derived from the moment equations of the SDE.

    Raises ValueError for a noise level that cannot be.
    """
    marginal, start = problem.marginal(problem.t0), problem.start
    e = (start.means - marginal.means)[0, 0] / jnp.sqrt(marginal.variances[0, 0])
    r = (start.variances / marginal.variances)[0, 0]
    k = lam**2 + (1 + lam**2) * error
    A = clock(problem, s)
    passed = k * A
    # lam²/k (1 - exp(-k A)), finite at k = 0
    fresh = jnp.where(k == 0, lam**2 * A, -(lam**2) / k * jnp.expm1(-passed))
    return Offset(e * jnp.exp(-passed / 2), fresh + r * jnp.exp(-passed))


def girsanov_factor(lam: float | Time) -> float | Time:
    """(1 + lam²)² / (8 lam²), what integral g² E|e|² dt is multiplied with in Girsanov's bound; least, 1/2, at lam = 1.

    The drifts of two lambda-SDEs whose scores differ by e differ by (1 + lam²)/2 g² e, over noise lam g.
    """
    return (1 + lam**2) ** 2 / (8 * lam**2)


@jax.jit
def girsanov(problem: Problem, s: Time, lam: float | Time, error: float | Time) -> Scalar:
    """(1 + lam²)²/(8 lam²) integral over [s, t0] of g² E_p~|e|² dt, e = error score, for Gaussian laws, d = 1.

    By Girsanov's theorem the KL between the paths of the inexact and the exact lambda-SDE from one start; KL at s is at
    most KL at t0 plus this. In the clock A, g² E|e|² dt = error² (r + e²) dA with (e, r) as in `inexact_score`:
        integral = error² {lam²/k A + (r + e² - lam²/k) [1 - exp(-k A)]/k}.
    """
    start = inexact_score(problem, problem.t0, lam, error)
    A = clock(problem, s)
    k = lam**2 + (1 + lam**2) * error
    safe = jnp.where(k == 0, 1.0, k)
    decayed = jnp.where(k == 0, A, -jnp.expm1(-k * A) / safe)  # integral of exp(-k a)
    fresh = jnp.where(k == 0, lam**2 * A**2 / 2, lam**2 / safe * (A - decayed))
    return girsanov_factor(lam) * error**2 * (fresh + (start.r + start.e**2) * decayed)


def path_covariance(
    problem: Problem, ts: Times, independent: bool | Bool[Array, ""] = False
) -> Float[Array, "times times"]:
    """Cov(x_t, x_s) = alpha_t alpha_s V_0 + (alpha_t / alpha_s) sigma_s², s <= t, on the forward path; d = 1.

    `independent` noises x_0 anew for every time instead, as "edit-friendly" DDPM inversion does (Huberman-Spiegelglas
    et al. 2024, arXiv 2304.06140): then the second term is on the diagonal only.
    """
    alpha, sigma = problem.schedule.alpha(ts), problem.schedule.sigma(ts)
    signal = alpha[:, None] * alpha[None] * problem.target.variances[0, 0]
    earlier = jnp.arange(len(ts))[:, None] > jnp.arange(len(ts))[None]  # ts decreases: a later index is earlier in t
    shared = jnp.where(
        earlier, alpha[None] / alpha[:, None] * sigma[:, None] ** 2, alpha[:, None] / alpha[None] * sigma[None] ** 2
    )
    return signal + jnp.where(independent, jnp.diag(sigma**2), shared)


class Linear(NamedTuple):
    """An affine function of a Gaussian path by its mean and covariance."""

    mean: Float[Array, " n"]
    covariance: Float[Array, "n n"]


def through(
    f: Callable[[Float[Array, "times 1"]], Float[Array, " n"]],
    problem: Problem,
    ts: Times,
    independent: bool | Bool[Array, ""] = False,
) -> Linear:
    """The law of f(path) for Gaussian data and an f that is affine on paths, exact: the Jacobian is constant."""
    mean_path = problem.schedule.alpha(ts)[:, None] * problem.target.means[0][None]
    J = jax.jacfwd(f)(mean_path)[..., 0]
    return Linear(f(mean_path), J @ path_covariance(problem, ts, independent) @ J.T)


@jax.jit
def recorded_noise(solver: Solver, problem: Problem, ts: Times, independent: bool | Bool[Array, ""] = False) -> Linear:
    """The joint law of (w_1, ..., w_N, x_t0): the recorded noise of Eq. (8), and the latent it is recorded from."""
    eps_fn = noise_fn(problem.target, problem.schedule)

    def f(path: Float[Array, "times 1"]) -> Float[Array, " n"]:
        return jnp.append(record(solver, eps_fn, path, ts)[:, 0], path[0, 0])

    return through(f, problem, ts, independent)


@jax.jit
def cycle_edited(
    solver: Solver,
    problem: Problem,
    ts: Times,
    edit: Partial,
    independent: bool | Bool[Array, ""] = False,
) -> Linear:
    """The law of (x~_s, x_s) at the end of Cycle-SDE, for an affine edit of x_t0, (1,) -> (1,), and any grid."""
    eps_fn = noise_fn(problem.target, problem.schedule)

    def f(path: Float[Array, "times 1"]) -> Float[Array, " n"]:
        noise = record(solver, eps_fn, path, ts)
        edited = replay(solver, eps_fn, edit(path[0]), ts, noise)[-1]
        return jnp.concatenate([edited, path[-1]])

    return through(f, problem, ts, independent)
