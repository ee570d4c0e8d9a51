"""Learned scores: what training error does to the generated law, and where randomness stops helping.

A small network learns the noise prediction of the paper's toy from samples. Its law under the reverse lambda-SDE is
solved for, not sampled (`theory.fokker_planck`), and so is each term of

    dKL/dtau = -lam²/2 g² I(p~|p) + (1 + lam²)/2 g² E_p~[e . grad log p~/p],      e = learned score - score.

The first term is the healing of Theorem 3.1; the second is the error's part, mostly harm, whose factor grows with
noise. The trade-off is that of Cao et al. 2023 (arXiv 2306.02063) and Schaeffer et al. 2025 (arXiv 2506.11378).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import numpy as np
import optax
from flax import nnx
from jax.tree_util import Partial
from jaxtyping import Array, Float
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.integrate import cumulative_simpson

from theory.checks import paper_problem
from theory.fokker_planck import inexact_curve, inexact_flow
from theory.heat import heat_curve
from theory.problems import InexactCurve, Problem
from theory.processes import marginal
from theory.solve import sample, time_grid
from theory.solvers import DDIM
from theory.types import PRNGKey, Time, Times
from toys.results import Row
from toys.style import INK, ODE, OTHERS, SDE, figure, letter, styled

TITLE = "Learned scores: where randomness stops helping"
END = 1e-3  # a learned noise prediction is not a score at t = 0
STARTS = ("the right start", "a wrong start")


@dataclass(frozen=True)
class Config:
    """The network and its training, when it is looked at, and the noise levels from 0 up; the rest is of the solver."""

    width: int = 64
    batch: int = 512
    learning_rate: float = 2e-3
    trained: tuple[int, ...] = (200, 600, 2000, 6000)
    levels: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.4, 2.0, 3.0)
    times: int = 81
    cells: int = 400
    samples: int = 20_000
    steps: int = 500
    seed: int = 0

    def __post_init__(self):
        if self.levels[:1] != (0.0,) or 1.0 not in self.levels:
            raise ValueError(f"levels must begin with 0, the ODE, and have 1, the SDE, among them, got {self.levels}")

    @classmethod
    def tiny(cls) -> "Config":
        return cls(32, 256, 4e-3, (200, 600), (0.0, 1.0, 2.0), 41, 200, 1000, 100)


class Arrays(NamedTuple):
    """Axes: start (right, wrong), training, level, then time."""

    trained: np.ndarray  # (trained,) steps of training
    levels: np.ndarray  # (levels,)
    ts: np.ndarray  # (times,)
    beta: np.ndarray  # (times,) g²
    kl: np.ndarray  # (2, trained, levels, times)
    kl_error: np.ndarray  # (2, trained, levels) at the end, of the solver
    fisher: np.ndarray  # (2, trained, levels, times)
    error: np.ndarray  # (2, trained, levels, times) E[e . grad log h]
    upper: np.ndarray  # (2, trained, levels) weight of the upper mode at the end
    exact: np.ndarray  # (levels,) KL of the wrong start with the exact score, by the same solver
    exact_error: np.ndarray  # (levels,)
    reference: np.ndarray  # (levels,) the same by the equation for the density ratio: `heat_curve`
    reference_error: np.ndarray  # (levels,)
    score_error: np.ndarray  # (trained, times) E_p |e|²
    sampled: np.ndarray  # (2,) share of samples in the upper mode: wrong start, lam = 1, the last network; its error


class NoiseNet(nnx.Module):
    """eps of points x (n, 1) at times of this log_snr, (n, 1) or one for all, (1, 1).

    Three layers on x and waves of log_snr, and a linear skip.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.first = nnx.Linear(10, width, rngs=rngs)
        self.second = nnx.Linear(width, width, rngs=rngs)
        self.third = nnx.Linear(width, width, rngs=rngs)
        self.last = nnx.Linear(width, 1, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x: Float[Array, "n 1"], log_snr: Float[Array, "#n 1"]) -> Float[Array, "n 1"]:
        u = log_snr / 10
        waves = [f(k * jnp.pi * u) for k in (0.5, 1.0, 2.0, 4.0) for f in (jnp.sin, jnp.cos)]
        time = jnp.concatenate([u, *waves], axis=-1)
        h = nnx.silu(self.first(jnp.concatenate([x, jnp.broadcast_to(time, (len(x), time.shape[1]))], axis=-1)))
        h = h + nnx.silu(self.second(h))
        h = h + nnx.silu(self.third(h))
        return x + self.last(h)  # at t = 1 the exact prediction is x, nearly


