"""The density ratio h_s = p~_s / p_s of a wrong start, exactly, as a function of the point.

lam = 1, SDE              h_s(x) = E[h_t0(x_t0) | x_s = x]: an average over the forward kernel, any mixture, d <= 2
lam = 0, ODE              h is constant along the flow, on the line the monotone map between marginals
any lam, Gaussian target  an affine map plus noise: a mixture stays a mixture, any dimension
"""

from collections.abc import Callable
from functools import partial
from math import erfc, exp
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from theory import line
from theory.arguments import level, prepared
from theory.mixtures import GaussianMixture, from_covariances
from theory.problems import Problem
from theory.quadrature import NORMAL_REACH, normal_grid
from theory.types import Time

Scalar = Float[Array, ""]
Point = Float[Array, " d"]

# Points per axis, by dimension: of the kernel's grid, and of the search for poles.
KERNEL_POINTS = {1: 97, 2: 31}
POLE_POINTS = {1: 401, 2: 61}
# What lies beyond the kernel's grid, relative to the Gaussian that it is laid over.
BEYOND = {1: erfc(NORMAL_REACH[1] / 2**0.5), 2: exp(-(NORMAL_REACH[2] ** 2) / 2)}
# Wanted of the poorer grid, whose error is the one reported, per digit of the grid itself; in the plane a compromise.
POORER = {1: 2.0, 2: 1.3}
MOST_COPIES = {1: 2000, 2: 16}
EPS = float(np.finfo(float).eps)


class Ratio(NamedTuple):
    """log h = log(p~ / p) and its gradient at a point, and what either may be off by."""

    log_h: Scalar
    grad: Point
    error: Scalar
    grad_error: Point


def ratio_of_laws(law: GaussianMixture, marginal: GaussianMixture) -> Callable[[Point], Ratio]:
    """log(p~ / p) for two mixtures in closed form: right to rounding."""

    def ratio(x: Point) -> Ratio:
        errors = [log_prob_errors(each, x) for each in (law, marginal)]
        return Ratio(
            law.log_prob(x) - marginal.log_prob(x),
            law.score(x) - marginal.score(x),
            errors[0][0] + errors[1][0],
            errors[0][1] + errors[1][1],
        )

    return ratio


def log_prob_errors(law: GaussianMixture, x: Point) -> tuple[Scalar, Point]:
    """What roundings of x and of the means change in log p(x) and in its gradient."""
    law, x = jax.lax.stop_gradient((law, x))
    centred = jnp.einsum("kij,ki->kj", law.axes, x[None] - law.means)
    pulls = jnp.einsum("kij,kj->ki", law.axes, centred / law.variances)
    share, pull = law.responsibilities(x), jnp.linalg.norm(pulls, axis=1)
    size = jnp.linalg.norm(x) + jnp.linalg.norm(law.means, axis=1)
    log_prob = EPS * (8 + share @ (pull * size))
    # Where components cross, their shares are only as good as their logarithms.
    apart = share @ jnp.linalg.norm(pulls - (share @ pulls)[None], axis=1)
    score = EPS * (share @ (8 * pull + size / law.variances.min(axis=1))) + log_prob * apart
    return log_prob, jnp.full_like(x, score)


