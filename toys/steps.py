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
from theory.gaussians import Offset, cycle_edited, inexact_score
from theory.mixtures import noise_fn
from theory.problems import Problem
from theory.processes import forward_path, transition
from theory.solve import invert, record, replay, sample, time_grid
from theory.solvers import DDIM, DPMSolverPP2M, EulerMaruyama, Heun
from theory.theorems import end_offset, to_start
from theory.types import Schedule, Solver, Times
from toys.results import Row
from toys.style import CYCLE, ODE, OTHERS, SDE, figure, letter, styled

TITLE = "Finitely many steps: orders, floors and reconstruction"
END = 1e-3  # where second-order solvers and recorded paths stop


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


@dataclass(frozen=True)
class Config:
    """Numbers of steps; those of Cycle-SDE and of the reconstructions cost a compilation each."""

    steps: tuple[int, ...] = (5, 10, 20, 50, 100, 200, 500, 1000)
    cycle_steps: tuple[int, ...] = (5, 20, 100)
    reconstruction_steps: tuple[int, ...] = (10, 30, 100, 300, 1000)
    points: int = 2000
    seed: int = 0

    @classmethod
    def tiny(cls) -> "Config":
        return cls((5, 10, 50, 100), (5,), (10,), 200)


class Arrays(NamedTuple):
    """KL to the data after n steps, on Gaussian data; reconstruction errors on the paper's mixture."""

    steps: np.ndarray  # (steps,)
    from_right: np.ndarray  # (solvers, steps) from the right marginal: discretisation alone
    from_wrong: np.ndarray  # (3, steps) from the wrong start, eta = 0, 1/2, 1
    limits: np.ndarray  # (3,) the same in continuous time
    cycle_steps: np.ndarray  # (cycles,)
    cycle: np.ndarray  # (cycles,) Cycle-SDE from the wrong start
    cycle_limit: np.ndarray  # () the SDE in continuous time, at the same end
    restart: np.ndarray  # (2, steps) one and two Restart cycles, Heun
    restart_limits: np.ndarray  # (2,) in continuous time
    reconstruction_steps: np.ndarray  # (reconstructions,)
    reconstruction: np.ndarray  # (2, 2, reconstructions) largest error: (Cycle-SDE, ODE inversion), (float32, float64)


def run(config: Config) -> Arrays:
    g = gaussian_problem()
    right, wrong = (Moments(law.means[0], law.covariances[0]) for law in (g.marginal(g.t0), g.start))
    grids, to_data = (_grids(g.schedule, config.steps, end) for end in (END, 0.0))
    from_right = [_end_kl(solver, g, right, grids) for solver, _ in solvers(g.schedule).values()]
    levels = (0.0, 0.5, 1.0)
    from_wrong = [_end_kl(DDIM(g.schedule, eta), g, wrong, to_data) for eta in levels]
    zero, end = jnp.zeros(()), jnp.array(END)
    # K exact cycles contract as lam² = K does: noise up and the ODE down have the adjoint of the SDE's kernel.
    limits = [
        [inexact_score(g, end, cycles**0.5).kl() for cycles in (1, 2)],
        [inexact_score(g, zero, lam).kl() for lam in levels],
    ]
    reconstruction = [_reconstruction(n, config.points, config.seed) for n in config.reconstruction_steps]
    return Arrays(
        steps=np.array(config.steps),
        from_right=np.stack(from_right),
        from_wrong=np.stack(from_wrong),
        limits=np.array(limits[1]),
        cycle_steps=np.array(config.cycle_steps),
        cycle=np.array([_cycle_kl(g, n) for n in config.cycle_steps]),
        cycle_limit=np.asarray(inexact_score(g, end, 1.0).kl()),
        restart=np.stack([_restart_kl(g, wrong, grids, cycles) for cycles in (1, 2)]),
        restart_limits=np.array(limits[0]),
        reconstruction_steps=np.array(config.reconstruction_steps),
        reconstruction=np.stack(reconstruction, axis=-1),
    )


def _grids(schedule: Schedule, steps: tuple[int, ...], end: float) -> Float[Array, "grids times"]:
    """Uniform grids, all filled up to the length of the longest."""
    grids = [np.asarray(time_grid(schedule, n, end=end)) for n in steps]
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


def _cycle_kl(g: Problem, steps: int) -> float:
    """Of the exact law of Cycle-SDE, started by the affine edit that makes the wrong start."""
    ts = time_grid(g.schedule, steps, end=END)
    return float(end_offset(cycle_edited(DDIM(g.schedule, 1.0), g, ts, to_start(g)), g, ts[-1]).kl())


def _reconstruction(steps: int, points: int, seed: int) -> np.ndarray:
    """Largest error of unedited points of the mixture up to t = 1 and back: (Cycle-SDE, inversion) x (f32, f64)."""
    p = paper_problem()
    found = np.empty((2, 2))
    ts = time_grid(p.schedule, steps, end=END)
    x0 = p.target.sample(jr.key(seed), (points,))
    for i, dtype in enumerate((jnp.float32, jnp.float64)):
        cast = jax.tree.map(partial(jnp.asarray, dtype=dtype), (p, x0, ts))
        found[:, i] = _errors(*cast, jr.key(seed + 1))
    return found


