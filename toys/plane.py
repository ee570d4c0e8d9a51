"""Editing in the plane: a drag, a translation and an inpainting on a mixture of six modes.

    drag          x_t0 is shifted by alpha(t0) times a vector: part of the cloud lands between the modes
    translation   x_0 has another law than the model's: SDEdit (noise), DDIB (ODE inversion), CycleDiffusion (recorded)
    inpainting    the first coordinate is known and the second is lost

For the first two the law of x~_t0 is a mixture, so KL(p~_0 | p_0) in continuous time is exact: through the reverse
kernel for the SDE, by Theorem 3.2 for the ODE. W2, finite steps and inpainting are measured on samples, beside two
samples of data. The right answer to inpainting is a mixture too, the second coordinate given the first.
"""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from theory.editing import Latent, edit
from theory.mixtures import GaussianMixture, mixture, noise_fn
from theory.schedules import LinearVP
from theory.solve import time_grid
from theory.solvers import DPMSolverPP2M, Heun
from theory.types import PRNGKey, Solver, Time, Times
from toys.estimators import matched_w2, plane_kl
from toys.results import Row
from toys.style import ODE, SAMPLERS, SDE, figure, styled

TITLE = "Editing in the plane: drag, translation, inpainting"
SCHEDULE = LinearVP()
SHIFT = (1.1, 0.6)  # of the drag, in data space
END = 1e-3  # recorded paths stop above t = 0
TASKS = ("drag", "translation", "inpainting")
METHODS: dict[str, tuple[Latent, Solver]] = {  # of second order: fifty steps do not blur what the samplers differ in
    "ODE": ("invert", Heun(SCHEDULE)),
    "SDE": ("noise", DPMSolverPP2M(SCHEDULE, 1.0)),
    "Cycle-SDE": ("cycle", DPMSolverPP2M(SCHEDULE, 1.0)),
}


@dataclass(frozen=True)
class Config:
    """Times t0 and numbers of steps that are gone through; the figure's fields are at t0 and the most steps."""

    t0s: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7)
    steps: tuple[int, ...] = (5, 15, 50)
    t0: float = 0.2
    samples: int = 20_000
    matched: int = 600
    checked: int = 1000
    points: int = 65
    seed: int = 0

    @classmethod
    def tiny(cls) -> "Config":
        return cls(t0s=(0.2, 0.4), steps=(10,), samples=1000, matched=200, points=33)


class Arrays(NamedTuple):
    """Axes: task (as in TASKS), sampler (ODE, SDE, Cycle-SDE), then t0 or steps."""

    t0s: np.ndarray  # (t0s,)
    steps: np.ndarray  # (steps,)
    t0: np.ndarray  # ()
    exact: np.ndarray  # (2, 2, t0s) KL in continuous time by quadrature: (drag, translation), (ODE, SDE)
    log_ratio: np.ndarray  # (2, 2, t0s) the same as a mean over exact draws
    log_ratio_error: np.ndarray  # (2, 2, t0s)
    kl: np.ndarray  # (3, 3, t0s) estimated from samples, the most steps
    kl_error: np.ndarray  # (3, 3, t0s)
    w2: np.ndarray  # (3, 3, t0s)
    moved: np.ndarray  # (3, 3, t0s) root mean square distance from the point that was edited
    kl_steps: np.ndarray  # (3, 3, steps) at the default t0
    kl_steps_error: np.ndarray  # (3, 3, steps)
    w2_steps: np.ndarray  # (3, 3, steps)
    floor: np.ndarray  # (3,) of a sample of the data itself: KL, its error, and W2 to another one
    conditional: (
        np.ndarray
    )  # (3,) the same of draws of the second coordinate given the first: inpainting's right answer
    before: np.ndarray  # (3, samples, 2)
    after: np.ndarray  # (3, 3, samples, 2) at the default t0, the most steps
    x: np.ndarray  # (points,) both axes of `density`
    density: np.ndarray  # (points, points) of the data


def data() -> GaussianMixture:
    """Six modes: five on a ring, and one in the middle."""
    angles = np.pi / 2 + 2 * np.pi * np.arange(5) / 5
    means = 2 * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    radial, along = 0.06, 0.16
    covariances = [
        radial * np.outer(u, u) / 4 + along * np.outer(v, v) / 4
        for u, v in (((np.cos(a), np.sin(a)), (-np.sin(a), np.cos(a))) for a in angles)
    ]
    return mixture([0.18, 0.18, 0.18, 0.18, 0.18, 0.1], [*means, (0, 0)], [*covariances, 0.02 * np.eye(2)])


