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
from theory.evolution import scales
from theory.flows import kl_ode
from theory.mixtures import gaussian, mixture_1d
from theory.problems import Curve, Problem, problem
from theory.processes import of_ou_time, ou_time
from theory.quadrature import Rule, legendre, panel_errors
from theory.schedules import LinearVP
from theory.types import Estimate, Schedule, Time, Times

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

    @property
    def margin(self) -> float:
        """The residual over what is allowed, tolerance and error: a statement fails, a lie is caught, above 1."""
        allowed = self.tolerance + self.error
        return self.residual / allowed if allowed > 0 else np.inf if self.residual > 0 else -np.inf


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


def at(estimates: Estimate, i: int | slice | tuple[int, int]) -> Estimate:
    """One of many estimates, or some."""
    return Estimate(estimates.value[i], estimates.error[i])


def difference(a: Number, b: Number) -> Estimate:
    """a - b, and the errors of both."""
    (a, a_error), (b, b_error) = _value(a), _value(b)
    return Estimate(np.asarray(a - b), np.asarray(a_error + b_error))


def scaled(number: Estimate, factor: float) -> Estimate:
    """A multiple."""
    return Estimate(factor * number.value, abs(factor) * number.error)


def decayed(number: Estimate, integral: Estimate) -> Estimate:
    """exp(-integral) number."""
    factor = np.exp(-integral.value)
    return Estimate(factor * number.value, factor * (number.error + abs(number.value) * integral.error))


def largest_growth(estimates: Estimate) -> Estimate:
    """The largest step upwards from one estimate to the next, as far as can be told."""
    steps = Estimate(np.diff(estimates.value), estimates.error[1:] + estimates.error[:-1])
    return at(steps, int(np.argmax(steps.value + steps.error)))


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


ORDER = 20  # nodes of a panel in time


class Nodes(NamedTuple):
    """Gauss-Legendre panels in `ou_time`, t decreasing, with g² dt in the weights, and the SDE's curve at the nodes."""

    ts: Float[np.ndarray, " nodes"]
    weights: Float[np.ndarray, " nodes"]
    coarse: Float[np.ndarray, " nodes"]  # weights of a poorer rule
    curve: Curve

    def integral(self, value: Float[np.ndarray, " nodes"], error: Float[np.ndarray, " nodes"]) -> Estimate:
        return Estimate(self.weights @ value, self.missed(value).sum() + self.weights @ error)

    def missed(self, value: Float[np.ndarray | Array, " nodes"]) -> Float[np.ndarray, " panels"]:
        """What the integral of a rate with these values may miss in every panel."""
        rule = Rule(*map(jax.device_put, (self.ts[:, None], self.weights, self.coarse)))
        return np.asarray(panel_errors(rule, jax.device_put(value), ORDER))


@dataclass(frozen=True)
class Study:
    """A problem and what several theorems need of it, computed once.

    Raises ValueError if the start is the right marginal already, to nine digits: 0 = 0 verifies nothing.
    """

    problem: Problem

    def __post_init__(self):
        if self.problem.target.dim > 2:
            raise ValueError(f"the checks integrate in one or two dimensions, got d = {self.problem.target.dim}")
        before = float(_curve(self.problem, np.array([float(self.problem.t0)])).kl.value[0])
        if before < 1e-9:
            raise ValueError(f"the start is the marginal at t0 already (KL = {before:.2g}): nothing to heal")

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
        return self.bundled, GAUSSIANS

    @cached_property
    def bundled(self) -> Problem:
        """The built-in pair of Gaussians on the schedule, and with the t0, of the problem."""
        return gaussian_problem(self.problem.schedule, float(self.problem.t0))

    @property
    def tolerance(self) -> float:
        """Of identities: a rule on the line is right to rounding, in the plane it is a compromise."""
        return 1e-12 if self.on_line else 1e-8

    @cached_property
    def ode(self) -> Estimate:
        """KL(0) under the ODE, by its flow and log-determinant."""
        return kl_ode(self.problem, 0.0)

    @cached_property
    def nodes(self) -> Nodes:
        """Of the integrals over [0, t0] of what the SDE's rates are, and its curve there."""
        if not self.on_line:  # where a time costs a hundred of the line's
            return _nodes(self.problem, np.asarray(_ou_times(self.problem, np.array([1.0, 0.8, 0.4, 0.0]))), 1e-9, 1)
        # Each panel twice as long as the one before, from either end: that is how fast things move.
        whole, first, last = map(float, _lengths(self.problem))
        doubling = 2.0 ** np.arange(1, 60) - 1
        early, late = (scale * doubling[scale * doubling < 0.45 * whole] for scale in (first, last))
        return _nodes(self.problem, np.concatenate([[whole], whole - early, [whole / 2], late[::-1], [0.0]]), 2e-13, 8)

    @property
    def times(self) -> Float[np.ndarray, " nodes"]:
        """The nodes of the integrals, t decreasing."""
        return self.nodes.ts

    @cached_property
    def sde(self) -> Curve:
        """The SDE's curve at t0, at `times`, and at 0, in NumPy's arrays; without W2."""
        p, inner = self.problem, self.nodes.curve
        ends = _curve(p, np.array([float(p.t0), 0.0]))
        return jax.tree.map(lambda end, inside: np.concatenate([end[:1], inside, end[1:]]), ends, inner)

    def integral(self, rate: Estimate | Float[Array | np.ndarray, " nodes"]) -> Estimate:
        """integral over [0, t0] of g² rate, from the rate at `times`."""
        value, error = rate if isinstance(rate, Estimate) else (rate, np.zeros(len(self.times)))
        return self.nodes.integral(np.asarray(value), np.asarray(error))


