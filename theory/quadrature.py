"""Quadrature on the line and in the plane for integrands made of Gaussians: exact to rounding, with an error estimate.

On the line: Gauss-Legendre panels whose width follows the narrowest Gaussian nearby. In d dimensions: the trapezoidal
rule in the eigenbasis of each Gaussian of a covering mixture, which converges exponentially for analytic integrands
(Trefethen & Weideman 2014, SIAM Review 56, Sec. 5), joined by a partition of unity.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from theory.mixtures import GaussianMixture
from theory.types import Estimate

# Half-width of everything in standard deviations: exp(-9²/2) = 3e-18 is below rounding.
REACH = 9.0
# The same for the trapezoidal rules, by dimension: outside a disc of radius 7.5 the density integrates to 6e-13.
NORMAL_REACH = {1: REACH, 2: 7.5}


class Rule(NamedTuple):
    """integral F(x) dx ~ sum_i weights_i F(nodes_i); `coarse` are the weights of a poorer rule on the same nodes."""

    nodes: Float[Array, "n d"]
    weights: Float[Array, " n"]
    coarse: Float[Array, " n"]

    def integrate(self, values: Float[Array, " n"]) -> Estimate:
        """The integral of a function given at the nodes, and the distance to the poorer rule."""
        value = self.weights @ values
        return Estimate(value, jnp.abs(value - self.coarse @ values))


@lru_cache
def legendre(order: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Gauss-Legendre on [-1, 1]: nodes, weights, coarse weights, and the matrix of integrals from -1 to each node.

    The coarse weights interpolate through all nodes but the two next to the centre.
    """
    nodes, weights = np.polynomial.legendre.leggauss(order)
    kept = np.delete(np.arange(order), [order // 2 - 1, order // 2])
    moments = np.zeros(len(kept))
    moments[0] = 2.0
    coarse = np.zeros(order)
    coarse[kept] = np.linalg.solve(np.polynomial.legendre.legvander(nodes[kept], len(kept) - 1).T, moments)

    to_coefficients = np.linalg.inv(np.polynomial.legendre.legvander(nodes, order - 1))
    antiderivatives = np.polynomial.legendre.legint(np.eye(order), lbnd=-1)
    cumulative = np.polynomial.legendre.legval(nodes, antiderivatives).T @ to_coefficients
    return nodes, weights, coarse, cumulative


def panel_edges(cover: GaussianMixture, panels: int) -> Float[Array, " panels_1"]:
    """Edges of panels on the line, `REACH` deviations around every Gaussian of the cover, narrow where one is narrow.

    The wanted density of panels at x is max 1 / std over the Gaussians that reach x; the edges are equally spaced in
    its integral. cover: a mixture with d = 1, of which only means and variances matter.
    """
    means, stds = cover.means[:, 0], jnp.sqrt(cover.variances[:, 0])
    low, high = means - REACH * stds, means + REACH * stds
    corners = jnp.sort(jnp.concatenate([low, high]))
    middles = (corners[1:] + corners[:-1]) / 2
    reached = (low[:, None] < middles[None]) & (middles[None] < high[:, None])
    density = jnp.max(jnp.where(reached, 1 / stds[:, None], 1 / stds.max()), axis=0)
    counted = jnp.concatenate([jnp.zeros(1), jnp.cumsum(density * jnp.diff(corners))])
    return jnp.interp(jnp.linspace(0, counted[-1], panels + 1), counted, corners)


def split_at_roots(
    edges: Float[Array, " n_1"], f: Callable[[Float[Array, " n"]], Float[Array, " n"]]
) -> Float[Array, " m"]:
    """Edges with a further edge in every panel: where f changes sign, by bisection, or at the panel's right end.

    A panel of width zero costs nothing; an integrand with a kink at the roots of f becomes smooth on each side.
    """
    right = edges[1:]

    def halve(i, state):
        low, high, sign = state
        x = jnp.where(i == 0, low, (low + high) / 2)  # the edges themselves in the first round: f is compiled once
        here = jnp.sign(f(x))
        sign = jnp.where(i == 0, here, sign)
        return jnp.where(here == sign, x, low), jnp.where(here == sign, high, x), sign

    closed = jnp.append(right, edges[-1])  # the last panel has no width: it is there for the sign at its edge
    low, _, sign = jax.lax.fori_loop(0, 51, halve, (edges, closed, jnp.zeros_like(edges)))
    roots = jnp.where(sign[:-1] * sign[1:] < 0, low[:-1], right)
    return jnp.concatenate([edges[:1], jnp.stack([roots, right], axis=1).ravel()])


def legendre_panels(edges: Float[Array, " panels_1"], order: int = 12) -> Rule:
    """Composite Gauss-Legendre with `order` nodes in every panel, in increasing order of x."""
    nodes, weights, coarse, _ = legendre(order)
    half = jnp.diff(edges)[:, None] / 2
    middle = (edges[1:] + edges[:-1])[:, None] / 2
    x = middle + half * nodes[None]
    return Rule(x.reshape(-1, 1), (half * weights[None]).ravel(), (half * coarse[None]).ravel())


class Cumulative(NamedTuple):
    """Integrals from the left end to every node, and from every node to the right end."""

    left: Float[Array, " n"]
    right: Float[Array, " n"]


def cumulative(rule: Rule, values: Float[Array, " n"], order: int = 12) -> Cumulative:
    """The running integrals of a function given at the nodes of `legendre_panels(edges, order)`.

    Both directions, each a sum of its own: one minus the other would lose the small tail.
    """
    _, weights, _, matrix = legendre(order)
    panels = values.reshape(-1, order)
    half = rule.weights.reshape(-1, order).sum(axis=1) / 2
    whole = half * (panels @ weights)
    before = jnp.cumsum(whole) - whole
    after = jnp.cumsum(whole[::-1])[::-1] - whole
    left = before[:, None] + half[:, None] * (panels @ matrix.T)
    right = after[:, None] + half[:, None] * (panels @ (weights[None] - matrix).T)
    return Cumulative(left.ravel(), right.ravel())


@lru_cache
def normal_grid(points: int, dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The trapezoidal rule for E[F(z)], z ~ N(0, I): nodes (n, dim), weights, and those of every other node.

    `points` per axis, an odd number, so that the coarse rule keeps both ends. In the plane the square is cut to a disc.
    """
    reach = NORMAL_REACH[dim]
    z, step = np.linspace(-reach, reach, points, retstep=True)
    w = step * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    coarse = np.where(np.arange(points) % 2 == 0, 2 * w, 0.0)
    nodes = np.stack(np.meshgrid(*[z] * dim, indexing="ij"), axis=-1).reshape(-1, dim)
    kept = np.linalg.norm(nodes, axis=1) <= reach * (1 + 1e-12)

    def product(weights: np.ndarray) -> np.ndarray:
        return np.prod(np.stack(np.meshgrid(*[weights] * dim, indexing="ij")), axis=0).ravel()[kept]

    return nodes[kept], product(w), product(coarse)


def covering_rule(cover: GaussianMixture, points: int) -> Rule:
    """A rule in d dimensions: points^d nodes around each Gaussian N_c of the cover, F split as sum_c F w_c N_c / cover.

    Each part is concentrated where its own nodes are dense, whatever the other Gaussians do.
    """
    z, weights, coarse = normal_grid(points, cover.dim)
    scaled = jnp.einsum("kij,kj,nj->kni", cover.axes, jnp.sqrt(cover.variances), z)
    nodes = (cover.means[:, None] + scaled).reshape(-1, cover.dim)
    share = jnp.exp(jnp.repeat(cover.log_weights, len(z)) - cover.log_prob(nodes))
    copies = len(cover.log_weights)
    return Rule(nodes, share * jnp.tile(weights, copies), share * jnp.tile(coarse, copies))


def interval(a: float, b: float, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights on [a, b]."""
    nodes, weights, _, _ = legendre(order)
    return (a + b) / 2 + (b - a) / 2 * nodes, (b - a) / 2 * weights
