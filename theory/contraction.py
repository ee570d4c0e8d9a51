"""The exact divergences of the edited law from the right one, at every time of the way back, without sampling."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from theory import line
from theory.arguments import level, prepared
from theory.divergences import (
    F_DIVERGENCES,
    TV,
    at_nodes,
    gaussian_chi2,
    gaussian_dirichlet,
    gaussian_fisher,
    gaussian_kl,
    gaussian_renyi,
    gaussian_w2,
)
from theory.flows import flow_map
from theory.heat import heat_curve
from theory.mixtures import GaussianMixture, from_covariances
from theory.problems import Curve, Problem, problem
from theory.quadrature import (
    REACH,
    Rule,
    absolute,
    coarsened,
    covering_rule,
    legendre_panels,
    length,
    panel_edges,
    panel_errors,
    piecewise,
)
from theory.ratios import Point, Ratio, law_gaussian, log_prob_errors, ratio_ode, ratio_of_laws, ratio_sde
from theory.tails import chi2_is_finite, is_decided
from theory.types import Estimate, Schedule, Time

# A panel of the line is this many standard deviations wide to begin with, and cut where the error asks for it.
WIDTH = 0.8
WANTED = 1e-13  # of every panel's error, relative to the whole
ROUNDS, MOST_PANELS = 12, 8192
POINTS = {"first": 151, "later": 77}  # per axis of the plane; the law at t0 is the narrowest and the cheapest


@prepared(lam=level)
def contraction_curve(
    target: GaussianMixture,
    start: GaussianMixture,
    schedule: Schedule,
    ts: Float[Array, " times"],
    lam: float = 1.0,
    w2: bool = True,
) -> Curve:
    """The exact divergences of the reverse lambda-SDE started at ts[0] from `start` instead of the marginal.

    In one and two dimensions for lam = 1; for other lam on the line, or for a Gaussian target; in more for two
    Gaussians. ts decreases. On the line the panels of the quadrature are cut until every error is at rounding, or no
    cutting helps; the errors are those of what is returned. Without `w2` it is nan, and all takes a third less time.
    See `divergences_at` for what can be jitted.

    Raises ValueError where no exact method applies, and for what `problem` refuses.
    """
    times = np.asarray(ts, float)
    if not (times.ndim == 1 and len(times) and np.all(np.diff(times) < 0) and times[-1] >= 0):
        raise ValueError("contraction_curve: ts must decrease and stay in [0, 1]")
    given = problem(target, start, schedule, times[0])
    if _by_heat(given, lam):
        return heat_curve(given, jax.device_put(times), lam)
    # Time by time: grids of all lengths share two programs.
    later = [jax.device_put(s) for s in times[1:]]
    if given.target.dim == 1:
        longest = max(float(_length(given, s, lam)) for s in (None, *later))
        parts = [_refined(given, s, lam, _enough(int(longest / WIDTH) + 1), w2) for s in (None, *later)]
    else:
        parts = [divergences_at(given, s, lam) for s in (None, *later)]
    return jax.tree.map(lambda *values: jax.device_put(np.stack(values)), *parts)


@partial(jax.jit, static_argnames=("lam", "panels", "copies"))
def divergences_at(
    given: Problem, s: Time | None = None, lam: float = 1.0, panels: int = 128, copies: int | None = None
) -> Curve:
    """`contraction_curve` at one time s < t0, or at t0 itself (None), with a fixed number of panels on the line.

    It may be jitted, batched and differentiated in the laws, in t0 and s; in reverse with given `copies` of the
    kernel's grid, 1 where no two components of the marginal at t0 are far apart. The errors tell whether `panels` and
    `copies` were enough; error of a derivative they are not.

    Raises ValueError where no exact method applies.
    """
    _check_method(given, lam)
    if given.target.dim > 2:
        return _in_closed_form(given, s, lam)
    if given.target.dim == 1:
        return _on_panels(given, s, lam, jax.lax.stop_gradient(_edges(given, s, lam, panels)), copies)[0]
    return _in_plane(given, s, lam, copies)


def _by_heat(given: Problem, lam: float) -> bool:
    return len(given.target.log_weights) > 1 and given.target.dim == 1 and lam not in (0, 1)


def _check_method(given: Problem, lam: float) -> None:
    """Raises ValueError where no exact method applies."""
    d, one = given.target.dim, len(given.target.log_weights) == 1
    if d > 2 and not (one and len(given.start.log_weights) == 1):
        raise ValueError(
            f"contraction_curve integrates in one or two dimensions, got d = {d}: there target and start must be "
            "Gaussians (see divergences.by_monte_carlo for other laws)"
        )
    if not (one or lam == 1 or (lam == 0 and d == 1)):
        raise ValueError(
            "contraction_curve: a mixture target needs lam = 1 in two dimensions (see kl_ode for lam = 0), and on the "
            "line lam = 0 or 1 (see heat_curve for others)"
        )


def _ratio(given: Problem, s: Time | None, lam: float, copies: int | None) -> Callable[[Point], Ratio]:
    if s is None:
        return ratio_of_laws(given.start, given.marginal(given.t0))
    if len(given.target.log_weights) == 1:
        return ratio_of_laws(law_gaussian(given, s, lam), given.marginal(s))
    return ratio_sde(given, s, copies) if lam == 1 else ratio_ode(given, s)


# --- the line ----------------------------------------------------------------------------------------------------


def _enough(panels: int) -> int:
    """At least so many panels, of few sizes: each is a program."""
    return next(64 * 2**i for i in range(20) if 64 * 2**i >= min(panels, MOST_PANELS))


@partial(jax.jit, static_argnames="lam")
def _length(given: Problem, s: Time | None, lam: float) -> Float[Array, ""]:
    return length(_cover(given, s, lam))


@partial(jax.jit, static_argnames=("lam", "panels"))
def _edges(given: Problem, s: Time | None, lam: float, panels: int) -> Float[Array, " panels_1"]:
    return panel_edges(_cover(given, s, lam), panels)


def _refined(given: Problem, s: Time | None, lam: float, panels: int, w2: bool) -> Curve:
    """The curve at one time on panels that are cut into four where their error is too large."""
    edges = _edges(given, s, lam, panels)
    found, excess = _on_panels(given, s, lam, edges, w2=w2)
    for _ in range(ROUNDS):
        edges, bad = np.asarray(edges), np.asarray(excess) > 1
        cut = np.unique(np.concatenate([edges, *(edges[:-1][bad] + i / 4 * np.diff(edges)[bad] for i in (1, 2, 3))]))
        size = _enough(len(cut) - 1)
        if not bad.any() or size < len(cut) - 1:
            break
        edges = np.append(cut, np.full(size + 1 - len(cut), cut[-1]))  # panels of no width change nothing
        found, excess = _on_panels(given, s, lam, jax.device_put(edges), w2=w2)
    return found


@partial(jax.jit, static_argnames=("lam", "copies", "w2"))
def _on_panels(
    given: Problem,
    s: Time | None,
    lam: float,
    edges: Float[Array, " panels_1"],
    copies: int | None = None,
    w2: bool = True,
) -> tuple[Curve, Float[Array, " panels"]]:
    """Every divergence at one time, and of every panel how far its error exceeds what is wanted."""
    at = given.t0 if s is None else s
    rule = legendre_panels(edges)
    found = _integrands(given, at, rule, jax.vmap(_ratio(given, s, lam, copies))(rule.nodes))
    del found["tv"]  # has a kink
    known, poorer = (jnp.stack([values[i] for values in found.values()]) for i in (0, 1))
    errors, unknown = jax.vmap(partial(panel_errors, rule))(known), jnp.abs(poorer - known) @ rule.weights
    totals = known @ rule.weights
    wanted = WANTED * jnp.abs(totals) + unknown / 10
    counted = jnp.isfinite(wanted) & (wanted > 0)
    excess = jnp.max(jnp.where(counted[:, None], errors / wanted[:, None], 0.0), axis=0)
    integrals = {name: Estimate(*each) for name, *each in zip(found, totals, errors.sum(1) + unknown, strict=True)}

    density, other = found["mass"]
    right = jnp.exp(given.marginal(at).log_prob(rule.nodes))
    gap = density - right
    tv, coarse = (absolute(piecewise(edges, values)) / 2 for values in (gap, coarsened(gap)))
    tv_error = jnp.abs(tv - coarse) + rule.weights @ jnp.abs(other - density) / 2
    distance = _w2(edges, density, right, other) if w2 else Estimate(*2 * (jnp.full_like(tv, jnp.nan),))
    return _curve(given, at, lam, integrals, Estimate(tv, tv_error), distance), excess


def _w2(
    edges: Float[Array, " panels_1"], density: Float[Array, " n"], right: Float[Array, " n"], other: Float[Array, " n"]
) -> Estimate:
    """W2 of two densities on panels; `other` is one that is as right as the first."""
    law, of_right, *others = (piecewise(edges, values) for values in (density, right, other, coarsened(density)))
    return line.w2(law, of_right, tuple(others))


# --- the plane, and beyond ---------------------------------------------------------------------------------------


def _in_plane(given: Problem, s: Time | None, lam: float, copies: int | None) -> Curve:
    at = given.t0 if s is None else s
    rule = covering_rule(_cover(given, s, lam), POINTS["first" if s is None else "later"])
    # Batches keep the plane's many nodes in the cache.
    ratio = jax.lax.map(_ratio(given, s, lam, copies), rule.nodes, batch_size=512)
    found = _integrands(given, at, rule, ratio)
    gaussians = len(given.target.log_weights) == len(given.start.log_weights) == 1
    nan = jnp.full_like(at, jnp.nan)
    law = given.start if s is None else law_gaussian(given, s, lam) if gaussians else None
    w2 = Estimate(nan, nan) if law is None or not gaussians else _rounded(gaussian_w2(law, given.marginal(at)))
    integrals = {name: rule.integrate(*values) for name, values in found.items()}
    return _curve(given, at, lam, integrals, integrals["tv"], w2)


def _in_closed_form(given: Problem, s: Time | None, lam: float) -> Curve:
    """Two Gaussians in any dimension. What has no closed form is nan."""
    at = given.t0 if s is None else s
    q = given.marginal(at)
    p = given.start if s is None else law_gaussian(given, at, lam)
    nan = jnp.full_like(at, jnp.nan)
    affinity = jnp.exp(-gaussian_renyi(p, q, 0.5) / 2)
    f = {"kl": gaussian_kl(p, q), "reverse_kl": gaussian_kl(q, p), "chi2": gaussian_chi2(p, q)}
    f |= {"hellinger": 1 - affinity, "jensen_shannon": nan}
    rates = {"kl": gaussian_fisher(p, q), "reverse_kl": gaussian_fisher(q, p), "chi2": 2 * gaussian_dirichlet(p, q)}
    rates |= {"hellinger": nan, "jensen_shannon": nan}
    one = jnp.ones_like(at)
    f, rates = ({name: _rounded(value) for name, value in each.items()} for each in (f, rates))
    return Curve(at, f, rates, Estimate(nan, nan), _rounded(gaussian_w2(p, q)), _rounded(one), _rounded(one[None]))


def _rounded(value: Array) -> Estimate:
    return Estimate(value, 1e-12 * jnp.abs(value))


# --- both --------------------------------------------------------------------------------------------------------

Integrands = dict[str, tuple[Float[Array, " n"], Float[Array, " n"]]]


def _integrands(given: Problem, at: Time, rule: Rule, ratio: Ratio) -> Integrands:
    """What is integrated over x, and the same as far off as the ratio may be."""
    marginal = given.marginal(at)
    log_q, modes = marginal.log_prob(rule.nodes), marginal.responsibilities(rule.nodes)

    def values(r: Float[Array, " n"], grad: Float[Array, "n d"]) -> dict[str, Float[Array, " n"]]:
        g = jnp.sum(grad**2, axis=-1)
        density = jnp.exp(log_q + r)
        return (
            {"mass": density, "tv": at_nodes(TV, log_q, r, g)}
            | {f"mode {k}": share * density for k, share in enumerate(modes)}
            | {f"f {name}": at_nodes(f.divergence, log_q, r, g) for name, f in F_DIVERGENCES.items()}
            | {f"rate {name}": at_nodes(f.rate, log_q, r, g) for name, f in F_DIVERGENCES.items()}
        )

    # Away from h = 1 all that is not linear in h grows.
    r = jnp.stack([ratio.log_h, ratio.log_h + jnp.where(ratio.log_h < 0, -ratio.error, ratio.error)])
    grad = jnp.stack([ratio.grad, jnp.abs(ratio.grad) + ratio.grad_error])
    of_q = jax.vmap(lambda x: log_prob_errors(marginal, x)[0])(rule.nodes)
    return {
        name: (known, known + jnp.abs(moved - known) + jnp.abs(known) * of_q)
        for name, (known, moved) in jax.vmap(values)(r, grad).items()
    }


def _curve(given: Problem, at: Time, lam: float, integrals: dict[str, Estimate], tv: Estimate, w2: Estimate) -> Curve:
    integrals = dict(integrals)
    finite, decided = chi2_is_finite(given, at, lam), is_decided(given, at, lam)
    for name in ("f chi2", "rate chi2"):
        value, error = integrals[name]
        # The integrand is positive: what is not a number has overflowed.
        value = jnp.where(finite & ~jnp.isnan(value), value, jnp.inf)
        error = jnp.where(jnp.isfinite(value), error, 0.0)
        integrals[name] = Estimate(jnp.where(decided, value, jnp.nan), jnp.where(decided, error, jnp.nan))
    f, rates = ({name: integrals[f"{kind} {name}"] for name in F_DIVERGENCES} for kind in ("f", "rate"))
    modes = [integrals[f"mode {k}"] for k in range(len(given.target.log_weights))]
    return Curve(at, f, rates, tv, w2, integrals["mass"], Estimate(*map(jnp.stack, zip(*modes, strict=True))))


def _cover(given: Problem, s: Time | None, lam: float) -> GaussianMixture:
    """Gaussians that cover p_s, p~_s and p~_s² / p_s, equally weighted."""
    if s is None:
        s, law = given.t0, given.start
    elif len(given.target.log_weights) == 1:
        law = law_gaussian(given, s, lam)
    elif lam == 1:
        return sde_cover(given, s)
    else:
        law = _images(given, s)
    return _union(given.marginal(s), law, _squares(law, given.marginal(s)))


def sde_cover(given: Problem, s: Time) -> GaussianMixture:
    """Gaussians that cover p_s, p~_s and the integrand of chi2, p~_s² / p_s, lam = 1.

    Under the reverse kernel of one component k of the target a Gaussian stays one: x_s = G (x_t0 - m_t0) + m_s + noise,
    G = c V_s V_t0^-1, and p~_s is at most the sum of all those of the start, each by each k.
    """
    before, after = given.marginal(given.t0), given.marginal(s)
    c = jnp.exp(given.schedule.log_alpha(given.t0) - given.schedule.log_alpha(s))
    means, covariances = given.start.means, given.start.covariances

    def push(m_t0, v_t0, m_s, v_s, axes):
        gain = c * v_s / v_t0
        G = (axes * gain[None]) @ axes.T
        noise = (axes * (v_s * (1 - c * gain))[None]) @ axes.T
        return m_s[None] + (means - m_t0[None]) @ G.T, G[None] @ covariances @ G.T[None] + noise[None]

    pushed = jax.vmap(push)(before.means, before.variances, after.means, after.variances, given.target.axes)
    d = given.target.dim
    moved = from_covariances(jnp.zeros(pushed[0].size // d), pushed[0].reshape(-1, d), pushed[1].reshape(-1, d, d))
    return _union(after, moved, _squares(moved, after))


def _squares(law: GaussianMixture, marginal: GaussianMixture) -> GaussianMixture:
    """The Gaussians N_j² / N_k, up to factors, for the components j of a law and k of the marginal.

    On the line for every k; in the plane one for each j: for the k, or the mean of all precisions (1 / p is at most a
    constant over the geometric mean), that leaves the narrowest. Where none can be divided by, N_j itself.
    """
    P, Q = jnp.linalg.inv(law.covariances), jnp.linalg.inv(marginal.covariances)
    Q, m = (jnp.concatenate([a, b[None]]) for a, b in ((Q, Q.mean(0)), (marginal.means, marginal.means.mean(0))))
    M = 2 * P[:, None] - Q[None]
    least = jnp.linalg.eigvalsh(M)[..., 0]
    usable = least > 1e-4 * jnp.linalg.eigvalsh(P)[:, :1]
    pull = 2 * (P @ law.means[..., None])[:, None, :, 0] - (Q @ m[..., None])[None, :, :, 0]
    M = jnp.where(usable[..., None, None], M, P[:, None])
    means = jnp.where(usable[..., None], jnp.linalg.solve(M, pull[..., None])[..., 0], law.means[:, None])
    covariances, d = jnp.linalg.inv(M), law.dim
    if d > 1:
        best, j = jnp.argmax(least, axis=1), jnp.arange(len(P))
        means, covariances = means[j, best], covariances[j, best]
    flat = means.reshape(-1, d), covariances.reshape(-1, d, d)
    return from_covariances(jnp.zeros(len(flat[0])), *flat)


def _union(*laws: GaussianMixture) -> GaussianMixture:
    """All the Gaussians of several mixtures, equally weighted: a cover for quadrature."""
    joined = [jnp.concatenate(parts) for parts in zip(*laws, strict=True)]
    count = len(joined[0])
    return GaussianMixture(jnp.full(count, -np.log(count)), *joined[1:])


def _images(given: Problem, s: Time) -> GaussianMixture:
    """Gaussians on the images under the flow of the intervals that carry the start; d = 1."""
    stds = jnp.sqrt(given.start.variances[:, 0])
    ends = jnp.concatenate([given.start.means[:, 0] - REACH * stds, given.start.means[:, 0] + REACH * stds])
    low, high = flow_map(given, given.t0, s, ends).reshape(2, -1)
    return given.start._replace(
        means=((low + high) / 2)[:, None], variances=(((high - low) / (2 * REACH)) ** 2)[:, None]
    )
