"""Finitely many steps: what discretisation costs each solver, and what it does not cost Cycle-SDE.

On Gaussian data the chain of any solver is affine, so its end law is known exactly (`theory.chains`): every KL here is
a number, not an estimate.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from theory.chains import Moments, gaussian_chain
from theory.checks import gaussian_problem, paper_problem
from theory.cycles import gaussian_cycle, to_start
from theory.gaussians import Offset, inexact_score
from theory.mixtures import noise_fn
from theory.problems import Problem
from theory.processes import forward_path, transition
from theory.schedules import LinearVP
from theory.solve import Spacing, invert, record, replay, sample, time_grid
from theory.solvers import DDIM, DPMSolverPP2M, EulerMaruyama, Heun
from theory.types import PRNGKey, Schedule, Solver, Times
from toys.results import Row
from toys.style import CYCLE, INK, ODE, OTHERS, SDE, figure, letter, styled

TITLE = "Finitely many steps: orders, floors and reconstruction"
END = 1e-3  # where every curve stops: recorded paths and log_snr grids have to, above t = 0
LEVELS = (0.0, 0.5, 1.0)  # eta of the DDIM chains
LIMIT = 0.02  # KL off by O(1/N²) from its limit, with a constant of some hundreds: a small number beside a large start
ORDER = 0.01  # the next order is still seen at some hundred steps
# KL to the data at t = 0 on uniform grids, computed apart from this package: (eta, steps).
GOLDEN = {(1.0, 10): 0.238835, (1.0, 100): 0.0103335, (0.0, 10): 0.785192, (0.0, 100): 0.427626}


def solvers(schedule: Schedule) -> dict[str, tuple[Solver, int]]:
    """Each with its order."""
    return {
        "DDIM, η = 0": (DDIM(schedule, 0.0), 1),
        "DDIM, η = ½": (DDIM(schedule, 0.5), 1),
        "DDIM, η = 1": (DDIM(schedule, 1.0), 1),
        "Euler-Maruyama": (EulerMaruyama(schedule, 1.0), 1),
        "Heun": (Heun(schedule), 2),
        "DPM++ 2M": (DPMSolverPP2M(schedule, 0.0), 2),
        "DPM++ 2M SDE": (DPMSolverPP2M(schedule, 1.0), 2),
    }


ORDERS = {name: order for name, (_, order) in solvers(LinearVP()).items()}


@dataclass(frozen=True)
class Config:
    """Numbers of steps; those of Cycle-SDE and of the reconstructions cost a compilation each."""

    steps: tuple[int, ...] = (5, 10, 20, 50, 100, 200, 500, 1000)
    cycle_steps: tuple[int, ...] = (5, 20, 100)
    reconstruction_steps: tuple[int, ...] = (10, 30, 100, 300, 1000)
    points: int = 2000
    seed: int = 0

    def __post_init__(self):
        if len(self.steps) < 2 or list(self.steps) != sorted(set(self.steps)):
            raise ValueError(f"steps must be two or more numbers that increase: orders are slopes; got {self.steps}")

    @classmethod
    def tiny(cls) -> "Config":
        return cls((5, 10, 100, 400, 800), (5,), (10,), 200)


class Arrays(NamedTuple):
    """KL to the data after n steps, on Gaussian data; reconstruction errors on the paper's mixture."""

    steps: np.ndarray  # (steps,)
    from_right: np.ndarray  # (solvers, steps) from the right marginal: discretisation alone
    from_wrong: np.ndarray  # (3, steps) from the wrong start, DDIM with eta as in LEVELS
    limits: np.ndarray  # (3,) the same in continuous time
    uniform: np.ndarray  # (3, steps) as from_wrong, on uniform grids to t = 0
    cycle_steps: np.ndarray  # (cycles,)
    cycle: np.ndarray  # (cycles,) Cycle-SDE from the wrong start
    second: np.ndarray  # (steps,) the SDE from the wrong start by a method of second order, DPM++ 2M SDE
    restart: np.ndarray  # (2, steps) one and two Restart cycles, Heun
    restart_limits: np.ndarray  # (2,) in continuous time
    reconstruction_steps: np.ndarray  # (reconstructions,)
    reconstruction: np.ndarray  # (2, 2, reconstructions) largest error: (Cycle-SDE, ODE inversion), (float32, float64)