def ratio_sde(problem: Problem, s: Time, copies: int | None = None) -> Callable[[Point], Ratio]:
    """h_s(x) = E[h_t0(x_t0) | x_s = x] for s < t0, where x_t0 | x_s ~ N(c x, tau² I) is the forward kernel; d <= 2.

    With p~ = sum_j w_j N_j, each term is the integral over y of w_j N_j(y) N(y; c x, tau²) / p(y). For every component
    k, 1 / p <= 1 / (w_k p_k), and dividing by p_k leaves a Gaussian, N(y; c x + shift_jk, C_jk). Of the k that gives
    the least bound, p_k / p is smooth and at most 1 / w_k: the trapezoidal rule takes all digits, however narrow or
    wide the start is, with as many shifted copies of the grid as `_copies` asks for. The gradient is that of the
    kernel, c / tau² (E_h[y] - c x), with E_h the average weighted by h. The error is the distance to every other node,
    what the bound leaves beyond the grid, and roundings: where no k bounds well, deep in a gap of p, few digits are
    left, and it says so. A given number of `copies` makes the ratio differentiable in reverse.

    Raises ValueError in more than two dimensions.
    """
    schedule, t0, d = problem.schedule, problem.t0, problem.target.dim
    if d not in KERNEL_POINTS:
        raise ValueError(
            f"ratio_sde integrates in one or two dimensions, got d = {d} (a Gaussian target: law_gaussian)"
        )
    marginal, start = problem.marginal(t0), problem.start
    c = jnp.exp(schedule.log_alpha(t0) - schedule.log_alpha(s))
    tau2 = -(schedule.sigma(t0) ** 2) * jnp.expm1(schedule.log_snr(t0) - schedule.log_snr(s))
    z, _, _ = normal_grid(KERNEL_POINTS[d], d)
    gap = 2 * NORMAL_REACH[d] / (KERNEL_POINTS[d] - 1)
    places = np.rint(z / gap).astype(int)

    # Of component j, N_j(y) N(y; c x, tau²) = N(c x; mu_j, S_j) N(y; b_j, T_j).
    def of_start(variances: Array) -> Float[Array, "j d d"]:
        return jnp.einsum("jab,jb,jcb->jac", start.axes, variances, start.axes)

    total = start.variances + tau2
    S_inverse, gain, T = of_start(1 / total), of_start(tau2 / total), of_start(tau2 * start.variances / total)
    # V_k - T_j of marginal and start, (j, k, d, d): a sum of positive terms, where 1 / T - 1 / V cancels.
    rest = (c**2 * problem.marginal(s).covariances)[None] + of_start(tau2**2 / total)[:, None]
    rest_inverse = jnp.linalg.inv(rest)
    pushed = T[:, None] @ rest_inverse
    C = T[:, None] + pushed @ T[:, None]  # of N_j(y) N(y; c x, tau²) / p_k(y)
    C = (C + jnp.swapaxes(C, -1, -2)) / 2
    root = jnp.linalg.cholesky(C)
    spread = root @ z.T  # (j, k, d, nodes)
    log_dets = jnp.sum(jnp.log(marginal.variances), axis=-1)[None] - jnp.linalg.slogdet(rest)[1] / 2
    log_dets -= jnp.sum(jnp.log(total), axis=-1)[:, None] / 2
    j = jnp.arange(len(total))
    stds = jnp.max(jnp.linalg.norm(root, axis=(-2, -1)), axis=1)
    finer: int | Array = copies or _copies(*jax.lax.stop_gradient((marginal, start, stds)), gap)

    def ratio(x: Point) -> Ratio:
        to_start, to_marginal = start.means - c * x[None], marginal.means - c * x[None]
        pull = jnp.einsum("jab,jb->ja", S_inverse, to_start)
        nearer = jnp.einsum("jab,jb->ja", gain, to_start)  # b_j - c x
        above = nearer[:, None] - to_marginal[None]  # b_j - M_k
        push = jnp.einsum("jkab,jkb->jka", rest_inverse, above)
        shifts = nearer[:, None] + jnp.einsum("jkab,jkb->jka", pushed, above)

        # N_j N(y; c x, tau²) / p_k = exp(log_scale) N(y; c x + shift, C)
        log_scales = (jnp.sum(above * push, axis=-1) - jnp.sum(to_start * pull, axis=-1)[:, None]) / 2 + log_dets
        bounds = start.log_weights[:, None] + log_scales - marginal.log_weights[None]
        k = jnp.argmin(bounds, axis=1)
        log_scale, shift, bound = log_scales[j, k], shifts[j, k], bounds[j, k]

        def add(i: Array | int, sums: _Sums) -> _Sums:
            copy = jnp.stack(jnp.unravel_index(jnp.asarray(i), (finer,) * d))
            offset = gap / finer * copy
            step = (shift + root[j, k] @ offset)[:, None] + jnp.swapaxes(spread[j, k], -1, -2)  # y - c x, (j, nodes, d)
            per_component = marginal.component_log_probs(c * x[None, None] + step)  # (k, j, nodes)
            share = jnp.take_along_axis(per_component, k[None, :, None], axis=0)[0] - marginal.log_weights[k][:, None]
            log_weights = -jnp.sum((z + offset[None]) ** 2, axis=1) / 2
            terms = share - jax.nn.logsumexp(per_component, axis=0) + (start.log_weights + log_scale)[:, None]
            kept = jnp.all((places * finer + copy[None]) % 2 == 0, axis=1)
            return sums.plus(terms + log_weights[None], step, jnp.where(kept, 2.0**d, 0.0))

        nothing = _Sums(jnp.array(-jnp.inf), *2 * (jnp.zeros(()), jnp.zeros(d)))
        # A loop of one would be a loop for XLA.
        sums = add(0, nothing) if copies == 1 else jax.lax.fori_loop(0, finer**d, add, nothing)
        log_h = sums.top + jnp.log(sums.total) + d * jnp.log(gap / finer / jnp.sqrt(2 * jnp.pi))
        grad, poorer_grad = (
            c / tau2 * m / t for t, m in ((sums.total, sums.moment), (sums.coarse, sums.coarse_moment))
        )
        # What roundings of x, the means and y change in each h_j, which is at most exp(bound) of h.
        at, far = jnp.linalg.norm(c * x), partial(jnp.linalg.norm, axis=1)
        pulled = far(pull) * (at + far(start.means)) + (
            (far(push[j, k]) + marginal.variances[k].min(axis=1) ** -0.5) * (at + far(shift) + far(marginal.means[k]))
        )
        most = jnp.exp(jnp.minimum(bound - log_h, 0.0))
        rounded = EPS * (8 + most @ (jnp.abs(log_scale) + pulled))
        log_beyond = np.log(BEYOND[d]) + jax.nn.logsumexp(bound) - log_h
        error = jnp.log1p(jnp.abs(sums.coarse / sums.total - 1)) + jnp.logaddexp(log_beyond, 0.0) + rounded
        reach = most @ (far(shift) + jnp.sqrt(jnp.trace(C[j, k], axis1=1, axis2=2)))
        grad_error = jnp.abs(poorer_grad - grad) + c / tau2 * reach * (10 * jax.nn.sigmoid(log_beyond) + rounded)
        return Ratio(log_h, grad, *jax.lax.stop_gradient((error, grad_error)))

    return ratio


