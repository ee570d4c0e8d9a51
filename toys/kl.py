"""KL along the way back: exact curves for every sampler, the bounds on them, and what samples can see of it.

The curves are those of `theory.contraction`: no samples. The estimators get exact draws of both laws, so that all their
error is their own.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from theory.checks import paper_problem
from theory.contraction import contraction_curve
from theory.heat import heat_curve
from theory.inequalities import chi2_factor, log_sobolev
from theory.problems import Problem
from theory.ratios import ratio_sde
from theory.types import PRNGKey, Time, Times
from toys.estimators import ESTIMATORS
from toys.results import Row
from toys.style import CYCLE, INK, ODE, OTHERS, SDE, figure, letter, styled

TITLE = "How fast the gap closes, exactly, and why samples do not show it"


@dataclass(frozen=True)
class Config:
    """Times of the curves, noise levels of the sweep, and the samples that estimators get."""

    times: int = 41
    levels: tuple[float, ...] = (0.25, 0.5, 0.75, 1.5)
    cells: int = 300
    samples: int = 10_000
    repeats: int = 6
    estimated_at: tuple[float, ...] = (0.9, 0.75, 0.6, 0.4, 0.2, 0.0)
    seed: int = 0

    @classmethod
    def tiny(cls) -> "Config":
        return cls(6, (0.5,), 100, 1000, 3, (0.8, 0.0))


class Arrays(NamedTuple):
    """KL(p~_t | p_t) on the paper's toy."""

    ts: np.ndarray  # (times,)
    ode: np.ndarray  # (times,)
    sde: np.ndarray  # (times,)
    levels: np.ndarray  # (levels,)
    sweep: np.ndarray  # (levels, times)
    sweep_error: np.ndarray  # (levels,) at t = 0
    log_sobolev: np.ndarray  # (times,) the certified bound
    singular_value: np.ndarray  # (times,) log(1 + factor chi2), the sharp bound through chi2
    estimated_at: np.ndarray  # (estimated,)
    exact_there: np.ndarray  # (estimated,) under the SDE
    estimates: np.ndarray  # (estimators, estimated, repeats) of the SDE's KL
    log_ratio: np.ndarray  # (estimated, 2) the exact log ratio over the same draws: mean and standard error


