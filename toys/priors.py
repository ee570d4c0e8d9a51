"""The paper's toy figure: two modes, four starts, and what ODE, SDE and Cycle-SDE make of each.

Every start is x~_T = T(x_T), T the increasing map from p_T to the start's law, so one draw of x_T serves all of them,
and Cycle-SDE, which needs the path that led to x_T, edits by the same map.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from theory import line
from theory.checks import paper_problem
from theory.flows import flow_map
from theory.mixtures import GaussianMixture, gaussian, mixture_1d, noise_fn
from theory.problems import Problem
from theory.processes import forward_path
from theory.quadrature import legendre_panels, panel_edges
from theory.solve import record, replay, sample, time_grid, unit_noise
from theory.solvers import DDIM
from theory.types import PRNGKey, Time
from toys.results import Row
from toys.style import INK, SAMPLERS, TEXT_WIDTH, figure, styled

TITLE = "A wrong prior: the ODE keeps the error, the SDE forgets it"
NAMES = ("p_T, the right one", "N(½, ½²)", "two modes", "uniform")
PUBLISHED = {("N(½, ½²)", "ODE"): 0.846, ("N(½, ½²)", "SDE"): 0.542}  # measured in the paper's figure


@dataclass(frozen=True)
class Config:
    """How many samples, over how many steps; the figure shows `paths` of them, at equal quantiles of p_T."""

    samples: int = 20_000
    steps: int = 400
    paths: int = 8
    points: int = 241
    times: int = 61
    seed: int = 0

    @classmethod
    def tiny(cls) -> "Config":
        return cls(samples=1000, steps=100, points=121, times=21)


class Arrays(NamedTuple):
    """Axes: sampler (ODE, SDE, Cycle-SDE), prior (as in NAMES), then what the name says."""

    x: np.ndarray  # (points,)
    ts: np.ndarray  # (times,)
    density: np.ndarray  # (3, 4, times, points) exact law of x~_t
    data: np.ndarray  # (points,) density of the data
    starts: np.ndarray  # (4, samples) x~_T
    ends: np.ndarray  # (3, 4, samples) x~_0
    path_ts: np.ndarray  # (steps + 1,)
    paths: np.ndarray  # (3, 4, steps + 1, paths)
    upper: np.ndarray  # (3, 4) exact weight of the upper mode


class Prior(NamedTuple):
    """A law on the line: its density, the increasing map to it from another law's tails, and its mass above 0."""

    density: Callable[[Array], Array]
    quantile: Callable[[line.Tails], Float[Array, " n"]]
    above: Float[Array, ""]


def priors(problem: Problem) -> tuple[Prior, ...]:
    """In the order of NAMES: the right one, the published one, another mixture, and a uniform law."""
    low, high = -0.4, 1.6

    def mixed(law: GaussianMixture) -> Prior:
        above = jnp.exp(line.tails(law, jnp.zeros(1)).log_upper[0])
        return Prior(lambda x: jnp.exp(law.log_prob(x[..., None])), partial(line.quantile, law), above)

    uniform = Prior(
        lambda x: ((x > low) & (x < high)) / (high - low),
        lambda u: low + (high - low) * jnp.exp(u.log_lower),
        jnp.array(high / (high - low)),
    )
    two = mixture_1d([0.8, 0.2], [-0.8, 1.0], [0.25, 0.15])
    return mixed(problem.marginal(problem.t0)), mixed(gaussian([0.5], [[0.25]])), mixed(two), uniform


def run(config: Config) -> Arrays:
    problem = paper_problem()
    x, ts = np.linspace(-3.2, 3.2, config.points), np.linspace(1.0, 0.0, config.times)
    density, data, upper = _exact(problem, x, ts)

    path_ts = time_grid(problem.schedule, config.steps)
    drawn = _draw(problem, path_ts, config.samples, jr.key(config.seed))
    first = drawn.path[0, :, 0]
    edited = _edited(problem, first)
    ranks = (config.samples * (np.arange(config.paths) + 0.5) / config.paths).astype(int)
    shown = np.argsort(first)[ranks]
    found = [_sample(problem, path_ts, start, drawn, shown) for start in edited]
    ends, paths = (np.stack(parts, axis=1) for parts in zip(*found, strict=True))
    return Arrays(*map(np.asarray, (x, ts, density, data, edited, ends, path_ts, paths, upper)))