class _Sums(NamedTuple):
    """sum exp(terms) and sum exp(terms) step, divided by exp(top), top the largest term so far, and of fewer nodes."""

    top: Scalar
    total: Scalar
    moment: Point
    coarse: Scalar
    coarse_moment: Point

    def plus(self, terms: Float[Array, "j n"], step: Float[Array, "j n d"], fewer: Float[Array, " n"]) -> "_Sums":
        top = jax.lax.stop_gradient(jnp.maximum(self.top, jnp.max(terms)))
        kept, values = jnp.exp(self.top - top), jnp.exp(terms - top)
        some = values * fewer[None]
        return _Sums(
            top,
            kept * self.total + values.sum(),
            kept * self.moment + jnp.einsum("jn,jnd->d", values, step),
            kept * self.coarse + some.sum(),
            kept * self.coarse_moment + jnp.einsum("jn,jnd->d", some, step),
        )


def _copies(marginal: GaussianMixture, start: GaussianMixture, stds: Float[Array, " j"], gap: float) -> Int[Array, ""]:
    """How many times finer than `gap` the grid of a kernel of these standard deviations must be.

    1 / p has poles where two components k, l of the marginal cancel, at a distance pi / |grad log(p_k / p_l)| from the
    points where they are equal, and the trapezoidal rule errs by exp(-2 pi distance / gap) there. That, times the
    density of the start, is to stay below exp(-34) = 2e-15, for the poorer grid too.
    """
    d = marginal.dim
    z, _, _ = normal_grid(POLE_POINTS[d], d)
    spacing = 2 * NORMAL_REACH[d] / (POLE_POINTS[d] - 1)

    def needed(mean: Point, variances: Point, axes: Float[Array, "d d"], std: Scalar) -> Scalar:
        def at(z: Point) -> Scalar:
            y = mean + axes @ (jnp.sqrt(variances) * z)
            logs, slopes = marginal.component_log_probs(y), jax.jacfwd(marginal.component_log_probs)(y)
            slope = jnp.linalg.norm(slopes[:, None] - slopes[None], axis=-1)
            reached = jnp.abs(logs[:, None] - logs[None]) <= slope * jnp.sqrt(variances.max()) * spacing
            seen = jnp.minimum(logs[:, None], logs[None]) > logs.max() - 34
            return jnp.max(jnp.where(reached & seen, slope, 0.0)) * std * (34 - z @ z / 2) * gap / (2 * jnp.pi**2)

        return jnp.max(jax.vmap(at)(jnp.asarray(z)))

    most = jnp.max(jax.vmap(needed)(start.means, start.variances, start.axes, stds))
    return jnp.clip(jnp.ceil(POORER[d] * most), 1, MOST_COPIES[d]).astype(int)


