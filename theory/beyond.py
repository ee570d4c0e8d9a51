"""What the paper's reviewers asked, as checks: other noise levels, other divergences, inexact scores, finite steps."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float
from scipy.optimize import minimize_scalar

from theory.chains import Moments, gaussian_chain, line_chain
from theory.checks import (
    GAUSSIANS,
    Check,
    Study,
    at,
    at_most,
    difference,
    equal,
    largest_growth,
    less,
    scaled,
)
from theory.contraction import contraction_curve
from theory.divergences import gaussian_kl
from theory.gaussians import clock, girsanov, girsanov_factor, inexact_score
from theory.heat import heat_curve
from theory.mixtures import GaussianMixture, gaussian, noise_fn
from theory.moment_equations import Solved, by_moment_equations
from theory.problems import Problem
from theory.solve import time_grid
from theory.solvers import DDIM
from theory.types import Estimate, Schedule, Solver, Time, Times, X


def lambda_family(study: Study) -> Iterator[Check]:
    """Every noise level lam: the contraction is exp(-lam² A), by closed form, moment equations and heat equation."""
    g, about = study.gaussians
    levels = (0.0, 0.5, 1.0, 2.0)
    for lam, found in zip(levels, _scaled(g, levels, (0.0,) * 4), strict=True):
        closed = inexact_score(g, jnp.zeros(()), lam)
        yield at_most(
            f"The law of the lambda family in closed form, lam = {lam:g}, against its moment equations",
            "e_0 = e sqrt(ρ), r_0 = 1 + ρ (r - 1), ρ = exp(-λ² A)",
            max(abs(closed.e - found.end.e), abs(closed.r - found.end.r)),
            0.0,
            1e-10,  # in units of the marginal; the equations are solved to 1e-13
            about=about,
        )
    if study.on_line:
        ode, half, sde = study.ode, *heat_kl(study, (0.5, 1.0))
        yield heat_is_average(study, sde)
        for more, less_noise, name in ((half, ode, "1/2 than with lam = 0"), (sde, half, "1 than with lam = 1/2")):
            yield less(
                f"More noise contracts more: KL(0) is smaller with lam = {name}",
                "KL_λ(0) decreases in λ",
                more,
                less_noise,
            )


def heat_is_average(study: Study, by_heat: Estimate) -> Check:
    """KL(0) by the heat equation at lam = 1, and by averages over the forward kernel."""
    return equal(
        "The heat equation for the density ratio agrees with the forward-kernel average",
        "dh/dτ = λ² g²/2 ∂u(p² ∂u h), λ = 1",
        by_heat,
        at(study.sde.kl, -1),
        HEAT,
    )


HEAT = 2e-4  # of a KL(0) that 1 % in λ changes by 2 % of log(KL(t0) / KL(0))


def heat_kl(study: Study, levels: Sequence[float]) -> list[Estimate]:
    """KL(0) at every noise level by the heat equation, on the line; on a finer grid where it has to be."""
    p = study.problem
    ends = jax.device_put(np.array([float(p.t0), 0.0]))
    for cells, steps in ((320, 60), (640, 120)):
        found = [at(jax.device_get(_heat(p, ends, np.float64(lam), cells, steps)), -1) for lam in levels]
        if all(kl.error < HEAT / 2 * kl.value for kl in found):
            break
    return found


@partial(jax.jit, static_argnames=("cells", "steps"))
def _heat(p: Problem, ends: Times, lam: Time, cells: int, steps: int) -> Estimate:
    return heat_curve(p, ends, lam, cells=cells, steps=steps).kl  # the rest of the curve is not compiled


def f_divergences(study: Study) -> Iterator[Check]:
    """Not only KL: every f-divergence contracts, dD_f/dt = 1/2 g² E_p[f''(h) |grad h|²]."""
    curve = study.sde
    for name in (name for name in NAMES if np.isfinite(curve.f[name].value[0])):
        yield integrated(study, name)
    for order, name in RENYI.items():
        if np.isfinite(curve.f[name].value[0]):
            yield _renyi(study, order, name)
    for name in (name for name in NAMES if np.isfinite(curve.f[name].value[0])):
        yield at_most(
            f"{NAMES[name][0]} never grows on the way back",
            "max [D(s) - D(t)] <= 0, s < t",
            largest_growth(curve.f[name]),
            0.0,
        )
    yield at_most(
        "Total variation never grows on the way back",
        "max [TV(s) - TV(t)] <= 0, s < t",
        largest_growth(curve.tv),
        0.0,
        study.tolerance if study.on_line else 1e-4,  # it has a kink that the rule in the plane does not follow
    )


NAMES = {  # and f''(h), of the f-divergences besides KL
    "reverse_kl": ("The reverse KL divergence", "1/h²"),
    "chi2": ("chi2", "2"),
    "hellinger": ("The squared Hellinger distance", "h^(-3/2) / 4"),
    "jensen_shannon": ("The Jensen-Shannon divergence", "1 / (2 h (1 + h))"),
}
RENYI = {0.5: "hellinger", 2.0: "chi2"}


def integrated(study: Study, name: str, factor: float = 0.5) -> Check:
    """What an f-divergence loses, and its rate integrated; that is half of it."""
    curve, (title, second) = study.sde, NAMES[name]
    return equal(
        f"{title}: what the SDE removes is its integrated rate",
        f"D(t0) - D(0) = 1/2 ∫ g² E_p[f''(h) |∇h|²] dt, f'' = {second}",
        difference(at(curve.f[name], 0), at(curve.f[name], -1)),
        scaled(study.integral(at(curve.rates[name], slice(1, -1))), factor),
        study.tolerance,
    )


def _renyi(study: Study, order: float, name: str) -> Check:
    """The Rényi divergence is a function of an f-divergence D: log(1 + chi2), and -2 log(1 - H²)."""
    curve, sign = study.sde, 1.0 if order == 2 else -1.0
    moment = 1 + sign * curve.f[name].value  # E_p h^order
    relative = curve.f[name].error / moment
    value, slope = np.log(moment) / (order - 1), 1 / ((order - 1) * moment)
    ends = Estimate(value, relative / abs(order - 1))
    rate, unknown = (each[1:-1] for each in curve.rates[name])
    inner = (sign * slope)[1:-1]
    return equal(
        f"The Rényi divergence of order {order:g}: what the SDE removes is its integrated rate",
        "R(t0) - R(0) = order/2 ∫ g² E_p[h^order |∇log h|²] / E_p h^order dt",
        difference(at(ends, 0), at(ends, -1)),
        scaled(study.integral(Estimate(inner * rate, inner * unknown + inner * rate * relative[1:-1])), 0.5),
        study.tolerance,
    )


OFF = "score off by 10 %"


def inexact_scores(study: Study) -> Iterator[Check]:
    """What if the score is not exact? Closed form for (1 + ε) score, the decomposition of dKL, and Girsanov's bound."""
    g, zero = study.bundled, jnp.zeros(())
    more: dict[str, Any] = {"about": GAUSSIANS, "assumes": OFF}
    levels, errors = (0.5, 1.0, 2.0, 0.5, 1.0), (0.1, 0.1, 0.1, -0.1, -0.1)
    for lam, error, found in zip(levels, errors, _scaled(g, levels, errors), strict=True):
        closed = inexact_score(g, zero, lam, error).kl()
        yield equal(
            f"Closed form for a score off by {error:+.0%}, lam = {lam:g}, against its moment equations",
            "k = λ² + (1 + λ²) ε",
            closed,
            found.end.kl(),
            1e-9,
            **more,
        )
        yield balanced(g, lam, error, found)
    yield from _girsanov(g, more)
    for error in (0.1, -0.1):
        ode, sde = (inexact_score(g, zero, lam, error).kl() for lam in (0.0, 1.0))
        yield less(
            f"With a score off by {error:+.0%} the SDE still ends closer to the data than the ODE",
            "KL_SDE(0) < KL_ODE(0)",
            sde,
            ode,
            **more,
        )