def other_data() -> GaussianMixture:
    """The source of the translation: six round modes on a line and beside it."""
    means = [(-1.5, -0.6), (-0.9, -0.2), (-0.3, 0.2), (0.3, 0.5), (0.9, 0.6), (1.5, 0.5)]
    return mixture([1 / 6] * 6, means, [0.02 * np.eye(2)] * 6)


def edited(task: str, sampler: str, x0: Array, ts: Times, key: PRNGKey) -> Float[Array, "n 2"]:
    """The points x0 after the edit at ts[0]: the procedure of the paper's Sec. 3.1, `theory.editing.edit`."""
    if task == "inpainting":
        return _refilled(sampler, x0, ts, key)
    source = other_data() if task == "translation" else data()
    return _moved(sampler, source, jnp.asarray(np.array([SHIFT]) * (task == "drag")), x0, ts, key)


@partial(jax.jit, static_argnums=0)
def _moved(
    sampler: str, source: GaussianMixture, shift: Float[Array, "1 2"], x0: Array, ts: Times, key: PRNGKey
) -> Float[Array, "n 2"]:
    """Up by the noise prediction of this source, shifted by so much in data space, back by that of the data."""
    latent, solver = METHODS[sampler]
    shift = SCHEDULE.alpha(ts[0]) * shift
    eps, source_eps = noise_fn(data(), SCHEDULE), noise_fn(source, SCHEDULE)
    return edit(solver, source_eps, eps, x0, ts, key, latent=latent, manipulate=lambda x: x + shift)


@partial(jax.jit, static_argnums=0)
def _refilled(sampler: str, x0: Array, ts: Times, key: PRNGKey) -> Float[Array, "n 2"]:
    """The lost coordinate starts from unit noise; the known one follows its own noised path."""
    eps, (edit_key, fill_key) = noise_fn(data(), SCHEDULE), jr.split(key)
    known, fill = x0 * jnp.array([[1.0, 0.0]]), jr.normal(fill_key, x0.shape)
    lost = jnp.array([[False, True]])
    return edit(
        METHODS[sampler][1], eps, eps, known, ts, edit_key, latent="noise", manipulate=lambda x: fill, mask=lost
    )


@jax.jit
def inpainted(x0: Float[Array, "n 2"], key: PRNGKey) -> Float[Array, "n 2"]:
    """The points x0 with the second coordinate drawn anew given the first: Gaussian regression by component, exact."""
    law = data()
    C = law.covariances
    slope = C[:, 1, 0] / C[:, 0, 0]
    first = GaussianMixture(law.log_weights, law.means[:, :1], C[:, :1, 0], jnp.ones((len(slope), 1, 1)))
    choose, draw = jr.split(key)
    k = jr.categorical(choose, first.component_log_probs(x0[:, :1]), axis=0)
    mean = law.means[k, 1] + slope[k] * (x0[:, 0] - law.means[k, 0])
    std = jnp.sqrt(C[:, 1, 1] - slope * C[:, 0, 1])[k]
    return jnp.stack([x0[:, 0], mean + std * jr.normal(draw, mean.shape)], axis=-1)


class Plane(NamedTuple):
    """Points of a square lattice, and the area that belongs to each."""

    points: Float[Array, "n 2"]
    area: Float[Array, ""]


def lattice(x: Float[Array, " points"]) -> Plane:
    """All pairs of these equally spaced numbers."""
    return Plane(jnp.stack(jnp.meshgrid(x, x), axis=-1).reshape(-1, 2), (x[1] - x[0]) ** 2)


def around(law: GaussianMixture, points: int) -> Float[Array, " points"]:
    """Numbers from -reach to reach, 6.5 standard deviations beyond every mean: 1e-10 of the mass is outside."""
    reach = jnp.abs(law.means).max() + 6.5 * jnp.sqrt(law.variances.max())
    return jnp.linspace(-reach, reach, points)


