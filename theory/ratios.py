"""The density ratio h_s = p~_s / p_s of a wrong start, exactly, as a function of the point.

lam = 1, SDE              h_s(x) = E[h_t0(x_t0) | x_s = x]: an average over the forward kernel, any mixture
lam = 0, ODE              h is constant along the flow, on the line the monotone map between marginals
any lam, Gaussian target  an affine map plus noise: a mixture stays a mixture, any dimension
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from theory.arguments import level, prepared
from theory.flows import flow_map
from theory.mixtures import GaussianMixture, from_covariances
from theory.problems import Problem
from theory.quadrature import NORMAL_REACH, normal_grid
from theory.types import Time

Scalar = Float[Array, ""]
Point = Float[Array, " d"]

# Points per axis, by dimension: of the kernel's grid, and of the search for poles.
KERNEL_POINTS = {1: 97, 2: 31}
POLE_POINTS = {1: 401, 2: 61}


class Ratio(NamedTuple):
    """log h = log(p~ / p) and its gradient at a point."""

    log_h: Scalar
    grad: Point


def ratio_of_laws(law: GaussianMixture, marginal: GaussianMixture) -> Callable[[Point], Ratio]:
    """log(p~ / p) for two mixtures in closed form."""
    return lambda x: Ratio(law.log_prob(x) - marginal.log_prob(x), law.score(x) - marginal.score(x))


def ratio_sde(problem: Problem, s: Time) -> Callable[[Point], Ratio]:
    """h_s(x) = E[h_t0(x_t0) | x_s = x] for s < t0, where x_t0 | x_s ~ N(c x, tau² I) is the forward kernel.

    With p~ = sum_j w_j N_j, each term is the integral over y of w_j N_j(y) N(y; c x, tau²) / p(y). Dividing the
    numerator by the component p_k that dominates there leaves a Gaussian, N(y; c x + shift_jk, C_jk), times
    p_k / p, which is smooth and bounded by 1 / w_k: the trapezoidal rule takes all digits, however narrow or wide the
    start is, with as many shifted copies of the grid as `_copies` asks for. The gradient is that of the kernel,
    c / tau² (E_h[y] - c x), with E_h the average weighted by h.
    """
    schedule, t0, d = problem.schedule, problem.t0, problem.target.dim
    marginal, start = problem.marginal(t0), problem.start
    c = jnp.exp(schedule.log_alpha(t0) - schedule.log_alpha(s))
    tau2 = -(schedule.sigma(t0) ** 2) * jnp.expm1(schedule.log_snr(t0) - schedule.log_snr(s))
    z, _, _ = normal_grid(KERNEL_POINTS[d], d)
    gap = 2 * NORMAL_REACH[d] / (KERNEL_POINTS[d] - 1)

    P, Q = jnp.linalg.inv(start.covariances), jnp.linalg.inv(marginal.covariances)
    kernel = jnp.eye(d)[None] / tau2
    product = jnp.linalg.inv(P + kernel)  # covariance of N_j(y) N(y; c x, tau²), (j, d, d)
    C = jnp.linalg.inv((P + kernel)[:, None] - Q[None])  # the same divided by p_k, (j, k, d, d)
    C = (C + jnp.swapaxes(C, -1, -2)) / 2
    root = jnp.linalg.cholesky(C)
    spread = root @ z.T  # (j, k, d, nodes)
    log_dets = jnp.linalg.slogdet(C)[1] + jnp.linalg.slogdet(P)[1][:, None] - jnp.linalg.slogdet(Q)[1][None]
    j = jnp.arange(len(P))
    copies = _copies(marginal, start, jnp.max(jnp.linalg.norm(root, axis=(-2, -1)), axis=1), gap)

    def ratio(x: Point) -> Ratio:
        to_start, to_marginal = start.means - c * x[None], marginal.means - c * x[None]
        pull = jnp.einsum("jab,jb->ja", P, to_start)
        k = jnp.argmax(marginal.component_log_probs(c * x[None] + jnp.einsum("jab,jb->ja", product, pull)), axis=0)
        tilt = jnp.einsum("jab,jb->ja", Q[k], to_marginal[k])
        shift = jnp.einsum("jab,jb->ja", C[j, k], pull - tilt)

        # N_j N(y; c x, tau²) / p_k = exp(log_scale) N(y; c x + shift, C): exponents at y = c x, up to the common 2 pi.
        exponents = jnp.sum(to_marginal[k] * tilt - to_start * pull + shift * (pull - tilt), axis=-1) / 2
        log_scale = exponents + (log_dets[j, k] - d * jnp.log(tau2)) / 2

        def add(i: Array, sums: _Sums) -> _Sums:
            offset = gap / copies * jnp.stack(jnp.unravel_index(i, (copies,) * d))
            step = (shift + root[j, k] @ offset)[:, None] + jnp.swapaxes(spread[j, k], -1, -2)  # y - c x, (j, nodes, d)
            per_component = marginal.component_log_probs(c * x[None, None] + step)  # (k, j, nodes)
            share = jnp.take_along_axis(per_component, k[None, :, None], axis=0)[0] - marginal.log_weights[k][:, None]
            log_weights = -jnp.sum((z + offset[None]) ** 2, axis=1) / 2
            terms = share - jax.nn.logsumexp(per_component, axis=0) + (start.log_weights + log_scale)[:, None]
            return sums.plus(terms + log_weights[None], step)

        nothing = _Sums(jnp.array(-jnp.inf), jnp.zeros(()), jnp.zeros(d))
        sums = jax.lax.fori_loop(0, copies**d, add, nothing)
        log_h = sums.top + jnp.log(sums.total) + d * jnp.log(gap / copies / jnp.sqrt(2 * jnp.pi))
        return Ratio(log_h, c / tau2 * sums.moment / sums.total)

    return ratio


class _Sums(NamedTuple):
    """sum exp(terms) and sum exp(terms) step, both divided by exp(top), top the largest term so far."""

    top: Scalar
    total: Scalar
    moment: Point

    def plus(self, terms: Float[Array, "j n"], step: Float[Array, "j n d"]) -> "_Sums":
        top = jnp.maximum(self.top, jnp.max(terms))
        kept, values = jnp.exp(self.top - top), jnp.exp(terms - top)
        return _Sums(top, kept * self.total + values.sum(), kept * self.moment + jnp.einsum("jn,jnd->d", values, step))


def _copies(marginal: GaussianMixture, start: GaussianMixture, stds: Float[Array, " j"], gap: float) -> Int[Array, ""]:
    """How many times finer than `gap` the grid of a kernel of these standard deviations must be.

    1 / p has poles where two components k, l of the marginal cancel, at a distance pi / |grad log(p_k / p_l)| from the
    points where they are equal, and the trapezoidal rule errs by exp(-2 pi distance / gap) there. That, times the
    density of the start, is to stay below exp(-34) = 2e-15.
    """
    z, _, _ = normal_grid(POLE_POINTS[marginal.dim], marginal.dim)
    spacing = 2 * NORMAL_REACH[marginal.dim] / (POLE_POINTS[marginal.dim] - 1)

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
    return jnp.clip(jnp.ceil(most), 1, 1000).astype(int)


def ratio_ode(problem: Problem, s: Time) -> Callable[[Point], Ratio]:
    """h_s(x) = h_t0(y), y = F_t0^-1(F_s(x)), d = 1: the density ratio is carried along (Theorem 3.2)."""
    marginal_s, marginal_t0 = problem.marginal(s), problem.marginal(problem.t0)

    def ratio(x: Point) -> Ratio:
        y = flow_map(problem, s, problem.t0, x)
        slope = jnp.exp(marginal_s.log_prob(x) - marginal_t0.log_prob(y))  # dy/dx
        log_h, grad = ratio_of_laws(problem.start, marginal_t0)(y)
        return Ratio(log_h, slope * grad)

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
