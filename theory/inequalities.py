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
from jaxtyping import Array, Bool, Float, Int

from theory import line
from theory.mixtures import GaussianMixture
from theory.problems import Problem
from theory.processes import transition
from theory.quadrature import REACH, Cumulative, Rule, cumulative, legendre, legendre_panels, panel_edges
from theory.types import Estimate, Time


class Bracket(NamedTuple):
    """Lower and upper bound of a constant.

    Barriers make constants that no float holds, e^80000 for modes 800 standard deviations apart: then the upper bound
    is inf, whose rate exp(-integral g² / inf) = 1 is a true bound, and the lower one the largest float.
    """

    lower: Float[Array, "*batch"]
    upper: Float[Array, "*batch"]


def _from_logs(log_lower: Float[Array, ""], log_upper: Float[Array, ""]) -> Bracket:
    lower, upper = jnp.exp(log_lower), jnp.exp(log_upper)
    return Bracket(jnp.minimum(lower, jnp.finfo(lower.dtype).max), upper)


# Panels within REACH of each Gaussian, and on each side of a valley between two.
PANELS, HALVINGS = 18, 24


def _rule(law: GaussianMixture, median: Float[Array, ""]) -> Rule:
    """Panels for a density p and for 1/p: around every Gaussian, and around the valleys, where 1/p has its peaks.

    A peak of 1/p is e.g. 1e-6 of the gap wide, so panels halve towards it. The median is an edge.
    """
    stds = jnp.sqrt(law.variances[:, 0])
    around = law.means + REACH * stds[:, None] * np.linspace(-1, 1, PANELS + 1)[None]
    valleys, gaps = _valleys(law)
    halved = np.append(2.0 ** -np.arange(HALVINGS), 0.0)
    graded = valleys[:, None] + gaps[:, None] * np.concatenate([-halved, halved])[None]
    inner = jnp.clip(graded.ravel(), around.min(), around.max())
    return legendre_panels(jnp.sort(jnp.concatenate([around.ravel(), inner, median[None]])))


def _valleys(law: GaussianMixture) -> tuple[Float[Array, " k_1"], Float[Array, " k_1"]]:
    """Where p is least between neighbouring means, and how far these are apart."""
    means = jnp.sort(law.means[:, 0])
    gaps = jnp.diff(means)
    cells = np.linspace(0, 1, 65)
    x = means[:-1, None] + gaps[:, None] * cells[None]
    lowest = jnp.argmin(law.log_prob(x[..., None]), axis=1)
    step = gaps * cells[1]
    middle = means[:-1] + lowest * step

    def halve(_, bracket):
        low, high = bracket
        x = (low + high) / 2
        falls = law.score(x[:, None])[:, 0] < 0
        return jnp.where(falls, x, low), jnp.where(falls, high, x)

    low, high = jax.lax.fori_loop(0, 60, halve, (middle - step, middle + step))
    return (low + high) / 2, gaps


def _log_cumulative(rule: Rule, logs: Float[Array, " n"], order: int = 12) -> Cumulative:
    """`cumulative` of exp(logs), in logarithms: each panel has a scale of its own."""
    panels = logs.reshape(-1, order)
    scale = jnp.maximum(panels.max(axis=1), jnp.finfo(logs.dtype).min)
    _, weights, _, matrix = legendre(order)
    half = rule.weights.reshape(-1, order).sum(axis=1) / 2
    values = half[:, None] * jnp.exp(panels - scale[:, None])
    log_whole = scale + jnp.log(values @ weights)
    nothing = jnp.full(1, -jnp.inf)
    before = jnp.concatenate([nothing, jax.lax.cumlogsumexp(log_whole)[:-1]])
    after = jnp.concatenate([jax.lax.cumlogsumexp(log_whole, reverse=True)[1:], nothing])

    def joined(outside: Float[Array, " panels"], inside: np.ndarray) -> Float[Array, " n"]:
        # The polynomial through a steep panel may dip below zero.
        part = scale[:, None] + jnp.log(jnp.maximum(values @ inside.T, 0.0))
        return jnp.logaddexp(outside[:, None], part).ravel()

    return Cumulative(joined(before, matrix), joined(after, weights[None] - matrix))


def _outwards(rule: Rule, logs: Float[Array, " n"], right: Bool[Array, " n"]) -> Float[Array, " n"]:
    """The logarithm of the integral of exp(logs) between a centre and each node; `right` are the nodes right of it."""
    above = _log_cumulative(rule, jnp.where(right, logs, -jnp.inf)).left
    below = _log_cumulative(rule, jnp.where(right, -jnp.inf, logs)).right
    return jnp.where(right, above, below)


def _median(law: GaussianMixture) -> Float[Array, ""]:
    half = jnp.log(jnp.full(1, 0.5))
    return line.quantile(law, line.Tails(half, half))[0]


