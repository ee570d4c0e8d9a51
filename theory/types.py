"""The four concepts everything is made of: a schedule, a noise prediction, a solver, a kernel.

            x0 --(noise it | invert it)--> x_t0 --(manipulate)--> x~_t0 --(ODE | SDE | Cycle-SDE)--> x~0

Time is continuous in [0, 1] with 0 = data; `t` is the current time, `s` the next one, `ts` a decreasing grid.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Float, Key

Time = Float[Array, ""]
Times = Float[Array, " times"]
X = Float[Array, "*x"]  # a point, a batch, a latent: solvers do not care
Path = Float[Array, "times *x"]  # x at every time of a grid
Noise = Float[Array, "steps *x"]  # unit noise for every step of a grid
PRNGKey = Key[Array, ""]
SolverState = Any  # a pytree of arrays; () for one-step methods


@runtime_checkable
class Schedule(Protocol):
    """The Gaussian perturbation x_t = alpha(t) x_0 + sigma(t) eps, eps ~ N(0, I).

    It is the marginal of the forward SDE dx = f(t) x dt + g(t) dw, whose squared diffusion g² is called
    `beta`. Every method maps times of any shape to values of that shape. `log_snr` is 2 log(alpha / sigma);
    it decreases in t, and `t_of_log_snr` is its inverse.
    """

    def log_alpha(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]: ...
    def alpha(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]: ...
    def sigma(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]: ...
    def log_snr(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]: ...
    def t_of_log_snr(self, log_snr: Float[Array, "*t"]) -> Float[Array, "*t"]: ...
    def f(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]: ...
    def beta(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]: ...


@runtime_checkable
class NoiseFn(Protocol):
    """eps_hat(x, t), the noise prediction: a `jax.tree_util.Partial(fn, weights, context, ...)`.

    A Partial is a pytree, so new weights, prompts and scales are new arrays, not a new trace. `theory.solve` and
    `theory.editing` take a bare function as well, which is traced once for each function object.
    """

    def __call__(self, x: X, t: Time) -> X: ...


class Kernel(NamedTuple):
    """A solver step as the Gaussian q(x_s | x_t) = N(mean, std² I); std = 0 is an ODE step.

    One object serves sampling (mean + std w), recording (w = (x_s - mean) / std) and per-step divergences.
    """

    mean: X
    std: Time


@runtime_checkable
class Solver(Protocol):
    """A frozen dataclass of numbers that turns a noise prediction into a `Kernel` from time t to time s.

    Solvers never hold a key and never loop: `theory.solve` adds the noise. A solver that is not `stochastic` has
    std = 0 at every step; it solves the ODE, and may also be run up a grid.
    """

    @property
    def schedule(self) -> Schedule: ...

    @property
    def stochastic(self) -> bool: ...

    def init(self, x: X) -> SolverState: ...

    def kernel(self, eps_fn: NoiseFn, x: X, t: Time, s: Time, state: SolverState) -> tuple[Kernel, SolverState]: ...


class Estimate(NamedTuple):
    """A number with its error: the change under refinement for quadrature, a standard error for Monte Carlo."""

    value: Float[Array | np.ndarray, "*batch"]
    error: Float[Array | np.ndarray, "*batch"]