def healed_density(start: GaussianMixture, t0: Time, plane: Plane, x: Float[Array, "n 2"]) -> Float[Array, " n"]:
    """p~_0 at the points x under the SDE from this law at t0: its exact reverse kernel, averaged over the lattice."""
    mass = jnp.exp(start.log_prob(plane.points)) * plane.area
    kernel = jax.vmap(lambda y: data().reverse_kernel(SCHEDULE, y, t0, jnp.zeros(())))(plane.points)
    shape = jax.tree.map(lambda leaf: leaf[0], kernel)  # only its weights and means depend on y
    whiten = shape.axes / jnp.sqrt(shape.variances)[:, None]
    means = jnp.einsum("nki,kij->jkn", kernel.means, whiten)
    heights = mass[None] * kernel.weights.T / (2 * jnp.pi * jnp.sqrt(jnp.prod(shape.variances, axis=-1)))[:, None]

    def density(x: Float[Array, "2"]) -> Float[Array, ""]:
        squares = (jnp.einsum("i,kij->jk", x, whiten)[..., None] - means) ** 2
        return jnp.vdot(heights, jnp.exp(-(squares[0] + squares[1]) / 2))

    return jax.lax.map(density, x, batch_size=16)


@partial(jax.jit, static_argnums=4)
def _exact_kl(
    start: GaussianMixture, t0: Time, x: Float[Array, " points"], key: PRNGKey, n: int
) -> tuple[Float[Array, "2"], Float[Array, "2"], Float[Array, "2"]]:
    """KL(p~_0 | p_0) of this law at t0 under (ODE, SDE), continuous time; the same as a mean over n draws; its error.

    The ODE keeps KL(p~_t0 | p_t0) (Theorem 3.2). The rule on the lattice errs by about 2 exp(-2 pi² (width / spacing)²)
    per Gaussian: the narrowest, at t0 = 0.1, is 1.1 spacings wide, 1e-10, or 0.55 with the 33 points of `Config.tiny`,
    5e-3. The draws of p~_0 are exact whatever the lattice is: p~_t0 is a mixture, and so is the reverse kernel.
    """
    target, marginal = data(), data().marginal(SCHEDULE, t0)
    after = lattice(x)
    before = lattice(around(start, x.size))
    healed = partial(healed_density, start, t0, before)

    def kl(p, log_q, area):  # p log(p / q) - p + q is never negative
        return area * (jnp.where(p > 0, p * (jnp.log(p) - log_q), 0.0) - p + jnp.exp(log_q)).sum()

    exact = (
        kl(jnp.exp(start.log_prob(before.points)), marginal.log_prob(before.points), before.area),
        kl(healed(after.points), target.log_prob(after.points), after.area),
    )
    keys = jr.split(key, 3)
    drawn_before, y = (start.sample(key, (n,)) for key in keys[:2])
    back = jax.vmap(lambda y, key: target.reverse_kernel(SCHEDULE, y, t0, jnp.zeros(())).sample(key))
    drawn = back(y, jr.split(keys[2], n))
    log_ratios = jnp.stack(
        [
            start.log_prob(drawn_before) - marginal.log_prob(drawn_before),
            jnp.log(healed(drawn)) - target.log_prob(drawn),
        ]
    )
    return jnp.stack(exact), log_ratios.mean(axis=1), log_ratios.std(axis=1, ddof=1) / jnp.sqrt(n)


@partial(jax.jit, static_argnums=0)
def start_of(task: str, t0: Time) -> GaussianMixture:
    """The law of the edited latent at t0."""
    if task == "translation":
        return other_data().marginal(SCHEDULE, t0)
    law = data().marginal(SCHEDULE, t0)
    return law._replace(means=law.means + SCHEDULE.alpha(t0) * jnp.array([SHIFT]))


