"""What a verified statement is: a left side, a right side, computed in different ways, and how far they are apart."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from theory.contraction import contraction_curve
from theory.mixtures import gaussian, mixture_1d
from theory.problems import Curve, Problem, problem
from theory.quadrature import interval
from theory.schedules import LinearVP


class Check(NamedTuple):
    """One verified sentence. `residual` is relative; for "<=" it is how far the left side exceeds the right one."""

    statement: str
    equation: str
    lhs: float
    relation: str
    rhs: float
    residual: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.residual <= self.tolerance  # False for nan


def equal(statement: str, equation: str, lhs, rhs, tolerance: float) -> Check:
    """lhs = rhs to a relative tolerance."""
    lhs, rhs = float(lhs), float(rhs)
    return Check(statement, equation, lhs, "=", rhs, abs(lhs - rhs) / max(abs(lhs), abs(rhs), 1e-300), tolerance)


# Differences of equal numbers, both right to rounding.
ROUNDING = 1e-13


def at_most(statement: str, equation: str, lhs, rhs, tolerance: float = ROUNDING) -> Check:
    """lhs <= rhs; the tolerance is relative to rhs, or absolute where rhs is 0."""
    lhs, rhs = float(lhs), float(rhs)
    excess = (lhs - rhs) / (abs(rhs) or 1.0)
    return Check(statement, equation, lhs, "<=", rhs, max(excess, 0.0) if excess == excess else excess, tolerance)


def paper_problem() -> Problem:
    """The paper's toy: 1/2 N(-2, .2²) + 1/2 N(2, .2²), started from N(.5, .5²), beta = 0.1 + 9.9 t.

    Inferred from the published figure, which fixes the weights it ends with: .846 (ODE) and .542 (SDE).
    """
    return problem(mixture_1d([0.5, 0.5], [-2.0, 2.0], [0.2, 0.2]), gaussian([0.5], [[0.25]]), LinearVP(0.1, 10.0))


def gaussian_problem() -> Problem:
    """A Gaussian pair, in which everything has a closed form: data N(1.3, .2²), start N(.5, .5²)."""
    return problem(gaussian([1.3], [[0.04]]), gaussian([0.5], [[0.25]]), LinearVP(0.1, 10.0))


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
