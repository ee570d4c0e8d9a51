"""The only loops over solver steps: `sample` with fresh noise, `replay` with given noise, `record` to find it.

    w = record(solver, eps, path, ts)   the noise that leads along a path (Eq. 8 of the paper)
    replay(solver, eps, path[0], ts, w) == path, to rounding

Cycle-SDE is record, manipulate, replay. All three are jitted; schedules and solvers are static, noise functions are
Partials, so new weights, prompts, points, noise and grids of the same length do not compile again. A bare function is
made a Partial, and what it closes over a part of the program. Grids decrease; one that grows raises ValueError.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from theory.arguments import as_partial, as_static, decreasing, prepared
from theory.schedules import DiscreteVP
from theory.types import Noise, NoiseFn, Path, PRNGKey, Schedule, Solver, Times, X

Spacing = Literal["uniform", "log_snr", "leading", "trailing", "linspace"]


class Constraint(NamedTuple):
    """What must not change: after every step, x_s <- mask x_s + (1 - mask) path_s.

    `mask` broadcasts against x and is 1 where the edit may change things; `path` holds the reference at every time
    of the grid, (times, *x). RePaint (arXiv 2201.09865), eq. (8); the mask of SDE-Drag.
    """

    mask: X
    path: Path

    def apply(self, x: X, reference: X) -> X:
        return self.mask * x + (1 - self.mask) * reference


@prepared(schedule=as_static)
def time_grid(
    schedule: Schedule,
    steps: int,
    spacing: Spacing = "uniform",
    *,
    start: float = 1.0,
    end: float = 0.0,
    offset: int = 0,
) -> Float[Array, " times"]:
    """A decreasing grid of times from `start` to `end`.

    "uniform" (in t) and "log_snr" (uniform in log_snr; needs end > 0) have steps + 1 times. "leading", "trailing"
    and "linspace" are the spacings of diffusers and need a DiscreteVP: `steps` of its timesteps k, shifted by `offset`
    (its steps_offset, "leading" only), at t = (k + 1) / N, then `end`; times not in (end, start] are left out, as
    image-to-image pipelines do. Lin et al. 2024 (arXiv 2305.08891), Table 2.

    Raises ValueError for a grid that is empty or leaves [0, 1], and for a spacing the schedule does not have.
    """
    if not (steps >= 1 and 0 <= end < start <= 1):
        raise ValueError(
            f"time_grid needs steps >= 1 and 0 <= end < start <= 1, got steps={steps}, start={start}, end={end}"
        )
    if spacing == "uniform":
        return jax.device_put(np.linspace(start, end, steps + 1))
    if spacing == "log_snr":
        if end == 0:
            raise ValueError("time_grid: log_snr is infinite at t = 0; give this spacing an end > 0")
        return _equal_in_log_snr(schedule, jnp.array([start, end]), steps)
    if spacing not in get_args(Spacing):
        raise ValueError(f"time_grid: unknown spacing {spacing!r}; choose one of {', '.join(get_args(Spacing))}")
    if not isinstance(schedule, DiscreteVP):
        raise ValueError(f"time_grid: spacing {spacing!r} counts trained timesteps; it needs a DiscreteVP")
    total = schedule.steps
    if steps > total:
        raise ValueError(f"time_grid: {steps} steps of {spacing!r}, but the schedule has {total} timesteps")
    timesteps = {
        "leading": np.arange(steps)[::-1] * (total // steps) + offset,
        "trailing": np.round(np.arange(total, 0, -total / steps)) - 1,
        "linspace": np.round(np.linspace(0, total - 1, steps))[::-1],
    }[spacing]
    times = (timesteps + 1) / total
    kept = times[(times <= start) & (times > end)]
    if kept.size == 0:
        raise ValueError(f"time_grid: no timestep of {spacing!r} with {steps} steps lies in ({end}, {start}]")
    return jax.device_put(np.append(kept, end))


@partial(jax.jit, static_argnums=2)
def _equal_in_log_snr(schedule: Schedule, ends: Float[Array, "2"], steps: int) -> Float[Array, " times"]:
    first, last = schedule.log_snr(ends)
    inner = schedule.t_of_log_snr(jnp.linspace(first, last, steps + 1)[1:-1])
    return jnp.concatenate([ends[:1], inner, ends[1:]])


@prepared(eps_fn=as_partial, ts=decreasing)
@jax.jit
def sample(solver: Solver, eps_fn: NoiseFn, x: X, ts: Times, key: PRNGKey, constraint: Constraint | None = None) -> X:
    """Solves from x at ts[0] to ts[-1] with fresh noise and returns the end point, in constant memory.

    Equal to `replay(..., unit_noise(key, x, ts))[-1]`. An ODE step (std = 0) ignores the noise.
    """
    keys = jr.split(key, ts.size - 1)
    return _advance(solver, eps_fn, (x, solver.init(x)), ts, keys, constraint)[0]


@prepared(eps_fn=as_partial, ts=decreasing)
def sample_parts(
    solver: Solver,
    eps_fn: NoiseFn,
    x: X,
    ts: Times,
    key: PRNGKey,
    constraint: Constraint | None = None,
    *,
    size: int = 4,
) -> Iterator[X]:
    """`sample`, `size` steps at a time: yields x after each part, the last of which is what `sample` returns.

    For progress bars and previews, and for grids of any length with one compilation: the last part is filled up with
    steps of no length, which are left out, their noise predictions too. A part is on its way before the one before it
    is asked for, so that the device never waits.
    """
    steps = ts.size - 1
    parts = math.ceil(steps / size)
    filled = np.pad(np.asarray(ts), (0, parts * size - steps), mode="edge")
    carry, keys = _begin(solver, x, key, parts * size)  # the first keys do not depend on how many there are
    before = None
    for i in range(0, parts * size, size):
        places = np.minimum(np.arange(i, i + size + 1), steps)
        part = None if constraint is None else constraint._replace(path=constraint.path[places])
        carry = _advance(solver, eps_fn, carry, jnp.asarray(filled[i : i + size + 1]), keys[i : i + size], part)
        if before is not None:
            yield before
        before = carry[0]
    assert before is not None
    yield before


@partial(jax.jit, static_argnames="steps")
def _begin(solver, x, key, steps):
    return (x, solver.init(x)), jr.split(key, steps)


@jax.jit
def _advance(solver, eps_fn, carry, ts, keys, constraint):
    def step(carry, inputs):
        t, s, key, reference = inputs

        def solve(carry):
            noise = jr.normal(key, carry[0].shape, carry[0].dtype)
            return _step(solver, eps_fn, carry, t, s, noise, constraint, reference)

        return jax.lax.cond(t == s, lambda carry: carry, solve, carry), None

    reference = None if constraint is None else constraint.path[1:]
    carry, _ = jax.lax.scan(step, carry, (ts[:-1], ts[1:], keys, reference))
    return carry


@prepared(eps_fn=as_partial, ts=decreasing)
@jax.jit
def replay(
    solver: Solver, eps_fn: NoiseFn, x: X, ts: Times, noise: Noise, constraint: Constraint | None = None
) -> Path:
    """Solves from x at ts[0] with the given unit noise, (steps, *x), and returns the whole path, (times, *x)."""
    return _replay(solver, eps_fn, x, ts, noise, constraint)


@jax.jit
def _replay(solver: Solver, eps_fn: NoiseFn, x: X, ts: Times, noise: Noise, constraint: Constraint | None) -> Path:
    def step(carry, inputs):
        t, s, w, reference = inputs
        carry = _step(solver, eps_fn, carry, t, s, w, constraint, reference)
        return carry, carry[0]

    reference = None if constraint is None else constraint.path[1:]
    inputs = (ts[:-1], ts[1:], noise, reference)
    _, path = jax.lax.scan(step, (x, solver.init(x)), inputs)
    return jnp.concatenate([x[None], path])


def _step(solver, eps_fn, carry, t, s, noise, constraint, reference):
    x, state = carry
    q, state = solver.kernel(eps_fn, x, t, s, state)
    x = q.mean + q.std * noise
    return (x if constraint is None else constraint.apply(x, reference)), state


def unit_noise(key: PRNGKey, x: X, ts: Times) -> Noise:
    """The noise that `sample` draws for this key: (steps, *x), one independent unit normal a step."""
    return jax.vmap(lambda k: jr.normal(k, x.shape, x.dtype))(jr.split(key, ts.size - 1))


@prepared(eps_fn=as_partial, ts=decreasing)
def invert(solver: Solver, eps_fn: NoiseFn, x: X, ts: Times) -> Path:
    """Runs an ODE solver up the grid, from x at ts[-1] to ts[0]: the path (times, *x), path[-1] = x.

    DDIM inversion when the solver is DDIM(eta = 0) (Song et al. 2021, arXiv 2010.02502, Sec. 4.3).

    Raises ValueError for a stochastic solver, whose steps have no meaning upwards.
    """
    if solver.stochastic:
        raise ValueError(f"invert runs an ODE up the grid, and {solver} is stochastic")
    no_noise = jnp.zeros((ts.size - 1, *x.shape), x.dtype)
    return _replay(solver, eps_fn, x, ts[::-1], no_noise, None)[::-1]


@prepared(eps_fn=as_partial, ts=decreasing)
def record(solver: Solver, eps_fn: NoiseFn, path: Path, ts: Times, *, batch_size: int | None = None) -> Noise:
    """The noise w_s = (x_s - mean(x_t)) / std that makes the solver follow a path: (steps, *x). Eq. (8).

    path: (times, *x) on the grid ts, e.g. from `forward_path`. The noise predictions on it are all known up front;
    `batch_size` of them are evaluated at once (None: one by one), which fills a GPU. Works for every stochastic
    solver, multistep ones included, whose memory is that of the path.

    Raises ValueError if a step has std = 0, where w would be 0/0: an ODE solver, or a grid that ends at t = 0
    (the latter is seen only outside jit; inside, the noise of that step is not finite).
    """
    noise, stds = _record(solver, eps_fn, path, ts, batch_size=batch_size)
    if not isinstance(stds, Tracer) and not np.all(stds > 0):
        step = int(np.argmin(np.asarray(stds) > 0))
        raise ValueError(
            f"record: step {step} from t = {float(ts[step]):g} to {float(ts[step + 1]):g} has no noise to record "
            "(std = 0); use a stochastic solver and a grid that ends above t = 0"
        )
    return noise


def _in_chunks(eps_fn: NoiseFn, xs: Path, ts: Times, size: int) -> Path:
    """eps_fn at every time, `size` of them at once; the last are filled up, so that the network stands here once."""
    size = min(size, len(ts))
    if size == 1:
        return jax.lax.map(lambda xt: eps_fn(*xt), (xs, ts))
    filled = jnp.minimum(jnp.arange(-(-len(ts) // size) * size), len(ts) - 1).reshape(-1, size)
    eps = jax.lax.map(lambda i: jax.vmap(eps_fn)(xs[i], ts[i]), filled)
    return eps.reshape(-1, *xs.shape[1:])[: len(ts)]


@partial(jax.jit, static_argnames="batch_size")
def _record(
    solver: Solver, eps_fn: NoiseFn, path: Path, ts: Times, batch_size: int | None
) -> tuple[Noise, Float[Array, " steps"]]:
    eps = _in_chunks(eps_fn, path[:-1], ts[:-1], batch_size or 1)

    def step(state, inputs):
        x_t, x_s, t, s, eps_t = inputs
        q, state = solver.kernel(lambda x, t: eps_t, x_t, t, s, state)
        return state, ((x_s - q.mean) / q.std, q.std)

    inputs = (path[:-1], path[1:], ts[:-1], ts[1:], eps)
    _, (noise, stds) = jax.lax.scan(step, solver.init(path[0]), inputs)
    return noise, stds