def noise_fn(problem: Problem, graph: nnx.GraphDef, weights: nnx.State, exact: float | Array = 0.0) -> Partial:
    """The network as a `NoiseFn` for points (n, 1) at one time; exact = 1 puts the exact prediction in its place.

    New weights, and the switch, are new arrays and not a new trace.
    """
    return Partial(partial(_predict, graph), problem, weights, jnp.asarray(exact))


def _predict(graph: nnx.GraphDef, problem: Problem, weights: nnx.State, exact: Array, x: Float[Array, "n 1"], t: Time):
    learned = nnx.merge(graph, weights)(x, problem.schedule.log_snr(t)[None, None])
    return jnp.where(exact, -problem.schedule.sigma(t) * problem.marginal(t).score(x), learned)


def train(problem: Problem, config: Config) -> tuple[nnx.GraphDef, nnx.State]:
    """Denoising score matching, E |eps(alpha x_0 + sigma eps, t) - eps|², t uniform: the weights after each of
    `config.trained` steps, stacked."""
    graph, weights = nnx.split(NoiseNet(config.width, rngs=nnx.Rngs(config.seed)))
    rate = optax.cosine_decay_schedule(config.learning_rate, config.trained[-1], alpha=0.02)
    optimizer = optax.adam(rate)

    def loss_fn(weights: nnx.State, key: PRNGKey) -> Float[Array, ""]:
        data_key, time_key, noise_key = jr.split(key, 3)
        x0 = problem.target.sample(data_key, (config.batch,))
        t = jr.uniform(time_key, (config.batch, 1), minval=END)
        eps = jr.normal(noise_key, x0.shape)
        x = jax.vmap(lambda x0, t, eps: (q := marginal(problem.schedule, x0, t)).mean + q.std * eps)(x0, t[:, 0], eps)
        return jnp.mean((nnx.merge(graph, weights)(x, problem.schedule.log_snr(t)) - eps) ** 2)

    @partial(jax.jit, static_argnums=2)
    def advance(weights, moments, steps: int, key):
        def step(carry, key):
            weights, moments = carry
            update, moments = optimizer.update(jax.grad(loss_fn)(weights, key), moments)
            return (optax.apply_updates(weights, update), moments), None

        return jax.lax.scan(step, (weights, moments), jr.split(key, steps))[0]

    moments, looks = optimizer.init(weights), []
    unit = int(np.gcd.reduce(config.trained))  # so that one program does for all
    done = 0
    for stop in config.trained:
        while done < stop:
            weights, moments = advance(weights, moments, unit, jr.fold_in(jr.key(config.seed + 1), done))
            done += unit
        looks.append(weights)
    return graph, jax.tree.map(lambda *leaves: jnp.stack(leaves), *looks)


def run(config: Config) -> Arrays:
    p = paper_problem()
    graph, weights = train(p, config)
    # Denser at both ends: a wrong start heals fastest at once, and the score's error is largest at the data.
    ts = jnp.asarray(END + (1 - END) * (1 + np.cos(np.linspace(0.0, np.pi, config.times))) / 2)
    levels = jnp.array(config.levels)
    both, score_errors = jax.tree.map(np.asarray, _laws(p, graph, weights, ts, levels, config.cells))
    learned = jax.tree.map(lambda leaf: leaf[:, :-1], both)

    ends, steps = jnp.array([1.0, END]), config.cells // 2
    reference = jax.vmap(lambda lam: heat_curve(p, ends, lam, config.cells, steps).kl)(levels)

    last = noise_fn(p, graph, jax.tree.map(lambda leaf: leaf[-1], weights))
    grid = time_grid(p.schedule, config.steps, end=END)
    x = p.start.sample(jr.key(config.seed + 2), (config.samples,))
    sampled = sample(DDIM(p.schedule, 1.0), last, x, grid, jr.key(config.seed + 3))
    share = float(np.mean(np.asarray(sampled) > 0))
    return Arrays(
        trained=np.array(config.trained),
        levels=np.asarray(levels),
        ts=np.asarray(ts),
        beta=np.asarray(p.schedule.beta(ts)),
        kl=learned.kl.value,
        kl_error=learned.kl.error[..., -1],
        fisher=learned.fisher.value,
        error=learned.error.value,
        upper=learned.mode_weights.value[..., -1, int(np.argmax(p.target.means[:, 0]))],
        exact=both.kl.value[1, -1, :, -1],
        exact_error=both.kl.error[1, -1, :, -1],
        reference=np.asarray(reference.value[:, -1]),
        reference_error=np.asarray(reference.error[:, -1]),
        score_error=score_errors[:-1],
        sampled=np.array([share, np.sqrt(share * (1 - share) / config.samples)]),
    )