@jax.jit
def _errors(p: Problem, x0, ts: Times, key):
    eps_fn, ode, sde = noise_fn(p.target, p.schedule), DDIM(p.schedule, 0.0), DDIM(p.schedule, 1.0)
    path = forward_path(p.schedule, x0, ts, key)
    cycled = replay(sde, eps_fn, path[0], ts, record(sde, eps_fn, path, ts))[-1]
    inverted = sample(ode, eps_fn, invert(ode, eps_fn, x0, ts)[0], ts, key)
    return jnp.stack([jnp.abs(x - x0).max() for x in (cycled, inverted)])


def rows(arrays: Arrays) -> list[Row]:
    found = [
        Row("wrong start, 10 steps of DDIM, η = 1: KL to the data", _at(arrays, 1.0, 10), exact=0.238835),
        Row("the same, 100 steps", _at(arrays, 1.0, 100), exact=0.0103334),
        Row("wrong start, 10 steps of DDIM, η = 0", _at(arrays, 0.0, 10), exact=0.785192),
        Row("the same, 100 steps", _at(arrays, 0.0, 100), exact=0.427626),
    ]
    for n, value in zip(arrays.cycle_steps, arrays.cycle, strict=True):
        limit = float(arrays.cycle_limit)
        found.append(Row(f"wrong start, {n} steps of Cycle-SDE", value, exact=limit, remark="that of the exact SDE"))
    names = solvers(gaussian_problem().schedule)
    for (name, (_, order)), curve in zip(names.items(), arrays.from_right, strict=True):
        # KL is quadratic in the error of the moments.
        slope = -np.polyfit(np.log(arrays.steps[-2:]), np.log(curve[-2:]), 1)[0] / 2
        found.append(Row(f"measured order, {name}", slope, remark=f"{order} in theory"))
    for cycles, curve, limit in zip((1, 2), arrays.restart, arrays.restart_limits, strict=True):
        found.append(
            Row(
                f"{cycles} Restart cycles, {arrays.steps[-1]} steps",
                curve[-1],
                remark=f"{limit:.3g} in the limit of many steps",
            )
        )
    for j, kind in enumerate(("float32", "float64")):
        for i, name in enumerate(("Cycle-SDE", "ODE inversion")):
            worst = arrays.reconstruction[i, j].max()
            found.append(
                Row(f"largest reconstruction error, {name}, {kind}", worst, remark="over all numbers of steps")
            )
    return found


def _at(arrays: Arrays, eta: float, steps: int) -> float:
    return float(arrays.from_wrong[(0.0, 0.5, 1.0).index(eta), list(arrays.steps).index(steps)])


@styled
def plot(arrays: Arrays) -> Figure:
    made = figure(5.0)
    axes = made.subplots(2, 2)
    orders, floors, restarts, errors = axes.ravel()
    colours = (ODE, OTHERS[0], SDE, OTHERS[1], OTHERS[3], ODE, SDE)
    styles = ("-", "-", "-", "-", "-", "--", "--")
    names = solvers(gaussian_problem().schedule)
    for name, curve, colour, style in zip(names, arrays.from_right, colours, styles, strict=True):
        evaluations = arrays.steps * (2 if name == "Heun" else 1)
        orders.plot(evaluations, curve, color=colour, ls=style, marker="o", ms=2, label=name)
    orders.set(ylabel="KL to the data, nats", xlabel="network evaluations", title="from the right law: orders 1 and 2")

    for curve, limit, name, colour in zip(
        arrays.from_wrong, arrays.limits, ("ODE", "η = ½", "SDE"), (ODE, OTHERS[0], SDE), strict=True
    ):
        floors.plot(arrays.steps, curve, color=colour, marker="o", ms=2, label=name)
        floors.axhline(limit, color=colour, ls=":", lw=0.9)
    floors.plot(arrays.cycle_steps, arrays.cycle, color=CYCLE, marker="s", label="Cycle-SDE")
    floors.set(ylabel="KL to the data, nats", xlabel="steps", title="from a wrong law: floors (dotted: N → ∞)")

    restarts.plot(arrays.steps, arrays.from_wrong[2], color=SDE, marker="o", ms=2, label="SDE, DDIM η = 1")
    for cycles, curve, colour in zip((1, 2), arrays.restart, (OTHERS[3], OTHERS[1]), strict=True):
        restarts.plot(
            (1 + cycles) * 2 * arrays.steps, curve, color=colour, marker="o", ms=2, label=f"Restart × {cycles}, Heun"
        )
    restarts.set(ylabel="KL to the data, nats", xlabel="network evaluations", title="Restart against the SDE")

    for i, (name, colour) in enumerate((("Cycle-SDE", CYCLE), ("ODE inversion", ODE))):
        for j, (kind, style) in enumerate((("float32", "--"), ("float64", "-"))):
            curve = arrays.reconstruction[i, j]
            errors.plot(
                arrays.reconstruction_steps, curve, style, color=colour, marker="o", ms=2, label=f"{name}, {kind}"
            )
    errors.set(ylabel="largest error of x₀", xlabel="steps", title="an unedited point, there and back")
    for axis in axes.ravel():
        axis.set(xscale="log", yscale="log")
        axis.legend(fontsize=6)
    errors.legend(fontsize=6, loc="center left", bbox_to_anchor=(0, 0.38))
    letter(list(axes.ravel()))
    return made
