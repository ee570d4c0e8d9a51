"""The exact law of the edited process, without sampling.

The reverse process starts at t0 from the wrong law p~ (`start`) instead of the marginal p of the data (`target`);
h_s = p~_s / p_s is the density ratio on the way down.

    lam = 1, SDE            h_s(x) = E[h_t0(x_t0) | x_s = x]: an average over the forward kernel, any mixture
    lam = 0, ODE            h is constant along the flow: the monotone map on the line, the flow map in d dimensions
    any lam, Gaussian target  an affine map plus noise: a mixture stays a mixture, any dimension
    any lam, on the line      the heat equation in u = F_s(x), see `theory.heat`
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.integrate import solve_ivp

from theory import line
from theory.divergences import CHI2, DIRICHLET, FISHER, KL, TV, Divergence, from_values
from theory.mixtures import GaussianMixture
from theory.quadrature import (
    NORMAL_REACH,
    REACH,
    Rule,
    covering_rule,
    legendre_panels,
    normal_grid,
    panel_edges,
    split_at_roots,
)
from theory.types import Estimate, Schedule, Time, Times

Scalar = Float[Array, ""]
Point = Float[Array, " d"]


# Points per axis, by dimension: of the kernel's grid, and of the search for poles.
KERNEL_POINTS = {1: 97, 2: 31}
POLE_POINTS = {1: 401, 2: 61}


class Problem(NamedTuple):
    """A reverse process that starts from the wrong law: data law, law of the edited latent at t0, schedule, t0."""

    target: GaussianMixture
    start: GaussianMixture
    schedule: Schedule
    t0: Time

    def marginal(self, s: Time) -> GaussianMixture:
        """p_s, the right law at time s."""
        return self.target.marginal(self.schedule, s)


def problem(target: GaussianMixture, start: GaussianMixture, schedule: Schedule, t0: float = 1.0) -> Problem:
    """Checks that the two laws can be compared.

    Raises ValueError for t0 outside (0, 1], for laws in different dimensions, and for a start with heavier tails
    than the marginal can bear: chi2(p~ | p) is finite only if 2 C~^-1 - C^-1 is positive definite for each covariance
    C~ of the start and some covariance C of the marginal.
    """
    if not 0 < t0 <= 1:
        raise ValueError(f"t0 must lie in (0, 1], got {t0}")
    if target.dim != start.dim:
        raise ValueError(f"target and start must have one dimension, got d = {target.dim} and d = {start.dim}")
    made = Problem(target, start, schedule, jnp.asarray(t0, float))
    precisions = np.linalg.inv(made.marginal(made.t0).covariances)
    for j, precision in enumerate(np.linalg.inv(start.covariances)):
        if np.linalg.eigvalsh(2 * precision[None] - precisions).min(axis=1).max() <= 0.05 * np.linalg.norm(
            precision, 2
        ):
            widest = float(start.variances[j].max() ** 0.5)
            raise ValueError(
                f"component {j} of the start (std up to {widest:.4g}) has heavier tails than the marginal at t0 = "
                f"{t0:g} can bear: chi2 is infinite or nearly so; make its covariance less than about 1.9 times "
                "that of the marginal"
            )
    return made


# --- lam = 1: the forward-kernel average -------------------------------------------------------------------------


class Ratio(NamedTuple):
    """log h = log(p~ / p) and its gradient at a point."""

    log_h: Scalar
    grad: Point


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


# --- lam = 0: the flow -------------------------------------------------------------------------------------------


def flow_map(problem: Problem, s: Time, t: Time, x: Float[Array, " n"]) -> Float[Array, " n"]:
    """The probability-flow ODE from s to t on the line: F_t^-1(F_s(x)), in either direction, without a solver."""
    return line.quantile(problem.marginal(t), line.tails(problem.marginal(s), x))


def ratio_ode(problem: Problem, s: Time) -> Callable[[Point], Ratio]:
    """h_s(x) = h_t0(y), y = F_t0^-1(F_s(x)), d = 1: the density ratio is carried along (Theorem 3.2)."""
    marginal_s, marginal_t0 = problem.marginal(s), problem.marginal(problem.t0)

    def ratio(x: Point) -> Ratio:
        y = flow_map(problem, s, problem.t0, x)
        slope = jnp.exp(marginal_s.log_prob(x) - marginal_t0.log_prob(y))  # dy/dx
        log_h, grad = ratio_of_laws(problem.start, marginal_t0)(y)
        return Ratio(log_h, slope * grad)

    return ratio


class Flow(NamedTuple):
    """Points carried by the probability-flow ODE: where they arrive, and the Jacobian of the map there."""

    x: Float[Array, "n d"]
    jacobian: Float[Array, "n d d"]


def flow(problem: Problem, y: Float[Array, "n d"], s: float, rtol: float = 1e-11) -> Flow:
    """Carries points from t0 to s along the probability-flow ODE and its variational equation, in any dimension.

    dx/dt = f x - g²/2 score, dJ/dt = (d drift/dx) J, by the 8th-order Runge-Kutta method of Dormand and Prince
    (scipy's DOP853). log|det J| is the log-determinant of the change of variables.
    """
    n, d = y.shape
    state = np.concatenate([np.ravel(y), np.tile(np.eye(d).ravel(), n)])
    span = (float(problem.t0), float(s))
    velocity = lambda t, state: np.asarray(_flow_velocity(problem, t, state))  # noqa: E731
    solution = solve_ivp(velocity, span, state, method="DOP853", rtol=rtol, atol=rtol)
    end = jnp.asarray(solution.y[:, -1])
    return Flow(end[: n * d].reshape(n, d), end[n * d :].reshape(n, d, d))


@jax.jit
def _flow_velocity(problem: Problem, t: Time, state: Float[Array, " n_d_dd"]) -> Float[Array, " n_d_dd"]:
    """d(x, J)/dt of `flow`, all points in one vector; their number follows from its length."""
    d = problem.target.dim
    n = state.size // (d + d * d)
    x, jacobian = state[: n * d].reshape(n, d), state[n * d :].reshape(n, d, d)
    marginal = problem.marginal(t)

    def drift(x: Point) -> Point:
        # Eq. (5) with the score itself, which is smooth at t = 0 where eps / sigma is 0/0.
        return problem.schedule.f(t) * x - problem.schedule.beta(t) / 2 * marginal.score(x)

    dx, slope = jax.vmap(lambda x: (drift(x), jax.jacfwd(drift)(x)))(x)
    return jnp.concatenate([dx.ravel(), (slope @ jacobian).ravel()])


def kl_ode(problem: Problem, s: float, points: int = 65) -> Estimate:
    """KL(p~_s | p_s) under the ODE in any dimension, from the flow and its log-determinant, not from Theorem 3.2.

    Nodes y for p~_t0 are carried to x; p~_s(x) = p~_t0(y) / |det J|.
    """
    if problem.target.dim == 1:
        rule = legendre_panels(panel_edges(problem.start, points // 2))
    else:
        rule = covering_rule(problem.start, points)
    carried = flow(problem, rule.nodes, s)
    log_start = problem.start.log_prob(rule.nodes)
    r = log_start - jnp.linalg.slogdet(carried.jacobian)[1] - problem.marginal(jnp.asarray(s)).log_prob(carried.x)
    # The average of r under p~ alone: the rule covers the start, not p, so E_p~[p / p~] = 1 is not at hand.
    return from_values(Divergence(lambda r, g: r), rule, log_start, r, jnp.zeros_like(r))


# --- a Gaussian target: closed form for every lam and dimension --------------------------------------------------


def law_gaussian(problem: Problem, s: Time, lam: float) -> GaussianMixture:
    """p~_s for a Gaussian target and any lam: each component of the start is mapped affinely and blurred.

    In the eigenbasis of the target, x_s - m_s = a (x_t0 - m_t0) + noise with a = sqrt(V_s / V_t0 rho),
    rho = [(alpha_t0² / V_t0) / (alpha_s² / V_s)]^(lam²), and the noise makes p_t0 arrive at p_s.
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
    return _from_covariances(problem.start.log_weights, means, push @ problem.start.covariances @ push.T + noise[None])


# --- curves ------------------------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """The distance of p~_s to p_s on a grid of times; every estimate holds arrays of shape (times,).

    `mode_weights`, (times, k), is the mean posterior probability of each component of the target under p~_s: how much
    of the edited law sits in each mode. `dirichlet` is E_p |grad h|², which chi2 loses at the rate lam² g². `mass` is
    the integral of p~_s, 1 to rounding. `w2` is nan in two dimensions, where it has no formula.
    """

    ts: Times
    kl: Estimate
    fisher: Estimate
    chi2: Estimate
    tv: Estimate
    w2: Estimate
    dirichlet: Estimate
    mass: Array
    mode_weights: Array


def contraction_curve(
    target: GaussianMixture,
    start: GaussianMixture,
    schedule: Schedule,
    ts: Float[Array, " times"],
    lam: float = 1.0,
) -> Curve:
    """The exact divergences of the reverse lambda-SDE started at ts[0] from `start` instead of the marginal.

    In one and two dimensions for lam = 1; for other lam on the line, or for a Gaussian target. ts decreases.

    Raises ValueError where no exact method applies, and for what `problem` refuses.
    """
    ts = jnp.asarray(ts, float)
    if not (np.all(np.diff(ts) < 0) and ts[-1] >= 0):
        raise ValueError("contraction_curve: ts must decrease and stay in [0, 1]")
    if lam < 0:
        raise ValueError(f"contraction_curve: lam must not be negative, got {lam}")
    given = problem(target, start, schedule, float(ts[0]))
    if target.dim > 2:
        raise ValueError(f"contraction_curve integrates in one or two dimensions, got d = {target.dim}")
    gaussian_target = len(target.log_weights) == 1
    if not gaussian_target and lam not in (0, 1) and target.dim == 1:
        from theory.heat import heat_curve

        return heat_curve(given, ts, lam)
    if not (gaussian_target or lam == 1 or (lam == 0 and target.dim == 1)):
        raise ValueError("contraction_curve: in two dimensions a mixture target needs lam = 1 (see kl_ode for lam = 0)")
    return _curve(given, ts, lam)


@partial(jax.jit, static_argnames="lam")
def _curve(given: Problem, ts: Times, lam: float) -> Curve:
    def later(s: Time) -> Curve:
        if len(given.target.log_weights) == 1:
            law, marginal = law_gaussian(given, s, lam), given.marginal(s)
            return _measure(given, s, ratio_of_laws(law, marginal), _union(marginal, law))
        if lam == 1:
            return _measure(given, s, ratio_sde(given, s), sde_cover(given, s))
        return _measure(given, s, ratio_ode(given, s), _cover_ode(given, s))

    at_start = ratio_of_laws(given.start, given.marginal(ts[0]))
    # The narrowest law of the curve, and the cheapest to evaluate.
    first = _measure(given, ts[0], at_start, sde_cover(given, ts[0]), points=151)
    rest = jax.lax.map(later, ts[1:])
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, rest)


def _measure(
    given: Problem, s: Time, ratio: Callable[[Point], Ratio], cover: GaussianMixture, points: int = 51
) -> Curve:
    """Every divergence at one time, on one rule; `points` per axis of the plane."""
    marginal = given.marginal(s)
    on_line = given.target.dim == 1
    rule = _rule_on_line(ratio, cover, marginal) if on_line else covering_rule(cover, points)
    log_h, grad = jax.lax.map(ratio, rule.nodes, batch_size=512)
    log_density = marginal.log_prob(rule.nodes) + log_h
    density = jnp.exp(log_density)
    g = jnp.sum(grad**2, axis=-1)

    def of(divergence: Divergence) -> Estimate:
        return from_values(divergence, rule, log_density, log_h, g)

    nan = jnp.full_like(s, jnp.nan)
    w2 = line.w2(rule, density, line.tails_from_density(rule, density), marginal) if on_line else Estimate(nan, nan)
    mode_weights = marginal.responsibilities(rule.nodes) @ (rule.weights * density)
    return Curve(
        s, of(KL), of(FISHER), of(CHI2), of(TV), w2, of(DIRICHLET), rule.integrate(density).value, mode_weights
    )


def _rule_on_line(ratio: Callable[[Point], Ratio], cover: GaussianMixture, marginal: GaussianMixture) -> Rule:
    """Panels that end where the densities cross, for TV, and at the quantiles of panels of the other law, for W2."""

    def log_h(x: Float[Array, " n"]) -> Float[Array, " n"]:
        return jax.vmap(ratio)(x[:, None]).log_h

    edges = split_at_roots(panel_edges(cover, 48), log_h)
    rule = legendre_panels(edges)
    density = jnp.exp(marginal.log_prob(rule.nodes) + log_h(rule.nodes[:, 0]))
    images = line.preimages(rule, density, line.tails(marginal, panel_edges(marginal, 24)))
    return legendre_panels(jnp.sort(jnp.concatenate([edges, images])))


def ratio_of_laws(law: GaussianMixture, marginal: GaussianMixture) -> Callable[[Point], Ratio]:
    """log(p~ / p) for two mixtures in closed form."""
    return lambda x: Ratio(law.log_prob(x) - marginal.log_prob(x), law.score(x) - marginal.score(x))


def _from_covariances(log_weights: Array, means: Array, covariances: Array) -> GaussianMixture:
    variances, axes = jnp.linalg.eigh(covariances)
    return GaussianMixture(log_weights, means, variances, axes)


def _union(*laws: GaussianMixture) -> GaussianMixture:
    """All the Gaussians of several mixtures, equally weighted: a cover for quadrature."""
    joined = [jnp.concatenate(parts) for parts in zip(*laws, strict=True)]
    count = len(joined[0])
    return GaussianMixture(jnp.full(count, -np.log(count)), *joined[1:])


def sde_cover(given: Problem, s: Time) -> GaussianMixture:
    """Gaussians that cover p_s, p~_s and the integrand of chi2, p~_s² / p_s.

    Under the reverse kernel of one component k of the target a Gaussian stays one: x_s = G (x_t0 - m_t0) + m_s + noise,
    G = c V_s V_t0^-1. The Gaussians pushed through are those of the start and, on the line, those of N~_j² / N_k.
    """
    before, after = given.marginal(given.t0), given.marginal(s)
    c = jnp.exp(given.schedule.log_alpha(given.t0) - given.schedule.log_alpha(s))
    means, covariances = given.start.means, given.start.covariances
    if given.target.dim == 1:
        squares, divisors = 2 / given.start.variances, 1 / before.variances[:, 0]
        precision = squares - divisors[None]  # (j, k)
        square = (squares * means - (divisors * before.means[:, 0])[None]) / precision
        usable = precision > 0.05 * squares
        square = jnp.where(usable, square, means)
        variance = jnp.where(usable, 1 / precision, given.start.variances)
        means = jnp.concatenate([means, square.reshape(-1, 1)])
        covariances = jnp.concatenate([covariances, variance.reshape(-1, 1, 1)])

    def push(m_t0, v_t0, m_s, v_s, axes):
        gain = c * v_s / v_t0
        G = (axes * gain[None]) @ axes.T
        noise = (axes * (v_s * (1 - c * gain))[None]) @ axes.T
        return m_s[None] + (means - m_t0[None]) @ G.T, G[None] @ covariances @ G.T[None] + noise[None]

    pushed = jax.vmap(push)(before.means, before.variances, after.means, after.variances, given.target.axes)
    d = given.target.dim
    moved = _from_covariances(jnp.zeros(pushed[0].size // d), pushed[0].reshape(-1, d), pushed[1].reshape(-1, d, d))
    return _union(after, moved)


def _cover_ode(given: Problem, s: Time) -> GaussianMixture:
    """p_s, and the images under the flow of the intervals that carry the start; d = 1."""
    stds = jnp.sqrt(given.start.variances[:, 0])
    ends = jnp.concatenate([given.start.means[:, 0] - REACH * stds, given.start.means[:, 0] + REACH * stds])
    low, high = flow_map(given, given.t0, s, ends).reshape(2, -1)
    images = given.start._replace(
        means=((low + high) / 2)[:, None], variances=(((high - low) / (2 * REACH)) ** 2)[:, None]
    )
    return _union(given.marginal(s), images)
