"""How fast must the SDE contract? Functional inequalities of laws on the line, with certified constants.

    Poincare      Var_p(f)   <= C_P  E_p f'²     gives chi2_s <= exp(-integral g² / C_P) chi2_t
    log-Sobolev   Ent_p(f²)  <= 2 C  E_p f'²     gives KL_s   <= exp(-integral g² / C)   KL_t      (C >= C_P)
    sharp factor  the squared maximal correlation of (x_s, x_t): the best constant in chi2_s <= factor chi2_t

The log-Sobolev constant of N(m, v) is v.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from theory import line
from theory.contraction import sde_cover
from theory.mixtures import GaussianMixture
from theory.problems import Problem
from theory.processes import transition
from theory.quadrature import cumulative, legendre_panels, panel_edges
from theory.types import Time


class Bracket(NamedTuple):
    """Lower and upper bound of a constant."""

    lower: Float[Array, "*batch"]
    upper: Float[Array, "*batch"]


@partial(jax.jit, static_argnames="iterations")
def poincare(law: GaussianMixture, iterations: int = 30) -> Bracket:
    """C_P of a mixture on the line, bracketed by the variational formula of its Sturm-Liouville problem.

    For every increasing f the least and the greatest value of
        I(f)(x) = 1 / (p(x) f'(x)) integral_x^inf p (f - mean f)
    bound C_P from both sides (Chen 2005, "Eigenvalues, Inequalities, and Ergodic Theory", Ch. 3), and the power method
    f <- integral 1/p integral_x^inf p (f - mean f) brings them together. The extremes are taken over the nodes with at
    least 1e-8 of the mass on each side.
    """
    rule = legendre_panels(panel_edges(law, 60))
    p = jnp.exp(law.log_prob(rule.nodes))
    sides = line.tails(law, rule.nodes[:, 0])
    inner = jnp.minimum(sides.log_lower, sides.log_upper) > jnp.log(1e-8)

    def flux(f: Float[Array, " n"]) -> Float[Array, " n"]:
        """integral_x^inf p (f - mean f), from the end where all terms have one sign, so that none cancel."""
        centred = f - rule.integrate(p * f).value
        left, right = cumulative(rule, p * centred)
        return jnp.where(centred < 0, -left, right)

    def power(last: Float[Array, " n"], _: None) -> tuple[Float[Array, " n"], Bracket]:
        new = flux(cumulative(rule, last / p).left)
        ratio = new / last
        bounds = Bracket(jnp.min(ratio, where=inner, initial=jnp.inf), jnp.max(ratio, where=inner, initial=0.0))
        return new / new.max(), bounds

    _, bounds = jax.lax.scan(power, flux(rule.nodes[:, 0]), None, length=iterations)
    return Bracket(bounds.lower[-1], bounds.upper[-1])


@jax.jit
def log_sobolev(law: GaussianMixture) -> Bracket:
    """The log-Sobolev constant C of a mixture on the line, within a factor of about nine.

    Barthe & Roberto 2003, "Sobolev inequalities for probability measures on the real line", Thm 3: on each side of the
    median, with mu the mass beyond x and R(x) the integral of 1/p from the median to x,
        sup mu log(1 + 1/(2 mu)) R <= 2 C <= 4 sup mu log(1 + e²/mu) R.
    """
    half = jnp.log(jnp.full(1, 0.5))
    median = line.quantile(law, line.Tails(half, half))[0]
    edges = panel_edges(law, 60)
    # Panels of each side alone: integrated from the median outwards, 1/p does not cancel.
    right, left = legendre_panels(jnp.maximum(edges, median)), legendre_panels(jnp.minimum(edges, median))
    beyond_right = line.tails(law, right.nodes[:, 0]).log_upper
    beyond_left = line.tails(law, left.nodes[:, 0]).log_lower
    resistance_right = cumulative(right, jnp.exp(-law.log_prob(right.nodes))).left
    resistance_left = cumulative(left, jnp.exp(-law.log_prob(left.nodes))).right
    mu = jnp.exp(jnp.concatenate([beyond_left, beyond_right]))
    resistance = jnp.concatenate([resistance_left, resistance_right])

    def supremum(a: float) -> Float[Array, ""]:
        return jnp.max(mu * jnp.log1p(a / mu) * resistance)

    return Bracket(supremum(0.5) / 2, 2 * supremum(np.e**2))


@jax.jit
def chi2_factor(problem: Problem, s: Time) -> Float[Array, ""]:
    """The squared second singular value of the kernel between times s < t0: the sharp factor of chi2.

    chi2_s <= factor chi2_t0 for every start, with equality in the limit (maximal correlation of x_s and x_t0;
    Hirschfeld 1935, Gebelein 1941). d = 1; the kernel p(x_s, x_t0) / sqrt(p_s p_t0) is discretised
    on Gauss-Legendre nodes.
    """
    after = legendre_panels(panel_edges(problem.marginal(s), 32))
    before = legendre_panels(panel_edges(sde_cover(problem, problem.t0), 32))
    q = transition(problem.schedule, after.nodes[:, 0], s, problem.t0)
    z = (before.nodes - q.mean[None]) / q.std
    forward = jnp.exp(-(z**2) / 2) / (jnp.sqrt(2 * jnp.pi) * q.std)
    p_s = jnp.exp(problem.marginal(s).log_prob(after.nodes))
    p_t0 = jnp.exp(problem.marginal(problem.t0).log_prob(before.nodes))
    kernel = jnp.sqrt(before.weights)[:, None] * forward * jnp.sqrt(after.weights * p_s)[None]
    scaled = kernel / jnp.sqrt(jnp.maximum(p_t0, jnp.finfo(p_t0.dtype).tiny))[:, None]
    return jnp.linalg.svd(scaled, compute_uv=False)[1] ** 2
