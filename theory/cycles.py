"""The laws of Cycle-SDE with finitely many steps, exactly: what Theorem 3.3 needs, and where it ends.

Record and replay in one line: of two states under the same noise the solver's standard deviation cancels,

    x~_s = x_s + mean(x~_t) - mean(x_t),

whatever the edit, the prompt of the way back (then the first mean is its own) or the noise level. x is the forward
path, whose law p_s is right at any number of steps. With W the recorded noise, x_s = F(x_t0, W), x~_s = F(x~_t0, W).

What it needs   W independent of x_t0. Then F(x, W) has the law of x_s given x_t0 = x, and an edit of x_t0 alone ends in
                the law of the exact SDE, for any data, solver and number of steps. W need not be white.
Who has it      With the exact score in continuous time, eta = 1: W is the Brownian motion of the reverse SDE. With
                finitely many steps and Gaussian data: DDIM(1), whose mean is E[x_s | x_t], and DPM-Solver++(2M) SDE,
                which adds multiples of E[x_0 | x_t] - E[x_0 | x_last] to it. For other data the noise of both is not
                correlated with any function of x_t0, which is less. At another noise level nobody, on Gaussian data.
More than that  An edit that knows of W has KL(p~_s | p_s) <= KL(p~_t0 | p_t0) + I(x~_t0; W), by data processing.
                Another prompt needs W to be white and of variance 1, too, and then has the law of its own SDE: in
                continuous time. A mask replaces what the SDE would have done by what the source did.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float

from theory import line
from theory.chains import ChainLaws, Moments
from theory.contraction import sde_cover
from theory.gaussians import Offset
from theory.mixtures import GaussianMixture, noise_fn
from theory.problems import Problem
from theory.processes import driven_path
from theory.quadrature import legendre, legendre_panels, panel_edges
from theory.solve import Constraint, record, replay
from theory.types import Path, Schedule, Solver, Time, Times

Scalar = Float[Array, ""]


class Edit(NamedTuple):
    """An affine edit x~_t0 = latent x_t0 + source x_0 + noise z + shift, z ~ N(0, I) independent of all else.

    Theorem 3.3 wants source = 0. x_0 stands at the end of the grid.
    """

    latent: Float[Array, "d d"]
    source: Float[Array, "d d"]
    noise: Float[Array, "d d"]
    shift: Float[Array, " d"]

    def __call__(self, latent, source, noise):
        return self.latent @ latent + self.source @ source + self.noise @ noise + self.shift


@jax.jit
def to_start(g: Problem) -> Edit:
    """The edit of x_t0 alone that turns the Gaussian marginal into the Gaussian start, d = 1."""
    marginal, nothing = g.marginal(g.t0), jnp.zeros((1, 1))
    scale = jnp.sqrt(g.start.variances / marginal.variances)
    return Edit(scale, nothing, nothing, g.start.means[0] - scale[0] * marginal.means[0])


class Standard(NamedTuple):
    """The same on the line for the standardised y = (x - m) / sqrt(V): latent y_t0 + source y_0 + noise z + shift.

    It leaves the law of the latent right where shift = 0 and latent² + source² + noise² + 2 latent source Cor = 1, with
    Cor that of x_0 and x_t0.
    """

    latent: float | Scalar
    source: float | Scalar = 0.0
    noise: float | Scalar = 0.0
    shift: float | Scalar = 0.0


@jax.jit
def edit_of(standard: Standard, data: GaussianMixture, schedule: Schedule, ts: Times) -> Edit:
    """The edit of x itself, for Gaussian data on the line; x_0 stands at ts[-1]."""
    (m, std), (m_0, std_0) = (_standard(data.marginal(schedule, t)) for t in (ts[0], ts[-1]))
    gain = standard.source * std / std_0
    shift = m + standard.shift * std - standard.latent * m - gain * m_0
    # of one type whatever was given, numbers or arrays: one program for all edits
    latent, source, noise = (jnp.full((1, 1), a, std.dtype) for a in (standard.latent, gain, standard.noise * std))
    return Edit(latent, source, noise, shift[None])


def _standard(law: GaussianMixture) -> tuple[Scalar, Scalar]:
    return law.means[0, 0], jnp.sqrt(law.variances[0, 0])


# --- Gaussian data: everything is an affine function of unit normals ----------------------------------------------


def _gaussian_path(data: GaussianMixture, schedule: Schedule, ts: Times, z: Float[Array, "normals d"]) -> Path:
    """A forward path of Gaussian data from unit normals, the last of which makes x_0."""
    x0 = data.means[0] + data.axes[0] @ (jnp.sqrt(data.variances[0]) * z[-1])
    return driven_path(schedule, x0, jnp.append(ts, 0.0), z[:-1])[:-1]


def _fresh_path(data: GaussianMixture, schedule: Schedule, ts: Times, z: Float[Array, "normals d"]) -> Path:
    """x_0 noised anew for every time, as "edit-friendly" inversion does (Huberman-Spiegelglas et al., 2304.06140)."""
    x0 = data.means[0] + data.axes[0] @ (jnp.sqrt(data.variances[0]) * z[-1])
    return schedule.alpha(ts)[:, None] * x0[None] + schedule.sigma(ts)[:, None] * z[:-1]


def _path(data, schedule, ts, z, independent) -> Path:
    return jnp.where(independent, _fresh_path(data, schedule, ts, z), _gaussian_path(data, schedule, ts, z))


@jax.jit
def recorded_noise(
    solver: Solver, data: GaussianMixture, ts: Times, independent: bool | Bool[Array, ""] = False
) -> Moments:
    """The joint law of (w_1, ..., w_N, x_t0) for Gaussian data, each of them (d,): the noise of Eq. (8) and the latent.

    `independent` noises x_0 anew for every time. Exact: an affine function of normals has its Jacobian for a root.
    """

    def f(z: Float[Array, "normals d"]) -> Float[Array, " n"]:
        path = _path(data, solver.schedule, ts, z, independent)
        noise = record(solver, noise_fn(data, solver.schedule), path, ts)
        return jnp.concatenate([noise, path[:1]]).ravel()

    zero = jnp.zeros((len(ts) + 1, data.dim))
    root = jax.jacfwd(f)(zero).reshape(-1, zero.size)
    return Moments(f(zero), root @ root.T)


@jax.jit
def gaussian_cycle(
    solver: Solver,
    data: GaussianMixture,
    ts: Times,
    edit: Edit,
    prompt: GaussianMixture | None = None,
    mask: Float[Array, " d"] | None = None,
    independent: bool | Bool[Array, ""] = False,
) -> Moments:
    """The law of (x~_s, x_s), one after the other, at every time of the grid: (times, 2 d), for Gaussian data.

    `prompt` is what the score of the way back describes, by default the data. Where the mask is 0, x~ is set to x at
    every time, the first included (`theory.solve.Constraint`). Any solver that is stochastic, any d; ts[-1] > 0.
    """
    eps_fn = noise_fn(data, solver.schedule)
    back_fn = eps_fn if prompt is None else noise_fn(prompt, solver.schedule)

    def f(z: Float[Array, "normals d"]) -> Float[Array, "times both"]:
        path = _path(data, solver.schedule, ts, z[1:], independent)
        noise = record(solver, eps_fn, path, ts)
        constraint = None if mask is None else Constraint(mask, path)
        x = edit(path[0], path[-1], z[0])
        x = x if constraint is None else constraint.apply(x, path[0])
        return jnp.concatenate([replay(solver, back_fn, x, ts, noise, constraint), path], axis=1)

    zero = jnp.zeros((len(ts) + 2, data.dim))
    root = jax.jacfwd(f)(zero).reshape(len(ts), 2 * data.dim, -1)
    return Moments(f(zero), root @ jnp.swapaxes(root, 1, 2))


@jax.jit
def cycle_kl(laws: Moments, schedule: Schedule, right: GaussianMixture, ts: Times) -> Float[Array, " times"]:
    """KL(p~_s | p_s) at every time for what `gaussian_cycle` gives; `right` is the data law p_0, or the prompt's."""

    def at(law: Moments, s: Time) -> Scalar:
        p, d = right.marginal(schedule, s), right.dim
        whiten = (p.axes[0] / jnp.sqrt(p.variances[0])[None]).T
        gap = whiten @ (law.mean[:d] - p.means[0])
        # KL is of second order in what R differs from I by: the difference first, then its logarithm.
        excess = jnp.linalg.eigvalsh(whiten @ law.covariance[:d, :d] @ whiten.T - jnp.eye(d))
        return (gap @ gap + jnp.sum(excess - jnp.log1p(excess))) / 2

    return jax.vmap(at)(laws, ts)