@partial(jax.jit, static_argnums=(1, 5))
def _laws(
    p: Problem, graph: nnx.GraphDef, weights: nnx.State, ts: Times, levels: Float[Array, " levels"], cells: int
) -> tuple[InexactCurve, Float[Array, "networks times"]]:
    """Curves of (starts, networks, levels), the first level that of the ODE; and E_p |e|² of the networks.

    The networks are those of these weights, and the exact prediction in the last place. The starts are two weightings
    of the same components: what does not depend on the weights, the flow and all predictions, is computed once.
    """
    right, count = p.marginal(p.t0), jax.tree.leaves(weights)[0].shape[0]
    with_last = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[-1:]]), weights)
    networks = jax.vmap(partial(noise_fn, p, graph))(with_last, jnp.arange(count + 1) == count)
    components = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), right, p.start)
    of_right = jnp.arange(len(components.means)) < len(right.means)
    log_weights = jnp.where(jnp.stack([of_right, ~of_right]), components.log_weights[None], -jnp.inf)

    def curves(network: Partial, log_weights: Float[Array, " k"]) -> InexactCurve:
        given = p._replace(start=components._replace(log_weights=log_weights))
        still = inexact_flow(given, network, ts, substeps=3)  # KL off by 4e-6 of itself at most
        noisy = jax.vmap(lambda lam: inexact_curve(given, network, ts, lam, cells, cells // 2))(levels[1:])
        return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), still, noisy)

    both = jax.vmap(lambda network: jax.vmap(partial(curves, network))(log_weights), out_axes=1)(networks)
    return both, _score_errors(p, networks, ts)


def _score_errors(p: Problem, networks: Partial, ts: Times) -> Float[Array, "networks times"]:
    """E_p |e|², the trapezoidal rule."""
    x = jnp.linspace(-5, 5, 2001)[:, None]

    def at(network: Partial, t: Time) -> Float[Array, ""]:
        marginal = p.marginal(t)
        e = -network(x, t) / p.schedule.sigma(t) - marginal.score(x)
        return jnp.sum(jnp.exp(marginal.log_prob(x)) * e[:, 0] ** 2) * (x[1, 0] - x[0, 0])

    return jax.vmap(lambda network: jax.lax.map(partial(at, network), ts))(networks)


def terms(arrays: Arrays, start: int, trained: int, level: int) -> tuple[np.ndarray, np.ndarray]:
    """What noise removes and what the score's error adds, each integrated from t = 1 to every time: (times,)."""
    lam = arrays.levels[level]
    rates = (
        lam**2 / 2 * arrays.beta * arrays.fisher[start, trained, level],
        (1 + lam**2) / 2 * arrays.beta * arrays.error[start, trained, level],
    )
    removed, added = (cumulative_simpson(rate, x=-arrays.ts, initial=0) for rate in rates)
    return removed, added


def imbalance(arrays: Arrays) -> np.ndarray:
    """(2, trained, levels): by how much the two terms miss the change of KL, over the largest of the three."""
    found = np.empty(arrays.kl.shape[:3])
    for i, j, k in np.ndindex(*found.shape):
        removed, added = terms(arrays, i, j, k)
        change = arrays.kl[i, j, k, -1] - arrays.kl[i, j, k, 0]
        found[i, j, k] = abs(added[-1] - removed[-1] - change) / max(removed[-1], abs(added[-1]), abs(change))
    return found


def rows(arrays: Arrays) -> list[Row]:
    one = int(np.flatnonzero(arrays.levels == 1)[0])
    found = [
        Row(
            "weight of the upper mode, wrong start, λ = 1, the last network: samples",
            arrays.sampled[0],
            arrays.sampled[1],
            arrays.upper[1, -1, one],
            "exact: the solved law",
        )
    ]
    for k, level in enumerate(arrays.levels):
        what = f"KL at t = {END:g} from a wrong start, exact score, λ = {level:g}"
        error = float(arrays.exact_error[k] + arrays.reference_error[k])
        remark = "by the equation for the law; exact: by that for the density ratio"
        found.append(Row(what, arrays.exact[k], error, float(arrays.reference[k]), remark))
    for i, start in enumerate(STARTS):
        for j, trained in enumerate(arrays.trained):
            best = int(arrays.kl[i, j, :, -1].argmin())
            for k in sorted({0, one, best}):
                mark = ", the best" if k == best else ""
                what = f"KL at t = {END:g} from {start}, {trained} training steps, λ = {arrays.levels[k]:g}{mark}"
                remark = f"± {arrays.kl_error[i, j, k]:.1g}, the solver's own estimate"
                found.append(Row(what, arrays.kl[i, j, k, -1], remark=remark))
    removed, added = terms(arrays, 1, -1, one)
    drop = float(arrays.kl[1, -1, one, 0] - arrays.kl[1, -1, one, -1])
    remark = f"{removed[-1]:.6g} less {added[-1]:.6g}; exact: by how much KL falls"
    what = "the last network, wrong start, λ = 1: what noise removes less what the error adds"
    found.append(Row(what, removed[-1] - added[-1], float(arrays.kl_error[1, -1, one]), drop, remark))
    worst = float(imbalance(arrays).max())
    what = "the same over all starts, networks and levels: off by at most this part of the largest term"
    found.append(Row(what, worst, remark="Simpson's rule; the error is steep near the data"))
    return found