def balanced(g: Problem, lam: float, error: float, found: Solved | None = None, factor: float = 1.0) -> Check:
    """KL at the end and what noise took away, KL at the start and `factor` times what the error of the score added."""
    if found is None:
        [found] = _scaled(g, (lam,), (error,))
    return equal(
        f"KL changes by what noise removes and what the error adds, {error:+.0%}, lam = {lam:g}",
        "KL(0) + λ²/2 ∫g²I = KL(t0) + (1+λ²)/2 ∫g²E[e·∇log h]",
        found.end.kl() + found.loss,
        inexact_score(g, g.t0, lam, error).kl() + factor * found.gain,
        1e-9,
        about=GAUSSIANS,
        assumes=OFF,
    )


def _girsanov(g: Problem, more: dict[str, Any]) -> Iterator[Check]:
    """The bound, which is all there is from the right start; where it is attained; where its parts are least."""
    zero, right = jnp.zeros(()), g._replace(start=g.marginal(g.t0))
    levels = (0.5, 1.0, 2.0)
    for lam, found in zip(levels, _scaled(right, levels, (0.1,) * 3), strict=True):
        bound = girsanov(right, zero, lam, 0.1)
        yield at_most(
            f"Girsanov's bound on an inexact score, from the right start, lam = {lam:g}",
            "KL(0) <= (1+λ²)²/(8λ²) ∫g²E|e|²",
            found.end.kl(),
            bound,
            **more,
        )
        yield equal(
            f"Its closed form, against the moment equations, lam = {lam:g}",
            "g²E|e|² dt = ε² (r + e²) dA",
            bound,
            girsanov_factor(lam) * found.squared,
            1e-9,
            **more,
        )
    for lam in levels:
        yield attained(g, lam)
    yield equal(
        "The factor of the bound is least at lam = 1, the reverse SDE",
        "argmin_λ (1+λ²)²/(8λ²) = 1",
        least(girsanov_factor),
        1.0,
        1e-6,  # a minimum is found to the root of the rounding
        **more,
    )
    yield equal(
        "So is the whole bound for a small error, from the right start",
        "argmin_λ → 1 as ε → 0",
        least(lambda lam: girsanov(right, zero, lam, 1e-5)),
        1.0,
        1e-4,
        about=GAUSSIANS,
        assumes="score off by 0.001 %",
    )
    best = least(lambda lam: girsanov(g, zero, lam, 0.1))
    yield less(
        f"From the wrong start the whole bound is least at another level, lam = {best:.3f} for +10%",
        "min_λ bound < bound at λ = 1: E|e|² depends on λ too",
        whole_bound(g, best, 0.1),
        whole_bound(g, 1.0, 0.1),
        **more,
    )


