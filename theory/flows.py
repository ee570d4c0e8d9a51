"""The probability-flow ODE as a map: between marginals on the line, with its log-determinant in any dimension."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float
from scipy.integrate import solve_ivp

from theory import line
from theory.mixtures import GaussianMixture
from theory.problems import Problem
from theory.processes import of_ou_time, ou_time
from theory.quadrature import Rule, covering_rule, legendre_panels, panel_edges, panel_errors
from theory.types import Estimate, PRNGKey, Time, Times

Point = Float[Array, " d"]


def flow_map(problem: Problem, s: Time, t: Time, x: Float[Array, " n"]) -> Float[Array, " n"]:
    """The probability-flow ODE from s to t on the line: F_t^-1(F_s(x)), in either direction, without a solver."""
    return line.quantile(problem.marginal(t), line.tails(problem.marginal(s), x))


class Flow(NamedTuple):
    """Points carried by the probability-flow ODE: where they arrive, and log|det J| of the map there."""

    x: Float[Array, "n d"]
    log_det: Float[Array, " n"]


def flow(problem: Problem, y: Float[Array, "n d"], s: float, rtol: float = 1e-11) -> Flow:
    """Carries points from t0 to s along the probability-flow ODE, in any dimension.

    dx/dt = f x - g²/2 score, d log|det J|/dt = div(dx/dt) (Liouville), in `ou_time`, by the 8th-order Runge-Kutta
    method of Dormand and Prince (scipy's DOP853). Everything is nan where the method gives up.
    """
    n, d = y.shape
    span = jax.device_get(_ou_times(problem, np.array([float(problem.t0), float(s)])))
    velocity = lambda at, state: np.asarray(_flow_velocity(problem, np.float64(at), state))  # noqa: E731
    start = np.concatenate([np.ravel(y), np.zeros(n)])
    solution = solve_ivp(velocity, span, start, method="DOP853", rtol=rtol, atol=rtol)
    x, log_det = np.split(solution.y[:, -1] if solution.success else np.full_like(start, np.nan), [n * d])
    return Flow(jax.device_put(x.reshape(n, d)), jax.device_put(log_det))


@jax.jit
def _ou_times(problem: Problem, ts: Times) -> Times:
    return ou_time(problem.schedule, ts)


@jax.jit
def _flow_velocity(problem: Problem, at: Time, state: Float[Array, " n_d_n"]) -> Float[Array, " n_d_n"]:
    """d(x, log|det J|) / d ou_time of `flow`, all points in one vector; their number follows from its length."""
    d = problem.target.dim
    x = state[: state.size // (d + 1) * d].reshape(-1, d)
    t, passed = of_ou_time(problem.schedule, at)
    marginal = problem.marginal(t)

    def drift(x: Point) -> Point:
        # Eq. (5) with the score itself, which is smooth at t = 0 where eps / sigma is 0/0.
        return passed * (problem.schedule.f(t) * x - problem.schedule.beta(t) / 2 * marginal.score(x))

    dx, divergence = jax.vmap(lambda x: (drift(x), jnp.trace(jax.jacfwd(drift)(x))))(x)
    return jnp.concatenate([dx.ravel(), divergence])


def kl_ode(
    problem: Problem, s: float, points: int = 65, key: PRNGKey | None = None, samples: int = 4096, rtol: float = 1e-12
) -> Estimate:
    """KL(p~_s | p_s) under the ODE in any dimension, from the flow and its log-determinant, not from Theorem 3.2.

    Points y of p~_t0 are carried to x, where p~_s(x) = p~_t0(y) / |det J|. In one and two dimensions they are nodes of
    a quadrature, `points` panels or `points` per axis; in more they are draws, start.sample(key, (samples,)), with
    jr.key(0) by default, and the error is one standard error. To it is added what the solver's own error changes: that
    at the tolerance 10 rtol, which is larger than at rtol.
    """
    if problem.target.dim <= 2:
        rule = _rule(problem.start, points)
        y, average = rule.nodes, partial(_by_rule, problem.start, rule)
    else:
        y, average = problem.start.sample(jr.key(0) if key is None else key, (samples,)), _by_draws
    (value, error), poorer = (average(_log_ratio(problem, y, flow(problem, y, s, r), s)) for r in (rtol, 10 * rtol))
    return Estimate(value, error + jnp.abs(value - poorer.value))


@partial(jax.jit, static_argnames="points")
def _rule(start: GaussianMixture, points: int) -> Rule:
    return legendre_panels(panel_edges(start, points)) if start.dim == 1 else covering_rule(start, points)


@jax.jit
def _log_ratio(problem: Problem, y: Float[Array, "n d"], carried: Flow, s: Time) -> Float[Array, " n"]:
    """log(p~_s / p_s) at the points carried from y."""
    return problem.start.log_prob(y) - carried.log_det - problem.marginal(s).log_prob(carried.x)


# The average under p~ alone: the points cover the start, not p, so E_p~[p / p~] = 1 is not at hand.


@jax.jit
def _by_rule(start: GaussianMixture, rule: Rule, r: Float[Array, " n"]) -> Estimate:
    values = jnp.exp(start.log_prob(rule.nodes)) * r
    if start.dim == 1:
        return Estimate(rule.weights @ values, panel_errors(rule, values).sum())
    return rule.integrate(values)


@jax.jit
def _by_draws(r: Float[Array, " n"]) -> Estimate:
    return Estimate(r.mean(), jnp.std(r, ddof=1) / np.sqrt(r.size))
