"""Classifier-free guidance: what the theorems say of a drift that is not the data's, in exact numbers.

Two runs of one guided SDE contract, and faster than without guidance; two of one guided ODE do not. Towards the class
there is a floor, and the ODE and the SDE have different ones. On Gaussian laws all of it is in closed form
(`theory.guidance`); on a mode of the paper's toy it is solved for (`theory.fokker_planck`, `two_chains`). Beside it
Girsanov's bound on the harm of an inexact score, which the guided one is to the class.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from theory.beyond import least, whole_bound
from theory.chains import Moments, affine_chain, two_chains
from theory.checks import gaussian_problem
from theory.fokker_planck import inexact_curve, inexact_flow
from theory.gaussians import girsanov, inexact_score
from theory.guidance import Guided, Normal, guided, guided_law, guided_ode_variance, guided_sde_law, tilted
from theory.guidance_statements import guided_gaussians, mode_of_the_toy
from theory.problems import Problem
from theory.solve import time_grid
from theory.solvers import DDIM
from theory.types import Solver, Time, Times
from toys.results import Row
from toys.style import INK, ODE, OTHERS, SDE, figure, letter, styled

TITLE = "Classifier-free guidance: what contracts, and towards what"
SHOWN = (1.0, 2.0, 4.0)  # scales of the curves in time
END = 0.01  # where the mode's solvers and all chains stop
ERRORS = (0.1, -0.1)


@dataclass(frozen=True)
class Config:
    """Numbers of times, scales and noise levels, the scales on the mode, the steps of chains, the grids of solvers."""

    times: int = 121
    scales: int = 61
    mode_scales: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0, 5.5, 7.5)
    levels: int = 81
    steps: tuple[int, ...] = (5, 10, 20, 50, 100, 200, 400, 1000)
    cells: int = 600
    panels: int = 40

    def __post_init__(self):
        if 1.0 not in self.mode_scales:
            raise ValueError(f"mode_scales must have 1, no guidance, among them, got {self.mode_scales}")

    @classmethod
    def tiny(cls) -> "Config":
        return cls(21, 13, (1.0, 4.0), 21, (10, 100, 400), 300, 16)


class Arrays(NamedTuple):
    """KL on the Gaussians and on the mode; where an axis is (2,) it is (ODE, SDE), or the errors of the score."""

    ts: np.ndarray  # (times,)
    to_class: np.ndarray  # (SHOWN, 2, times) from the edited start
    between: np.ndarray  # (SHOWN, 2, times) of two runs
    scales: np.ndarray  # (scales,)
    at_end: np.ndarray  # (2, scales) to the class at 0, from the edited start
    floor: np.ndarray  # (2, scales) from the right one
    between_at_end: np.ndarray  # (2, scales)
    variances: np.ndarray  # (3, scales) over that of the class: ODE, SDE, and noise without bound
    elementary: np.ndarray  # (scales,) variance of the SDE by powers, nan where they are 0 / 0
    geometric: np.ndarray  # (scales,) variance of the ODE by powers
    steps: np.ndarray  # (steps,)
    chains: np.ndarray  # (2, steps) DDIM and DDPM with w = 2, KL to the class at END, from the right start
    limits: np.ndarray  # (2,)
    mode_scales: np.ndarray  # (mode scales,)
    mode: np.ndarray  # (2, mode scales) to the class at END, from the edited start
    mode_error: np.ndarray  # (2, mode scales)
    mode_start: np.ndarray  # () at t0
    mode_exact: np.ndarray  # (2,) without guidance, in closed form
    mode_between: np.ndarray  # (mode scales,) two chains of DDPM
    levels: np.ndarray  # (levels,)
    whole: np.ndarray  # (2, levels) KL(t0) plus Girsanov's term, from the edited start
    term: np.ndarray  # (2, levels) Girsanov's term from the right start
    ends: np.ndarray  # (2, levels) KL(0) from the right start
    best: np.ndarray  # (2,) the level at which the whole bound is least, from the edited start
    best_right: np.ndarray  # (2,) from the right one


def run(config: Config) -> Arrays:
    given = guided_gaussians()
    # None is 1/2 or 1, where the elementary form is 0 / 0.
    scales = np.linspace(0.0, 7.5, config.scales) + 1e-3
    ts = np.linspace(1.0, 0.0, config.times)
    curves = [[_curve(given._replace(scale=jnp.asarray(w)), ts, lam) for lam in (0.0, 1.0)] for w in SHOWN]
    ends = [_ends(given, scales, lam) for lam in (0.0, 1.0)]
    levels = np.geomspace(0.25, 4.0, config.levels)
    grids = [np.asarray(time_grid(given.problem.schedule, n, "log_snr", end=END)) for n in config.steps]
    filled = np.array([np.pad(grid, (0, max(config.steps) + 1 - len(grid)), mode="edge") for grid in grids])
    chains, limits = zip(
        *(_chains(DDIM(given.problem.schedule, eta), given, filled) for eta in (0.0, 1.0)), strict=True
    )
    p, exact = _mode()
    g = gaussian_problem()
    right = g._replace(start=g.marginal(g.t0))
    modes = [_on_mode(p, w, config.cells, config.panels) for w in config.mode_scales]
    return Arrays(
        ts=ts,
        to_class=np.array([[np.asarray(pair[0]) for pair in row] for row in curves]),
        between=np.array([[np.asarray(pair[1]) for pair in row] for row in curves]),
        scales=scales,
        at_end=np.array([np.asarray(end.to_class) for end in ends]),
        floor=np.array([np.asarray(end.floor) for end in ends]),
        between_at_end=np.array([np.asarray(end.between) for end in ends]),
        variances=np.array([*(np.asarray(end.variance) for end in ends), np.asarray(ends[0].tilted)]),
        elementary=np.asarray(ends[0].elementary),
        geometric=np.asarray(ends[0].geometric),
        steps=np.array(config.steps),
        chains=np.array(chains),
        limits=np.array(limits),
        mode_scales=np.array(config.mode_scales),
        mode=np.array([mode.kl for mode in modes]).T,
        mode_error=np.array([mode.error for mode in modes]).T,
        mode_start=np.array(modes[0].start),
        mode_exact=np.array(exact),
        mode_between=np.array([mode.between for mode in modes]),
        levels=levels,
        whole=np.array([np.asarray(_whole(g, levels, error)) for error in ERRORS]),
        term=np.array([np.asarray(_term(right, levels, error)) for error in ERRORS]),
        ends=np.array([np.asarray(_inexact(right, levels, error)) for error in ERRORS]),
        best=np.array([least(lambda lam, e=error: whole_bound(g, lam, e)) for error in ERRORS]),
        best_right=np.array([least(lambda lam, e=error: whole_bound(right, lam, e)) for error in ERRORS]),
    )


@jax.jit
def _curve(given: Guided, ts: Times, lam: Time) -> tuple[Array, Array]:
    """KL towards the class and between two runs, at every time."""

    def at(t: Time) -> tuple[Array, Array]:
        edited, right = (guided_law(given, start, t, lam) for start in (given.edited, given.right))
        return edited.kl(given.of_class(t)), edited.kl(right)

    return jax.vmap(at)(ts)


class _End(NamedTuple):
    to_class: Array
    floor: Array
    between: Array
    variance: Array
    tilted: Array
    elementary: Array
    geometric: Array


@jax.jit
def _ends(given: Guided, scales: Float[Array, " n"], lam: Time) -> _End:
    zero = jnp.zeros(())
    one = given.of_class(zero)

    def at(w: Time) -> _End:
        here = given._replace(scale=w)
        edited, right = (guided_law(here, start, zero, lam) for start in (here.edited, here.right))
        powers = guided_sde_law(here, here.right, zero).variance, guided_ode_variance(here, here.right, zero)
        variances = (v / one.variance for v in (right.variance, tilted(here, zero).variance, *powers))
        return _End(edited.kl(one), right.kl(one), edited.kl(right), *variances)

    return jax.vmap(at)(scales)


@jax.jit
def _chains(solver: Solver, given: Guided, grids: Float[Array, "n times"]) -> tuple[Array, Array]:
    """KL of the guided chains from the class at the end of their grids, and of the process; from the right start."""
    start = Moments(given.right.mean[None], given.right.variance[None, None])

    def kl(ts: Times) -> Array:
        laws = affine_chain(solver, given.eps_fn, start, ts)
        return Normal(laws.mean[-1, 0], laws.covariance[-1, 0, 0]).kl(given.of_class(ts[-1]))

    end = grids[0, -1]
    limit = guided_law(given, given.right, end, 1.0 if solver.stochastic else 0.0)
    return jax.vmap(kl)(grids), limit.kl(given.of_class(end))


def _mode() -> tuple[Problem, tuple[float, float]]:
    """A mode of the toy as a class, and KL at END without guidance, under the ODE and the SDE."""
    p, _ = mode_of_the_toy()
    ode, sde = (float(inexact_score(p, jnp.asarray(END), lam).kl()) for lam in (0.0, 1.0))
    return p, (ode, sde)


class _Mode(NamedTuple):
    kl: tuple[float, float]
    error: tuple[float, float]
    start: float
    between: float


def _on_mode(p: Problem, scale: float, cells: int, panels: int) -> _Mode:
    """KL towards the class at END under the guided ODE and SDE, and between two guided chains of forty steps."""
    _, unconditional = mode_of_the_toy()
    eps_fn = guided(p.target, unconditional, p.schedule, scale)
    ts = time_grid(p.schedule, 40, "log_snr", end=END)
    ode = inexact_flow(p, eps_fn, ts, panels, 4).kl
    sde = inexact_curve(p, eps_fn, ts, jnp.ones(()), cells, 160).kl
    right = p.marginal(p.t0)
    between = two_chains(DDIM(p.schedule, 1.0), eps_fn, (p.start, right), ts, 9.0).kl()
    value, error = zip(*((float(kl.value[-1]), float(kl.error[-1])) for kl in (ode, sde)), strict=True)
    return _Mode(value, error, float(ode.value[0]), float(between[-1]))


@jax.jit
def _whole(g: Problem, levels: Float[Array, " n"], error: Time) -> Array:
    return jax.vmap(lambda lam: whole_bound(g, lam, error))(levels)


@jax.jit
def _term(g: Problem, levels: Float[Array, " n"], error: Time) -> Array:
    return jax.vmap(lambda lam: girsanov(g, jnp.zeros(()), lam, error))(levels)


@jax.jit
def _inexact(g: Problem, levels: Float[Array, " n"], error: Time) -> Array:
    return jax.vmap(lambda lam: inexact_score(g, jnp.zeros(()), lam, error).kl())(levels)


def rows(arrays: Arrays) -> list[Row]:
    found = []
    start = float(arrays.to_class[0, 0, 0])
    for i, w in enumerate(SHOWN):
        for j, name in enumerate(("ODE", "SDE")):
            what = f"Gaussians, w = {w:g}, {name}"
            between = arrays.between[i, j, -1]
            found.append(Row(f"{what}: KL between two runs at 0", between, exact=np.nan if j else start))
            remark = f"{start:.4g} at t0"
            found.append(Row(f"{what}: KL to the class at 0, edited start", arrays.to_class[i, j, -1], remark=remark))
    for k in (-1, len(arrays.scales) // 2):
        w = arrays.scales[k]
        for name, value, exact in zip(
            ("ODE", "SDE"), arrays.variances[:, k], (arrays.geometric[k], arrays.elementary[k]), strict=False
        ):
            remark = "by powers of V_u and V_c"
            found.append(Row(f"Gaussians, w = {w:.4g}, {name}: variance over the class's", value, 0.0, exact, remark))
        found.append(Row(f"Gaussians, w = {w:.4g}, noise without bound: the same", arrays.variances[2, k]))
    for name, curve, limit in zip(("DDIM", "DDPM"), arrays.chains, arrays.limits, strict=True):
        what = f"Gaussians, w = 2, {arrays.steps[-1]} steps of {name}, right start: KL to the class at t = {END:g}"
        found.append(Row(what, curve[-1], exact=float(limit), remark="the limit of many steps", tolerance=0.05))
    unguided = list(arrays.mode_scales).index(1.0)
    for j, name in enumerate(("ODE", "SDE")):
        what = f"mode, w = 1, {name}: KL to the class at t = {END:g}"
        value, error, exact = (
            float(leaf[j]) for leaf in (arrays.mode[:, unguided], arrays.mode_error[:, unguided], arrays.mode_exact)
        )
        # What is right to rounding has to agree in the digits that are printed.
        error = error if error > 1e-6 * abs(value) else 0.0
        found.append(Row(what, value, error, exact, "in closed form; the error is the solver's"))
    for j, name in enumerate(("ODE", "SDE")):
        for k, w in enumerate(arrays.mode_scales):
            if k != unguided:
                what = f"mode, w = {w:g}, {name}: KL to the class at t = {END:g}, edited start"
                remark = f"{arrays.mode_start:.4g} at t0"
                found.append(Row(what, arrays.mode[j, k], arrays.mode_error[j, k], remark=remark))
    for w, value in zip(arrays.mode_scales, arrays.mode_between, strict=True):
        found.append(Row(f"mode, w = {w:g}, 40 steps of DDPM: KL between two runs", value))
    spacing = float(np.log(arrays.levels[1] / arrays.levels[0]))
    for i, error in enumerate(ERRORS):
        what = f"score off by {error:+.0%}, edited start: λ at which Girsanov's whole bound is least"
        near = float(arrays.levels[arrays.whole[i].argmin()])
        found.append(Row(what, arrays.best[i], exact=near, remark="of those on the grid", tolerance=spacing))
        found.append(Row(f"score off by {error:+.0%}, right start: the same", arrays.best_right[i]))
    return found


@styled
def plot(arrays: Arrays) -> Figure:
    made = figure(4.9)
    (to_class, between, scales), (modes, chains, bounds) = made.subplots(2, 3)
    shades = (0.4, 0.65, 1.0)
    for axis, curves in ((to_class, arrays.to_class), (between, arrays.between)):
        for i, (w, shade) in enumerate(zip(SHOWN, shades, strict=True)):
            for j, (name, colour) in enumerate((("ODE", ODE), ("SDE", SDE))):
                if axis is between and not j and i:
                    continue  # the same line
                label = f"{name}, w = {w:g}" if axis is to_class or j else "ODE, any w"
                axis.plot(arrays.ts, curves[i, j], color=colour, alpha=shade, lw=0.8 + 0.4 * i, label=label)
        axis.set(yscale="log", xlim=(1, 0), xlabel="t")
    to_class.set(ylabel="KL(p̃ | p(· | c)), nats", title="towards the class: a floor", ylim=(1e-8, 20))
    between.set(ylabel="KL(p̃ | pʷ), nats", title="two guided runs: contraction", ylim=(1e-10, 20))

    for j, (name, colour) in enumerate((("ODE", ODE), ("SDE", SDE))):
        scales.plot(arrays.scales, arrays.at_end[j], color=colour, label=f"{name}, edited start")
        scales.plot(arrays.scales, arrays.floor[j], color=colour, ls=":", label=f"{name}, right start")
        shown = arrays.mode[j] > 10 * arrays.mode_error[j]
        label = f"{name}, to the class"
        modes.plot(arrays.mode_scales[shown], arrays.mode[j][shown], color=colour, marker="o", label=label)
        label = ("DDIM, η = 0", "DDPM, η = 1")[j]
        chains.plot(arrays.steps, arrays.chains[j], color=colour, marker="o", ms=2.5, label=label)
        chains.axhline(arrays.limits[j], color=colour, ls=":", lw=0.9)
    scales.axhline(arrays.to_class[0, 0, 0], color=INK, lw=0.8, ls="--", label="KL(t₀)")
    scales.set(yscale="log", xlabel="guidance scale w", ylabel="KL at 0, nats", title="what is left, Gaussians")
    scales.set_ylim(1e-5, 20)
    modes.plot(arrays.mode_scales, arrays.mode_between, color=SDE, marker="s", ls="--", label="DDPM, two runs")
    modes.axhline(arrays.mode_start, color=INK, lw=0.8, ls="--", label="KL(t₀)")
    modes.set(yscale="log", xlabel="guidance scale w", ylabel=f"KL at t = {END:g}, nats", title="a mode of the toy")
    modes.set_ylim(1e-11, 20)
    chains.plot([], [], color=INK, ls=":", lw=0.9, label="ODE, SDE: N → ∞")
    chains.set(xscale="log", yscale="log", xlabel="steps N", ylabel=f"KL to the class at t = {END:g}")
    chains.set_title("w = 2: two limits")
    chains.minorticks_off()
    chains.set_yticks([0.25, 0.5, 1, 2], ["0.25", "0.5", "1", "2"])

    for i, (error, colour) in enumerate(zip(ERRORS, (OTHERS[0], OTHERS[1]), strict=True)):
        bounds.plot(arrays.levels, arrays.term[i], color=colour, label=f"bound, {error:+.0%}")
        bounds.plot(arrays.levels, arrays.ends[i], color=colour, ls="--", label=f"KL(0), {error:+.0%}")
        lowest = np.interp(arrays.best_right[i], arrays.levels, arrays.term[i])
        bounds.plot(arrays.best_right[i], lowest, color=colour, marker="o")
    bounds.vlines(1.0, arrays.term.min() / 2, arrays.term.max(), color=INK, lw=0.6)
    bounds.set(
        xscale="log",
        yscale="log",
        xlabel="noise level λ",
        ylabel="nats",
        title="inexact score: Girsanov",
        ylim=(2e-4, 0.5),
    )
    bounds.set_xticks([0.25, 0.5, 1, 2, 4], ["¼", "½", "1", "2", "4"])
    bounds.minorticks_off()
    axes = [to_class, between, scales, modes, chains, bounds]
    for axis in axes:
        axis.legend(fontsize=6, handlelength=1.6, loc="upper right" if axis is chains else "lower left")
    scales.get_legend().set_loc("lower right")
    letter(axes)
    return made