def run(config: Config) -> Arrays:
    target, source = data(), other_data()
    x = np.linspace(-3.2, 3.2, config.points)
    data_key, source_key, again_key, edit_key, check_key, fill_key = jr.split(jr.key(config.seed), 6)

    def checked(i: int, k: int):
        t0 = jnp.asarray(config.t0s[k])
        key = jr.fold_in(check_key, i * len(config.t0s) + k)
        return _exact_kl(start_of(TASKS[i], t0), t0, jnp.asarray(x), key, config.checked)

    exact = [[checked(i, k) for k in range(len(config.t0s))] for i in range(2)]
    exact, log_ratio, log_ratio_error = np.transpose(np.array(exact), (2, 0, 3, 1))
    right, wrong, again = (
        law.sample(key, (config.samples,))
        for law, key in ((target, data_key), (source, source_key), (target, again_key))
    )
    filled = inpainted(right, fill_key)
    before = {"drag": right, "translation": wrong, "inpainting": right}
    most = max(config.steps)
    at_end = target.marginal(SCHEDULE, jnp.asarray(END))

    def distances(x: Array) -> tuple[float, float, float]:
        """KL of these points to the data, its error, and W2 to a sample of it."""
        kl, error = plane_kl(np.asarray(x), lambda x: np.asarray(at_end.log_prob(jnp.asarray(x))))
        return kl, error, matched_w2(np.asarray(x)[: config.matched], np.asarray(again)[: config.matched])

    @cache  # the figure's own t0 and steps are among those of the curves
    def measured(task: str, sampler: str, t0: float, steps: int) -> tuple[np.ndarray, np.ndarray]:
        if task == "inpainting" and sampler == "Cycle-SDE":  # what is lost has no noise to record
            return np.full(4, np.nan), np.full(right.shape, np.nan)
        ts = time_grid(SCHEDULE, steps, "log_snr", start=t0, end=END)
        y = edited(task, sampler, before[task], ts, edit_key)
        moved = np.sqrt(np.mean(np.sum((np.asarray(y) - np.asarray(before[task])) ** 2, axis=-1)))
        return np.array([*distances(y), moved]), np.asarray(y)

    by_t0 = [[[measured(task, name, t0, most)[0] for t0 in config.t0s] for name in SAMPLERS] for task in TASKS]
    by_steps = [[[measured(task, name, config.t0, n)[0] for n in config.steps] for name in SAMPLERS] for task in TASKS]
    after = [[measured(task, name, config.t0, most)[1] for name in SAMPLERS] for task in TASKS]
    kl, kl_error, w2, moved = np.moveaxis(np.array(by_t0), -1, 0)
    kl_steps, kl_steps_error, w2_steps, _ = np.moveaxis(np.array(by_steps), -1, 0)
    square = np.stack(np.meshgrid(x, x), axis=-1)
    return Arrays(
        t0s=np.array(config.t0s),
        steps=np.array(config.steps),
        t0=np.array(config.t0),
        exact=exact,
        log_ratio=log_ratio,
        log_ratio_error=log_ratio_error,
        kl=kl,
        kl_error=kl_error,
        w2=w2,
        moved=moved,
        kl_steps=kl_steps,
        kl_steps_error=kl_steps_error,
        w2_steps=w2_steps,
        floor=np.array([*distances(right)]),
        conditional=np.array([*distances(filled)]),
        before=np.stack([before[task] for task in TASKS]),
        after=np.array(after),
        x=x,
        density=np.exp(target.log_prob(jnp.asarray(square))),
    )


def rows(arrays: Arrays) -> list[Row]:
    found = [
        Row("KL of a sample of the data", arrays.floor[0], arrays.floor[1], 0.0),
        Row("W2 between two samples of the data", arrays.floor[2]),
    ]
    for (i, j, k), exact in np.ndenumerate(arrays.exact):
        what = (
            f"{TASKS[i]}, t0 = {arrays.t0s[k]:g}, {('ODE', 'SDE')[j]}, continuous time: mean log-ratio over exact draws"
        )
        found.append(Row(what, float(arrays.log_ratio[i, j, k]), float(arrays.log_ratio_error[i, j, k]), exact))
    kl, error, w2 = arrays.conditional
    what = "inpainting, the second coordinate drawn given the first: KL"
    found.append(Row(what, kl, error, 0.0, f"W2 {w2:.3f}; what inpainting should be"))
    for i, task in enumerate(TASKS):
        for j, name in enumerate(SAMPLERS):
            if np.isnan(arrays.kl[i, j, 0]):
                continue
            for k, t0 in enumerate(arrays.t0s):
                remark = f"W2 {arrays.w2[i, j, k]:.3f}, moved {arrays.moved[i, j, k]:.2f}"
                if i < 2:
                    remark += f"; {arrays.exact[i, min(j, 1), k]:.4f} without the error of the steps"
                what = f"{task}, t0 = {t0:g}, {name}: KL, {arrays.steps[-1]} steps"
                found.append(Row(what, arrays.kl[i, j, k], arrays.kl_error[i, j, k], remark=remark))
            for k, n in enumerate(arrays.steps[:-1]):
                what = f"{task}, t0 = {arrays.t0:g}, {name}: KL, {n} steps"
                remark = f"W2 {arrays.w2_steps[i, j, k]:.3f}"
                found.append(Row(what, arrays.kl_steps[i, j, k], arrays.kl_steps_error[i, j, k], remark=remark))
    return found