def attained(g: Problem, lam: float, factor: Callable[[float], float | Time] = girsanov_factor) -> Check:
    """The error that makes the most of Girsanov's bound among those that do not depend on x.

    e(t) proportional to Φ(0, t), by which the exact process carries a push at t to the end: its variance there is fed
    by lam² g² Φ² dt, V_0 (1 - ρ) in all, so by Cauchy-Schwarz KL(0) <= (1 - ρ) bound, with equality for this e.
    """
    right = g._replace(start=g.marginal(g.t0))
    [found] = by_moment_equations(right, Partial(_pushed, g), [lam], [(lam, 1.0)])
    rho = jnp.exp(-(lam**2) * clock(g, jnp.zeros(())))
    return equal(
        f"Girsanov's bound is attained but for ρ, by an error that only pushes, lam = {lam:g}",
        "KL(0) = (1 - ρ) (1+λ²)²/(8λ²) ∫g²E|e|²",
        found.end.kl(),
        (1 - rho) * factor(lam) * found.squared,
        1e-9,
        about=GAUSSIANS,
        assumes="score off by e(t) ∝ Φ(0, t), right start",
    )


def _pushed(g: Problem, push: Float[Array, "2"], x: X, t: Time) -> X:
    """The noise prediction whose score is off by `size` Φ(0, t), Φ² = V_0/V_t exp(-lam² A)."""
    lam, size = push
    upper = g._replace(t0=t)
    carried = jnp.sqrt(g.target.variances[0, 0] / g.marginal(t).variances[0, 0])
    carried = carried * jnp.exp(-(lam**2) / 2 * clock(upper, jnp.zeros(())))
    return noise_fn(g.target, g.schedule)(x, t) - g.schedule.sigma(t) * size * carried


def least(f: Callable[[float], float | Time]) -> float:
    """The noise level between 1/8 and 8 at which this is least."""
    found = minimize_scalar(lambda log: float(f(float(np.exp(log)))), bounds=(-2.08, 2.08), options={"xatol": 1e-9})
    return float(np.exp(found.x))


def extrapolated(values: Float[np.ndarray, "3"]) -> float:
    """The limit of a series in 1/N from N, 2 N and 4 N, but for its third term. Richardson 1911."""
    first = 2 * values[1:] - values[:-1]
    return float((4 * first[1] - first[0]) / 3)


def whole_bound(g: Problem, lam: float | Time, error: float | Time) -> Time:
    """KL(t0) + (1 + lam²)²/(8 lam²) integral g² E|e|², at most which KL(0) is."""
    return inexact_score(g, g.t0, lam).kl() + girsanov(g, jnp.zeros(()), lam, error)


def discretisation(study: Study) -> Iterator[Check]:
    """Sampling is not the SDE: with finitely many steps, two chains contract as well, and tend to the SDE."""
    g, about = study.gaussians
    for eta in (1.0, 0.0):
        for n in (10, 40):
            yield equal(
                f"DDIM(eta = {eta:g}) with {n} steps, two chains on Gaussian data",
                "KL_N(0) = KL(ρ_N)" if eta else "KL_N(0) = KL(t0)",
                gaussian_kl(*two_chain_moments(g, eta, n)),
                two_chain_closed_form(g, eta, n),
                1e-11,
                about=about,
            )
    if study.on_line:
        p = study.problem
        curves = [_chain_kl(p, n) for n in CHAINS]
        growths = [largest_growth(curve) for curve in curves]
        yield at_most(
            "On the mixture the KL of two chains never grows, at any step",
            "max [KL_N(s) - KL_N(t)] <= 0",
            max(growths, key=lambda growth: growth.value + growth.error),
            0.0,
        )
        ends = jax.device_put(float(p.t0) * np.array([1.0, 0.01]))
        exact = jax.device_get(contraction_curve(p.target, p.start, p.schedule, ends, w2=False).kl)
        coarse, middle, fine = (float(curve.value[-1]) for curve in curves)
        found, poorer = 2 * fine - middle, 2 * middle - coarse
        error = abs(found - poorer) + 0.1 * abs(found - fine) + float(curves[-1].error[-1])
        yield equal(
            f"It tends to that of the SDE, at first order (from {CHAINS[1]} and {CHAINS[2]} steps)",
            "2 KL_2N - KL_N = KL + O(1/N²)",
            Estimate(np.asarray(found), np.asarray(error)),
            at(exact, -1),
            0.05,
        )


