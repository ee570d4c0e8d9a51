"""The exact divergences of the edited law from the right one, at every time of the way back, without sampling."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from theory import line
from theory.divergences import CHI2, DIRICHLET, FISHER, KL, TV, Divergence, from_values
from theory.flows import flow_map
from theory.heat import heat_curve
from theory.mixtures import GaussianMixture, from_covariances
from theory.problems import Curve, Problem, problem
from theory.quadrature import REACH, Rule, covering_rule, legendre_panels, panel_edges, split_at_roots
from theory.ratios import Point, Ratio, law_gaussian, ratio_ode, ratio_of_laws, ratio_sde
from theory.types import Estimate, Schedule, Time


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
    times = np.asarray(ts, float)
    if not (np.all(np.diff(times) < 0) and times[-1] >= 0):
        raise ValueError("contraction_curve: ts must decrease and stay in [0, 1]")
    if lam < 0:
        raise ValueError(f"contraction_curve: lam must not be negative, got {lam}")
    given = problem(target, start, schedule, times[0])
    if target.dim > 2:
        raise ValueError(f"contraction_curve integrates in one or two dimensions, got d = {target.dim}")
    gaussian_target = len(target.log_weights) == 1
    if not gaussian_target and lam not in (0, 1) and target.dim == 1:
        return heat_curve(given, jax.device_put(times), lam)
    if not (gaussian_target or lam == 1 or (lam == 0 and target.dim == 1)):
        raise ValueError("contraction_curve: in two dimensions a mixture target needs lam = 1 (see kl_ode for lam = 0)")
    # Time by time: grids of all lengths share two programs.
    parts = [_first(given), *(_later(given, jax.device_put(s), lam) for s in times[1:])]
    return jax.tree.map(lambda *values: jax.device_put(np.stack(values)), *parts)


@jax.jit
def _first(given: Problem) -> Curve:
    t0 = given.t0
    ratio = ratio_of_laws(given.start, given.marginal(t0))
    # The narrowest law of the curve, and the cheapest to evaluate.
    return _measure(given, t0, ratio, sde_cover(given, t0), points=151)


@partial(jax.jit, static_argnames="lam")
def _later(given: Problem, s: Time, lam: float) -> Curve:
    if len(given.target.log_weights) == 1:
        law, marginal = law_gaussian(given, s, lam), given.marginal(s)
        return _measure(given, s, ratio_of_laws(law, marginal), _union(marginal, law))
    if lam == 1:
        return _measure(given, s, ratio_sde(given, s), sde_cover(given, s))
    return _measure(given, s, ratio_ode(given, s), _cover_ode(given, s))


def _measure(
    given: Problem, s: Time, ratio: Callable[[Point], Ratio], cover: GaussianMixture, points: int = 77
) -> Curve:
    """Every divergence at one time, on one rule; `points` per axis of the plane."""
    marginal = given.marginal(s)
    on_line = given.target.dim == 1
    rule = _rule_on_line(ratio, cover, marginal) if on_line else covering_rule(cover, points)
    # Batches keep the plane's many nodes in the cache; on the line they would only be compiled twice.
    log_h, grad = jax.vmap(ratio)(rule.nodes) if on_line else jax.lax.map(ratio, rule.nodes, batch_size=512)
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
    moved = from_covariances(jnp.zeros(pushed[0].size // d), pushed[0].reshape(-1, d), pushed[1].reshape(-1, d, d))
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
