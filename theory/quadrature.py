"""Quadrature on the line and in the plane for integrands made of Gaussians: exact to rounding, with an error estimate.

On the line: Gauss-Legendre panels whose width follows the narrowest Gaussian nearby. In d dimensions: the trapezoidal
rule in the eigenbasis of each Gaussian of a covering mixture, which converges exponentially for analytic integrands
(Trefethen & Weideman 2014, SIAM Review 56, Sec. 5), joined by a partition of unity.
"""

from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from theory.mixtures import GaussianMixture
from theory.types import Estimate

# Half-width of everything in standard deviations: exp(-9²/2) = 3e-18 is below rounding.
REACH = 9.0
# The same for the trapezoidal rules, by dimension: outside a disc of radius 7.5 the density integrates to 6e-13.
NORMAL_REACH = {1: REACH, 2: 7.5}
# How far the poorer of two trapezoidal rules stops short of that: exp(-7.25² / 2) is six times exp(-7.5² / 2).
RING = 0.25


class Rule(NamedTuple):
    """integral F(x) dx ~ sum_i weights_i F(nodes_i); `coarse` are the weights of a poorer rule on the same nodes."""

    nodes: Float[Array, "n d"]
    weights: Float[Array, " n"]
    coarse: Float[Array, " n"]

    def integrate(self, values: Float[Array, " n"], poorer: Float[Array, " n"] | None = None) -> Estimate:
        """The integral of a function given at the nodes, and its error.

        That is the distance to the poorer rule and, where the function itself is known to some error only, the
        integral of the distance to `poorer` values of it.
        """
        value = self.weights @ values
        error = jnp.abs(value - self.coarse @ values)
        return Estimate(value, error if poorer is None else error + self.weights @ jnp.abs(poorer - values))


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

    cover: a mixture with d = 1, of which only means and variances matter. The panels are equally long in the measure
    of `_wanted`.
    """
    counted, corners = _wanted(cover)
    return jnp.interp(jnp.linspace(0, counted[-1], panels + 1), counted, corners)


def length(cover: GaussianMixture) -> Float[Array, ""]:
    """How long the cover is, counted in the standard deviations of the narrowest Gaussian at every place."""
    return _wanted(cover)[0][-1]


def _wanted(cover: GaussianMixture) -> tuple[Float[Array, " corners"], Float[Array, " corners"]]:
    """The wanted number of panels up to every corner, and the corners, where a Gaussian of the cover begins or ends.

    Its density is max 1 / std over the Gaussians that reach x. A gap that none reaches counts as one standard
    deviation however wide it is: there is nothing in it.
    """
    means, stds = cover.means[:, 0], jnp.sqrt(cover.variances[:, 0])
    low, high = means - REACH * stds, means + REACH * stds
    corners = jnp.sort(jnp.concatenate([low, high]))
    middles, widths = (corners[1:] + corners[:-1]) / 2, jnp.diff(corners)
    reached = (low[:, None] < middles[None]) & (middles[None] < high[:, None])
    density = jnp.max(jnp.where(reached, 1 / stds[:, None], 0.0), axis=0)
    count = jnp.where(density > 0, density * widths, jnp.minimum(1.0, widths / stds.min()))
    return jnp.concatenate([jnp.zeros(1), jnp.cumsum(count)]), corners


def legendre_panels(edges: Float[Array, " panels_1"], order: int = 12) -> Rule:
    """Composite Gauss-Legendre with `order` nodes in every panel, in increasing order of x."""
    nodes, weights, coarse, _ = legendre(order)
    half = jnp.diff(edges)[:, None] / 2
    middle = (edges[1:] + edges[:-1])[:, None] / 2
    x = middle + half * nodes[None]
    return Rule(x.reshape(-1, 1), (half * weights[None]).ravel(), (half * coarse[None]).ravel())


def panel_errors(rule: Rule, values: Float[Array, " n"], order: int = 12) -> Float[Array, " panels"]:
    """What the integral over each panel of `legendre_panels` may be off by.

    The distance d to the coarse rule is the error of that; the rule itself is right to twice as many digits. As in
    QUADPACK (Piessens et al. 1983, routine QK15) the estimate is a min(1, (200 d / a)^1.5), a the integral of |f|.
    """
    size = abs(rule.weights * values).reshape(-1, order).sum(1)
    gap = abs(((rule.weights - rule.coarse) * values).reshape(-1, order).sum(1))
    return size * jnp.minimum(1.0, (200 * gap / jnp.where(size > 0, size, 1.0)) ** 1.5)


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


class Piecewise(NamedTuple):
    """A function on the line that is a polynomial in t on every panel, x = middle + half t, and its integral.

    Of an integrand made of Gaussians, and panels that suit it, the interpolant at the nodes of Gauss and Legendre has
    nearly all digits. It can be evaluated, integrated and split anywhere without evaluating the function again.
    """

    edges: Float[Array, " panels_1"]
    powers: Float[Array, "panels order"]  # the coefficients of 1, t, t², ...
    primitive: Float[Array, "panels order_1"]  # those of its integral over t from -1
    left: Float[Array, " panels"]  # the integral up to each panel's left end
    right: Float[Array, " panels"]  # the integral from each panel's right end

    @property
    def half(self) -> Float[Array, " panels"]:
        return jnp.diff(self.edges) / 2

    @property
    def middle(self) -> Float[Array, " panels"]:
        return (self.edges[1:] + self.edges[:-1]) / 2

    def __call__(self, x: Float[Array, " n"]) -> Float[Array, " n"]:
        i, t = self._place(x)
        return polynomial(self.powers[i], t)

    def below(self, x: Float[Array, " n"]) -> Float[Array, " n"]:
        """The integral up to x."""
        i, t = self._place(x)
        return self.left[i] + self.half[i] * polynomial(self.primitive[i], t)

    def above(self, x: Float[Array, " n"]) -> Float[Array, " n"]:
        """The integral from x on; a sum of its own, for the total minus the rest would lose a small tail."""
        i, t = self._place(x)
        return self.right[i] + self.half[i] * (self.primitive[i].sum(-1) - polynomial(self.primitive[i], t))

    def _place(self, x: Float[Array, " n"]) -> tuple[Int[Array, " n"], Float[Array, " n"]]:
        """The panel of every x, and where in it x is, from -1 to 1."""
        i = jnp.clip(jnp.searchsorted(self.edges, x, side="right") - 1, 0, len(self.left) - 1)
        half = self.half[i]
        return i, jnp.clip((x - self.middle[i]) / jnp.where(half > 0, half, 1.0), -1.0, 1.0)


def piecewise(edges: Float[Array, " panels_1"], values: Float[Array, " n"], order: int = 12) -> Piecewise:
    """The interpolant of values at the nodes of `legendre_panels(edges, order)`."""
    to_powers, to_primitive, _ = _interpolation(order)
    panels, half = values.reshape(-1, order), jnp.diff(edges) / 2
    powers, primitive = panels @ to_powers.T, panels @ to_primitive.T
    whole = half * primitive.sum(-1)  # at t = 1
    left, right = jnp.cumsum(whole) - whole, jnp.cumsum(whole[::-1])[::-1] - whole
    return Piecewise(edges, powers, primitive, left, right)


def coarsened(values: Float[Array, " n"], order: int = 12) -> Float[Array, " n"]:
    """The values at the nodes of the interpolant through all nodes of a panel but the two next to its centre.

    What is computed of them has the error of the coarse rule.
    """
    return (values.reshape(-1, order) @ _interpolation(order)[2].T).ravel()


def absolute(f: Piecewise) -> Float[Array, ""]:
    """integral |f|: each stretch between two nodes is cut where f changes sign, by bisection."""
    order = f.powers.shape[-1]
    t = np.concatenate([[-1.0], legendre(order)[0], [1.0]])
    signs = jnp.sign(f.powers @ np.vander(t, order, increasing=True).T)
    low, high = (jnp.broadcast_to(part, (len(f.left), order + 1)) for part in (t[:-1], t[1:]))

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        same = jnp.sign(polynomial(f.powers[:, None], middle)) == signs[:, :-1]
        return jnp.where(same, middle, low), jnp.where(same, high, middle)

    low, high = jax.lax.fori_loop(0, 50, halve, (low, high))
    root = jnp.where(signs[:, :-1] * signs[:, 1:] < 0, (low + high) / 2, t[1:])
    at = f.primitive @ np.vander(t, order + 1, increasing=True).T
    at_root = polynomial(f.primitive[:, None], root)
    pieces = jnp.abs(at_root - at[:, :-1]) + jnp.abs(at[:, 1:] - at_root)
    return f.half @ pieces.sum(-1)


def polynomial(powers: Float[Array, "*#n order"], t: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """sum_n powers_n t^n, by Horner's scheme."""
    value = jnp.zeros_like(t)
    for n in range(powers.shape[-1] - 1, -1, -1):
        value = value * t + powers[..., n]
    return value