def run(config: Config) -> Arrays:
    g = gaussian_problem()
    right, wrong = (Moments(law.means[0], law.covariances[0]) for law in (g.marginal(g.t0), g.start))
    grids = _grids(g.schedule, config.steps, "log_snr", END)
    uniform = _grids(g.schedule, config.steps, "uniform", 0.0)
    x0 = paper_problem().target.sample(jr.key(config.seed), (config.points,))
    reconstruction = [_reconstruction(n, x0, jr.key(config.seed + 1)) for n in config.reconstruction_steps]
    return Arrays(
        steps=np.array(config.steps),
        from_right=np.stack([_end_kl(solver, g, right, grids) for solver, _ in solvers(g.schedule).values()]),
        from_wrong=np.stack([_end_kl(DDIM(g.schedule, eta), g, wrong, grids) for eta in LEVELS]),
        limits=np.asarray(_limits(g, LEVELS)),
        uniform=np.stack([_end_kl(DDIM(g.schedule, eta), g, wrong, uniform) for eta in LEVELS]),
        cycle_steps=np.array(config.cycle_steps),
        cycle=np.array([_cycle_kl(g, time_grid(g.schedule, n, end=END)) for n in config.cycle_steps]),
        second=np.asarray(_end_kl(DPMSolverPP2M(g.schedule, 1.0), g, wrong, grids)),
        restart=np.stack([_restart_kl(g, wrong, grids, cycles) for cycles in (1, 2)]),
        # K exact cycles contract as lam² = K does: noise up and the ODE down have the adjoint of the SDE's kernel.
        restart_limits=np.asarray(_limits(g, (1.0, 2**0.5))),
        reconstruction_steps=np.array(config.reconstruction_steps),
        reconstruction=np.stack(reconstruction, axis=-1),
    )


def _grids(schedule: Schedule, steps: tuple[int, ...], spacing: Spacing, end: float) -> Float[Array, "grids times"]:
    """Grids of these numbers of steps, all filled up to the length of the longest."""
    grids = [np.asarray(time_grid(schedule, n, spacing, end=end)) for n in steps]
    return jnp.array([np.pad(ts, (0, max(steps) + 1 - len(ts)), mode="edge") for ts in grids])


def _kl(law: Moments, g: Problem, s) -> Float[Array, ""]:
    marginal = g.marginal(s)
    V = marginal.variances[0, 0]
    return Offset((law.mean[0] - marginal.means[0, 0]) / jnp.sqrt(V), law.covariance[0, 0] / V).kl()


@partial(jax.jit, static_argnums=0)
def _end_kl(solver: Solver, g: Problem, start: Moments, grids) -> Float[Array, " grids"]:
    def of(ts: Times):
        laws = gaussian_chain(solver, g, start, ts)
        return _kl(jax.tree.map(lambda leaf: leaf[-1], laws), g, ts[-1])

    return jax.vmap(of)(grids)


@partial(jax.jit, static_argnums=3)
def _restart_kl(g: Problem, start: Moments, grids, cycles: int) -> Float[Array, " grids"]:
    """Down by the ODE, then `cycles` times noised up to the start and down again. Xu et al. 2023 (arXiv 2306.14878)."""

    def of(ts: Times):
        def down(law: Moments) -> Moments:
            return jax.tree.map(lambda leaf: leaf[-1], gaussian_chain(Heun(g.schedule), g, law, ts))

        law = down(start)
        for _ in range(cycles):
            up = transition(g.schedule, law.mean, ts[-1], ts[0])
            scale = g.schedule.alpha(ts[0]) / g.schedule.alpha(ts[-1])
            law = down(Moments(up.mean, scale**2 * law.covariance + up.std**2 * jnp.eye(1)))
        return _kl(law, g, ts[-1])

    return jax.vmap(of)(grids)