@jax.jit
def _exact(problem: Problem, x, ts):
    """The laws on the way, (samplers, priors, times, points), the data's density, and the weights of the upper mode."""
    starts, law = priors(problem), problem.marginal(problem.t0)
    came_from, marginals, at_source = _flow(problem, x, ts)
    ode = jnp.stack([marginals * prior.density(came_from) / at_source for prior in starts])
    rule = legendre_panels(panel_edges(law, 40))
    nodes, mass = line.tails(law, rule.nodes[:, 0]), rule.weights * jnp.exp(law.log_prob(rule.nodes))
    sources = jnp.stack([prior.quantile(nodes) for prior in starts])
    later, healed = jax.lax.map(lambda y: _average(problem, y, mass, x, ts[1:]), sources)
    sde = jnp.concatenate([jnp.stack([prior.density(x) for prior in starts])[:, None], later], axis=1)
    # Under the ODE the half of the data above 0 comes from the half of p_T above 0.
    above = jnp.stack([prior.above for prior in starts])
    density = jnp.stack([ode, sde, sde])  # Theorem 3.3: Cycle-SDE has the SDE's marginals
    return density, jnp.exp(problem.target.log_prob(x[:, None])), jnp.stack([above, healed, healed])


@jax.jit
def _edited(problem: Problem, x) -> Float[Array, "priors n"]:
    """These draws of p_T, edited into draws of every prior."""
    reached = line.tails(problem.marginal(problem.t0), x)
    return jnp.stack([prior.quantile(reached) for prior in priors(problem)])


class Drawn(NamedTuple):
    """Forward paths of data, the noise recorded along them, and the key of the SDE's own noise."""

    path: Float[Array, "times n 1"]
    noise: Float[Array, "steps n 1"]
    key: PRNGKey


@partial(jax.jit, static_argnums=2)
def _draw(problem: Problem, ts, n: int, key) -> Drawn:
    data_key, path_key, noise_key = jr.split(key, 3)
    x0 = problem.target.sample(data_key, (n,))
    path = forward_path(problem.schedule, x0, ts, path_key)
    eps_fn = noise_fn(problem.target, problem.schedule)
    # The last step has no noise to record: it is the ODE's.
    return Drawn(path, record(DDIM(problem.schedule, 1.0), eps_fn, path[:-1], ts[:-1]), noise_key)


@jax.jit
def _sample(problem: Problem, ts, start, drawn: Drawn, shown):
    """The ends, (3, n), and the paths that are shown, (3, times, paths), of the three samplers from a start, (n,)."""
    start, eps_fn = start[:, None], noise_fn(problem.target, problem.schedule)
    ode, sde = DDIM(problem.schedule, 0.0), DDIM(problem.schedule, 1.0)
    fresh = unit_noise(drawn.key, start, ts)
    cycled = replay(sde, eps_fn, start, ts[:-1], drawn.noise)
    last = sample(ode, eps_fn, cycled[-1], ts[-2:], drawn.key)
    whole = [
        replay(ode, eps_fn, start, ts, jnp.zeros_like(fresh)),
        replay(sde, eps_fn, start, ts, fresh),
        jnp.concatenate([cycled, last[None]]),
    ]
    return jnp.stack([path[-1, :, 0] for path in whole]), jnp.stack([path[:, shown, 0] for path in whole])


def _flow(problem: Problem, x, ts):
    """Where the ODE takes x at t from, p_t at x, and p_T there, (times, points): p~_t(x) = p_t(x) p~_T / p_T there."""

    def at(t: Time):
        y = flow_map(problem, t, problem.t0, x)
        return y, jnp.exp(problem.marginal(t).log_prob(x[:, None])), jnp.exp(law.log_prob(y[:, None]))

    law = problem.marginal(problem.t0)
    return jax.lax.map(at, ts)


