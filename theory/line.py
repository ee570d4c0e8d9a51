"""Laws on the line: distribution functions, quantiles, the monotone map between two laws, and W2.

On the line the probability-flow ODE is the monotone map F_s^-1 o F_t, and so is the optimal coupling, so both need
quantiles. Both tails are kept: u = F(x) and 1 - u as logarithms, since 1 - u is zero to rounding beyond x = 8 std.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr
from jaxtyping import Array, Float

from theory.mixtures import GaussianMixture
from theory.quadrature import REACH, Piecewise, legendre, polynomial
from theory.types import Estimate

Values = Float[Array, " n"]

ROUNDING = 2e-16  # of a distribution function
ITERATIONS = 12  # of Newton's method, which doubles the digits, and of the bisections that bring it near


class Tails(NamedTuple):
    """log u and log(1 - u) for probabilities u."""

    log_lower: Values
    log_upper: Values


@jax.jit
def tails(law: GaussianMixture, x: Values) -> Tails:
    """log F(x) and log(1 - F(x)) of a mixture with d = 1."""
    z = (x[None] - law.means) / jnp.sqrt(law.variances)
    weigh = law.log_weights[:, None]
    return Tails(jax.nn.logsumexp(weigh + log_ndtr(z), axis=0), jax.nn.logsumexp(weigh + log_ndtr(-z), axis=0))


def quantile(law: GaussianMixture, u: Tails) -> Values:
    """F^-1(u), by bisection on the nearer tail; one step of Newton's method makes it differentiable in law and u."""
    stds = jnp.sqrt(law.variances)
    reach = 4 * REACH
    low = jnp.full_like(u.log_lower, jnp.min(law.means - reach * stds))
    high = jnp.full_like(u.log_lower, jnp.max(law.means + reach * stds))
    # The nearer tail of x -> u is the lower tail of side * x.
    side = jnp.where(u.log_lower < u.log_upper, 1.0, -1.0)
    log_wanted = jnp.minimum(u.log_lower, u.log_upper)
    fixed, fixed_stds, wanted = jax.lax.stop_gradient((law, stds, jnp.exp(log_wanted)))

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        z = side[None] * (middle[None] - fixed.means) / fixed_stds
        # Not a logarithm, which takes eight times as long: within the bracket nothing underflows.
        tail = fixed.weights @ jax.lax.erfc(-z / np.sqrt(2)) / 2
        beyond = (tail - wanted) * side > 0
        return jnp.where(beyond, low, middle), jnp.where(beyond, middle, high)

    low, high = jax.lax.fori_loop(0, 64, halve, jax.lax.stop_gradient((low, high)))
    x = (low + high) / 2
    return x + _implicit(law, x, side, log_wanted)


@jax.custom_jvp
def _implicit(law: GaussianMixture, x: Values, side: Values, log_wanted: Values) -> Values:
    """0, with the derivative of the root of log F(x) = log_wanted: (d log_wanted - d log F) F / (side p)."""
    return jnp.zeros_like(x)


@_implicit.defjvp
def _implicit_jvp(primals, tangents):
    law, x, side, _ = primals
    d_law, _, _, d_wanted = tangents

    def log_tail(law: GaussianMixture) -> Values:
        z = side[None] * (x[None] - law.means) / jnp.sqrt(law.variances)
        return jax.nn.logsumexp(law.log_weights[:, None] + log_ndtr(z), axis=0)

    value, slope = jax.jvp(log_tail, (law,), (d_law,))
    mills = side * jnp.exp(value - law.log_prob(x[:, None]))
    return jnp.zeros_like(x), (d_wanted - slope) * mills


def tails_of(density: Piecewise, x: Values) -> Tails:
    """The tails at x of a law known by its density."""
    tiny = jnp.finfo(x.dtype).tiny
    return Tails(*(jnp.log(jnp.maximum(tail, tiny)) for tail in (density.below(x), density.above(x))))