@partial(jax.jit, static_argnums=1)
def _limits(g: Problem, levels: tuple[float, ...]) -> Float[Array, " levels"]:
    """KL at END in continuous time, from the wrong start, at these noise levels."""
    return jnp.stack([inexact_score(g, jnp.array(END), lam).kl() for lam in levels])


@jax.jit
def _cycle_kl(g: Problem, ts: Times) -> Float[Array, ""]:
    """Of the exact law of Cycle-SDE, started by the affine edit that makes the wrong start."""
    return gaussian_cycle(DDIM(g.schedule, 1.0), g.target, ts, to_start(g)).kl[-1]


def _reconstruction(steps: int, x0: Float[Array, "n 1"], key: PRNGKey) -> np.ndarray:
    """Largest error of unedited points of the mixture up to t = 1 and back: (Cycle-SDE, inversion) x (f32, f64)."""
    p = paper_problem()
    given = p, x0, time_grid(p.schedule, steps, end=END)
    cast = (jax.tree.map(lambda leaf, d=dtype: np.asarray(leaf, d), given) for dtype in (np.float32, np.float64))
    return np.stack([_errors(*each, key) for each in cast], axis=1)


@jax.jit
def _errors(p: Problem, x0, ts: Times, key):
    eps_fn, ode, sde = noise_fn(p.target, p.schedule), DDIM(p.schedule, 0.0), DDIM(p.schedule, 1.0)
    path = forward_path(p.schedule, x0, ts, key)
    cycled = replay(sde, eps_fn, path[0], ts, record(sde, eps_fn, path, ts))[-1]
    inverted = sample(ode, eps_fn, invert(ode, eps_fn, x0, ts)[0], ts, key)
    return jnp.stack([jnp.abs(x - x0).max() for x in (cycled, inverted)])


def rows(arrays: Arrays) -> list[Row]:
    found = []
    for (eta, n), exact in GOLDEN.items():
        if n in arrays.steps:
            value = float(arrays.uniform[LEVELS.index(eta), list(arrays.steps).index(n)])
            found.append(Row(f"wrong start, {n} uniform steps of DDIM, η = {eta:g}, to t = 0: KL", value, exact=exact))
    sde = float(arrays.limits[LEVELS.index(1.0)])
    for n, value in zip(arrays.cycle_steps, arrays.cycle, strict=True):
        what = f"wrong start, {n} steps of Cycle-SDE, to t = {END:g}: KL"
        found.append(Row(what, value, exact=sde, remark="that of the SDE in continuous time"))
    most = arrays.steps[-1]
    for eta, curve, limit in zip(LEVELS, arrays.from_wrong, arrays.limits, strict=True):
        remark = f"{limit:.4g} in the limit of many steps"
        found.append(
            Row(f"wrong start, {most} steps of DDIM, η = {eta:g}, to t = {END:g}: KL", curve[-1], remark=remark)
        )
    limit = "the limit of many steps"
    what = f"wrong start, {most} steps of DPM++ 2M SDE, to t = {END:g}: KL"
    found.append(Row(what, arrays.second[-1], exact=sde, remark=limit, tolerance=LIMIT))
    for cycles, curve, exact in zip((1, 2), arrays.restart, arrays.restart_limits, strict=True):
        what = f"wrong start, {cycles} Restart cycle{'s' if cycles > 1 else ''}, {most} steps of Heun each way: KL"
        found.append(Row(what, curve[-1], exact=float(exact), remark=limit, tolerance=LIMIT))
    for (name, order), slope in zip(ORDERS.items(), measured_orders(arrays), strict=True):
        found.append(Row(f"measured order, {name}", slope, exact=order, remark="in theory", tolerance=ORDER))
    for j, (kind, dtype) in enumerate((("float32", np.float32), ("float64", np.float64))):
        # One rounding a step, of numbers up to 3, which add up as a random walk does.
        rounding = 3 * float(np.finfo(dtype).eps) * float(arrays.reconstruction_steps.max()) ** 0.5
        cycle, inversion = arrays.reconstruction[:, j].max(-1)
        what = f"largest reconstruction error over all numbers of steps, {kind}"
        found.append(Row(f"{what}: Cycle-SDE", cycle, rounding, 0.0, "its error is one of rounding"))
        found.append(Row(f"{what}: ODE inversion", inversion, remark="not one of precision"))
    return found