def _average(problem: Problem, y, mass, x, ts):
    """p~_t(x) = E[q(x_t = x | x_T = y)] with the exact reverse kernel, (times, points), and the upper mode's weight."""

    def at(t: Time):
        kernel = jax.vmap(lambda y: problem.target.reverse_kernel(problem.schedule, y, problem.t0, t))(y[:, None])
        variances = kernel.variances[None, ..., 0]
        z = (x[:, None, None] - kernel.means[None, ..., 0]) / jnp.sqrt(variances)
        normal = jnp.exp(-(z**2) / 2) / jnp.sqrt(2 * jnp.pi * variances)
        return jnp.einsum("i,ik,xik->x", mass, kernel.weights, normal)

    # The weights of the modes in x_0 given y are their responsibilities for y.
    responsibilities = problem.marginal(problem.t0).responsibilities(y[:, None])
    highest = jnp.argmax(problem.target.means[:, 0])
    return jax.lax.map(at, ts), mass @ responsibilities[highest]


def rows(arrays: Arrays) -> list[Row]:
    found = []
    for i, sampler in enumerate(SAMPLERS):
        for j, name in enumerate(NAMES):
            share = float(np.mean(arrays.ends[i, j] > 0))
            error = np.sqrt(share * (1 - share) / arrays.ends.shape[-1])
            published = PUBLISHED.get((name, sampler))
            remark = "" if published is None else f"{published:.3f} in the paper's figure"
            found.append(
                Row(f"weight of the upper mode, {sampler} from {name}", share, error, arrays.upper[i, j], remark)
            )
    return found


@styled
def plot(arrays: Arrays) -> Figure:
    """A row for each sampler, a column for each start: exact law in grey, sample paths, and both ends."""
    made = figure(5.6, TEXT_WIDTH)
    rows_, columns = arrays.ends.shape[:2]
    grid = made.add_gridspec(rows_, 3 * columns, width_ratios=[1, 3.2, 1.5] * columns, wspace=0.0)
    bins = np.linspace(arrays.x[0], arrays.x[-1], 61)
    for i, (sampler, colour) in enumerate(SAMPLERS.items()):
        for j, name in enumerate(NAMES):
            left, middle, right = (made.add_subplot(grid[i, 3 * j + k]) for k in range(3))
            shade = arrays.density[i, j] / arrays.density[i, j].max(axis=1, keepdims=True)
            extent = (1.0, 0.0, arrays.x[0], arrays.x[-1])
            middle.imshow(shade.T, origin="lower", aspect="auto", extent=extent, vmin=0, vmax=1.8)
            middle.plot(arrays.path_ts, arrays.paths[i, j], color=colour, lw=0.6)
            middle.set(xlim=(1, 0), xticks=[1, 0], yticks=[])
            for axis, values, exact in (
                (left, arrays.starts[j], arrays.density[i, j, 0]),
                (right, arrays.ends[i, j], arrays.density[i, j, -1]),
            ):
                look = {"histtype": "stepfilled", "orientation": "horizontal", "color": colour, "alpha": 0.35}
                axis.hist(values, bins, density=True, lw=0, **look)
                axis.plot(exact, arrays.x, color=colour, lw=1)
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
            right.plot(arrays.data, arrays.x, color="black", lw=0.7, ls=(0, (2, 2)))
            left.invert_xaxis()
            for axis in (left, middle, right):
                axis.set_ylim(arrays.x[0], arrays.x[-1])
            share = arrays.upper[i, j]
            for weight, y, va in ((share, 1.0, "top"), (1 - share, 0.0, "bottom")):
                words = {"ha": "right", "va": va, "fontsize": 9, "fontweight": "bold", "color": colour}
                right.text(1.0, y, f"{weight:.0%}", transform=right.transAxes, **words)
            if i == 0:
                middle.set_title(f"from {name}")
            if i == rows_ - 1:
                middle.set_xlabel("time t")
            if j == 0:
                left.set_ylabel(f"{sampler}\n", color=colour, fontweight="bold", fontsize=9)
                left.set_yticks([-2, 0, 2])
                left.tick_params(length=0, pad=1)
                left.text(-0.42, 0.82, "x", transform=left.transAxes, ha="right", va="center", fontsize=8)
    handles = [
        Line2D([], [], color="black", lw=0.8, ls=(0, (2, 2)), label="data"),
        Patch(color="0.6", label="exact law on the way"),
        Line2D([], [], color=INK, lw=1, label="exact law at the ends"),
        Patch(color=INK, alpha=0.35, lw=0, label="samples"),
        Line2D([], [], color=INK, lw=0.6, label="eight paths, from equal quantiles"),
    ]
    made.legend(handles=handles, loc="outside lower center", ncols=5)
    return made