@lru_cache
def _interpolation(order: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """From values at the nodes of Gauss and Legendre to powers of the interpolant and of its primitive; `coarsened`."""
    nodes = np.polynomial.legendre.leggauss(order)[0]
    to_series = np.linalg.inv(np.polynomial.legendre.legvander(nodes, order - 1))
    to_powers = np.zeros((order, order))
    for n in range(order):
        to_powers[: n + 1, n] = np.polynomial.legendre.leg2poly(np.eye(order)[n, : n + 1])
    primitive = np.polynomial.polynomial.polyint(np.eye(order), lbnd=-1)
    kept = np.delete(np.arange(order), [order // 2 - 1, order // 2])
    fewer = np.polynomial.legendre.legvander(nodes, order - 3)
    coarse = np.zeros((order, order))
    coarse[:, kept] = fewer @ np.linalg.inv(fewer[kept])
    return to_powers @ to_series, primitive @ to_powers @ to_series, coarse


@lru_cache
def normal_grid(points: int, dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The trapezoidal rule for E[F(z)], z ~ N(0, I): nodes (n, dim), weights, and those of a poorer rule.

    `points` per axis, an odd number, so that every other one keeps both ends. In the plane the square is cut to a disc.
    The poorer rule has every other node of a smaller disc: the ring holds more than all that lies beyond the larger.
    """
    reach = NORMAL_REACH[dim]
    z, step = np.linspace(-reach, reach, points, retstep=True)
    w = step * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    coarse = np.where(np.arange(points) % 2 == 0, 2 * w, 0.0)
    nodes = np.stack(np.meshgrid(*[z] * dim, indexing="ij"), axis=-1).reshape(-1, dim)
    radius = np.linalg.norm(nodes, axis=1)
    kept = radius <= reach * (1 + 1e-12)

    def product(weights: np.ndarray) -> np.ndarray:
        return np.prod(np.stack(np.meshgrid(*[weights] * dim, indexing="ij")), axis=0).ravel()[kept]

    return nodes[kept], product(w), np.where(radius[kept] < reach - RING, product(coarse), 0.0)


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
