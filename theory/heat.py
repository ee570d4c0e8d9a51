"""Any noise level lam on the line: the density ratio solves a heat equation.

In u = F_t(x), with tau = t0 - t running backwards along the reverse lambda-SDE,

    dh/dtau = lam² g²/2 d/du (p_t² dh/du)   on (0, 1), no flux at the ends.

lam = 0 leaves h alone (Theorem 3.2), lam > 0 flattens it towards 1 (Theorem 3.1). Finite volumes in u, whose cells
follow the quantiles of p_t, and Crank-Nicolson in time, both of second order; Richardson extrapolation from two
resolutions gives the value and its error.
"""

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr
from jaxtyping import Array, Float

from theory import line
from theory.quadrature import legendre
from theory.types import Estimate, Time, Times

if TYPE_CHECKING:  # a cycle at run time: contraction hands its curves over to this module
    from theory.contraction import Curve, Problem

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


def _grid(cells: int, reach: float = 8.0) -> Grid:
    z = (jnp.arange(cells) + 0.5) / cells * 2 * reach - reach
    # phi dz rather than the difference of Phi: the midpoint rule is then exact to rounding for smooth h.
    size = jnp.exp(-(z**2) / 2)
    return Grid(size / size.sum(), line.Tails(log_ndtr(z), log_ndtr(-z)))


def _medium(problem: "Problem", grid: Grid, t: Time) -> Medium:
    marginal = problem.marginal(t)
    x = line.quantile(marginal, grid.centre)
    nodes, weights, _, _ = legendre(16)
    half = jnp.diff(x)[:, None] / 2
    y = (x[1:] + x[:-1])[:, None] / 2 + half * nodes[None]
    # exp(700) is as good as an insulator, and finite.
    resistance = (half * jnp.exp(jnp.minimum(-marginal.log_prob(y[..., None]), 700.0))) @ weights
    return Medium(x, 1 / resistance)


def _crank_nicolson(grid: Grid, h: Cells, before: Medium, after: Medium, half_steps: tuple[Time, Time]) -> Cells:
    """(1 - dt/2 L_s) h_s = (1 + dt/2 L_t) h_t, L = lam² g²/2 d/du (p² d/du) tridiagonal."""

    def bands(medium: Medium, half_step: Time) -> tuple[Cells, Cells, Cells]:
        zero = jnp.zeros(1)
        lower = half_step * jnp.concatenate([zero, medium.conductance]) / grid.size
        upper = half_step * jnp.concatenate([medium.conductance, zero]) / grid.size
        return lower, -(lower + upper), upper

    lower, diagonal, upper = bands(before, half_steps[0])
    around = jnp.pad(h, 1)
    right = h + lower * around[:-2] + diagonal * h + upper * around[2:]
    lower, diagonal, upper = bands(after, half_steps[1])
    return jax.lax.linalg.tridiagonal_solve(-lower, 1 - diagonal, -upper, right[:, None])[:, 0]


def _measure(problem: "Problem", grid: Grid, h: Cells, medium: Medium, s: Time) -> dict[str, Array]:
    marginal = problem.marginal(s)
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
        "mass": mass.sum(),
        "mode_weights": marginal.responsibilities(medium.x[:, None]) @ mass,
    }


@partial(jax.jit, static_argnames=("cells", "substeps"))
def _solve(problem: "Problem", ts: Times, lam: Time, cells: int, substeps: int) -> dict[str, Array]:
    grid = _grid(cells)
    medium = _medium(problem, grid, ts[0])
    x = medium.x[:, None]
    h = jnp.exp(problem.start.log_prob(x) - problem.marginal(ts[0]).log_prob(x))

    def step(carry, times):
        t, s = times
        h, before = carry
        after = _medium(problem, grid, s)
        rates = lam**2 * problem.schedule.beta(times) * (t - s) / 4
        return (_crank_nicolson(grid, h, before, after, (rates[0], rates[1])), after), None

    def interval(carry, ends):
        inner = jnp.linspace(ends[0], ends[1], substeps + 1)
        (h, medium), _ = jax.lax.scan(step, carry, jnp.stack([inner[:-1], inner[1:]], axis=1))
        return (h, medium), _measure(problem, grid, h, medium, ends[1])

    first = _measure(problem, grid, h, medium, ts[0])
    _, rest = jax.lax.scan(interval, (h, medium), jnp.stack([ts[:-1], ts[1:]], axis=1))
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, rest)


def heat_curve(problem: "Problem", ts: Times, lam: float, cells: int = 200, steps: int = 120) -> "Curve":
    """`contraction_curve` for any lam on the line: `steps` time steps on the coarse grid, twice that on the fine."""
    from theory.contraction import Curve

    substeps = -(-steps // (len(ts) - 1))
    coarse = _solve(problem, ts, jnp.asarray(lam, float), cells, substeps)
    fine = _solve(problem, ts, jnp.asarray(lam, float), 2 * cells, 2 * substeps)
    values = {
        name: Estimate((4 * fine[name] - coarse[name]) / 3, jnp.abs(fine[name] - coarse[name]) / 3) for name in fine
    }
    mass, mode_weights = values.pop("mass").value, values.pop("mode_weights").value
    return Curve(ts=ts, mass=mass, mode_weights=mode_weights, **values)
