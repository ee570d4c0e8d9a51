"""Classifier-free guidance: how much of the theorems survives a drift that is not that of p_t, exactly.

Everybody edits with the guided score

    s_w = s_u + w (s_c - s_u),      s_c, s_u the scores of p_t(. | c) and p_t

(Ho & Salimans 2022, arXiv 2207.12598). For w != 1 it is not the score of a diffused law, so p_t(. | c) is not what the
reverse process keeps, and its levels of noise do not share their marginals (Bradley & Nakkiran 2024, arXiv 2408.09000).
Theorem 3.1 needs less than that: any two runs of one SDE contract,

    dKL(p~ | p^w)/dtau = -lam²/2 g² I(p~ | p^w),      p^w the law of the guided run from the right start,

and two runs of one ODE keep their KL. Towards p(. | c) there is a floor, KL(p^w | p(. | c)).

For Gaussian laws on the line, N(m_c, v_c) and N(m_u, v_u), all is a mean and a variance. With u = (sigma / alpha)²,
C = v_c + u, U = v_u + u and kappa = (1 + lam²)/2, x / alpha - m_c is a linear process, which from u to u_s < u is
multiplied by

    push = (C_s / C)^(kappa w) (U_s / U)^(kappa (1 - w)).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from theory.gaussians import Offset
from theory.mixtures import GaussianMixture, noise_fn
from theory.predictions import guide
from theory.problems import Problem
from theory.quadrature import legendre_panels
from theory.types import Schedule, Time, X

Scalar = Float[Array, ""]

# Panels of the integrals over log(v + u), finer towards both ends: at high noise levels all happens next to one.
SHARES = np.concatenate([[0.0], 2.0 ** np.arange(-14, -1), [0.5], 1 - 2.0 ** np.arange(-2, -15, -1), [1.0]])


def guided(
    conditional: GaussianMixture, unconditional: GaussianMixture, schedule: Schedule, scale: float | Time
) -> Partial:
    """The exact guided noise prediction, eps_u + w (eps_c - eps_u); w is an array: a new one is not a new trace."""
    return Partial(guided_eps, conditional, unconditional, schedule, jnp.asarray(scale, float))


def guided_eps(
    conditional: GaussianMixture, unconditional: GaussianMixture, schedule: Schedule, scale: Time, x: X, t: Time
) -> X:
    """eps_u + w (eps_c - eps_u) at the points x, (*batch, d)."""
    return guide(noise_fn(unconditional, schedule)(x, t), noise_fn(conditional, schedule)(x, t), scale)


def class_law(law: GaussianMixture, members: Int[np.ndarray, " k"]) -> GaussianMixture:
    """p(. | c) where a class c is some components of a mixture: those alone, with weights that add up to one."""
    kept = GaussianMixture(*(leaf[members] for leaf in law))
    return kept._replace(log_weights=jax.nn.log_softmax(kept.log_weights))


class Normal(NamedTuple):
    """A Gaussian on the line."""

    mean: Scalar
    variance: Scalar

    def relative_to(self, other: "Normal") -> Offset:
        return Offset((self.mean - other.mean) / jnp.sqrt(other.variance), self.variance / other.variance)

    @jax.jit
    def kl(self, other: "Normal") -> Scalar:
        """KL(self | other)."""
        return self.relative_to(other).kl()

    @jax.jit
    def fisher(self, other: "Normal") -> Scalar:
        """E |grad log self/other|² under self: [e² + (r - 1)² / r] / variance of the other."""
        e, r = self.relative_to(other)
        return (e**2 + (r - 1) ** 2 / r) / other.variance


def normal(law: GaussianMixture) -> Normal:
    """A mixture of one component on the line. Raises ValueError for any other."""
    if law.means.shape != (1, 1):
        raise ValueError(f"needs a Gaussian on the line, got components and dimensions {law.means.shape}")
    return Normal(law.means[0, 0], law.variances[0, 0])


class Guided(NamedTuple):
    """Guided sampling: the law of a class (`problem.target`), an edited start, the law of all, and the scale w."""

    problem: Problem
    unconditional: GaussianMixture
    scale: Time

    @property
    def eps_fn(self) -> Partial:
        return guided(self.problem.target, self.unconditional, self.problem.schedule, self.scale)

    @property
    def edited(self) -> Normal:
        """The wrong start at t0."""
        return normal(self.problem.start)

    @property
    def right(self) -> Normal:
        """The right start, p_t0(. | c)."""
        return self.of_class(self.problem.t0)

    def of_class(self, s: Time) -> Normal:
        """p_s(. | c)."""
        return normal(self.problem.marginal(s))


def _spreads(given: Guided, t: Time) -> tuple[Scalar, Scalar, Scalar]:
    """(sigma / alpha)², and the variances of x / alpha given the class and over all."""
    u = jnp.exp(-given.problem.schedule.log_snr(t))
    return u, normal(given.problem.target).variance + u, normal(given.unconditional).variance + u


@jax.jit
def guided_law(given: Guided, start: Normal, s: Time, lam: float | Time) -> Normal:
    """The law at s of the guided lambda-SDE from a Gaussian start at t0; Gaussian laws on the line.

    With n = E[x / alpha] - m_c and v = Var(x / alpha),
        n_s = push n + kappa (1 - w) (m_u - m_c) integral push / U du,    v_s = push² v + lam² integral push² du,
    by Gauss-Legendre in log(min(v_c, v_u) + u), to rounding for lam up to some tens.
    """
    p, w, kappa = given.problem, given.scale, (1 + lam**2) / 2
    first, second = normal(p.target), normal(given.unconditional)
    (u_0, C_0, U_0), (u_s, C_s, U_s) = _spreads(given, p.t0), _spreads(given, s)

    def push(C: Array, U: Array) -> Array:
        return jnp.exp(kappa * (w * jnp.log(C_s / C) + (1 - w) * jnp.log(U_s / U)))

    least = jnp.minimum(first.variance, second.variance)
    low, high = jnp.log(least + u_s), jnp.log(least + u_0)
    rule = legendre_panels(low + SHARES * (high - low))
    du = jnp.exp(rule.nodes[:, 0]) * rule.weights
    u = jnp.exp(rule.nodes[:, 0]) - least
    C, U = first.variance + u, second.variance + u
    alpha_0, alpha_s = p.schedule.alpha(p.t0), p.schedule.alpha(s)
    whole = push(C_0, U_0)
    n = whole * (start.mean / alpha_0 - first.mean)
    n = n + kappa * (1 - w) * (second.mean - first.mean) * jnp.sum(du * push(C, U) / U)
    v = whole**2 * start.variance / alpha_0**2 + lam**2 * jnp.sum(du * push(C, U) ** 2)
    return Normal(alpha_s * (first.mean + n), alpha_s**2 * v)


@jax.jit
def guided_sde_law(given: Guided, start: Normal, s: Time) -> Normal:
    """The same for lam = 1, the SDE, in elementary functions of y = U / C, for v_c != v_u and w other than 1/2 and 1.

    With d = v_u - v_c, from y_0 at t0 to y_s,
        n_s = push n - (m_u - m_c) C_s / d [1 - (y_0 / y_s)^(w - 1)]
        v_s = push² v + C_s² y_s^(2 - 2w) [y_s^(2w - 1) - y_0^(2w - 1)] / [(2w - 1) d],
    for lam = 1 makes push² du C_s^-2 = -(y / y_s)^(2w - 2) dy / d.
    """
    p, w = given.problem, given.scale
    first, second = normal(p.target), normal(given.unconditional)
    (_, C_0, U_0), (_, C_s, U_s) = _spreads(given, p.t0), _spreads(given, s)
    alpha_0, alpha_s = p.schedule.alpha(p.t0), p.schedule.alpha(s)
    gap, y_0, y_s, q = second.variance - first.variance, U_0 / C_0, U_s / C_s, 2 * w - 1
    push = (C_s / C_0) ** w * (U_s / U_0) ** (1 - w)
    n = push * (start.mean / alpha_0 - first.mean)
    n = n - (second.mean - first.mean) * C_s / gap * (1 - (y_0 / y_s) ** (w - 1))
    v = push**2 * start.variance / alpha_0**2 + C_s**2 * y_s ** (1 - q) * (y_s**q - y_0**q) / (q * gap)
    return Normal(alpha_s * (first.mean + n), alpha_s**2 * v)


@jax.jit
def guided_ode_variance(given: Guided, start: Normal, s: Time) -> Scalar:
    """The variance under the ODE: start.variance (V_c(s) / V_c(t0))^w (V_u(s) / V_u(t0))^(1 - w)."""
    V_c, V_u = (law.marginal(given.problem.schedule, s) for law in (given.problem.target, given.unconditional))
    t0 = given.problem.t0
    W_c, W_u = (law.marginal(given.problem.schedule, t0) for law in (given.problem.target, given.unconditional))
    grown = (normal(V_c).variance / normal(W_c).variance) ** given.scale
    return start.variance * grown * (normal(V_u).variance / normal(W_u).variance) ** (1 - given.scale)


@jax.jit
def tilted(given: Guided, s: Time) -> Normal:
    """The law proportional to p_s(. | c)^w p_s^(1 - w), whose score s_w is at this s alone; where it exists.

    Its variance is 1 / [w / V_c + (1 - w) / V_u]. The guided lambda-SDE tends to it as lam does to infinity, when it is
    Langevin's equation at s: no sampler of bounded noise ends there.
    """
    one, other = given.of_class(s), normal(given.unconditional.marginal(given.problem.schedule, s))
    w = given.scale
    precision = w / one.variance + (1 - w) / other.variance
    return Normal((w * one.mean / one.variance + (1 - w) * other.mean / other.variance) / precision, 1 / precision)


def guided_rho(given: Guided, s: Time, lam: float | Time) -> Scalar:
    """What is left of a mean shift between two guided runs, squared and in deviations of the right one; at most 1.

    For Gaussian starts KL(s) is 1/2 [rho e² + rho (r - 1) - log(1 + rho (r - 1))] as in Theorem 3.1, (e, r) at t0.
    """
    right, after = given.right, guided_law(given, given.right, s, lam)
    shifted = guided_law(given, right._replace(mean=right.mean + jnp.sqrt(right.variance)), s, lam)
    return shifted.relative_to(after).e ** 2


@jax.jit
def contracted(rho: Scalar, start: Offset) -> Scalar:
    """1/2 [rho e² + rho (r - 1) - log(1 + rho (r - 1))]: KL once a Gaussian offset has been contracted by rho."""
    return Offset(jnp.sqrt(rho) * start.e, 1 + rho * (start.r - 1)).kl()
