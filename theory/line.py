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
from theory.quadrature import REACH, Rule, cumulative
from theory.types import Estimate

Values = Float[Array, " n"]


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
    """F^-1(u), by bisection on the nearer tail."""
    stds = jnp.sqrt(law.variances)
    reach = 4 * REACH
    low = jnp.full_like(u.log_lower, jnp.min(law.means - reach * stds))
    high = jnp.full_like(u.log_lower, jnp.max(law.means + reach * stds))
    # The nearer tail of x -> u is the lower tail of side * x.
    side = jnp.where(u.log_lower < u.log_upper, 1.0, -1.0)
    wanted = jnp.exp(jnp.minimum(u.log_lower, u.log_upper))

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        z = side[None] * (middle[None] - law.means) / stds
        # Not a logarithm, which takes eight times as long: within the bracket nothing underflows.
        tail = law.weights @ jax.lax.erfc(-z / np.sqrt(2)) / 2
        beyond = (tail - wanted) * side > 0
        return jnp.where(beyond, low, middle), jnp.where(beyond, middle, high)

    low, high = jax.lax.fori_loop(0, 64, halve, (low, high))
    return (low + high) / 2


def tails_from_density(rule: Rule, density: Values) -> Tails:
    """The tails at the nodes of a `legendre_panels` rule of a law known by its density there."""
    below, above = cumulative(rule, density)
    tiny = jnp.finfo(density.dtype).tiny
    return Tails(jnp.log(jnp.maximum(below, tiny)), jnp.log(jnp.maximum(above, tiny)))


def preimages(rule: Rule, density: Values, u: Tails) -> Float[Array, " m"]:
    """The points where the law known by its density at the nodes has the tails u.

    Cubic Hermite interpolation of x as a function of logit F, whose slope is F (1 - F) / density.
    """
    x, known = rule.nodes[:, 0], tails_from_density(rule, density)
    logit = known.log_lower - known.log_upper
    slope = jnp.exp(known.log_lower + known.log_upper) / jnp.maximum(density, jnp.finfo(density.dtype).tiny)
    wanted = jnp.clip(u.log_lower - u.log_upper, logit[0], logit[-1])
    i = jnp.clip(jnp.searchsorted(logit, wanted) - 1, 0, len(x) - 2)
    gap, width = logit[i + 1] - logit[i], x[i + 1] - x[i]
    q = (wanted - logit[i]) / jnp.where(gap > 0, gap, 1.0)
    left, right = gap * slope[i] - width, width - gap * slope[i + 1]
    return x[i] + jnp.clip(width * q + q * (1 - q) * (left * (1 - q) + right * q), 0.0, width)


def w2(rule: Rule, density: Values, u: Tails, other: GaussianMixture) -> Estimate:
    """W2 between a law with this density and tails at the nodes, and a mixture: W2² = E (x - G^-1(F(x)))².

    The monotone coupling is optimal on the line (Villani 2003, Thm 2.18).
    """
    distance = rule.nodes[:, 0] - quantile(other, u)
    squared = rule.integrate(jnp.where(density > 0, density * distance**2, 0.0))
    value = jnp.sqrt(jnp.maximum(squared.value, 0.0))
    return Estimate(value, squared.error / jnp.maximum(2 * value, jnp.finfo(density.dtype).tiny ** 0.5))
