"""What a verified statement is: a left side, a right side, computed in different ways, and how far they are apart."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from theory.contraction import contraction_curve
from theory.mixtures import gaussian, mixture_1d
from theory.problems import Curve, Problem, problem
from theory.quadrature import interval
from theory.schedules import LinearVP
from theory.types import Estimate, Schedule

Number = float | Array | np.ndarray | Estimate

# What a row is about: the two laws that the user gave, or a built-in pair of Gaussians with closed forms for all.
PAIR, GAUSSIANS = "pair", "Gaussians"
# What a row assumes.
EXACT = "exact score"
CYCLE = "exact score, an edit that sees x_t0 alone, eta = 1"


class Check(NamedTuple):
    """One sentence put to the test: `lhs relation rhs`.

    `residual` is how far apart the sides are ("="), or by how much the left one exceeds the right one ("<=", "<";
    negative where it does not), and `error` what is not known of that; both relative to the larger side ("=") or to
    the right one, where that is not 0. `about` is PAIR or GAUSSIANS; `lie`, of a control, by how much it is false.
    """

    statement: str
    equation: str
    lhs: float
    relation: Literal["=", "<=", "<"]
    rhs: float
    residual: float
    tolerance: float
    error: float = 0.0
    about: str = PAIR
    assumes: str = EXACT
    lie: str = ""

    @property
    def verdict(self) -> Literal["holds", "fails", "undecided"]:
        """Undecided where the error is too large to tell, or where something is not a number."""
        least, most = self.residual - self.error, self.residual + self.error
        if most < self.tolerance or (most == self.tolerance and self.relation != "<"):
            return "holds"
        if least > self.tolerance or (least == self.tolerance and self.relation == "<"):
            return "fails"
        return "undecided"


def equal(statement: str, equation: str, lhs: Number, rhs: Number, tolerance: float, **more: Any) -> Check:
    """lhs = rhs to a relative tolerance. Either may be an `Estimate`; `more` are the last fields of `Check`."""
    (left, left_error), (right, right_error) = _value(lhs), _value(rhs)
    scale = max(abs(left), abs(right), 1e-300)
    residual, error = abs(left - right) / scale, (left_error + right_error) / scale
    return Check(statement, equation, left, "=", right, residual, tolerance, error, **more)


# Differences of equal numbers, both right to rounding.
ROUNDING = 1e-13


def at_most(statement: str, equation: str, lhs: Number, rhs: Number, tolerance: float = ROUNDING, **more: Any) -> Check:
    """lhs <= rhs; the tolerance is relative to rhs, or absolute where rhs is 0."""
    left, right, residual, error = _excess(lhs, rhs)
    return Check(statement, equation, left, "<=", right, residual, tolerance, error, **more)


def less(statement: str, equation: str, lhs: Number, rhs: Number, **more: Any) -> Check:
    """lhs < rhs, by more than the errors of both."""
    left, right, residual, error = _excess(lhs, rhs)
    return Check(statement, equation, left, "<", right, residual, 0.0, error, **more)


def _excess(lhs: Number, rhs: Number) -> tuple[float, float, float, float]:
    (left, left_error), (right, right_error) = _value(lhs), _value(rhs)
    scale = abs(right) or 1.0
    return left, right, (left - right) / scale, (left_error + right_error) / scale


def _value(number: Number) -> tuple[float, float]:
    """A value and its error."""
    value, error = number if isinstance(number, Estimate) else (number, 0.0)
    return float(value), float(error)


def paper_problem() -> Problem:
    """The paper's toy: 1/2 N(-2, .2²) + 1/2 N(2, .2²), started from N(.5, .5²), beta = 0.1 + 9.9 t.

    Inferred from the published figure, which fixes the weights it ends with: .846 (ODE) and .542 (SDE).
    """
    return problem(mixture_1d([0.5, 0.5], [-2.0, 2.0], [0.2, 0.2]), gaussian([0.5], [[0.25]]), LinearVP(0.1, 10.0))


def gaussian_problem(schedule: Schedule | None = None, t0: float = 1.0) -> Problem:
    """A Gaussian pair, in which everything has a closed form: data N(1.3, .2²), start N(.5, .5²).

    Where t0 is so small that the marginal is narrower than this start, the start has half its variance.
    """
    data, schedule = gaussian([1.3], [[0.04]]), schedule or LinearVP(0.1, 10.0)
    widest = data.marginal(schedule, jnp.asarray(t0, float)).variances.item()
    return problem(data, gaussian([0.5], [[0.25 if widest > 0.25 else widest / 2]]), schedule, t0)


@dataclass(frozen=True)
class Study:
    """A problem and what several theorems need of it, computed once.

    Raises ValueError if the start is the right marginal already, to nine digits: 0 = 0 verifies nothing.
    """

    problem: Problem

    def __post_init__(self):
        if self.problem.target.dim > 2:
            raise ValueError(f"the checks integrate in one or two dimensions, got d = {self.problem.target.dim}")
        if self.sde.kl.value[0] < 1e-9:
            raise ValueError(
                f"the start is the marginal at t0 already (KL = {self.sde.kl.value[0]:.2g}): nothing to heal"
            )

    @property
    def on_line(self) -> bool:
        return self.problem.target.dim == 1

    @cached_property
    def gaussians(self) -> tuple[Problem, str]:
        """A pair of Gaussians on the line, for what has closed forms there alone, and what it is (`Check.about`).

        The pair itself if it is one, else the built-in one on its schedule.
        """
        p = self.problem
        if self.on_line and len(p.target.log_weights) == len(p.start.log_weights) == 1:
            return p, PAIR
        return gaussian_problem(p.schedule, float(p.t0)), GAUSSIANS

    @cached_property
    def times(self) -> tuple[np.ndarray, np.ndarray]:
        """Gauss-Legendre nodes and weights for integrals over [0, t0], t decreasing."""
        t0 = float(self.problem.t0)
        # The divergence falls fastest just below t0. In the plane each node costs a hundred times more.
        line_cuts, plane_cuts = (1.0, 0.97, 0.9, 0.75, 0.55, 0.35, 0.2, 0.08, 0.0), (1.0, 0.8, 0.4, 0.0)
        cuts = t0 * np.array(line_cuts if self.on_line else plane_cuts)
        parts = [interval(a, b, 12) for a, b in pairwise(cuts)]
        nodes, weights = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return nodes, -weights

    @cached_property
    def sde(self) -> Curve:
        """The SDE's curve at t0, at the nodes of `times`, and at 0, in NumPy's arrays."""
        p = self.problem
        ts = jax.device_put(np.concatenate([[float(p.t0)], self.times[0], [0.0]]))
        return jax.device_get(contraction_curve(p.target, p.start, p.schedule, ts, 1.0))

    @cached_property
    def beta(self) -> Float[np.ndarray, " nodes"]:
        """g² at the nodes of `times`."""
        return np.asarray(jax.jit(self.problem.schedule.beta)(self.times[0]))

    def integral(self, rate: Float[Array | np.ndarray, " nodes"]) -> float:
        """integral over [0, t0] of g² rate."""
        return float(self.times[1] @ (self.beta * np.asarray(rate)))
