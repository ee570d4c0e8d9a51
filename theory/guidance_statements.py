"""What classifier-free guidance leaves of the theorems, as checks: of two runs all, towards the class a floor."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from theory.beyond import extrapolated
from theory.chains import Moments, affine_chain, two_chains
from theory.checks import GAUSSIANS, Check, Study, at_most, equal, gaussian_problem, less, paper_problem
from theory.gaussians import Offset, clock, girsanov_factor, inexact_score
from theory.guidance import (
    SHARES,
    Guided,
    Normal,
    class_law,
    contracted,
    guided,
    guided_eps,
    guided_law,
    guided_ode_variance,
    guided_rho,
    guided_sde_law,
    normal,
    tilted,
)
from theory.mixtures import GaussianMixture, gaussian
from theory.moment_equations import Solved, by_moment_equations
from theory.problems import Problem
from theory.quadrature import legendre_panels
from theory.solve import time_grid
from theory.solvers import DDIM
from theory.types import Estimate, Schedule, Solver, Time, Times

SCALE = 2.0
LEVELS = (0.0, 1.0)  # the ODE and the SDE
ASSUMES = "exact scores, guided with w = 2"
MODES = "a mode of the toy"  # what a row is about
END = 1e-3  # where chains stop, as a part of t0: with steps equal in log_snr their error is a series in 1/N


NOISE_LEFT = 0.04  # sigma / alpha where chains on a mode of the toy stop, whose kernels are narrower below


def guided_gaussians(schedule: Schedule | None = None, t0: float = 1.0) -> Guided:
    """A class N(1.3, .2²) among all, N(.7, .6²), edited to N(.5, .5²) (`theory.checks.gaussian_problem`), w = 2.

    Not the user's pair: what a class is wider or narrower than, and how far off, decides what guidance does to it.
    """
    return Guided(gaussian_problem(schedule, t0), gaussian([0.7], [[0.36]]), jnp.asarray(SCALE, float))


def mode_of_the_toy(schedule: Schedule | None = None) -> tuple[Problem, GaussianMixture]:
    """The upper of the two modes of the paper's toy as a class, edited as there, and the law of all."""
    toy = paper_problem()
    target = class_law(toy.target, np.array([1]))
    return toy._replace(target=target, schedule=schedule or toy.schedule), toy.target


class Known(NamedTuple):
    """What has closed forms at t = 0 for the guided Gaussians; pairs are at lam = 0 and 1."""

    start_kl: Array  # KL at t0, towards the class and between two runs
    rho: Array  # of two runs at lam = 1
    unguided: Array  # the same for w = 1
    edited: list[Normal]
    right: list[Normal]


def known_of(given: Guided) -> Known:
    zero = jnp.zeros(())
    edited, right = ([guided_law(given, law, zero, lam) for lam in LEVELS] for law in (given.edited, given.right))
    unguided = guided_rho(given._replace(scale=jnp.ones(())), zero, 1.0)
    return Known(given.edited.kl(given.right), guided_rho(given, zero, 1.0), unguided, edited, right)


def guidance(study: Study) -> Iterator[Check]:
    """Two runs contract as ever, towards the law of the guided process; that is not the class, nor one for all lam."""
    given = guided_gaussians(study.problem.schedule, float(study.problem.t0))
    known, solved = known_of(given), _solved(given)
    yield from _two_runs(given, known, solved)
    yield from _towards_the_class(given, known, solved)
    yield from _limits(given, known)
    yield from _on_modes(study.problem.schedule)


class _Both(NamedTuple):
    """The moment equations at lam = 0 and 1, from the edited start and from the right one."""

    edited: list[Solved]
    right: list[Solved]


def _solved(given: Guided) -> _Both:
    p = given.problem
    eps_fn = Partial(guided_eps, p.target, given.unconditional, p.schedule)
    starts = p, p._replace(start=p.marginal(p.t0))
    return _Both(*(by_moment_equations(start, eps_fn, LEVELS, [float(given.scale)] * 2) for start in starts))


def _between(edited: Offset, right: Offset) -> float:
    """KL between two laws given relative to a third."""
    return float(Offset((edited.e - right.e) / np.sqrt(right.r), edited.r / right.r).kl())


@jax.jit
def _lost(given: Guided) -> Time:
    """∫ g²/2 I(p~ | p^w) dt at lam = 1, over u = (sigma / alpha)², for which g² dt = alpha² du, as in `guided_law`."""
    schedule = given.problem.schedule
    least = jnp.minimum(given.problem.target.variances[0, 0], given.unconditional.variances[0, 0])
    low, high = jnp.log(least), jnp.log(least + jnp.exp(-schedule.log_snr(given.problem.t0)))
    rule = legendre_panels(low + SHARES * (high - low))
    grown = jnp.exp(rule.nodes[:, 0])  # least + u

    def rate(u: Time) -> Time:
        t = schedule.t_of_log_snr(-jnp.log(u))
        edited, right = (guided_law(given, start, t, 1.0) for start in (given.edited, given.right))
        return schedule.alpha(t) ** 2 / 2 * edited.fisher(right)

    return jnp.sum(rule.weights * grown * jax.vmap(rate)(grown - least))


