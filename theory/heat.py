"""Any noise level lam on the line: the density ratio solves a heat equation.

In u = F_t(x), with tau = t0 - t running backwards along the reverse lambda-SDE,

    dh/dtau = lam² g²/2 d/du (p_t² dh/du)   on (0, 1), no flux at the ends.

lam = 0 leaves h alone (Theorem 3.2), lam > 0 flattens it towards 1 (Theorem 3.1). Finite volumes in u, whose cells
follow the quantiles of p_t; two resolutions give the error.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr, ndtr, ndtri
from jaxtyping import Array, Float

from theory import line
from theory.arguments import level, prepared
from theory.divergences import F_DIVERGENCES, at_nodes
from theory.evolution import Cells, Steps, evolve, refined, steps_of
from theory.problems import Curve, Problem
from theory.quadrature import legendre
from theory.tails import chi2_is_finite
from theory.types import Estimate, Time, Times

Faces = Float[Array, " faces"]


class Grid(NamedTuple):
    """Cells of u = Phi(z), equal in z: their probabilities and the tails of u at their centres."""

    size: Cells
    centre: line.Tails


class Medium(NamedTuple):
    """Where the cells are at time t, and the conductance of each inner face: 1 / integral of dx / p_t across it."""

    x: Cells
    conductance: Faces


def _grid(problem: Problem, cells: int, reach: float = 8.0, finest: float = 1e-5) -> Grid:
    """A third of the cells equal in z, a third crowded geometrically around the gaps between neighbouring components.

    A gap of the data closes to a point in u, and what passes it while it closes decides the weights of the modes. The
    last third is spread over what the components of the start reach, however narrow they are, or far in a tail.
    """
    target, start = problem.target, problem.start
    unit = start._replace(
        log_weights=jnp.zeros(1), means=jnp.zeros((1, 1)), variances=jnp.ones((1, 1)), axes=start.axes[:1]
    )
    across = jnp.linspace(-reach, reach, 401)
    x = start.means + jnp.sqrt(start.variances) * across[None]  # (j, 401)
    of_start = jax.vmap(lambda x: line.quantile(unit, line.tails(problem.marginal(problem.t0), x)))(x)
    low, high = jnp.minimum(-reach, of_start.min()), jnp.maximum(reach, of_start.max())

    order = jnp.argsort(target.means[:, 0])
    below = jnp.cumsum(target.weights[order])[:-1]
    gaps = ndtri(below) if len(below) else jnp.zeros(1)
    widest = high - low
    table = jnp.sinh(jnp.linspace(-1, 1, 4001) * jnp.arcsinh(widest / finest)) * finest

    flat = jnp.linspace(low, high, 2001)
    z = jnp.sort(jnp.clip(jnp.concatenate([flat, (gaps[:, None] + table[None]).ravel(), of_start.ravel()]), low, high))
    crowded = jnp.mean(jnp.arcsinh((z[None] - gaps[:, None]) / finest), axis=0)
    covered = jnp.mean(jax.vmap(lambda known: jnp.interp(z, known, jnp.linspace(0, 1, len(across))))(of_start), axis=0)
    counted = sum((part - part[0]) / (part[-1] - part[0]) for part in (z, crowded, covered))
    faces = jnp.interp(jnp.linspace(0.0, 3.0, cells + 1), counted, z)
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
    tiny = jnp.finfo(h.dtype).tiny
    matched = line.quantile(marginal, line.Tails(*(jnp.log(jnp.maximum(tail, tiny)) for tail in (below, above))))
    distance = (medium.x - matched) ** 2
    size_of_two = grid.size[1:] + grid.size[:-1]
    modes = marginal.responsibilities(medium.x[:, None])
    r = jnp.maximum(jnp.log(jnp.maximum(h, tiny)), -700.0)  # exp(700) is finite
    h = jnp.exp(r)
    log_size, flat = jnp.log(grid.size), jnp.zeros_like(r)
    f = {f"f {name}": at_nodes(f.divergence, log_size, r, flat).sum() for name, f in F_DIVERGENCES.items()}
    # the exact rate at which the semi-discrete equation dissipates each
    rates = {
        f"rate {name}": jnp.sum(jnp.diff(h) * jnp.diff(f.slope(r)) * medium.conductance)
        for name, f in F_DIVERGENCES.items()
    }
    return (
        f
        | rates
        | {
            "kink": jnp.sum(jnp.where((h[1:] - 1) * (h[:-1] - 1) < 0, size_of_two * jnp.abs(jnp.diff(h)), 0.0)) / 4,
            "tv": jnp.sum(grid.size * jnp.abs(h - 1)) / 2,
            "w2": jnp.sqrt(mass @ distance),
            "cut": len(problem.target.log_weights)
            * jnp.max(jnp.minimum(mass[1:], mass[:-1]) * jnp.abs(jnp.diff(distance))),
            "mass": mass.sum(),
            "mode_weights": modes @ mass,
            "edge": jnp.max(jnp.maximum(mass[1:], mass[:-1])[None] * jnp.abs(jnp.diff(modes, axis=1)), axis=1) / 2,
        }
    )


@prepared(lam=level)
@partial(jax.jit, static_argnames=("cells", "steps"))
def heat_curve(problem: Problem, ts: Times, lam: float | Time, cells: int = 400, steps: int = 200) -> Curve:
    """`contraction_curve` for any lam on the line, on `cells` cells in `steps` time steps, and twice as many of both.

    ts decreases from t0. The error is that of `evolution.refined`, and what one cell may change: of W2 where the map
    between the laws jumps, of TV where h = 1, of the mode weights where a mode ends. Under `jax.vmap` over lam what
    takes the time, the grid's quantiles, is found once for all levels.

    Raises ValueError for a noise level that cannot be.
    """
    lam = jnp.asarray(lam, float)

    def solved(cells: int, in_time: Steps) -> dict[str, Array]:
        grid = _grid(problem, cells)
        before = problem.marginal(ts[0])
        x = line.quantile(before, grid.centre)[:, None]
        h = jnp.exp(problem.start.log_prob(x) - before.log_prob(x))
        h = h / (grid.size @ h)  # the equation keeps the mass, and divergences that small feel what lacks in it

        def implicit(right: Cells, t: Time, passed: Time) -> Cells:
            return _implicit(grid, right, _medium(problem, grid, t), lam**2 / 2 * passed)

        path = evolve(problem.schedule, implicit, h, in_time)
        return jax.lax.map(lambda at: _measure(problem, grid, *at), (path, ts))

    found = refined(solved, cells // 2, steps_of(problem, ts, steps // 2))
    lost = jnp.abs(found["mass"].value - 1)  # to rounding: cells at the gaps are tiny
    found = {n: Estimate(e.value, e.error + jnp.abs(e.value) * _along(lost, e.value)) for n, e in found.items()}
    cut, (value, error) = jnp.abs(found.pop("cut").value), found["w2"]
    w2 = Estimate(value, error + cut / jnp.maximum(value, jnp.sqrt(cut)))
    value, error = found["mode_weights"]
    mode_weights = Estimate(value, error + jnp.abs(found.pop("edge").value))
    tv = Estimate(found["tv"].value, found["tv"].error + jnp.abs(found.pop("kink").value))
    f, rates = ({name: found[f"{kind} {name}"] for name in F_DIVERGENCES} for kind in ("f", "rate"))
    finite = jax.vmap(lambda s: chi2_is_finite(problem, s, lam))(ts)
    for each in (f, rates):
        value, error = each["chi2"]
        each["chi2"] = Estimate(jnp.where(finite, value, jnp.inf), jnp.where(finite, error, 0.0))
    return Curve(ts, f, rates, tv, w2, found["mass"], mode_weights)


def _along(times: Times, values: Array | np.ndarray) -> Array:
    """(times,) against values of shape (times, ...)."""
    return times.reshape(-1, *[1] * (values.ndim - 1))