@jax.jit
def correlation_of_times(data: GaussianMixture, schedule: Schedule, t: Time, s: Time) -> Scalar:
    """Cor(x_s, x_t) = alpha_t sqrt(V_s) / (alpha_s sqrt(V_t)), s <= t; Gaussian data, d = 1."""
    V_t, V_s = (data.marginal(schedule, time).variances[0, 0] for time in (t, s))
    return jnp.exp(schedule.log_alpha(t) - schedule.log_alpha(s)) * jnp.sqrt(V_s / V_t)


@jax.jit
def cycle_limit(
    data: GaussianMixture, schedule: Schedule, ts: Times, edit: Standard, lam: float | Time = 1.0
) -> Offset:
    """The law of x~_s in continuous time at every time of a grid, by its moments, each (times,); Gaussian data, d = 1.

    y~_s = y_s + l (y~_t0 - y_t0) with l = k^(lam²) and k = Cor(x_s, x_t0): the replayed noise is that of y_s, and what
    two states differ by shrinks as the lambda-SDE's mean does. So e = l shift, and with j = Cor(x_s, x_0)

        r = 1 + 2 l [(latent - 1) k + source j] + l² [(latent - 1)² + source² + 2 (latent - 1) source Cor + noise²].

    At lam = 1 this is r - 1 = k² (r_t0 - 1) + 2 source Cor (1 - k²): without source the contraction of the SDE.
    """
    k = jax.vmap(lambda s: correlation_of_times(data, schedule, ts[0], s))(ts)
    j = k[-1] / k
    shrunk, moved = k ** (lam**2), edit.latent - 1.0
    cross = 2 * shrunk * (moved * k + edit.source * j)
    square = moved**2 + edit.source**2 + 2 * moved * edit.source * k[-1] + edit.noise**2
    return Offset(shrunk * edit.shift, 1 + cross + shrunk**2 * square)