def run(config: Config) -> Arrays:
    p = paper_problem()
    ts = jnp.linspace(1.0, 0.0, config.times)
    at = np.searchsorted(-ts, -np.array(config.estimated_at))  # the estimators get times of the curves
    ode, sde = (contraction_curve(p.target, p.start, p.schedule, ts, lam) for lam in (0.0, 1.0))
    sweep = [heat_curve(p, ts, lam, cells=config.cells, steps=config.cells // 2) for lam in config.levels]

    constants = jax.lax.map(lambda t: log_sobolev(p.marginal(t)).upper, ts)
    rate = p.schedule.beta(ts) / constants
    # The rate grows with t: its smaller end in every interval keeps the bound a bound.
    passed = jnp.concatenate([jnp.zeros(1), jnp.cumsum(rate[1:] * -jnp.diff(ts))])
    factors = jnp.concatenate([jnp.ones(1), jax.lax.map(partial(chi2_factor, p), ts[1:])])
    singular_value = jnp.log1p(factors * sde.chi2.value[0])

    estimates, log_ratio = _estimates(p, ts[at], config)
    return Arrays(
        ts=np.asarray(ts),
        ode=np.asarray(ode.kl.value),
        sde=np.asarray(sde.kl.value),
        levels=np.array(config.levels),
        sweep=np.stack([curve.kl.value for curve in sweep]),
        sweep_error=np.stack([curve.kl.error[-1] for curve in sweep]),
        log_sobolev=np.asarray(sde.kl.value[0] * jnp.exp(-passed)),
        singular_value=np.asarray(singular_value),
        estimated_at=np.asarray(ts[at]),
        exact_there=np.asarray(sde.kl.value[at]),
        estimates=estimates,
        log_ratio=log_ratio,
    )


def _estimates(p: Problem, ts: Times, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Every estimator on exact draws of p~_t and p_t; mean and standard error of log(p~_t / p_t) over the former."""
    found, ratios = np.empty((len(ESTIMATORS), len(ts), config.repeats)), []
    for j, t in enumerate(ts):
        keys = jr.split(jr.fold_in(jr.key(config.seed), j), config.repeats)
        draws = [_draw(p, t, config.samples, key) for key in keys]
        for r, (edited, right, _) in enumerate(draws):
            found[:, j, r] = [f(np.asarray(edited), np.asarray(right)) for f in ESTIMATORS.values()]
        values = np.concatenate([log_ratio for *_, log_ratio in draws])
        ratios.append((values.mean(), values.std(ddof=1) / np.sqrt(values.size)))
    return found, np.array(ratios)


@partial(jax.jit, static_argnums=2)
def _draw(p: Problem, t: Time, n: int, key: PRNGKey):
    """n draws of p~_t by the exact reverse kernel, n of p_t, and log(p~_t / p_t) of the first."""
    start_key, kernel_key, right_key = jr.split(key, 3)
    y = p.start.sample(start_key, (n,))
    keys = jr.split(kernel_key, n)
    edited = jax.vmap(lambda y, key: p.target.reverse_kernel(p.schedule, y, p.t0, t).sample(key))(y, keys)
    log_ratio = jax.lax.map(ratio_sde(p, t), edited, batch_size=1000).log_h
    return edited, p.marginal(t).sample(right_key, (n,)), log_ratio


def rows(arrays: Arrays) -> list[Row]:
    found = [
        Row("KL at t = 1, whatever follows", arrays.ode[0], exact=0.448052683986, remark="Gauss-Hermite, 60 nodes"),
        Row("KL at t = 0, ODE", arrays.ode[-1], exact=arrays.ode[0], remark="Theorem 3.2"),
        Row("KL at t = 0, SDE", arrays.sde[-1], exact=0.00322556396747, remark="Gauss-Hermite, 60 nodes"),
    ]
    for level, curve, error in zip(arrays.levels, arrays.sweep, arrays.sweep_error, strict=True):
        found.append(Row(f"KL at t = 0, λ = {level:g}", curve[-1], error, remark="heat equation, two grids"))
    for t, exact, (mean, error) in zip(arrays.estimated_at, arrays.exact_there, arrays.log_ratio, strict=True):
        found.append(Row(f"mean of the exact log-ratio over draws, t = {t:g}", mean, error, exact))
    exact = arrays.exact_there[-1]
    for name, several in zip(ESTIMATORS, arrays.estimates[:, -1], strict=True):
        error = several.std(ddof=1) / np.sqrt(len(several))
        scatter = several.std(ddof=1)
        remark = f"{several.mean() / exact:.1f} times the true {exact:.3g}; one sample scatters by {scatter:.1g}"
        what = f"estimate of KL at t = {arrays.estimated_at[-1]:g}, SDE, {name}"
        found.append(Row(what, several.mean(), error, remark=remark))
    return found


@styled
def plot(arrays: Arrays) -> Figure:
    made = figure(3.3)
    left, right = made.subplots(1, 2, sharey=True)
    left.plot(arrays.ts, arrays.ode, color=ODE, label="ODE (Theorem 3.2)")
    shades = matplotlib.colormaps["Greys"](np.linspace(0.45, 0.85, len(arrays.levels)))
    for level, curve, shade in zip(arrays.levels, arrays.sweep, shades, strict=True):
        left.plot(arrays.ts, curve, color=shade, lw=0.8)
        left.annotate(
            f"λ = {level:g}", (0, curve[-1]), xytext=(2, 0), textcoords="offset points", fontsize=6, va="center"
        )
    left.plot(arrays.ts, arrays.sde, color=SDE, label="SDE, λ = 1 (Theorem 3.1)")
    left.plot(arrays.ts, arrays.sde, color=CYCLE, ls=(0, (1, 2)), label="Cycle-SDE (Theorem 3.3)")
    left.plot(arrays.ts, arrays.singular_value, color=INK, ls="--", lw=0.9, label="sharp χ² factor: log(1 + ρ² χ²)")
    left.plot(arrays.ts, arrays.log_sobolev, color=INK, ls=":", lw=0.9, label="certified log-Sobolev bound")
    right.plot(arrays.ts, arrays.sde, color=SDE, label="exact")
    right.plot(arrays.ts, arrays.ode, color=ODE, lw=0.8)
    for i, (name, colour, marker) in enumerate(zip(ESTIMATORS, OTHERS, "os^", strict=False)):
        middle, spread = arrays.estimates[i].mean(-1), arrays.estimates[i].std(-1, ddof=1)
        kept = middle > 0  # a nearest-neighbour estimate may be negative: an arrow at the foot
        at = arrays.estimated_at + 0.012 * (i - 1)
        right.errorbar(at[kept], middle[kept], spread[kept], fmt=marker, color=colour, lw=0.8, label=name)
        right.plot(at[~kept], np.full((~kept).sum(), 1.4e-5), "v", color=colour, mfc="none")
    left.set(xlim=(1, 0), yscale="log", ylim=(1e-5, 2), ylabel="KL(p̃ₜ | pₜ), nats")
    left.set_title("what happens")
    right.set(xlim=(1, -0.04))
    right.set_title("what samples of the SDE show")
    for axis in (left, right):
        axis.set_xlabel("time t: from the edited latent to the image")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    letter([left, right])
    return made
