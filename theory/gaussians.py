"""Closed forms for Gaussian data on the line that go beyond the exact score: moments under an inexact one.

For data N(m_0, V_0) everything in the paper is affine-Gaussian, so a law is a mean and a variance. `theory.cycles` has
the laws of recorded noise and of Cycle-SDE.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from theory.arguments import level, prepared
from theory.problems import Problem
from theory.types import Time

Scalar = Float[Array, ""]


class Offset(NamedTuple):
    """A Gaussian relative to p_t = N(m_t, V_t), d = 1: e = (mean - m_t) / sqrt(V_t), r = variance / V_t."""

    e: Float[Array, "*times"]
    r: Float[Array, "*times"]

    @jax.jit
    def kl(self) -> Float[Array, "*times"]:
        """KL(p~ | p) = 1/2 [e² + r - 1 - log r]."""
        return (self.e**2 + (self.r - 1) - jnp.log1p(self.r - 1)) / 2  # r near 1 cancels in the difference alone


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
