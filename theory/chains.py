"""The exact law of a discretised sampler: what a solver with finitely many steps does to a law.

A solver step is a Gaussian kernel, so a chain of them acts on laws without sampling: affinely for Gaussian data, by
Chapman-Kolmogorov on a quadrature grid for mixtures on the line.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from theory.contraction import sde_cover
from theory.mixtures import GaussianMixture, noise_fn
from theory.problems import Problem
from theory.quadrature import Rule, legendre_panels, panel_edges
from theory.types import NoiseFn, Solver, Time, Times


class Moments(NamedTuple):
    """Mean and covariance of a Gaussian law."""

    mean: Float[Array, "*times d"]
    covariance: Float[Array, "*times d d"]


@jax.jit
def gaussian_chain(solver: Solver, problem: Problem, moments: Moments, ts: Times) -> Moments:
    """The laws of a solver's chain for Gaussian data, started from a Gaussian: (times, ...) along ts."""
    return affine_chain(solver, noise_fn(problem.target, problem.schedule), moments, ts)


@jax.jit
def affine_chain(solver: Solver, eps_fn: NoiseFn, moments: Moments, ts: Times) -> Moments:
    """The laws of a solver's chain with an affine noise prediction, started from a Gaussian: (times, ...) along ts.

    A step is affine too: m <- f(m), C <- A C A^T + std² I with A the Jacobian of f. x and what the solver remembers
    have a joint Gaussian law, so multistep solvers are no exception. Any dimension. Steps of no length change nothing:
    grids of one length, filled up with their last time, compile once.
    """
    mean, covariance = moments
    d = len(mean)
    remembered, unravel = ravel_pytree(solver.init(mean))
    size = d + len(remembered)
    joint = Moments(jnp.concatenate([mean, remembered]), jnp.zeros((size, size)).at[:d, :d].set(covariance))

    def step(law: Moments, times: tuple[Time, Time]) -> tuple[Moments, Moments]:
        t, s = times

        def advance(joint):
            q, state = solver.kernel(eps_fn, joint[:d], t, s, unravel(joint[d:]))
            return jnp.concatenate([q.mean, ravel_pytree(state)[0]]), q.std

        A, std = jax.jacfwd(advance, has_aux=True)(law.mean)
        # Memory that was never filled (an infinite last step) has no part in the next one.
        A = jnp.where(jnp.isfinite(law.mean)[None], A, 0.0)
        noise = jnp.zeros(size).at[:d].set(std**2)
        after = Moments(advance(law.mean)[0], A @ law.covariance @ A.T + jnp.diag(noise))
        law = jax.tree.map(lambda new, old: jnp.where(t == s, old, new), after, law)
        return law, Moments(law.mean[:d], law.covariance[:d, :d])

    _, laws = jax.lax.scan(step, joint, (ts[:-1], ts[1:]))
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), moments, laws)


class ChainLaws(NamedTuple):
    """Densities of two chains on the line, started from p~_t0 and from p_t0, at the nodes of a rule for each time."""

    rule: Rule  # leaves (times, n, ...)
    edited: Float[Array, "times n"]
    right: Float[Array, "times n"]

    @jax.jit
    def kl(self) -> Float[Array, " times"]:
        """KL between the two chains at every time."""
        tiny = jnp.finfo(self.edited.dtype).tiny  # where a kernel underflows there is nothing
        edited, right = jnp.maximum(self.edited, tiny), jnp.maximum(self.right, tiny)
        log_ratio = jnp.log(edited) - jnp.log(right)
        return jnp.sum(self.rule.weights * edited * (log_ratio + jnp.expm1(-log_ratio)), axis=-1)

    @jax.jit
    def lost(self) -> Float[Array, " times"]:
        """How far the masses are from 1: what the nodes do not see of the kernels."""
        masses = [jnp.sum(self.rule.weights * density, axis=-1) for density in (self.edited, self.right)]
        return jnp.max(jnp.abs(jnp.stack(masses) - 1), axis=0)


@partial(jax.jit, static_argnames="panels")
def line_chain(solver: Solver, problem: Problem, ts: Times, panels: int = 48) -> ChainLaws:
    """Chapman-Kolmogorov for a stochastic one-step solver on the line, p_s(x) = integral q(x | y) p_t(y) dy.

    ts[0] must be t0, and the last time positive. The kernel must be wider than the spacing of the nodes, about a
    tenth of the narrowest standard deviation; the masses of the result tell. Steps of no length change nothing, as in
    `gaussian_chain`.
    """
    eps_fn = noise_fn(problem.target, problem.schedule)

    def rule_at(s: Time) -> Rule:
        return legendre_panels(panel_edges(sde_cover(problem, s), panels))

    def step(carry, times):
        rule, densities = carry
        t, s = times
        q, _ = solver.kernel(eps_fn, rule.nodes, t, s, solver.init(rule.nodes))
        after = rule_at(s)
        z = (after.nodes - q.mean[:, 0][None]) / q.std
        transition = jnp.exp(-(z**2) / 2) / (jnp.sqrt(2 * jnp.pi) * q.std)
        densities = jnp.where(t == s, densities, (densities * rule.weights[None]) @ transition.T)
        return (after, densities), (after, densities)

    first = rule_at(ts[0])
    laws = jnp.exp(jnp.stack([problem.start.log_prob(first.nodes), problem.marginal(ts[0]).log_prob(first.nodes)]))
    _, rest = jax.lax.scan(step, (first, laws), (ts[:-1], ts[1:]))
    rule, densities = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), (first, laws), rest)
    return ChainLaws(rule, densities[:, 0], densities[:, 1])


@partial(jax.jit, static_argnames="points")
def two_chains(
    solver: Solver,
    eps_fn: NoiseFn,
    laws: tuple[GaussianMixture, GaussianMixture],
    ts: Times,
    reach: float | Time,
    points: int = 801,
) -> ChainLaws:
    """The densities of a stochastic one-step solver's chain from two laws at ts[0], on the line, any noise prediction.

    Chapman-Kolmogorov by the trapezoidal rule on [-reach, reach], which must hold both laws at all times; for kernels
    wider than the spacing of the points it is right to rounding, and the masses tell. Two runs of one sampler: their KL
    is exact for its finitely many steps.
    """
    x = jnp.linspace(-reach, reach, points)
    dx = x[1] - x[0]

    def step(densities: Float[Array, "2 n"], ends: Float[Array, "2"]) -> tuple[Array, Array]:
        q, _ = solver.kernel(eps_fn, x[:, None], ends[0], ends[1], solver.init(x[:, None]))
        z = (x[None] - q.mean) / q.std  # (from, to)
        transition = jnp.exp(-(z**2) / 2) / (jnp.sqrt(2 * jnp.pi) * q.std)
        densities = dx * densities @ transition
        return densities, densities

    first = jnp.exp(jnp.stack([law.log_prob(x[:, None]) for law in laws]))
    _, later = jax.lax.scan(step, first, jnp.stack([ts[:-1], ts[1:]], axis=1))
    densities = jnp.concatenate([first[None], later])
    weights = jnp.full((len(ts), points), dx)
    rule = Rule(jnp.tile(x[None, :, None], (len(ts), 1, 1)), weights, weights)
    return ChainLaws(rule, densities[:, 0], densities[:, 1])