@jax.jit
def information(data: GaussianMixture, schedule: Schedule, ts: Times, edit: Standard) -> Float[Array, " times"]:
    """I(x~_t0; W) = -1/2 log(1 - Cor(x~_t0, x_s - G x_t0)²), W the noise from t0 to s; Gaussian data, lam = 1, d = 1.

    Of x_s the noise makes x_s - G x_t0, and nothing else of it is in x_0 and so in the edit. 0 without source.
    """
    k = jax.vmap(lambda s: correlation_of_times(data, schedule, ts[0], s))(ts)
    j, Cor = k[-1] / k, k[-1]
    variance = edit.latent**2 + edit.source**2 + 2 * edit.latent * edit.source * Cor + edit.noise**2
    return -jnp.log1p(-((edit.source * j) ** 2) * (1 - k**2) / variance) / 2


# --- Mixtures on the line: Chapman-Kolmogorov for the pair --------------------------------------------------------


def monotone_edit(problem: Problem, source: GaussianMixture | None = None) -> Partial:
    """The increasing map of x_t0, noised from the source, whose image has the law of the start, (n,) -> (n,); d = 1."""
    source = problem.target if source is None else source
    return Partial(_monotone, source.marginal(problem.schedule, problem.t0), problem.start)


def _monotone(before: GaussianMixture, after: GaussianMixture, x: Float[Array, " n"]) -> Float[Array, " n"]:
    return line.quantile(after, line.tails(before, x))


@partial(jax.jit, static_argnames=("panels", "offsets"))
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
    schedule = solver.schedule
    source = problem.target if source is None else source
    eps_fn, back_fn = noise_fn(source, schedule), noise_fn(problem.target, schedule)

    def mean(eps_fn, x, t, s):
        return solver.kernel(eps_fn, x.reshape(-1, 1), t, s, solver.init(x.reshape(-1, 1)))[0].mean.reshape(x.shape)

    def edges_at(s: Time) -> Float[Array, " panels_1"]:
        return panel_edges(source.marginal(schedule, s), panels)

    def step(carry, times):
        (t, s), (x, deltas, law, *_) = times, carry
        moved = mean(back_fn, x[:, None] + deltas, t, s) - mean(eps_fn, x, t, s)[:, None]
        fine, shared = _share_out(moved, law, offsets, spacing)
        edges = edges_at(s)
        rule = legendre_panels(edges)
        density = _reverse_density(source, schedule, x, t, rule.nodes[:, 0], s) @ shared  # of x_s, for every delta
        out = legendre_panels(panel_edges(sde_cover(problem, s), panels))
        edited = _sum_of_shifted(edges, density, fine, out.nodes[:, 0])
        places, weights = jnp.broadcast_to(fine[None], density.shape), rule.weights[:, None] * density
        after = rule.nodes[:, 0], places, weights, out, edited
        carry = jax.tree.map(lambda new, old: jnp.where(t == s, old, new), after, carry)
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
    """sum_m f_m(y - shift_m) for f_m given at the nodes of panels, 0 outside of them."""
    nodes, _, _, _ = legendre(12)
    barycentric = jnp.asarray(1 / np.prod(nodes[:, None] - nodes[None] + np.eye(12), axis=1))
    x = y[:, None] - shifts[None]
    panel = jnp.clip(jnp.searchsorted(edges, x) - 1, 0, len(edges) - 2)
    u = 2 * (x - edges[panel]) / (edges[panel + 1] - edges[panel]) - 1
    total, norm = jnp.zeros_like(x), jnp.zeros_like(x)
    columns = jnp.arange(len(shifts))[None]
    for i, node in enumerate(nodes.tolist()):
        share = barycentric[i] / jnp.where(u == node, 1e-300, u - node)
        total, norm = total + share * density[panel * 12 + i, columns], norm + share
    inside = (x >= edges[0]) & (x <= edges[-1])
    return jnp.sum(jnp.where(inside, total / norm, 0.0), axis=1)
