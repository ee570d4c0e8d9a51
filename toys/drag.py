"""The drag, explained: SDE-Drag's copy-and-paste on a small grid of pixels whose law is known.

A picture is a bump at one of many places on a smooth random background (`toys.pictures`). The edit at t0 copies the
patch around one place to another and drowns what it leaves behind in noise (Eq. 12 of the paper), in m operations along
the way, each up to t0 and back. For Gaussian data the distance of the edited law to the data's is exact; for the
mixture the density of what comes out is.

SDE-Drag replays noise that it recorded on the way up from the picture as edited so far. At the first operation that is
as good as fresh noise (Theorem 3.3). Later its picture no longer has the law of the data, recorded noise is no longer
white, and less is healed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from theory.editing import Latent, edit
from theory.mixtures import GaussianMixture, gaussian
from theory.solve import time_grid
from theory.solvers import DDIM, DPMSolverPP2M, Heun
from theory.types import PRNGKey, Solver, Time, Times
from toys.pictures import (
    SCHEDULE,
    SIDE,
    SOURCE,
    TARGET,
    Count,
    Operation,
    dragged_laws,
    exact_kl,
    noise_fn,
    operations,
    pictures,
    places,
)
from toys.results import Row
from toys.style import CYCLE, INK, ODE, SDE, figure, letter, styled

TITLE = "The drag, explained: copy, paste, and what heals"
END = 1e-3  # recorded paths stop above t = 0
METHODS: dict[str, tuple[Latent, Solver]] = {
    "ODE-Drag": ("invert", Heun(SCHEDULE)),
    "SDE, fresh noise": ("noise", DPMSolverPP2M(SCHEDULE, 1.0)),
    "SDE-Drag": ("cycle", DPMSolverPP2M(SCHEDULE, 1.0)),
}
COLOURS = (ODE, SDE, CYCLE)


@dataclass(frozen=True)
class Config:
    """Values of t0, alpha, beta and m that are gone through, each with the others at their defaults.

    The mixture is sampled with the first and the last m only; `checked` draws check every exact number.
    """

    t0s: tuple[float, ...] = (0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6)
    operations: tuple[int, ...] = (1, 2, 4)
    alphas: tuple[float, ...] = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4)
    betas: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
    t0: float = 0.2
    alpha: float = 1.1
    beta: float = 0.3
    samples: int = 512
    steps: int = 30
    checked: int = 4000
    seed: int = 0

    @classmethod
    def tiny(cls) -> "Config":
        return cls((0.2, 0.4), (1, 4), (0.9, 1.3), (0.0, 0.7), samples=32, steps=10, checked=400)


class Arrays(NamedTuple):
    """KL(p~_0 | p_0) on Gaussian data under METHODS, exact and from draws; samples of the mixture under METHODS."""

    t0s: np.ndarray  # (t0s,)
    operations: np.ndarray  # (operations,)
    alphas: np.ndarray  # (alphas,)
    betas: np.ndarray  # (betas,)
    t0: np.ndarray  # () of the sweeps and the pictures
    by_t0: np.ndarray  # (3, operations, t0s)
    by_alpha: np.ndarray  # (3, alphas) the most operations, at the default t0
    by_beta: np.ndarray  # (3, betas)
    drawn_t0: np.ndarray  # (2, 2, operations, t0s) (mean log ratio, its error) over draws of (fresh noise, SDE-Drag)
    drawn_alpha: np.ndarray  # (2, 2, alphas)
    drawn_beta: np.ndarray  # (2, 2, betas)
    arrived: np.ndarray  # (3, 2, t0s) probability that the bump is at the target, given the result; first and last m
    arrived_error: np.ndarray  # (3, 2, t0s)
    surprise: np.ndarray  # (3, 2, t0s) -log p_0 of the results less that of data, nats a pixel
    surprise_error: np.ndarray  # (3, 2, t0s)
    before: np.ndarray  # (4, SIDE, SIDE) pictures at the source
    after: np.ndarray  # (3, 4, SIDE, SIDE) the same, dragged in one operation at the default t0


@partial(jax.jit, static_argnums=0)
def dragged(
    latent: Latent, solver: Solver, law: GaussianMixture, x: Array, ops: Operation, m: Count, ts: Times, key: PRNGKey
) -> Array:
    """The pictures x, (n, d), after the first m operations, each up to ts[0] and back by `theory.editing.edit`."""
    eps_fn = noise_fn(law)

    def operate(i: Array, x: Array) -> Array:
        edit_key, noise_key = jr.split(jr.fold_in(key, i))
        op, noise = ops.at(i), jr.normal(noise_key, x.shape)
        manipulate = lambda x: x @ op.A.T + op.std[None] * noise  # noqa: E731
        return edit(solver, eps_fn, eps_fn, x, ts, edit_key, latent=latent, manipulate=manipulate)

    return jax.lax.fori_loop(0, m, operate, x)


@partial(jax.jit, static_argnums=5)
def log_ratios(
    data: GaussianMixture, ops: Operation, m: Count, t0: Time, key: PRNGKey, n: int
) -> tuple[Float[Array, "2"], Float[Array, "2"]]:
    """Mean of log(p~_0 / p_0), Gaussian data, over n draws of the SDE with fresh noise and of SDE-Drag; its error.

    Neither has an error of steps: fresh noise by the exact reverse kernel, SDE-Drag because the mean of a DDIM step
    with eta = 1 is E[x_s | x_t], so that recorded noise brings back the same x~_0 over any grid. If p~_0 were not the
    law that the draws have, their mean would fall short of its KL.
    """
    keys = jr.split(key, 4)
    x0 = data.sample(keys[0], (n,))
    alpha, sigma = SCHEDULE.alpha(t0), SCHEDULE.sigma(t0)

    def afresh(i: Array, x: Array) -> Array:
        op, (up_key, paste_key, down_key) = ops.at(i), jr.split(jr.fold_in(keys[1], i), 3)
        noised = alpha * x + sigma * jr.normal(up_key, x.shape)
        y = noised @ op.A.T + op.std[None] * jr.normal(paste_key, x.shape)
        back = jax.vmap(lambda y, key: data.reverse_kernel(SCHEDULE, y, t0, jnp.zeros(())).sample(key))
        return back(y, jr.split(down_key, n))

    ts = jnp.linspace(t0, 1e-6, 9)  # what lies below the last time changes KL by 1e-5 of itself
    draws = (
        jax.lax.fori_loop(0, m, afresh, x0),
        dragged("cycle", DDIM(SCHEDULE, 1.0), data, x0, ops, m, ts, keys[2]),
    )
    laws = dragged_laws(data, ops, m, t0)[1:]
    ratios = [law.log_prob(x) - data.log_prob(x) for law, x in zip(laws, draws, strict=True)]
    return jnp.stack([r.mean() for r in ratios]), jnp.stack([r.std(ddof=1) / jnp.sqrt(n) for r in ratios])


def run(config: Config) -> Arrays:
    law = pictures()
    data = gaussian(law.mean(), law.covariance())
    most = max(config.operations)
    exact_key, draw_key, edit_key, usual_key = jr.split(jr.key(config.seed), 4)

    def of(settings: Iterable[tuple[int, float, float, float]], key: PRNGKey) -> tuple[np.ndarray, np.ndarray]:
        """Exact, (3, settings), and drawn, (2, 2, settings), for these (m, alpha, beta, t0)."""
        exact, drawn = [], []
        for i, (m, alpha, beta, t0) in enumerate(settings):
            given = (data, operations(m, alpha, beta, most), jnp.asarray(m), jnp.asarray(t0))
            exact.append(exact_kl(*given))
            drawn.append(log_ratios(*given, jr.fold_in(key, i), config.checked))
        return np.array(exact).T, np.moveaxis(np.array(drawn), 0, -1)

    keys = jr.split(exact_key, 3)
    every = [(m, config.alpha, config.beta, t0) for m in config.operations for t0 in config.t0s]
    by_t0, drawn_t0 = of(every, keys[0])
    by_alpha, drawn_alpha = of([(most, alpha, config.beta, config.t0) for alpha in config.alphas], keys[1])
    by_beta, drawn_beta = of([(most, config.alpha, beta, config.t0) for beta in config.betas], keys[2])
    grid = (len(config.operations), len(config.t0s))

    source, target = (int(np.flatnonzero((places() == place).all(1))[0]) for place in (SOURCE, TARGET))
    only = jax.tree.map(lambda leaf: np.asarray(leaf)[source][None], law)._replace(log_weights=np.zeros(1))
    x = only.sample(draw_key, (config.samples,))
    usual = float(jnp.mean(law.log_prob(law.sample(usual_key, (20 * config.samples,)))))

    def judged(method: str, m: int, t0: float) -> list[float]:
        """Share arrived and surprise a pixel, each with its error."""
        ts = time_grid(SCHEDULE, config.steps, "log_snr", start=t0, end=END)
        ops = operations(m, config.alpha, config.beta, most)
        y = dragged(*METHODS[method], law, x, ops, jnp.asarray(m), ts, edit_key)
        values = (np.asarray(law.responsibilities(y))[target], (usual - np.asarray(law.log_prob(y))) / SIDE**2)
        return [float(f(v)) for v in values for f in (np.mean, lambda v: np.std(v, ddof=1) / len(v) ** 0.5)]

    ends = (min(config.operations), most)
    found = np.array([[[judged(name, m, t0) for t0 in config.t0s] for m in ends] for name in METHODS])
    arrived, arrived_error, surprise, surprise_error = np.moveaxis(found, -1, 0)
    ts = time_grid(SCHEDULE, config.steps, "log_snr", start=config.t0, end=END)
    ops = operations(1, config.alpha, config.beta, most)
    after = [np.asarray(dragged(*method, law, x, ops, jnp.asarray(1), ts, edit_key)[:4]) for method in METHODS.values()]
    return Arrays(
        *map(np.array, (config.t0s, config.operations, config.alphas, config.betas, config.t0)),
        by_t0=by_t0.reshape(3, *grid),
        by_alpha=by_alpha,
        by_beta=by_beta,
        drawn_t0=drawn_t0.reshape(2, 2, *grid),
        drawn_alpha=drawn_alpha,
        drawn_beta=drawn_beta,
        arrived=arrived,
        arrived_error=arrived_error,
        surprise=surprise,
        surprise_error=surprise_error,
        before=np.asarray(x[:4]).reshape(-1, SIDE, SIDE),
        after=np.stack(after).reshape(len(METHODS), -1, SIDE, SIDE),
    )


def rows(arrays: Arrays) -> list[Row]:
    most, t0 = max(arrays.operations), float(arrays.t0)
    settings = [
        (f"m = {m}, t0 = {t0:g}", arrays.by_t0[:, j, k], arrays.drawn_t0[:, :, j, k])
        for j, m in enumerate(arrays.operations)
        for k, t0 in enumerate(arrays.t0s)
    ]
    for name, values, exact, drawn in (
        ("α", arrays.alphas, arrays.by_alpha, arrays.drawn_alpha),
        ("β", arrays.betas, arrays.by_beta, arrays.drawn_beta),
    ):
        settings += [
            (f"m = {most}, t0 = {t0:g}, {name} = {value:g}", exact[:, i], drawn[:, :, i])
            for i, value in enumerate(values)
        ]
    found = []
    for what, exact, (mean, error) in settings:
        ode, *others = map(float, exact)
        for i, name in enumerate(list(METHODS)[1:]):
            remark = f"{ode:.4g} under ODE-Drag" if i else ""
            found.append(
                Row(
                    f"Gaussian data, {name}, {what}: KL as mean log-ratio of draws",
                    mean[i],
                    error[i],
                    others[i],
                    remark,
                )
            )
    for i, method in enumerate(METHODS):
        for j, m in enumerate((min(arrays.operations), most)):
            for k, t0 in enumerate(arrays.t0s):
                beyond = f"{arrays.surprise[i, j, k]:+.3f} ± {arrays.surprise_error[i, j, k]:.3f}"
                remark = f"{beyond} nats a pixel less likely than data"
                what = f"bump at its target, {method}, m = {m}, t0 = {t0:g}"
                found.append(Row(what, arrays.arrived[i, j, k], arrays.arrived_error[i, j, k], remark=remark))
    return found


@styled
def plot(arrays: Arrays) -> Figure:
    made = figure(5.6)
    parts: Any = made.subfigures(2, 1, height_ratios=[0.62, 1])
    top, bottom = parts
    show = ["before", *METHODS]
    tiles = top.subplots(2, 2 * len(show), gridspec_kw={"wspace": 0.03, "hspace": 0.03})
    for i, (name, images) in enumerate(zip(show, (arrays.before, *arrays.after), strict=True)):
        for axis, image in zip(tiles[:, 2 * i : 2 * i + 2].ravel(), images, strict=True):
            axis.imshow(image, cmap="cividis", vmin=-1, vmax=2.5)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            (y0, x0), (y1, x1) = SOURCE, TARGET
            arrow = {"arrowstyle": "->", "color": "white", "lw": 1, "shrinkA": 5, "shrinkB": 5}
            axis.annotate("", (x1, y1), (x0, y0), arrowprops=arrow)
        colour = (INK, *COLOURS)[i]
        tiles[0, 2 * i].set_title(name, loc="left", color=colour, fontweight="bold")
    top.supxlabel(f"one operation at t₀ = {arrays.t0:g}", fontsize=8)

    axes = bottom.subplots(2, 3).ravel()
    exact, by_alpha, by_beta, arrived, surprise, key = axes
    styles = ("-", "--", ":")
    for i, colour in enumerate(COLOURS):
        for j, style in enumerate(styles[: len(arrays.operations)]):
            exact.plot(arrays.t0s, arrays.by_t0[i, j], style, color=colour)
        by_alpha.plot(arrays.alphas, arrays.by_alpha[i], styles[len(arrays.operations) - 1], color=colour)
        by_beta.plot(arrays.betas, arrays.by_beta[i], styles[len(arrays.operations) - 1], color=colour)
        for j, style in enumerate((styles[0], styles[len(arrays.operations) - 1])):
            for axis, values, errors in (
                (arrived, arrays.arrived[i, j], arrays.arrived_error[i, j]),
                (surprise, arrays.surprise[i, j], arrays.surprise_error[i, j]),
            ):
                axis.plot(arrays.t0s, values, style, color=colour)
                axis.fill_between(arrays.t0s, values - 2 * errors, values + 2 * errors, color=colour, alpha=0.2, lw=0)
    most = max(arrays.operations)
    exact.set(yscale="log", xlabel="t₀", ylabel="KL(p̃₀ | p₀), nats", title="Gaussian data, exact")
    label = {"yscale": "log", "ylim": exact.get_ylim()}
    by_alpha.set(**label, xlabel="strength α of the copy", title=f"the same, m = {most}, t₀ = {arrays.t0:g}")
    by_beta.set(**label, xlabel="what β of the source is left", title=f"the same, m = {most}, t₀ = {arrays.t0:g}")
    arrived.set(xlabel="t₀", ylim=(0, 1), ylabel="share of pictures", title="the bump has arrived")
    surprise.axhline(0, color=INK, lw=0.6)
    surprise.set(xlabel="t₀", ylabel="nats a pixel", title="surprise: 0 = as likely as data")
    _legend(key, arrays)
    letter([tiles[0, 0], *axes[:-1]])
    return made


def _legend(axis: Axes, arrays: Arrays) -> None:
    """The names of colours and line styles, in the place of a panel."""
    for name, colour in zip(METHODS, COLOURS, strict=True):
        axis.plot([], [], color=colour, label=name)
    for m, style in zip(arrays.operations, ("-", "--", ":"), strict=False):
        axis.plot([], [], style, color=INK, label=f"m = {m}")
    axis.axis("off")
    axis.legend(loc="center", fontsize=8)