def _two_runs(given: Guided, known: Known, solved: _Both) -> Iterator[Check]:
    """Theorems 3.1 and 3.2 for two runs of one guided process."""
    more: dict[str, Any] = {"about": GAUSSIANS, "assumes": ASSUMES}
    p, zero = given.problem, jnp.zeros(())
    ends = [_between(edited.end, right.end) for edited, right in zip(*solved, strict=True)]
    yield equal(
        "Two runs of the guided SDE contract: what is lost is the integrated Fisher divergence",
        "KL(p~|p^w)(t0) - KL(p~|p^w)(0) = ∫ g²/2 I(p~|p^w) dt",
        known.start_kl - ends[1],
        _lost(given),
        1e-9,
        **more,
    )
    yield equal(
        "By how much: the push of the guided drift in closed form, against the moment equations",
        "KL(p~|p^w)(0) = KL(e sqrt(ρ_w), 1 + ρ_w (r - 1))",
        contracted(known.rho, given.edited.relative_to(given.right)),
        ends[1],
        1e-8,  # of 7e-7, and the equations are solved to 1e-13
        **more,
    )
    yield equal("Two runs of the guided ODE do not", "KL(p~|p^w)(0) = KL(t0)", ends[0], known.start_kl, 1e-9, **more)
    yield equal(
        "Without guidance it is Theorem 3.1",
        "ρ_1 = exp(-∫ g²/V)",
        known.unguided,
        jnp.exp(-clock(p, zero)),
        1e-11,
        about=GAUSSIANS,
        assumes="exact scores, w = 1",
    )
    as_wide = given._replace(unconditional=given.unconditional._replace(variances=p.target.variances))
    means = as_wide.unconditional.means + given.scale * (p.target.means - as_wide.unconditional.means)
    moved = p._replace(target=p.target._replace(means=means))
    yield equal(
        "Among classes of one width guidance only moves the class, and Theorem 3.1 holds towards the moved one",
        "s_w = ∇log of N(m_u + w (m_c - m_u), v), diffused",
        guided_law(as_wide, given.edited, zero, 1.0).kl(normal(moved.target)),
        inexact_score(moved, zero, 1.0).kl(),
        1e-10,
        about=GAUSSIANS,
        assumes="exact scores, w = 2, v_u = v_c",
    )


def _towards_the_class(given: Guided, known: Known, solved: _Both) -> Iterator[Check]:
    """The divergence from the class: its balance, its floor, and Girsanov's bound on that."""
    more: dict[str, Any] = {"about": GAUSSIANS, "assumes": ASSUMES}
    zero = jnp.zeros(())
    one = given.of_class(zero)
    to_class = [law.kl(one) for law in known.edited]
    for name, closed, found in zip(("ODE", "SDE"), to_class, solved.edited, strict=True):
        yield equal(
            f"Towards the class: the guided {name} in closed form, against the moment equations",
            "KL(p~|p(·|c)) at 0",
            closed,
            found.end.kl(),
            1e-9,
            **more,
        )
        yield equal(
            f"KL towards the class changes by what noise removes and what guidance adds, {name}",
            "KL(0) + λ²/2 ∫g²I = KL(t0) + (1+λ²)/2 ∫g²E[e·∇log h], e = (w-1)(s_c-s_u)",
            found.end.kl() + found.loss,
            known.start_kl + found.gain,
            1e-9,
            **more,
        )
    yield equal(
        "The floor of the guided SDE, from the right start: powers of V_u/V_c, against the moment equations",
        "KL(p^w|p(·|c)) at 0, λ = 1",
        guided_sde_law(given, given.right, zero).kl(one),
        solved.right[1].end.kl(),
        1e-9,
        **more,
    )
    yield at_most(
        "Girsanov's bound on that floor",
        "KL(p^w|p(·|c)) <= (w-1)²/2 ∫g²E|s_c-s_u|², λ = 1",
        known.right[1].kl(one),
        girsanov_factor(1.0) * solved.right[1].squared,
        **more,
    )
    # Where the start is forgotten: from a small t0 the ODE is still on its way.
    whole = guided_gaussians(given.problem.schedule)
    yield less(
        "From a wrong start at t0 = 1 the guided ODE ends farther from the class than it began",
        "KL_ODE(t0) < KL_ODE(0)",
        whole.edited.kl(whole.right),
        guided_law(whole, whole.edited, zero, 0.0).kl(one),
        **more,
    )


