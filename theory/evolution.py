"""Linear equations du = g² dt A(t) u on a grid, t running backwards: one time-stepper, and its error by refinement."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from theory.problems import Problem
from theory.processes import of_ou_time, ou_time
from theory.types import Estimate, Schedule, Time, Times

Cells = Float[Array, " cells"]
# (right, t, passed) -> the solution of (1 - passed A(t)) u = right, `passed` being the integral of g² dt
Implicit = Callable[[Cells, Time, Time], Cells]


class Steps(NamedTuple):
    """A decreasing grid of `ou_time`, in which schedules are smooth, and where in it the wanted times are."""

    ou_times: Times
    at: Float[Array, " times"]  # indices


@jax.jit
def scales(problem: Problem) -> tuple[Time, Time]:
    """How long below t0 the narrowest component of the start keeps its variance, and from when that of the target does.

    Both as far as noise alone goes, lam = 1, and at most t0 / 2.
    """
    schedule, t0 = problem.schedule, problem.t0
    grown = problem.start.variances.min() / schedule.sigma(t0) ** 2
    doubled = schedule.t_of_log_snr(schedule.log_snr(t0) - jnp.log1p(-jnp.minimum(grown, 0.5)))
    formed = schedule.t_of_log_snr(-jnp.log(problem.target.variances.min()))
    return jnp.minimum(t0 - doubled, t0 / 2), jnp.minimum(formed, t0 / 2)


def steps_of(problem: Problem, ts: Times, count: int) -> Steps:
    """At least `count` steps through all of ts, which decreases from t0.

    A third of them are equal in t, a third in the logarithm of the time since t0, where a narrow start widens, and a
    third in that of the time left, where narrow modes form: below the time in which the variance doubles the
    logarithms are flat. For every noise level the same, so that one grid serves many.
    """
    t0, (first, last) = problem.t0, scales(problem)

    def counted(t: Array) -> Array:
        since = jnp.log1p((t0 - t) / first) / jnp.log1p(t0 / first)
        left = 1 - jnp.log1p(t / last) / jnp.log1p(t0 / last)
        return (t0 - t) / t0 + since + left

    wanted = jnp.linspace(counted(ts[0]), counted(ts[-1]), count + 1)
    low, high = (jnp.broadcast_to(ts[i], wanted.shape) for i in (-1, 0))

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        late = counted(middle) > wanted
        return jnp.where(late, middle, low), jnp.where(late, high, middle)

    low, high = jax.lax.fori_loop(0, 60, halve, (low, high))
    grid = -jnp.sort(-jnp.concatenate([(low + high)[1:-1] / 2, ts]))
    return Steps(ou_time(problem.schedule, grid), jnp.searchsorted(-grid, -ts))


def halved(steps: Steps) -> Steps:
    """Twice as many steps."""
    times = steps.ou_times
    finer = jnp.stack([times[:-1], (times[1:] + times[:-1]) / 2], axis=1).ravel()
    return Steps(jnp.append(finer, times[-1]), 2 * steps.at)


def evolve(schedule: Schedule, implicit: Implicit, u: Cells, steps: Steps) -> Float[Array, "times cells"]:
    """u at the times that were asked for, from u at the first of them."""

    def solved(right: Cells, at: Time, long: Time) -> Cells:
        t, passed = of_ou_time(schedule, at)
        return implicit(right, t, long * passed * schedule.beta(t))

    def step(u: Cells, ends: Float[Array, "2"]) -> tuple[Cells, Cells]:
        # Alexander 1977, the two-stage L-stable SDIRK method of second order: tails and gaps between modes are stiff.
        gamma = 1 - 2**-0.5
        at, h = ends[0], ends[0] - ends[1]
        first = solved(u, at - gamma * h, gamma * h)
        u = solved(u + (1 - gamma) / gamma * (first - u), at - h, gamma * h)
        return u, u

    _, path = jax.lax.scan(step, u, jnp.stack([steps.ou_times[:-1], steps.ou_times[1:]], axis=1))
    return jnp.concatenate([u[None], path])[steps.at]


def refined(solve: Callable[[int, Steps], dict[str, Array]], cells: int, steps: Steps) -> dict[str, Estimate]:
    """What a method of second order finds on `cells` cells in the given steps, twice as many of both, and four times.

    The finer two extrapolated (Richardson); the error is the distance to the coarser two extrapolated, and a small part
    of what the extrapolation changed, lest the two agree by accident.
    """
    twice = halved(steps)
    grids = (cells, steps), (2 * cells, twice), (4 * cells, halved(twice))
    coarse, middle, fine = (solve(*grid) for grid in grids)

    def estimate(coarse: Array, middle: Array, fine: Array) -> Estimate:
        value, poorer = (4 * fine - middle) / 3, (4 * middle - coarse) / 3
        return Estimate(value, jnp.abs(value - poorer) + 0.1 * jnp.abs(value - fine))

    return jax.tree.map(estimate, coarse, middle, fine)