def ratio_ode(problem: Problem, s: Time) -> Callable[[Point], Ratio]:
    """h_s(x) = h_t0(y), y = F_t0^-1(F_s(x)), d = 1: the density ratio is carried along (Theorem 3.2).

    The error is what rounding F_s(x) does to y: much, where p_t0 has a gap.
    """
    marginal_s, marginal_t0 = problem.marginal(s), problem.marginal(problem.t0)
    at_start = ratio_of_laws(problem.start, marginal_t0)

    def ratio(x: Point) -> Ratio:
        u = line.tails(marginal_s, x)
        less = line.Tails(*(log - 4 * EPS * (1 + jnp.abs(log)) for log in u))
        y, moved = line.quantile(marginal_t0, u), line.quantile(marginal_t0, less)
        slope, moved_slope = (jnp.exp(marginal_s.log_prob(x) - marginal_t0.log_prob(y)) for y in (y, moved))  # dy/dx
        here, there = at_start(y), at_start(moved)
        grad = slope * here.grad
        error = here.error + jnp.abs(there.log_h - here.log_h)
        return Ratio(here.log_h, grad, error, jnp.abs(moved_slope * there.grad - grad) + slope * here.grad_error)

    return ratio


@prepared(lam=level)
@jax.jit
def law_gaussian(problem: Problem, s: Time, lam: float | Time) -> GaussianMixture:
    """p~_s for a Gaussian target and any lam: each component of the start is mapped affinely and blurred.

    In the eigenbasis of the target, x_s - m_s = a (x_t0 - m_t0) + noise with a = sqrt(V_s / V_t0 rho),
    rho = [(alpha_t0² / V_t0) / (alpha_s² / V_s)]^(lam²), and the noise makes p_t0 arrive at p_s.

    Raises ValueError for a target of several components, and for a noise level that cannot be.
    """
    if len(problem.target.log_weights) != 1:
        raise ValueError("law_gaussian needs a target of one component")
    before, after = problem.marginal(problem.t0), problem.marginal(s)
    log_scale = problem.schedule.log_alpha(problem.t0) - problem.schedule.log_alpha(s)
    ratio = after.variances[0] / before.variances[0]
    rho = (jnp.exp(2 * log_scale) * ratio) ** (lam**2)
    axes = problem.target.axes[0]
    push = (axes * jnp.sqrt(ratio * rho)[None]) @ axes.T
    noise = (axes * (after.variances[0] * (1 - rho))[None]) @ axes.T
    means = after.means + (problem.start.means - before.means) @ push.T
    return from_covariances(problem.start.log_weights, means, push @ problem.start.covariances @ push.T + noise[None])
