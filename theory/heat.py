"""Any noise level lam on the line: the density ratio solves a heat equation.

In u = F_t(x), with tau = t0 - t running backwards along the reverse lambda-SDE,

    dh/dtau = lam² g²/2 d/du (p_t² dh/du)   on (0, 1), no flux at the ends.

lam = 0 leaves h alone (Theorem 3.2), lam > 0 flattens it towards 1 (Theorem 3.1). Finite volumes in u, whose cells
follow the quantiles of p_t, and an L-stable Runge-Kutta method in time; two resolutions give the error.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr, ndtr, ndtri
from jaxtyping import Array, Float

from theory import line
from theory.problems import Curve, Problem
from theory.quadrature import legendre
from theory.types import Estimate, Time, Times

Cells = Float[Array, " cells"]
Faces = Float[Array, " faces"]


class Grid(NamedTuple):
    """Cells of u = Phi(z), equal in z: their probabilities and the tails of u at their centres."""

    size: Cells
    centre: line.Tails


class Medium(NamedTuple):
    """Where the cells are at time t, and the conductance of each inner face: 1 / integral of dx / p_t across it."""

    x: Cells
    conductance: Faces


def _grid(problem: Problem, cells: int, reach: float = 8.0, finest: float = 1e-4) -> Grid:
    """Half the cells equal in z, half crowded geometrically around the gaps between neighbouring components.

    A gap of the data closes to a point in u, and what passes it while it closes decides the weights of the modes.
    """
    target = problem.target
    order = jnp.argsort(target.means[:, 0])
    below = jnp.cumsum(target.weights[order])[:-1]
    gaps = ndtri(below) if len(below) else jnp.zeros(1)

    table = jnp.sinh(jnp.linspace(-1, 1, 4001) * jnp.arcsinh(reach / finest)) * finest
    z = jnp.sort(jnp.clip((gaps[:, None] + table[None]).ravel(), -reach, reach))
    distance = (z[None] - gaps[:, None]) / finest
    crowding = jnp.mean(jnp.arcsinh(distance), axis=0) / jnp.arcsinh(reach / finest)
    counted = z / reach + crowding
    faces = jnp.interp(jnp.linspace(counted[0], counted[-1], cells + 1), counted, z)
    size = jnp.where(faces[1:] > 0, ndtr(-faces[:-1]) - ndtr(-faces[1:]), ndtr(faces[1:]) - ndtr(faces[:-1]))
    centre = (faces[1:] + faces[:-1]) / 2
    return Grid(size, line.Tails(log_ndtr(centre), log_ndtr(-centre)))


def _medium(problem: Problem, grid: Grid, t: Time) -> Medium:
    marginal = problem.marginal(t)
    x = line.quantile(marginal, grid.centre)
    nodes, weights, _, _ = legendre(16)
    half = jnp.diff(x)[:, None] / 2
    y = (x[1:] + x[:-1])[:, None] / 2 + half * nodes[None]
    # exp(700) is as good as an insulator, and finite.
    resistance = (half * jnp.exp(jnp.minimum(-marginal.log_prob(y[..., None]), 700.0))) @ weights
    return Medium(x, 1 / resistance)


def _implicit(grid: Grid, right: Cells, medium: Medium, scale: Time) -> Cells:
    """Solves (1 - scale d/du (p² d/du)) h = right, a tridiagonal system."""
    zero = jnp.zeros(1)
    lower = scale * jnp.concatenate([zero, medium.conductance]) / grid.size
    upper = scale * jnp.concatenate([medium.conductance, zero]) / grid.size
    return jax.lax.linalg.tridiagonal_solve(-lower, 1 + lower + upper, -upper, right[:, None])[:, 0]


def _measure(problem: Problem, grid: Grid, h: Cells, s: Time) -> dict[str, Array]:
    marginal, medium = problem.marginal(s), _medium(problem, grid, s)
    mass = grid.size * h
    below = jnp.cumsum(mass) - mass / 2
    above = jnp.cumsum(mass[::-1])[::-1] - mass / 2
    matched = line.quantile(marginal, line.Tails(jnp.log(below), jnp.log(above)))
    return {
        "kl": jnp.sum(grid.size * (h * jnp.log(h) - h + 1)),
        # the exact rate at which the semi-discrete equation dissipates this KL
        "fisher": jnp.sum(jnp.diff(h) * jnp.diff(jnp.log(h)) * medium.conductance),
        "chi2": jnp.sum(grid.size * (h - 1) ** 2),
        "tv": jnp.sum(grid.size * jnp.abs(h - 1)) / 2,
        "w2": jnp.sqrt(jnp.sum(mass * (medium.x - matched) ** 2)),
        "dirichlet": jnp.sum(jnp.diff(h) ** 2 * medium.conductance),
        "mass": mass.sum(),
        "mode_weights": marginal.responsibilities(medium.x[:, None]) @ mass,
    }


def _solve(problem: Problem, ts: Times, lam: Time, cells: int, substeps: int) -> dict[str, Array]:
    grid = _grid(problem, cells)
    before = problem.marginal(ts[0])
    x = line.quantile(before, grid.centre)[:, None]
    h = jnp.exp(problem.start.log_prob(x) - before.log_prob(x))
    h = h / (grid.size @ h)  # the equation keeps the mass, and divergences that small feel what lacks in it

    def step(h: Cells, ends: Float[Array, "2"]) -> tuple[Cells, None]:
        # Alexander 1977, the two-stage L-stable SDIRK method: the tails and the gaps between modes are stiff.
        gamma = 1 - 2**-0.5
        t, s = ends
        stages = jnp.stack([t + gamma * (s - t), s])
        media = jax.vmap(partial(_medium, problem, grid))(stages)
        rates = lam**2 / 2 * problem.schedule.beta(stages) * gamma * (t - s)
        early, late = (jax.tree.map(lambda leaf, i=i: leaf[i], (media, rates)) for i in (0, 1))
        first = _implicit(grid, h, *early)
        slope = (first - h) / gamma
        return _implicit(grid, h + (1 - gamma) * slope, *late), None

    def interval(h: Cells, ends: Float[Array, "2"]) -> tuple[Cells, Cells]:
        inner = jnp.linspace(ends[0], ends[1], substeps + 1)
        h, _ = jax.lax.scan(step, h, jnp.stack([inner[:-1], inner[1:]], axis=1))
        return h, h

    _, later = jax.lax.scan(interval, h, jnp.stack([ts[:-1], ts[1:]], axis=1))
    return jax.lax.map(lambda at: _measure(problem, grid, *at), (jnp.concatenate([h[None], later]), ts))


@partial(jax.jit, static_argnames=("cells", "steps"))
def heat_curve(problem: Problem, ts: Times, lam: float | Time, cells: int = 400, steps: int = 200) -> Curve:
    """`contraction_curve` for any lam on the line: `steps` time steps on the coarse grid, twice that on the fine.

    Under `jax.vmap` over lam what takes the time, the grid's quantiles, is found once for all levels.
    """
    substeps = -(-steps // (len(ts) - 1))
    coarse, fine = (_solve(problem, ts, jnp.asarray(lam, float), k * cells, k * substeps) for k in (1, 2))
    values = {
        name: Estimate((4 * fine[name] - coarse[name]) / 3, jnp.abs(fine[name] - coarse[name]) / 3) for name in fine
    }
    mass, mode_weights = values.pop("mass").value, values.pop("mode_weights").value
    return Curve(ts=ts, mass=mass, mode_weights=mode_weights, **values)
