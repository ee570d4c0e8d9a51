"""The probability-flow ODE as a map: between marginals on the line, with its Jacobian in any dimension."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.integrate import solve_ivp

from theory import line
from theory.divergences import Divergence, from_values
from theory.mixtures import GaussianMixture
from theory.problems import Problem
from theory.processes import of_ou_time, ou_time
from theory.quadrature import Rule, covering_rule, legendre_panels, panel_edges
from theory.types import Estimate, Time, Times

Point = Float[Array, " d"]


def flow_map(problem: Problem, s: Time, t: Time, x: Float[Array, " n"]) -> Float[Array, " n"]:
    """The probability-flow ODE from s to t on the line: F_t^-1(F_s(x)), in either direction, without a solver."""
    return line.quantile(problem.marginal(t), line.tails(problem.marginal(s), x))


class Flow(NamedTuple):
    """Points carried by the probability-flow ODE: where they arrive, and the Jacobian of the map there."""

    x: Float[Array, "n d"]
    jacobian: Float[Array, "n d d"]


def flow(problem: Problem, y: Float[Array, "n d"], s: float, rtol: float = 1e-11) -> Flow:
    """Carries points from t0 to s along the probability-flow ODE and its variational equation, in any dimension.

    dx/dt = f x - g²/2 score, dJ/dt = (d drift/dx) J, in `ou_time`, by the 8th-order Runge-Kutta method of Dormand and
    Prince (scipy's DOP853). log|det J| is the log-determinant of the change of variables.
    """
    n, d = y.shape
    state = np.concatenate([np.ravel(y), np.tile(np.eye(d).ravel(), n)])
    span = jax.device_get(_ou_times(problem, np.array([float(problem.t0), float(s)])))
    velocity = lambda at, state: np.asarray(_flow_velocity(problem, np.float64(at), state))  # noqa: E731
    solution = solve_ivp(velocity, span, state, method="DOP853", rtol=rtol, atol=rtol)
    x, jacobian = np.split(solution.y[:, -1], [n * d])
    return Flow(jax.device_put(x.reshape(n, d)), jax.device_put(jacobian.reshape(n, d, d)))


@jax.jit
def _ou_times(problem: Problem, ts: Times) -> Times:
    return ou_time(problem.schedule, ts)


@jax.jit
def _flow_velocity(problem: Problem, at: Time, state: Float[Array, " n_d_dd"]) -> Float[Array, " n_d_dd"]:
    """d(x, J) / d ou_time of `flow`, all points in one vector; their number follows from its length."""
    d = problem.target.dim
    n = state.size // (d + d * d)
    x, jacobian = state[: n * d].reshape(n, d), state[n * d :].reshape(n, d, d)
    t, passed = of_ou_time(problem.schedule, at)
    marginal = problem.marginal(t)

    def drift(x: Point) -> Point:
        # Eq. (5) with the score itself, which is smooth at t = 0 where eps / sigma is 0/0.
        return passed * (problem.schedule.f(t) * x - problem.schedule.beta(t) / 2 * marginal.score(x))

    dx, slope = jax.vmap(lambda x: (drift(x), jax.jacfwd(drift)(x)))(x)
    return jnp.concatenate([dx.ravel(), (slope @ jacobian).ravel()])


def kl_ode(problem: Problem, s: float, points: int = 65) -> Estimate:
    """KL(p~_s | p_s) under the ODE in any dimension, from the flow and its log-determinant, not from Theorem 3.2.

    Nodes y for p~_t0 are carried to x; p~_s(x) = p~_t0(y) / |det J|.
    """
    rule = _rule(problem.start, points)
    return _kl_carried(problem, rule, flow(problem, rule.nodes, s), s)


@partial(jax.jit, static_argnames="points")
def _rule(start: GaussianMixture, points: int) -> Rule:
    return legendre_panels(panel_edges(start, points // 2)) if start.dim == 1 else covering_rule(start, points)


@jax.jit
def _kl_carried(problem: Problem, rule: Rule, carried: Flow, s: Time) -> Estimate:
    log_start = problem.start.log_prob(rule.nodes)
    log_p = problem.marginal(s).log_prob(carried.x)
    r = log_start - jnp.linalg.slogdet(carried.jacobian)[1] - log_p
    # The average of r under p~ alone: the rule covers the start, not p, so E_p~[p / p~] = 1 is not at hand.
    return from_values(Divergence(lambda r, g: r), rule, log_start, r, jnp.zeros_like(r))