def _curve(p: Problem, ts: Float[np.ndarray, " times"]) -> Curve:
    """The SDE's at t0 and at ts."""
    return jax.device_get(contraction_curve(p.target, p.start, p.schedule, jax.device_put(ts), w2=False))


def _nodes(p: Problem, cuts: Float[np.ndarray, " panels_1"], wanted: float, rounds: int) -> Nodes:
    """Panels between the cuts in `ou_time`, which fall, halved until no rate's integral misses more than `wanted`."""
    nodes, weights, coarse, _ = legendre(ORDER)
    kept: list[Nodes] = []
    todo = list(pairwise(cuts.tolist()))
    for left in range(rounds, -1, -1):
        a, b = np.array(todo).T[:, :, None]
        ts, g2 = jax.device_get(_in_time(p, ((a + b) / 2 - (a - b) / 2 * nodes).ravel()))
        curve = jax.tree.map(lambda leaf: leaf[1:], _curve(p, np.append(float(p.t0), ts)))
        scale = (a - b) / 2 * g2.reshape(-1, ORDER)
        found = Nodes(ts, (scale * weights).ravel(), (scale * coarse).ravel(), curve)
        known = [name for name, rate in curve.rates.items() if np.all(np.isfinite(rate.value))]
        totals = {n: sum(part.weights @ part.curve.rates[n].value for part in [*kept, found]) for n in known}
        missed = np.max([found.missed(curve.rates[name].value) / totals[name] for name in known], axis=0)
        good = (missed <= wanted / 20) | (missed.sum() <= wanted) | (left == 0)
        kept += [_panel(found, i) for i, enough in enumerate(good) if enough]
        halves = [((a, (a + b) / 2), ((a + b) / 2, b)) for (a, b), enough in zip(todo, good, strict=True) if not enough]
        todo = [half for pair in halves for half in pair]
        if not todo:
            break
    kept.sort(key=lambda panel: -panel.ts[0])
    return jax.tree.map(lambda *parts: np.concatenate(parts), *kept)


def _panel(nodes: Nodes, i: int) -> Nodes:
    return jax.tree.map(lambda leaf: leaf[i * ORDER : (i + 1) * ORDER], nodes)


@jax.jit
def _ou_times(p: Problem, parts: Times) -> Times:
    """At these parts of t0."""
    return ou_time(p.schedule, p.t0 * parts)


@jax.jit
def _lengths(p: Problem) -> tuple[Time, Time, Time]:
    """In `ou_time`: that of t0, how long it keeps the narrowest of the start, and from when on that of the target."""
    first, last = scales(p)
    whole, kept, formed = ou_time(p.schedule, jnp.stack([p.t0, p.t0 - first, last]))
    return whole, whole - kept, formed


@jax.jit
def _in_time(p: Problem, ou_times: Times) -> tuple[Times, Times]:
    """t, and g² dt per d ou_time."""
    ts, passed = of_ou_time(p.schedule, ou_times)
    return ts, passed * p.schedule.beta(ts)
