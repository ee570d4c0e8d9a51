"""The linear rate under a log-Sobolev inequality as checks: of the user's pair, and where it is attained."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from theory.checks import GAUSSIANS, Check, Study, at, at_most, decayed, equal, gaussian_problem, less
from theory.divergences import gaussian_kl
from theory.inequalities import Bracket, chi2_factor, log_sobolev, poincare
from theory.mixtures import GaussianMixture, gaussian
from theory.problems import Problem
from theory.rates import Constants, Fact, mixture_constants, rate
from theory.ratios import law_gaussian
from theory.types import Estimate, Schedule, Times

# Both sides of what is an equality for Gaussians, integrated in time.
IN_TIME = 1e-9
ONE = Estimate(np.ones(()), np.zeros(()))


def linear_rate(study: Study) -> Iterator[Check]:
    """The linear rate under a log-Sobolev inequality, how loose it is, and where it is sharp."""
    if study.on_line:
        yield from _certified(study)
    yield from _from_components(study)
    yield from _attained(study.problem.schedule, float(study.problem.t0))


def _certified(study: Study) -> Iterator[Check]:
    """On the line, by constants that are known from both sides."""
    p, curve = study.problem, study.sde
    (spectral, entropic), variances = jax.device_get(certified_constants(p, curve.ts))
    inner = slice(1, -1)  # the nodes of `study.times`
    sharp, certified = (study.integral(1 / bracket.upper[inner]) for bracket in (spectral, entropic))
    kl, chi2 = ((at(each, 0), at(each, -1)) for each in (curve.kl, curve.chi2))
    yield at_most(
        "KL decays at the rate of a certified log-Sobolev constant",
        "KL(0) <= exp(-∫ g²/C) KL(t0)",
        kl[1],
        decayed(kl[0], certified),
        IN_TIME,
    )
    yield at_most(
        "No certified constant is below the variance of its law",
        "max Var p_t / C_P <= 1",
        np.max(variances / spectral.upper),
        1.0,
        IN_TIME,
    )
    if not np.isfinite(chi2[0].value):
        return
    factor = jax.device_get(chi2_factor(p, jnp.zeros(())))
    yield at_most(
        "chi2 decays at the rate of the Poincaré constant",
        "χ²(0) <= exp(-∫ g²/C_P) χ²(t0)",
        chi2[1],
        decayed(chi2[0], sharp),
        IN_TIME,
    )
    yield at_most(
        "chi2 decays at least by the squared second singular value of the kernel",
        "χ²(0) <= ς₂² χ²(t0)",
        chi2[1],
        Estimate(factor.value * chi2[0].value, factor.error * chi2[0].value + factor.value * chi2[0].error),
        IN_TIME,
    )
    yield at_most(
        "The Poincaré rate is not better than the sharp factor",
        "ς₂² <= exp(-∫ g²/C_P)",
        factor,
        decayed(ONE, sharp),
        IN_TIME,
    )
    yield at_most(
        "At every time the edited law meets the Poincaré inequality with the certified constant",
        "max χ² / (C_P E_p|∇h|²) <= 1",
        _largest_ratio(curve.chi2, spectral.upper, curve.dirichlet),
        1.0,
        IN_TIME,
    )


def _from_components(study: Study) -> Iterator[Check]:
    """In any dimension, by constants that follow from the components of the mixture."""
    p, curve = study.problem, study.sde
    constants, variances = jax.device_get(component_constants(p, curve.ts))
    inner = slice(1, -1)  # the nodes of `study.times`
    yield at_most(
        "KL decays at a rate that the data's components promise, in any dimension",
        "KL(0) <= exp(-∫ g²/C) KL(t0)",
        at(curve.kl, -1),
        decayed(at(curve.kl, 0), study.integral(1 / constants.log_sobolev[inner])),
        IN_TIME if study.on_line else 1e-7,
    )
    yield at_most(
        "At every time the edited law meets the log-Sobolev inequality with that constant",
        "max KL / (C I / 2) <= 1",
        _largest_ratio(curve.kl, constants.log_sobolev / 2, curve.fisher),
        1.0,
        IN_TIME if study.on_line else 1e-7,
    )
    if np.isfinite(curve.chi2.value[0]):
        yield at_most(
            "At every time it meets the Poincaré inequality with the one of the components",
            "max χ² / (C_P E_p|∇h|²) <= 1",
            _largest_ratio(curve.chi2, constants.poincare, curve.dirichlet),
            1.0,
            IN_TIME if study.on_line else 1e-7,
        )
    yield at_most(
        "No such constant is below the largest variance of its law",
        "max λ_max(Cov p_t) / C_P <= 1",
        np.max(variances / constants.poincare),
        1.0,
    )


def _largest_ratio(left: Estimate, constants: Float[np.ndarray, " times"], right: Estimate) -> Estimate:
    """The largest left / (constant right), where left is not so small that rounding makes it."""
    seen = ~(left.value <= 1e-12)  # what is not a number is seen
    ratios = left.value[seen] / (constants[seen] * right.value[seen])
    relative = left.error[seen] / left.value[seen] + right.error[seen] / right.value[seen]
    i = np.argmax(ratios)
    return Estimate(ratios[i], (ratios * relative)[i])


class _Shift(NamedTuple):
    """A Gaussian whose mean alone is wrong: the KL it ends with, what its rate promises, and the KL it starts with."""

    after: float
    promised: float
    before: float


def _attained(schedule: Schedule, t0: float) -> Iterator[Check]:
    """Gaussian data and a start whose mean alone is wrong: an equality along the widest axis, whatever d is."""
    for d in (1, 2, 10, 100):
        shift = mean_shift(schedule, t0, np.full(d, 0.3), np.ones(d))
        yield equal(
            f"For a mean shift of a Gaussian with equal variances the rate is attained, d = {d}",
            "KL(0) = exp(-∫ g²/V) KL(t0)",
            shift.after,
            shift.promised,
            1e-11,
            about=GAUSSIANS,
        )
    variances = np.geomspace(1.0, 0.01, 10)
    widest = mean_shift(schedule, t0, variances, np.eye(10)[0])
    yield equal(
        "With ten variances it is attained along the widest axis",
        "KL(0) = exp(-∫ g²/max V) KL(t0)",
        widest.after,
        widest.promised,
        1e-11,
        about=GAUSSIANS,
    )
    every = mean_shift(schedule, t0, variances, np.ones(10))
    yield less(
        "Along all axes the SDE is faster than that",
        "KL(0) < exp(-∫ g²/max V) KL(t0)",
        every.after,
        every.promised,
        about=GAUSSIANS,
    )


def mean_shift(
    schedule: Schedule, t0: float, variances: Float[np.ndarray, " d"], direction: Float[np.ndarray, " d"]
) -> _Shift:
    """Data N(0, Q diag(variances) Q^T), Q a rotation; the start is the marginal moved along Q direction."""
    Q = _rotation(len(variances))
    target = gaussian(np.zeros(len(variances)), (Q * variances) @ Q.T)
    # A Problem whose start is its own marginal, for the moved one.
    p = gaussian_problem(schedule, t0)._replace(target=target)
    before = jax.jit(Problem.marginal)(p, p.t0)
    moved = before._replace(means=before.means + (Q @ direction)[None])
    after = law_gaussian(p._replace(start=moved), jnp.zeros(()), 1.0)
    kl = float(gaussian_kl(moved, before))
    promised = float(rate(Fact(convexity=1 / variances.max()), schedule, jnp.zeros(()), p.t0))
    return _Shift(float(gaussian_kl(after, target)), promised * kl, kl)


def _rotation(d: int) -> Float[np.ndarray, "d d"]:
    """A rotation that leaves no axis alone."""
    return np.linalg.qr(np.random.default_rng(d).normal(size=(d, d)))[0]


@jax.jit
def certified_constants(p: Problem, ts: Times) -> tuple[tuple[Bracket, Bracket], Float[Array, " times"]]:
    """The Poincaré and the log-Sobolev constants of the marginals on the line, and their variances."""
    return jax.lax.map(lambda t: _bracketed(p.marginal(t)), ts)


def _bracketed(marginal: GaussianMixture) -> tuple[tuple[Bracket, Bracket], Float[Array, ""]]:
    return (poincare(marginal), log_sobolev(marginal)), marginal.covariance()[0, 0]


@jax.jit
def component_constants(p: Problem, ts: Times) -> tuple[Constants, Float[Array, " times"]]:
    """The constants of the marginals that follow from their components, and their largest variances."""
    return jax.lax.map(lambda t: _bounded(p.marginal(t)), ts)


def _bounded(marginal: GaussianMixture) -> tuple[Constants, Float[Array, ""]]:
    return mixture_constants(marginal), jnp.linalg.eigvalsh(marginal.covariance())[-1]
