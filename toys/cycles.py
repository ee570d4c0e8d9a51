"""What keeps the guarantee of Cycle-SDE: Theorem 3.3, which edits, masks, prompts, levels and solvers it covers.

Every KL is that of an exact law: linear algebra on Gaussian data, Chapman-Kolmogorov on the paper's mixture
(`theory.cycles`, `theory.line_cycles`). Theorem 3.3 promises that no curve rises on its way to t = 0.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from theory.checks import gaussian_problem, paper_problem
from theory.contraction import contraction_curve
from theory.cycle_closed_forms import cycle_limit, information, prompt_kl, prompt_sde_kl, reading_kl, reads_the_source
from theory.cycle_edits import in_plane, masked_cycle, redrawn
from theory.cycles import END, Standard, gaussian_cycle, grid, to_start
from theory.gaussians import inexact_score
from theory.line_cycles import line_cycle, monotone_edit
from theory.mixtures import GaussianMixture, gaussian
from theory.solvers import DDIM, DPMSolverPP2M, EulerMaruyama
from theory.types import Solver, Times
from toys.results import Row
from toys.style import CYCLE, INK, ODE, OTHERS, SDE, figure, letter, styled

TITLE = "What keeps the guarantee of Cycle-SDE"
MIXTURE_END = 1e-2  # where recording stops on the mixture, whose kernels are narrower than its nodes are apart below
LEVELS = (0.25, 0.5, 0.75, 1.0)  # eta
SHRINK = 0.5  # the edit for them: x_t0 towards its mean
SOURCES = (0.2, 0.6, 0.9)  # how much of x_0 an edit reads
MASKS = (0.3, 0.6, 0.9)  # correlation of what a mask keeps with what is edited
PROMPT = (-0.7, 0.09)  # mean and variance of another prompt's law
FLOOR = 1e-9  # of the figure, where KL is 0 in theory


def solvers() -> dict[str, Solver]:
    """All with eta = 1, and one without."""
    schedule = gaussian_problem().schedule
    return {
        "DDIM(1)": DDIM(schedule, 1.0),
        "DPM++ 2M SDE": DPMSolverPP2M(schedule, 1.0),
        "Euler-Maruyama": EulerMaruyama(schedule, 1.0),
        "DDIM(½)": DDIM(schedule, 0.5),
    }


@dataclass(frozen=True)
class Config:
    """Numbers of steps: of the curves, of those of another prompt, to compare solvers, and on the mixture."""

    curve_steps: int = 100
    prompt_steps: tuple[int, ...] = (5, 20, 100)
    solver_steps: tuple[int, ...] = (5, 10, 20, 40, 80, 160)
    mixture_steps: tuple[int, ...] = (8, 16, 32, 64)
    panels: int = 40
    offsets: int = 256

    @classmethod
    def tiny(cls) -> "Config":
        return cls(20, (20,), (20,), (8,), 32, 128)  # grids of one length share programs


class Arrays(NamedTuple):
    """KL to the right law at every time, and what Theorem 3.3 would have."""

    ts: np.ndarray  # (times,) of the curves on Gaussian data
    levels: np.ndarray  # (4, times) DDIM(eta) with an edit of x_t0 alone
    limits: np.ndarray  # (4, times) in continuous time
    sources: np.ndarray  # (3, times) edits that read x_0, from the right law of x_t0
    information: np.ndarray  # (3, times) their bound
    masks: np.ndarray  # (3, times) a coordinate is kept, the other drawn anew from its law given that
    prompt_steps: np.ndarray  # (prompts,)
    prompts: np.ndarray  # (prompts, times) at the times of `ts`, by numbers of steps; interpolated in between
    prompt_sde: np.ndarray  # (times,) the prompt's own SDE
    prompt_by_hand: np.ndarray  # (prompts,) KL at the end by the recursion of its moments
    solver_steps: np.ndarray  # (steps,)
    solvers: np.ndarray  # (4, steps) KL at the end, of the wrong start
    sde: np.ndarray  # () the same by the exact SDE
    mixture_steps: np.ndarray  # (mixtures,)
    mixture_ts: np.ndarray  # (9,) times that all grids on the mixture have
    mixture: np.ndarray  # (mixtures, 9)
    mixture_apart: np.ndarray  # (9,) the finest with twice the spacing of the offsets
    mixture_sde: np.ndarray  # (9,) Theorem 3.3


def run(config: Config) -> Arrays:
    g, p = gaussian_problem(), paper_problem()
    ts, ddim = grid(g, config.curve_steps), DDIM(g.schedule, 1.0)
    shrunk, reading = Standard(SHRINK), [reads_the_source(g, ts, source) for source in SOURCES]
    prompt = gaussian([PROMPT[0]], [[PROMPT[1]]])
    grids = [grid(g, n) for n in config.prompt_steps]
    prompts = [gaussian_cycle(ddim, g.target, steps, Standard(1.0), prompt).kl for steps in grids]
    mixture = [_mixture(n, config) for n in config.mixture_steps]
    common = np.linspace(1.0, MIXTURE_END, 9)
    return Arrays(
        ts=np.asarray(ts),
        levels=np.stack([gaussian_cycle(DDIM(g.schedule, eta), g.target, ts, shrunk).kl for eta in LEVELS]),
        limits=np.stack([cycle_limit(g.target, g.schedule, ts, shrunk, eta).kl() for eta in LEVELS]),
        sources=np.stack([gaussian_cycle(ddim, g.target, ts, edit).kl for edit in reading]),
        information=np.stack([information(g.target, g.schedule, ts, edit) for edit in reading]),
        masks=np.stack([_masked(in_plane(r), ts) for r in MASKS]),
        prompt_steps=np.array(config.prompt_steps),
        prompts=np.stack([_interpolated(ts, steps, kl) for steps, kl in zip(grids, prompts, strict=True)]),
        prompt_sde=np.array([prompt_sde_kl(g, prompt, s) for s in ts]),
        prompt_by_hand=np.array([prompt_kl(g, prompt, steps) for steps in grids]),
        solver_steps=np.array(config.solver_steps),
        solvers=np.array([[_end(solver, n) for n in config.solver_steps] for solver in solvers().values()]),
        sde=np.asarray(inexact_score(g, ts[-1], 1.0).kl()),
        mixture_steps=np.array(config.mixture_steps),
        mixture_ts=common,
        mixture=np.stack(mixture),
        mixture_apart=_mixture(config.mixture_steps[-1], config, 2.0),
        mixture_sde=np.asarray(contraction_curve(p.target, p.start, p.schedule, jax.device_put(common)).kl.value),
    )


def _end(solver: Solver, steps: int) -> float:
    """KL at the end, of the wrong start."""
    g = gaussian_problem()
    return float(gaussian_cycle(solver, g.target, grid(g, steps), to_start(g)).kl[-1])


def _masked(data: GaussianMixture, ts: Times) -> np.ndarray:
    schedule = gaussian_problem().schedule
    return np.asarray(masked_cycle(data, schedule, ts, redrawn(data, schedule, ts[0])).kl)


def _interpolated(ts: Times, steps: Times, kl: Times) -> np.ndarray:
    return np.exp(np.interp(-np.asarray(ts), -np.asarray(steps), np.log(kl)))


def _mixture(steps: int, config: Config, spacing: float = 1.0) -> np.ndarray:
    """KL at nine times that grids of a multiple of eight steps share; the shorter grids are filled up."""
    p = paper_problem()
    filled = grid(p, steps, MIXTURE_END, max(config.mixture_steps))
    laws = line_cycle(
        DDIM(p.schedule, 1.0),
        p,
        filled,
        monotone_edit(p),
        panels=config.panels,
        offsets=config.offsets,
        spacing=spacing,
    )
    return np.asarray(laws.kl())[: steps + 1 : steps // 8]


def rows(arrays: Arrays) -> list[Row]:
    found = []
    for eta, kl in zip(LEVELS, arrays.levels, strict=True):
        least, end = kl.min(), kl[-1]
        remark = (
            "does not grow: Theorem 3.3" if end == least else f"after {least:.1e} at t = {arrays.ts[kl.argmin()]:.2f}"
        )
        found.append(Row(f"edit of x_t0 alone, DDIM, η = {eta:g}: KL at the end", end, remark=remark))
    # of DDIM(1), at any number of steps, the law is that of continuous time
    found.append(
        Row("the same with η = 1, in continuous time", arrays.levels[-1, -1], exact=float(arrays.limits[-1, -1]))
    )
    for source, kl, bound in zip(SOURCES, arrays.sources, arrays.information, strict=True):
        what = f"edit that reads x_0, k = {source:g}, η = 1, from the right law: KL at the end"
        exact = reading_kl(gaussian_problem(), jax.device_put(arrays.ts), source)
        found.append(Row(what, kl[-1], exact=exact, remark=f"at most {bound[-1]:.2g}, what the edit tells of w"))
    for r, kl in zip(MASKS, arrays.masks, strict=True):
        what = f"mask, correlation {r:g} of what is kept with the rest, η = 1, from the right law: KL at the end"
        found.append(Row(what, kl[-1]))
    for n, kl, exact in zip(arrays.prompt_steps, arrays.prompts[:, -1], arrays.prompt_by_hand, strict=True):
        remark = f"{arrays.prompt_sde[-1]:.3g} by the prompt's SDE"
        found.append(Row(f"another prompt, {n} steps of DDIM(1): KL at the end", kl, exact=float(exact), remark=remark))
    most = arrays.solver_steps[-1]
    for name, kl in zip(solvers(), arrays.solvers[:, -1], strict=True):
        exact = float(arrays.sde) if name in ("DDIM(1)", "DPM++ 2M SDE") else float("nan")
        remark = "that of the SDE, at any number" if exact == exact else f"the SDE has {float(arrays.sde):.3g}"
        found.append(Row(f"wrong start, {most} steps of {name}: KL at the end", kl, exact=exact, remark=remark))
    for n, kl in zip(arrays.mixture_steps, arrays.mixture, strict=True):
        grown = np.diff(kl).max()
        remark = f"the SDE has {arrays.mixture_sde[-1]:.3g}" + (
            f"; grows by {grown:.2g} on the way" if grown > 0 else ""
        )
        found.append(
            Row(f"the paper's mixture, {n} steps of DDIM(1): KL at t = {MIXTURE_END:g}", kl[-1], remark=remark)
        )
    what = f"the same with {arrays.mixture_steps[-1]} steps and twice the spacing of the offsets"
    found.append(Row(what, arrays.mixture_apart[-1], exact=float(arrays.mixture[-1, -1]), tolerance=0.02))
    return found


@styled
def plot(arrays: Arrays) -> Figure:
    made = figure(4.9)
    axes = made.subplots(2, 3).ravel()
    levels, sources, masks, prompts, by_solver, mixture = axes
    shades = (OTHERS[0], OTHERS[1], OTHERS[2])

    for eta, kl, limit, colour in zip(LEVELS, arrays.levels, arrays.limits, (*shades, CYCLE), strict=True):
        levels.plot(arrays.ts, _above(limit), color=colour, label=f"η = {eta:g}")
        levels.plot(arrays.ts[::10], _above(kl[::10]), ".", color=colour, ms=3.5)
    levels.plot([], [], ".", color=INK, ms=3.5, label=f"{len(arrays.ts) - 1} steps")
    levels.set_title("an edit of $x_{t_0}$ alone")
    for source, kl, bound, colour in zip(SOURCES, arrays.sources, arrays.information, shades, strict=True):
        sources.plot(arrays.ts, _above(kl), color=colour, label=f"k = {source:g}")
        sources.plot(arrays.ts, _above(bound), ":", color=colour, lw=0.9)
    sources.plot([], [], ":", color=INK, lw=0.9, label="bound: $I(\\tilde x_{t_0}; W)$")
    sources.set_title("an edit that reads $x_0$, η = 1")
    for r, kl, colour in zip(MASKS, arrays.masks, shades, strict=True):
        masks.plot(arrays.ts, _above(kl), color=colour, label=f"correlation {r:g}")
    masks.set_title("a mask, η = 1")
    for n, kl, colour in zip(arrays.prompt_steps, arrays.prompts, shades, strict=False):
        prompts.plot(arrays.ts, _above(kl), color=colour, label=f"{n} steps")
    prompts.plot(arrays.ts, _above(arrays.prompt_sde), "--", color=SDE, label="the prompt's SDE")
    prompts.set_title("another prompt, η = 1")

    styles = (("o", CYCLE), ("x", SDE), ("s", OTHERS[1]), ("^", ODE))
    for (name, kl), (marker, colour) in zip(zip(solvers(), arrays.solvers, strict=True), styles, strict=True):
        line = "none" if marker == "x" else "-"
        by_solver.plot(arrays.solver_steps, kl, marker, ls=line, color=colour, ms=5 if marker == "x" else 3, label=name)
    by_solver.axhline(float(arrays.sde), color=INK, ls=":", lw=0.9, label="exact SDE")
    by_solver.set(xscale="log", xlabel="steps", title="a wrong start, by solver")
    by_solver.set_ylabel(f"KL at t = {END:g}, nats")

    colours = (*shades, CYCLE)[-len(arrays.mixture) :]
    for n, kl, colour in zip(arrays.mixture_steps, arrays.mixture, colours, strict=True):
        mixture.plot(arrays.mixture_ts, kl, color=colour, marker="o", ms=2.5, label=f"{n} steps")
    mixture.plot(arrays.mixture_ts, arrays.mixture_sde, "--", color=SDE, label="SDE")
    mixture.set_title("the paper's mixture, η = 1")
    for axis in (levels, sources, masks, prompts, mixture):
        _towards_the_data(axis)
    for axis in axes:
        axis.set_yscale("log")
        axis.legend(fontsize=6.5, handlelength=1.6, labelspacing=0.3)
    letter(list(axes))
    return made


def _towards_the_data(axis: Axes) -> None:
    axis.set(xlim=(1, 0), xlabel="time t", ylabel="KL($\\tilde p_t$ | $p_t$), nats")


def _above(kl: np.ndarray) -> np.ndarray:
    """Zeros are drawn at the floor."""
    return np.maximum(kl, FLOOR)