@styled
def plot(arrays: Arrays) -> Figure:
    made = figure(4.5)
    grid = made.add_gridspec(3, 6, width_ratios=[1, 1, 1, 1, 1.25, 1.25])
    levels = arrays.density.max() * np.array([0.02, 0.15, 0.5])
    here = int(np.argmin(np.abs(arrays.t0s - arrays.t0)))
    for i, task in enumerate(TASKS):
        clouds = {"before": arrays.before[i], **dict(zip(SAMPLERS, arrays.after[i], strict=True))}
        for j, (name, points) in enumerate(clouds.items()):
            axis = made.add_subplot(grid[i, j])
            colour = SAMPLERS.get(name, "black")
            if np.isnan(points[0, 0]):
                axis.text(0.5, 0.5, "nothing\nto record", ha="center", va="center", transform=axis.transAxes)
            else:
                reach = (arrays.x[0], arrays.x[-1])
                counts = np.histogram2d(points[:, 1], points[:, 0], 90, (reach, reach))[0]
                shades = LinearSegmentedColormap.from_list(name, ["white", colour])
                axis.imshow(counts**0.4, origin="lower", extent=(*reach, *reach), cmap=shades)
                axis.contour(arrays.x, arrays.x, arrays.density, levels, colors="0.5", linewidths=0.4)
                if j:
                    value = arrays.kl[i, j - 1, here] if i == 2 else arrays.exact[i, min(j - 1, 1), here]
                    axis.set_xlabel(f"KL {value:.2g}", color=colour, fontsize=8, fontweight="bold", labelpad=1)
            axis.set(xticks=[], yticks=[], xlim=(-2.7, 2.7), ylim=(-2.7, 2.7), aspect="equal")
            axis.spines[:].set_visible(False)
            if i == 0:
                axis.set_title(name)
            if j == 0:
                axis.set_ylabel(task, fontsize=9, fontweight="bold")
        _curves(arrays, i, made.add_subplot(grid[i, 4]), made.add_subplot(grid[i, 5]))
    handles = [Line2D([], [], color=c, marker="o", ms=3, lw=0, label=f"{n}, sampled") for n, c in SAMPLERS.items()]
    handles += [
        Line2D([], [], color=ODE, lw=1.2, label="ODE, exact"),
        Line2D([], [], color=SDE, lw=1.2, label="SDE = Cycle-SDE, exact"),
        Patch(color="0.9", label="estimate not told from 0"),
    ]
    made.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=6.5, handlelength=1.5, columnspacing=1.2)
    return made


def _curves(arrays: Arrays, i: int, by_t0: Axes, by_steps: Axes) -> None:
    """KL of a task against t0, and at the t0 of the fields against the number of steps."""
    for j, colour in enumerate(SAMPLERS.values()):
        line: Any = {"ms": 2.5, "color": colour, "elinewidth": 0.7}
        by_t0.errorbar(arrays.t0s, arrays.kl[i, j], 2 * arrays.kl_error[i, j], fmt="o", **line)
        by_steps.errorbar(arrays.steps, arrays.kl_steps[i, j], 2 * arrays.kl_steps_error[i, j], fmt="o-", lw=1, **line)
    here = int(np.argmin(np.abs(arrays.t0s - arrays.t0)))
    for j, colour in enumerate((ODE, SDE)) if i < 2 else ():
        by_t0.plot(arrays.t0s, arrays.exact[i, j], color=colour, lw=1.2)
        by_steps.axhline(arrays.exact[i, j, here], color=colour, lw=0.9, ls=":")
    for axis in (by_t0, by_steps):
        if i < 2:
            axis.axhspan(1e-9, 4 * arrays.floor[1], color="0.9", lw=0)
            axis.set(yscale="log", ylim=(2e-3, 9))
        else:
            axis.set(ylim=(0, 1.15 * np.nanmax(arrays.kl_steps[i])))
    by_steps.set(xscale="log")
    by_steps.set_xticks(arrays.steps, [f"{n:g}" for n in arrays.steps])
    by_steps.set_xticks([], minor=True)
    if i == 0:
        by_t0.set_title("KL to the data, nats")
        by_steps.set_title(f"at t₀ = {arrays.t0:g}")
    if i == 2:
        by_t0.set_xlabel("t₀")
        by_steps.set_xlabel("steps")