@styled
def plot(arrays: Arrays) -> Figure:
    made = figure(5.0)
    axes = made.subplots(2, 2).ravel()
    shades = matplotlib.colormaps["viridis_r"](np.linspace(0.15, 1, len(arrays.trained)))
    for i, (axis, start) in enumerate(zip(axes[:2], STARTS, strict=True)):
        for j, shade in enumerate(shades):
            curve = arrays.kl[i, j, :, -1]
            axis.plot(arrays.levels, curve, color=shade, marker="o", ms=2.5)
            best = int(curve.argmin())
            axis.plot(arrays.levels[best], curve[best], "o", mfc="none", mec=ODE, ms=8)
        axis.set(yscale="log", xlabel="noise level λ (0 ODE, 1 SDE)", title=f"from {start}")
        axis.set_ylabel(f"KL at t = {END:g}, nats")
    axes[1].plot(arrays.levels, arrays.reference, color="black", ls=":")
    axes[1].set_ylim(arrays.kl[1, ..., -1].min() / 3, 2 * arrays.kl[1, ..., -1].max())

    balance, growth = axes[2:]
    for i, style in enumerate(("--", "-")):
        removed, added = np.array(
            [[parts[-1] for parts in terms(arrays, i, -1, k)] for k in range(len(arrays.levels))]
        ).T
        balance.plot(arrays.levels, removed, style, color=SDE, marker="o", ms=2.5)
        balance.plot(arrays.levels, added, style, color=ODE, marker="o", ms=2.5)
    ends = [parts[-1] for parts in terms(arrays, 1, -1, len(arrays.levels) - 1)]
    for words, colour, value in zip(("noise\nremoves", "the error\nadds"), (SDE, ODE), ends, strict=True):
        place: Any = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 7.5}
        balance.annotate(words, (arrays.levels[-1], value), color=colour, fontweight="bold", **place)
    balance.set(xlabel="noise level λ", ylabel="nats, from t = 1 on", title="the two terms, the last network")
    shown = ((0, ODE, 0), (int(np.flatnonzero(arrays.levels == 1)[0]), SDE, -4), (-1, OTHERS[0], 4))
    for k, colour, up in shown:
        for i, style in enumerate(("--", "-")):
            growth.plot(arrays.trained, arrays.kl[i, :, k, -1], style, color=colour, marker="o", ms=2.5)
        at = (arrays.trained[-1], arrays.kl[1, -1, k, -1])
        words = {"xytext": (5, up), "textcoords": "offset points", "va": "center", "fontsize": 7.5, "color": colour}
        growth.annotate(f"λ = {arrays.levels[k]:g}", at, **words)
    growth.set(xscale="log", yscale="log", xlabel="training steps", title="while it learns")
    growth.set_ylabel(f"KL at t = {END:g}, nats")
    growth.set_xticks(arrays.trained, [f"{n:g}" for n in arrays.trained])
    growth.set_xticks([], minor=True)
    handles = [
        Line2D([], [], color=c, marker="o", ms=3, label=f"{n} training steps")
        for n, c in zip(arrays.trained, shades, strict=True)
    ]
    handles += [
        Line2D([], [], color=ODE, marker="o", mfc="none", ms=8, lw=0, label="best λ"),
        Line2D([], [], color="black", ls=":", label="exact score"),
        Line2D([], [], color=INK, ls="--", label="c, d: right start"),
        Line2D([], [], color=INK, ls="-", label="c, d: wrong start"),
    ]
    made.legend(handles=handles, loc="outside lower center", ncols=4)
    letter(list(axes))
    return made