def inverse(density: Piecewise, u: Tails) -> Values:
    """The points where a law known by its density has the tails u; differentiable, as `quantile` is.

    The panel is known from the integrals at its ends; in it Newton's method, and bisection where that would leave the
    bracket.
    """
    from_below = u.log_lower < u.log_upper
    wanted = jnp.exp(jnp.minimum(u.log_lower, u.log_upper))
    fixed, fixed_wanted = jax.lax.stop_gradient((density, wanted))
    lower = jnp.searchsorted(fixed.left, fixed_wanted, side="right") - 1
    upper = len(fixed.right) - jnp.searchsorted(fixed.right[::-1], fixed_wanted, side="right")
    i = jnp.clip(jnp.where(from_below, lower, upper), 0, len(fixed.left) - 1)

    side = jnp.where(from_below, 1.0, -1.0)

    def tail(density: Piecewise, t: Values) -> Values:
        passed = density.half[i] * polynomial(density.primitive[i], t)
        whole = density.half[i] * density.primitive[i].sum(-1)
        return jnp.where(from_below, density.left[i] + passed, density.right[i] + whole - passed)

    def closer(_, state):
        low, high, t = state
        found = tail(fixed, t)
        beyond = side * (found - fixed_wanted) > 0
        low, high = jnp.where(beyond, low, t), jnp.where(beyond, t, high)
        # Of the logarithm of the tail, which is nearly straight where the tail itself is an exponential.
        slope = side * fixed.half[i] * polynomial(fixed.powers[i], t) / found
        step = t + jnp.log(fixed_wanted / found) / slope
        near = jnp.clip(step, low, high)  # t is an end of the bracket: a step of rounding may leave it
        return low, high, jnp.where(jnp.abs(step - near) < 1e-9, near, (low + high) / 2)

    ends = jnp.full_like(wanted, -1.0), jnp.full_like(wanted, 1.0)
    *_, t = jax.lax.fori_loop(0, ITERATIONS, closer, (*ends, jnp.zeros_like(wanted)))
    at = fixed.half[i] * polynomial(fixed.powers[i], t)
    # 0, with the derivative of the root.
    moved = side * (wanted - fixed_wanted - tail(density, t) + tail(fixed, t))
    t = t + jnp.where(at > 0, moved / jnp.where(at > 0, at, 1.0), 0.0)
    return density.middle[i] + density.half[i] * t


def w2(p: Piecewise, q: Piecewise, others: tuple[Piecewise, ...] = ()) -> Estimate:
    """W2 of two laws known by their densities on the same panels: W2² = integral p (x - y)², y = G^-1(F(x)).

    The monotone coupling is optimal on the line (Villani 2003, Thm 2.18). x and y go through panels together, each cut
    where the other's panels end; between two cuts the one that moves further, in panels, is integrated over: where q
    has a gap y jumps, and where p has one x does. `others` are densities as right as p; by Kantorovich's duality what
    they change in W2² is at most the integral of 2 |x - y| |change of F| dx.
    """
    ends = p.edges
    both, swapped = (jax.tree.map(lambda *leaves: jnp.stack(leaves), *laws) for laws in ((p, q), (q, p)))
    matched = jax.vmap(lambda law, other, z: inverse(law, tails_of(other, z)), in_axes=(0, 0, None))
    xs, ys = jnp.sort(jnp.concatenate([jnp.stack([ends, ends]), matched(both, swapped, ends)], axis=1))
    by_x = _panels_passed(ends, xs) >= _panels_passed(ends, ys)
    a, b = (jnp.where(by_x, x, y) for x, y in ((xs[:-1], ys[:-1]), (xs[1:], ys[1:])))
    nodes, weights, coarse, _ = legendre(p.powers.shape[1])
    z = ((a + b)[:, None] / 2 + (b - a)[:, None] / 2 * nodes[None]).ravel()
    by_x = jnp.repeat(by_x, len(nodes))
    x_of_z, y_of_z = matched(both, swapped, z)
    x, y = jnp.where(by_x, z, x_of_z), jnp.where(by_x, y_of_z, z)
    squares = (jnp.maximum(jnp.where(by_x, p(z), q(z)), 0.0) * (x - y) ** 2).reshape(-1, len(nodes))
    half = (b - a) / 2
    squared, poorer = half @ (squares @ weights), half @ (squares @ coarse)
    unknown = ROUNDING + sum((jnp.abs(other.below(x) - p.below(x)) for other in others), jnp.zeros_like(x))
    moved = jnp.diff(xs) @ ((jnp.abs(x - y) * unknown).reshape(-1, len(nodes)) @ weights)  # 2 / 2, the width of [-1, 1]
    error = jnp.abs(squared - poorer) + moved
    value = jnp.sqrt(jnp.maximum(squared, jnp.finfo(x.dtype).tiny))
    return Estimate(value, error / jnp.maximum(value, jnp.sqrt(error)))  # sqrt(error) where W2 is less than that


def _panels_passed(ends: Float[Array, " panels_1"], cuts: Float[Array, " n_1"]) -> Float[Array, " n"]:
    """The distance between neighbouring cuts, as a part of the panel that they lie in."""
    middle = (cuts[1:] + cuts[:-1]) / 2
    i = jnp.clip(jnp.searchsorted(ends, middle, side="right") - 1, 0, len(ends) - 2)
    return jnp.diff(cuts) / jnp.maximum(ends[i + 1] - ends[i], jnp.finfo(ends.dtype).tiny)