CHAINS = (16, 32, 64)


def _scaled(g: Problem, levels: Sequence[float], errors: Sequence[float]) -> list[Solved]:
    """With (1 + error) score."""
    return by_moment_equations(g, Partial(_scaled_eps, g), levels, errors)


def _scaled_eps(g: Problem, error: Time, x: X, t: Time) -> X:
    return (1 + error) * noise_fn(g.target, g.schedule)(x, t)


def two_chain_moments(g: Problem, eta: float, steps: int) -> tuple[GaussianMixture, GaussianMixture]:
    """The laws in which DDIM(eta) ends from the start and from the marginal, for Gaussian data."""
    ts = _filled(time_grid(g.schedule, steps, start=float(g.t0)), 40)
    edited, right = jax.device_get(_ends(DDIM(g.schedule, eta), g, ts))
    return gaussian(*edited), gaussian(*right)


@jax.jit
def _ends(solver: Solver, g: Problem, ts: Times) -> tuple[Moments, Moments]:
    """The last laws of the two chains."""
    starts = [Moments(law.means[0], law.covariances[0]) for law in (g.start, g.marginal(g.t0))]
    both = jax.tree.map(lambda *a: jnp.stack(a), *starts)
    laws = jax.vmap(lambda law: gaussian_chain(solver, g, law, ts))(both)
    edited, right = (jax.tree.map(lambda a, i=i: a[i, -1], laws) for i in (0, 1))
    return edited, right


def _filled(ts: Times, steps: int) -> Float[Array, " filled"]:
    """The grid with so many steps, the last ones of no length: grids of one length share a program."""
    return jax.device_put(np.pad(ts, (0, max(steps + 1 - len(ts), 0)), mode="edge"))


def two_chain_closed_form(g: Problem, eta: float, steps: int) -> float:
    """KL = 1/2 [ρ e² + ρ (r - 1) - log(1 + ρ (r - 1))] by hand: ρ_N = (prod c)² V_t0 / V^_N, V^ <- c² V^ + η² σ^²."""
    ts = time_grid(g.schedule, steps, start=float(g.t0))
    alpha, sigma = jax.device_get(_scales(g.schedule, ts))
    v0 = g.target.variances.item()
    variance = start_variance = alpha[0] ** 2 * v0 + sigma[0] ** 2
    shrink = 1.0
    for a_t, s_t, a_s, s_s in zip(alpha[:-1], sigma[:-1], alpha[1:], sigma[1:], strict=True):
        fresh = (s_s / s_t) ** 2 * (1 - (a_t / a_s) ** 2)
        c = (a_s * a_t * v0 + s_t * np.sqrt(s_s**2 - eta**2 * fresh)) / (a_t**2 * v0 + s_t**2)
        variance, shrink = c**2 * variance + eta**2 * fresh, shrink * c
    rho = shrink**2 * start_variance / variance
    e2 = (g.start.means.item() - alpha[0] * g.target.means.item()) ** 2 / start_variance
    r = g.start.variances.item() / start_variance
    return (rho * e2 + rho * (r - 1) - np.log1p(rho * (r - 1))) / 2


@jax.jit
def _scales(schedule: Schedule, ts: Times) -> tuple[Times, Times]:
    return schedule.alpha(ts), schedule.sigma(ts)


def _chain_kl(p: Problem, steps: int) -> Estimate:
    """KL of the two chains of DDIM(1) at every step, on panels so many that their masses are 1, if such there are."""
    ts = time_grid(p.schedule, steps, start=float(p.t0), end=0.01 * float(p.t0))
    for panels in (48, 96, 192):
        laws = line_chain(DDIM(p.schedule, eta=1.0), p, _filled(ts, CHAINS[-1]), panels)
        kl, lost = jax.device_get((laws.kl(), laws.lost()))
        if lost.max() < 1e-6:
            break
    return Estimate(kl[: steps + 1], lost[: steps + 1] * (1 + kl[0]))