def measured_orders(arrays: Arrays) -> np.ndarray:
    """(solvers,) the slopes between the two largest numbers of steps; KL is quadratic in the error of the moments."""
    return -np.diff(np.log(arrays.from_right[:, -2:]))[:, 0] / np.diff(np.log(arrays.steps[-2:])) / 2


@styled
def plot(arrays: Arrays) -> Figure:
    made = figure(4.9)
    axes = made.subplots(2, 3).ravel()
    first, second, floors, restarts, errors, blank = axes
    colours = (ODE, OTHERS[0], SDE, OTHERS[1], ODE, OTHERS[0], SDE)
    for (name, order), curve, colour in zip(ORDERS.items(), arrays.from_right, colours, strict=True):
        evaluations = arrays.steps * (2 if name == "Heun" else 1)
        (first, second)[order - 1].plot(evaluations, curve, color=colour, marker="o", ms=2.5, label=name)
    limits = (min(arrays.from_right.min(), 1e-8) / 2, 10 * arrays.from_right.max())
    for axis, order in ((first, 1), (second, 2)):
        axis.set(ylim=limits, xlabel="network evaluations", title=f"from the right law: order {order}")

    names = ("DDIM, η = 0 (ODE)", "DDIM, η = ½", "DDIM, η = 1 (SDE)")
    for curve, limit, name, colour in zip(arrays.from_wrong, arrays.limits, names, (ODE, OTHERS[0], SDE), strict=True):
        floors.plot(arrays.steps, curve, color=colour, marker="o", ms=2.5, label=name)
        floors.axhline(limit, color=colour, ls=":", lw=0.9)
    floors.plot(arrays.cycle_steps, arrays.cycle, color=CYCLE, marker="s", ms=3.5, label="Cycle-SDE")
    floors.plot([], [], color=INK, ls=":", lw=0.9, label="limit N → ∞")
    floors.set(xlabel="steps", title="from a wrong law: floors")

    restarts.plot(arrays.steps, arrays.second, color=SDE, marker="o", ms=2.5, label="SDE, DPM++ 2M")
    for cycles, curve, limit, colour in zip(
        (1, 2), arrays.restart, arrays.restart_limits, (OTHERS[3], OTHERS[1]), strict=True
    ):
        evaluations = (1 + cycles) * 2 * arrays.steps
        restarts.plot(evaluations, curve, color=colour, marker="o", ms=2.5, label=f"Restart × {cycles}, Heun")
        restarts.axhline(limit, color=colour, ls=":", lw=0.9)
    restarts.set(xlabel="network evaluations", title="Restart against the SDE")

    for i, (name, colour) in enumerate((("Cycle-SDE", CYCLE), ("ODE inversion", ODE))):
        for j, (kind, style) in enumerate((("float32", "--"), ("float64", "-"))):
            curve = arrays.reconstruction[i, j]
            label = f"{name}, {kind}"
            errors.plot(arrays.reconstruction_steps, curve, style, color=colour, marker="o", ms=2.5, label=label)
    errors.set(ylabel="largest error of x₀", xlabel="steps", title="unedited, there and back")
    for axis in axes[:4]:
        axis.set_ylabel(f"KL at t = {END:g}, nats")
    for axis in axes[:5]:
        axis.set(xscale="log", yscale="log")
    for axis in (first, second, restarts):
        axis.legend(fontsize=6.5, handlelength=1.5, loc="best")
    blank.axis("off")
    for axis, place, name in ((floors, 0.75, "c"), (errors, 0.3, "e")):
        handles = axis.get_legend_handles_labels()
        words = {"fontsize": 6.5, "title": name, "title_fontproperties": {"weight": "bold"}, "alignment": "left"}
        blank.add_artist(blank.legend(*handles, loc="center left", bbox_to_anchor=(0, place), **words))
    blank.get_legend().remove()  # the last is there as an artist too
    letter(list(axes[:5]))
    return made