@partial(jax.jit, static_argnames="iterations")
def poincare(law: GaussianMixture, iterations: int = 30) -> Bracket:
    """C_P of a mixture on the line, bracketed by the variational formula of its Sturm-Liouville problem.

    For every increasing f the least and the greatest value of
        I(f)(x) = 1 / (p(x) f'(x)) integral_x^inf p (f - mean f)
    bound C_P from both sides (Chen 2005, "Eigenvalues, Inequalities, and Ergodic Theory", Ch. 3), and the power method
    f <- integral 1/p integral_x^inf p (f - mean f) brings them together. The extremes are taken over the nodes with
    1e8 times the mass beyond them that there is beyond the panels. f is counted from the median, in units of its
    largest value: it may be e^80000.
    """
    median = _median(law)
    rule = _rule(law, median)
    x = rule.nodes[:, 0]
    right = x > median
    log_p = law.log_prob(rule.nodes)
    p = jnp.exp(log_p)
    sides = line.tails(law, x)
    margin = jnp.minimum(sides.log_lower - sides.log_lower[0], sides.log_upper - sides.log_upper[-1])
    inner = margin > np.log(1e8)
    tiny = jnp.finfo(p.dtype).tiny

    def flux(f: Float[Array, " n"]) -> Float[Array, " n"]:
        """integral_x^inf p (f - mean f), from the end where all terms have one sign, so that none cancel."""
        centred = f - rule.integrate(p * f).value
        below, above = cumulative(rule, p * centred)
        return jnp.maximum(jnp.where(centred < 0, -below, above), tiny)

    def power(state: tuple[Int[Array, ""], Float[Array, " n"], Bracket]):
        count, last, _ = state
        log_f = _outwards(rule, jnp.log(last) - log_p, right)
        unit = log_f.max()
        new = flux(jnp.where(right, 1.0, -1.0) * jnp.exp(log_f - unit))
        log_ratio = unit + jnp.log(new / last)
        bounds = Bracket(
            jnp.min(log_ratio, where=inner, initial=jnp.inf), jnp.max(log_ratio, where=inner, initial=-jnp.inf)
        )
        return count + 1, new / new.max(), bounds

    def apart(state) -> Bool[Array, ""]:
        count, _, bounds = state
        return (count == 0) | ((count < iterations) & (bounds.upper - bounds.lower > 1e-13))

    start = flux((x - median) / jnp.abs(x - median).max())
    nothing = Bracket(jnp.zeros(()), jnp.zeros(()))
    *_, logs = jax.lax.while_loop(apart, power, (jnp.asarray(0), start / start.max(), nothing))
    return _from_logs(logs.lower, logs.upper)


@jax.jit
def log_sobolev(law: GaussianMixture) -> Bracket:
    """The log-Sobolev constant C of a mixture on the line, within a factor of about nine.

    Barthe & Roberto 2003, "Sobolev inequalities for probability measures on the real line", Thm 3: on each side of the
    median, with mu the mass beyond x and R(x) the integral of 1/p from the median to x,
        sup mu log(1 + 1/(2 mu)) R <= 2 C <= 4 sup mu log(1 + e²/mu) R.
    """
    median = _median(law)
    rule = _rule(law, median)
    right = rule.nodes[:, 0] > median
    log_resistance = _outwards(rule, -law.log_prob(rule.nodes), right)
    sides = line.tails(law, rule.nodes[:, 0])
    log_mu = jnp.where(right, sides.log_upper, sides.log_lower)

    def log_supremum(a: float) -> Float[Array, ""]:
        # log(1 + a/mu) without mu, which may underflow
        return jnp.max(log_mu + jnp.log(jnp.logaddexp(0.0, np.log(a) - log_mu)) + log_resistance)

    return _from_logs(log_supremum(0.5) - np.log(2), log_supremum(np.e**2) + np.log(2))


@jax.jit
def chi2_factor(problem: Problem, s: Time) -> Estimate:
    """The squared second singular value of the kernel between times s < t0: the sharp factor of chi2.

    chi2_s <= factor chi2_t0 for every start, with equality in the limit (maximal correlation of x_s and x_t0;
    Hirschfeld 1935, Gebelein 1941). d = 1; the kernel p(x_s, x_t0) / sqrt(p_s p_t0) is discretised on Gauss-Legendre
    nodes, and the error is the distance to three quarters of the panels.
    """
    panels = min(24 + 8 * len(problem.target.log_weights), 96)
    value, poorer = (_second_singular_value(problem, s, n) ** 2 for n in (panels, 3 * panels // 4))
    return Estimate(value, jnp.abs(value - poorer) + 1e-14)


def _second_singular_value(problem: Problem, s: Time, panels: int) -> Float[Array, ""]:
    after = legendre_panels(panel_edges(problem.marginal(s), panels))
    before = legendre_panels(panel_edges(problem.marginal(problem.t0), panels))
    q = transition(problem.schedule, after.nodes[:, 0], s, problem.t0)
    z = (before.nodes - q.mean[None]) / q.std
    forward = jnp.exp(-(z**2) / 2) / (jnp.sqrt(2 * jnp.pi) * q.std)
    p_s = jnp.exp(problem.marginal(s).log_prob(after.nodes))
    p_t0 = jnp.exp(problem.marginal(problem.t0).log_prob(before.nodes))
    kernel = jnp.sqrt(before.weights)[:, None] * forward * jnp.sqrt(after.weights * p_s)[None]
    scaled = kernel / jnp.sqrt(jnp.maximum(p_t0, jnp.finfo(p_t0.dtype).tiny))[:, None]
    return jnp.linalg.svd(scaled, compute_uv=False)[1]
