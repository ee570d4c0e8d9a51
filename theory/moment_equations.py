"""The moment equations of the reverse lambda-SDE with an affine noise prediction, solved together with its rates."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float
from scipy.integrate import solve_ivp

from theory.gaussians import Offset
from theory.predictions import score_from_eps
from theory.problems import Problem
from theory.processes import of_ou_time, ou_time, reverse_diffusion, reverse_drift
from theory.types import Time, Times


class Solved(NamedTuple):
    """The end of a reverse process, and the integrals of its rates along the way."""

    end: Offset  # relative to the data
    loss: float  # lam²/2 g² I
    gain: float  # (1 + lam²)/2 g² E[e . grad log h]
    squared: float  # g² E|e|²


def by_moment_equations(g: Problem, eps_fn: Partial, levels: Sequence[float], parameters: Sequence) -> list[Solved]:
    """The reverse lambda-SDE from g.start with an affine noise prediction in place of that of the data, on the line.

    dm/dt = drift(m), dv/dt = 2 drift' v - (lam g)² (t backwards), together with the integrals, in `ou_time`, for every
    noise level and its parameter, (n,) or (n, several), of eps_fn(parameter, x, t); e is what is added to the score.
    By DOP853.
    """
    start = np.tile([g.start.means.item(), g.start.variances.item(), 0.0, 0.0, 0.0], len(levels))
    pairs = np.array(levels, float), np.array(parameters, float)
    # The end is a touch above 0, where eps / sigma is 0/0; everything is smooth there.
    end = 1e-12
    span = jax.device_get(_ou_times(g, np.array([float(g.t0), end])))
    rates = lambda t, state: np.asarray(_rates(g, eps_fn, pairs, np.float64(t), state))  # noqa: E731
    solution = solve_ivp(rates, span, start, method="DOP853", rtol=1e-13, atol=1e-15)
    marginal = g.marginal(jnp.asarray(end, float))
    m, v = marginal.means.item(), marginal.variances.item()
    return [
        Solved(Offset((mean - m) / np.sqrt(v), variance / v), *integrals)
        for mean, variance, *integrals in solution.y[:, -1].reshape(-1, 5)
    ]


@jax.jit
def _ou_times(g: Problem, ts: Times) -> Times:
    return ou_time(g.schedule, ts)


@jax.jit
def _rates(g: Problem, eps_fn: Partial, pairs: tuple, at: Time, states: Float[Array, " n_5"]) -> Float[Array, " n_5"]:
    """The derivatives of mean, variance and three integrals in `ou_time`, for every noise level and parameter."""
    levels, parameters = pairs
    t, passed = of_ou_time(g.schedule, at)
    rates = jax.vmap(partial(_rates_of_one, g, eps_fn, t))(levels, parameters, states.reshape(-1, 5))
    return passed * rates.ravel()


def _rates_of_one(g: Problem, eps_fn: Partial, t: Time, lam: Time, parameter, state: Float[Array, "5"]):
    mean, variance = state[0], state[1]
    given = partial(eps_fn, parameter)

    def drift(x):
        return reverse_drift(g.schedule, given, x[None], t, lam)[0]

    def off(x):
        return score_from_eps(g.schedule, given(x[None], t), t)[0] - g.marginal(t).score(x[None])[0]

    slope = jax.grad(drift)(mean)
    noise = reverse_diffusion(g.schedule, t, lam) ** 2
    marginal, g2 = g.marginal(t), g.schedule.beta(t)
    m, v = marginal.means[0, 0], marginal.variances[0, 0]
    # grad log h = a (x - mean) + b and e are affine, E over N(mean, variance)
    a, b = 1 / v - 1 / variance, (mean - m) / v
    e, tilt = jax.value_and_grad(off)(mean)
    fisher = a**2 * variance + b**2
    cross = e * b + tilt * a * variance
    squared = e**2 + tilt**2 * variance
    integrals = jnp.stack([lam**2 / 2 * g2 * fisher, (1 + lam**2) / 2 * g2 * cross, g2 * squared])
    return jnp.concatenate([jnp.stack([drift(mean), 2 * slope * variance - noise]), -integrals])