def _limits(given: Guided, known: Known) -> Iterator[Check]:
    """DDIM's steps tend to the ODE and DDPM's to the SDE, which are no longer one law; unbounded noise to a third."""
    more: dict[str, Any] = {"about": GAUSSIANS, "assumes": ASSUMES}
    p, zero = given.problem, jnp.zeros(())
    start, end = float(p.t0), END * float(p.t0)
    grids = [np.asarray(time_grid(p.schedule, n, "log_snr", start=start, end=end)) for n in (100, 200, 400)]
    ts = np.array([np.pad(grid, (0, 401 - len(grid)), mode="edge") for grid in grids])
    for name, process, level in (("DDIM", "ODE", 0.0), ("DDPM", "SDE", 1.0)):
        yield equal(
            f"{name} with ever more steps tends to the guided {process}, from the right start",
            f"KL(p^w_N|p(·|c)) → KL(p^w|p(·|c)), λ = η = {level:g}",
            extrapolated(np.asarray(_chains(DDIM(p.schedule, level), given, ts))),
            guided_law(given, given.right, jnp.asarray(end), level).kl(given.of_class(jnp.asarray(end))),
            1e-4,  # after two terms in 1/N the third is left
            **more,
        )
    yield equal(
        "The guided ODE has a geometric mean of the variances",
        "v = V_c(t0) (v_c/V_c(t0))^w (v_u/V_u(t0))^(1-w)",
        guided_ode_variance(given, given.right, zero),
        known.right[0].variance,
        1e-12,
        **more,
    )
    whole = guided_gaussians(p.schedule)  # from t0 = 1: the other way round while the start is remembered
    yield less(
        "So DDIM and DDPM have two limits: from t0 = 1 the ODE makes a narrow class narrower than the SDE does",
        "v_λ=0 < v_λ=1 for v_c < v_u, w > 1",
        *(guided_law(whole, whole.right, zero, lam).variance for lam in LEVELS),
        **more,
    )
    yield equal(
        "Only noise without bound ends at the law that the guided score has at t = 0",
        "v_λ → 1 / [w/v_c + (1-w)/v_u] as λ → ∞ (λ = 100)",
        guided_law(given, given.right, zero, 100.0).variance,
        tilted(given, zero).variance,
        1e-3,  # O(1/λ²)
        **more,
    )


@jax.jit
def _chains(solver: Solver, given: Guided, grids: Float[Array, "n times"]) -> Array:
    """KL of the guided chain from the class at the end of each grid, from the right start."""
    start = Moments(given.right.mean[None], given.right.variance[None, None])

    def kl(ts: Times) -> Array:
        laws = affine_chain(solver, given.eps_fn, start, ts)
        return Normal(laws.mean[-1, 0], laws.covariance[-1, 0, 0]).kl(given.of_class(ts[-1]))

    return jax.vmap(kl)(grids)


@partial(jax.jit, static_argnums=0)
def _time_of_noise(schedule: Schedule, ratio: float | Time) -> Time:
    """The time at which sigma / alpha is this."""
    return schedule.t_of_log_snr(-2 * jnp.log(jnp.asarray(ratio, float)))


def _on_modes(schedule: Schedule) -> Iterator[Check]:
    """A class that is one of two modes, where the guided drift is not affine, in forty steps of DDPM from t0 = 1."""
    p, unconditional = mode_of_the_toy(schedule)
    eps_fn = guided(p.target, unconditional, p.schedule, 4.0)
    end = float(_time_of_noise(schedule, NOISE_LEFT))
    ts = time_grid(p.schedule, 40, "log_snr", end=end)
    chains = two_chains(DDIM(p.schedule, 1.0), eps_fn, (p.start, p.marginal(p.t0)), ts, 9.0)
    kl, masses = np.asarray(chains.kl()), [chains.rule.weights * law for law in (chains.edited, chains.right)]
    # Where the grid of x is too short or too coarse for a schedule nothing is known.
    error = np.where(np.abs(np.sum(masses, axis=-1) - 1).max() < 1e-4, 0.0, np.inf)
    more: dict[str, Any] = {"about": MODES, "assumes": "exact scores, guided with w = 4"}
    yield at_most(
        "Two guided chains of DDPM never part, on a mode of two as well",
        "max [KL_N(s) - KL_N(t)] <= 0",
        Estimate(np.diff(kl).max(), error),
        0.0,
        **more,
    )
    yield less(
        "They end a thousand times closer than they began",
        "KL_N(0) < KL_N(t0) / 1000",
        Estimate(kl[-1], error),
        kl[0] / 1000,
        **more,
    )
