"""The law of Cycle-SDE with finitely many steps on a mixture on the line: Chapman-Kolmogorov for the pair (x, x~)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from theory import line
from theory.chains import ChainLaws
from theory.contraction import sde_cover
from theory.mixtures import GaussianMixture, noise_fn
from theory.problems import Problem
from theory.quadrature import legendre, legendre_panels, panel_edges
from theory.types import Schedule, Solver, Time, Times

Scalar = Float[Array, ""]


def monotone_edit(problem: Problem, source: GaussianMixture | None = None) -> Partial:
    """The increasing map of x_t0, noised from the source, whose image has the law of the start, (n,) -> (n,); d = 1."""
    source = problem.target if source is None else source
    return Partial(_monotone, source.marginal(problem.schedule, problem.t0), problem.start)


def _monotone(before: GaussianMixture, after: GaussianMixture, x: Float[Array, " n"]) -> Float[Array, " n"]:
    return line.quantile(after, line.tails(before, x))


def line_cycle(
    solver: Solver,
    problem: Problem,
    ts: Times,
    edit: Partial,
    source: GaussianMixture | None = None,
    panels: int = 32,
    offsets: int = 192,
    spacing: float | Scalar = 1.0,
) -> ChainLaws:
    """The law of Cycle-SDE on the line with a one-step solver and an edit of x_t0, (n,) -> (n,), that gives the start.

    The pair of x_t and delta_t = x~_t - x_t is a Markov chain on the way back: x_s is drawn from the reverse kernel of
    the data, p(x_s | x_t), which is exact, and delta_s = mean(x_t + delta_t) - mean(x_t). Its law is kept as weights on
    a rule for x times evenly spaced delta: the map moves them off the grid, and each is shared out among the six
    neighbours that interpolate there, which keeps all averages of smooth functions to sixth order.

    problem.target is the law of the result and of the way back, `source`, by default the same, that of the data.
    `edited` and `right` are the densities of x~_s and of problem's p_s. ts[0] = t0, ts[-1] > 0. The kernel must be
    wider than the nodes' spacing, which the masses tell, and the offsets fine enough, which they do not: `spacing` = 2
    spaces them twice as far, for the change under refinement. Steps of no length change nothing.
    """
    source = problem.target if source is None else source  # one program, with and without it
    return _line_cycle(solver, problem, ts, edit, source, panels, offsets, spacing)


@partial(jax.jit, static_argnames=("panels", "offsets"))
def _line_cycle(
    solver: Solver,
    problem: Problem,
    ts: Times,
    edit: Partial,
    source: GaussianMixture,
    panels: int,
    offsets: int,
    spacing: float | Scalar,
) -> ChainLaws:
    schedule = solver.schedule
    eps_fn, back_fn = noise_fn(source, schedule), noise_fn(problem.target, schedule)

    def mean(eps_fn, x, t, s):
        return solver.kernel(eps_fn, x.reshape(-1, 1), t, s, solver.init(x.reshape(-1, 1)))[0].mean.reshape(x.shape)

    def edges_at(s: Time) -> Float[Array, " panels_1"]:
        return panel_edges(source.marginal(schedule, s), panels)

    def solve(carry, t, s):
        x, deltas, law, *_ = carry
        moved = mean(back_fn, x[:, None] + deltas, t, s) - mean(eps_fn, x, t, s)[:, None]
        fine, shared = _share_out(moved, law, offsets, spacing)
        edges = edges_at(s)
        rule = legendre_panels(edges)
        density = _reverse_density(source, schedule, x, t, rule.nodes[:, 0], s) @ shared  # of x_s, for every delta
        out = legendre_panels(panel_edges(sde_cover(problem, s), panels))
        edited = _sum_of_shifted(edges, density, fine, out.nodes[:, 0])
        places, weights = jnp.broadcast_to(fine[None], density.shape), rule.weights[:, None] * density
        return rule.nodes[:, 0], places, weights, out, edited

    def step(carry, times):
        t, s = times
        carry = jax.lax.cond(t == s, lambda carry: carry, lambda carry: solve(carry, t, s), carry)
        return carry, carry[3:]

    rule = legendre_panels(edges_at(ts[0]))
    x = rule.nodes[:, 0]
    weights = rule.weights * jnp.exp(source.marginal(schedule, ts[0]).log_prob(rule.nodes))
    # The first law sits on a curve: one delta for every x.
    deltas = jnp.broadcast_to((edit(x) - x)[:, None], (len(x), offsets))
    law = jnp.zeros_like(deltas).at[:, 0].set(weights)
    first = legendre_panels(panel_edges(sde_cover(problem, ts[0]), panels))
    density = jnp.exp(problem.start.log_prob(first.nodes))
    _, rest = jax.lax.scan(step, (x, deltas, law, first, density), (ts[:-1], ts[1:]))
    rules, edited = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), (first, density), rest)
    right = jnp.exp(jax.vmap(lambda s, nodes: problem.marginal(s).log_prob(nodes))(ts, rules.nodes))
    return ChainLaws(rules, edited, right)


def _reverse_density(source: GaussianMixture, schedule: Schedule, x_t, t: Time, x_s, s: Time) -> Float[Array, "n m"]:
    """p(x_s | x_t) by Bayes, the nodes x_s first."""
    c = jnp.exp(schedule.log_alpha(t) - schedule.log_alpha(s))
    tau2 = -(schedule.sigma(t) ** 2) * jnp.expm1(schedule.log_snr(t) - schedule.log_snr(s))
    up = -((x_t[None] - c * x_s[:, None]) ** 2) / (2 * tau2) - jnp.log(2 * jnp.pi * tau2) / 2
    log_s, log_t = (source.marginal(schedule, r).log_prob(y[:, None]) for r, y in ((s, x_s), (t, x_t)))
    return jnp.exp(up + log_s[:, None] - log_t[None])


def _share_out(
    places: Float[Array, "n m"], weights: Float[Array, "n m"], points: int, spacing: float | Scalar
) -> tuple[Float[Array, " points"], Float[Array, "n points"]]:
    """Weights at any places, moved to an even grid that spans those that matter: transposed sextic interpolation."""
    matter = jnp.abs(weights) > 1e-17
    low = jnp.min(jnp.where(matter, places, jnp.inf))
    high = jnp.max(jnp.where(matter, places, -jnp.inf))
    # A grid of no width, where nothing was edited, is widened; beyond the ends there is room for the neighbours.
    gap = spacing * jnp.maximum(high - low, 1e-6) / (points - 7)
    grid = low + gap * (jnp.arange(points) - 3)
    at = (jnp.clip(places, low, high) - grid[0]) / gap
    first = jnp.clip(jnp.floor(at).astype(int) - 2, 0, points - ORDER)
    u = at - first
    rows = jnp.arange(len(places))[:, None]
    shared = jnp.zeros((len(places), points))
    for i in range(ORDER):
        lagrange = jnp.ones_like(u)
        for j in range(ORDER):
            lagrange = lagrange if i == j else lagrange * (u - j) / (i - j)
        shared = shared.at[rows, first + i].add(jnp.where(matter, weights * lagrange, 0.0))
    return grid, shared


ORDER = 6  # points of an interpolation in delta


def _sum_of_shifted(edges, density: Float[Array, "n m"], shifts: Float[Array, " m"], y) -> Float[Array, " k"]:
    """sum_m f_m(y - shift_m) for f_m given at the nodes of panels, 0 outside of them: barycentric interpolation."""
    nodes, _, _, _ = legendre(12)
    weights = jnp.asarray(1 / np.prod(nodes[:, None] - nodes[None] + np.eye(12), axis=1))
    nodes, columns = jnp.asarray(nodes), jnp.arange(len(shifts))[None]
    x = y[:, None] - shifts[None]
    panel = jnp.clip(jnp.searchsorted(edges, x) - 1, 0, len(edges) - 2)
    u = 2 * (x - edges[panel]) / (edges[panel + 1] - edges[panel]) - 1

    def add(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        share = weights[i] / jnp.where(u == nodes[i], 1e-300, u - nodes[i])
        return sums[0] + share * density[panel * 12 + i, columns], sums[1] + share

    # A loop: unrolled, it is a third of the time that the program takes to load.
    total, norm = jax.lax.fori_loop(0, 12, add, (jnp.zeros_like(x), jnp.zeros_like(x)))
    inside = (x >= edges[0]) & (x <= edges[-1])
    return jnp.sum(jnp.where(inside, total / norm, 0.0), axis=1)
