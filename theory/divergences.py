"""Divergences between two laws, by closed form, quadrature or Monte Carlo.

Every f-divergence here is an expectation under p of a function of r = log(p / q) and |grad r|², so one definition
serves quadrature and Monte Carlo. Conventions: KL in nats; the Fisher divergence is E_p |grad log(p/q)|² without a
factor 1/2, so that dKL/dt = 1/2 lam² g² I along the reverse lambda-SDE.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.scipy.special import ndtr
from jaxtyping import Array, Float

from theory.mixtures import GaussianMixture
from theory.quadrature import Rule
from theory.types import Estimate, PRNGKey

Scalar = Float[Array, ""]
Values = Float[Array, " n"]
LogDensity = Callable[[Float[Array, " d"]], Scalar]


class Divergence(NamedTuple):
    """D(p|q) = finish(E_p[integrand(r, |grad r|²)]), r = log(p/q).

    `per_q` is exp(r) integrand, for r < 0, where the integrand overflows and this does not; `per_square` likewise
    exp(-r) integrand, for r > 0.
    """

    integrand: Callable[[Values, Values], Values]
    finish: Callable[[Array], Array] = lambda mean: mean
    per_q: Callable[[Values, Values], Values] | None = None
    per_square: Callable[[Values, Values], Values] | None = None


class FDivergence(NamedTuple):
    """D_f(p|q) = E_q f(h), h = p/q = exp(r), f convex with f(1) = 0 (Csiszar 1967), and what it loses on the way back.

    With f'(1) = 0 too, f >= 0: no cancellation. Along the reverse lambda-SDE dD_f/dt = lam²/2 g² rate, with
    rate = E_q[f''(h) |grad h|²] = E_p[h f''(h) |grad r|²].
    """

    divergence: Divergence  # of f(h) / h
    slope: Callable[[Array], Array]  # f'(h)
    rate: Divergence  # of h f''(h) |grad r|²


def _jensen_shannon(r: Values, g: Values) -> Values:
    # of h log h / 2 - (1 + h) / 2 log((1 + h) / 2), written as the mean of KL(p|m) and KL(q|m), m = (p + q) / 2
    of_p, of_q = r - jax.nn.softplus(r) + jnp.log(2.0), jnp.log(2.0) - jax.nn.softplus(r)
    small = jnp.minimum(r, 1.0)
    near = jnp.exp(-small) * (of_q + jnp.expm1(-jnp.log(2.0) + jax.nn.softplus(small)))
    far = jnp.exp(-r) * of_q - jnp.expm1(-r) / 2  # the same where exp(r) overflows
    return (of_p + jnp.expm1(-of_p) + jnp.where(r > 1, far, near)) / 2


# Of KL it uses E_p[q / p] = 1, and of the others likewise.
F_DIVERGENCES = {
    "kl": FDivergence(
        Divergence(lambda r, g: r + jnp.expm1(-r)),
        slope=lambda r: r,
        rate=Divergence(lambda r, g: g),
    ),
    "reverse_kl": FDivergence(  # KL(q|p)
        Divergence(lambda r, g: -r * jnp.exp(-r) - jnp.expm1(-r), per_q=lambda r, g: jnp.expm1(r) - r),
        slope=lambda r: -jnp.exp(-r),
        rate=Divergence(lambda r, g: jnp.exp(-r) * g, per_q=lambda r, g: g),
    ),
    "chi2": FDivergence(
        Divergence(lambda r, g: 4 * jnp.sinh(r / 2) ** 2, per_square=lambda r, g: jnp.expm1(-r) ** 2),
        slope=lambda r: 2 * jnp.exp(r),
        rate=Divergence(lambda r, g: 2 * jnp.exp(r) * g, per_square=lambda r, g: 2 * g),
    ),
    "hellinger": FDivergence(  # squared: 1 - E_q sqrt(h)
        Divergence(lambda r, g: jnp.expm1(-r / 2) ** 2 / 2),
        slope=lambda r: -jnp.exp(-r / 2) / 2,
        rate=Divergence(lambda r, g: jnp.exp(-r / 2) / 4 * g),
    ),
    "jensen_shannon": FDivergence(
        Divergence(_jensen_shannon, per_q=lambda r, g: _jensen_shannon(-r, g)),  # it is symmetric
        slope=lambda r: -jax.nn.softplus(-r) / 2,
        rate=Divergence(lambda r, g: jax.nn.sigmoid(-r) / 2 * g),
    ),
}
KL, CHI2 = (F_DIVERGENCES[name].divergence for name in ("kl", "chi2"))
FISHER = F_DIVERGENCES["kl"].rate
TV = Divergence(lambda r, g: jnp.abs(jnp.expm1(-r)) / 2)
# Not a divergence of its own, but the rate of one: E_q |grad (p/q)|².
DIRICHLET = Divergence(lambda r, g: jnp.exp(r) * g)


def renyi(order: float) -> Divergence:
    """log E_p[(p/q)^(order - 1)] / (order - 1), order > 0 other than 1. Van Erven & Harremoes 2014, eq. (10)."""
    if order <= 0 or order == 1:
        raise ValueError(f"renyi: order must be positive and not 1 (that is KL), got {order}")
    return Divergence(lambda r, g: jnp.exp((order - 1) * r), lambda mean: jnp.log(mean) / (order - 1))


def _finish(divergence: Divergence, mean: Array | np.ndarray, error: Array | np.ndarray) -> Estimate:
    """Passes a mean and its error through `finish`; first order, as both errors are small."""
    value, slope = jax.value_and_grad(divergence.finish)(mean)
    return Estimate(value, jnp.abs(slope) * error)


def _per_larger(divergence: Divergence, r: Float[Array, "*n"], g: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """p integrand(r, g) / max(p, q): where p vanishes against q the integrands grow like q / p, and q counts."""
    if divergence.per_q is not None:
        return jnp.where(r < 0, divergence.per_q(r, g), divergence.integrand(jnp.maximum(r, 0.0), g))
    floored = jnp.maximum(r, -700.0)  # exp(700) is finite
    return jnp.exp(jnp.minimum(floored, 0.0)) * divergence.integrand(floored, g)


def at_nodes(divergence: Divergence, log_q: Values, r: Values, g: Values) -> Values:
    """p integrand(r, |grad r|²) from log q, r = log(p/q) and g = |grad r|²: what is integrated over x."""
    larger = jnp.exp(log_q + jnp.maximum(r, 0.0))
    # Where both are zero to rounding, r may be huge: 0 * inf.
    values = jnp.where(larger > 0, larger * _per_larger(divergence, r, g), 0.0)
    if divergence.per_square is None:
        return values
    up = jnp.maximum(r, 0.0)
    return jnp.where(r > 0, jnp.exp(log_q + 2 * up) * divergence.per_square(up, g), values)


def from_values(divergence: Divergence, rule: Rule, log_p: Values, r: Values, g: Values) -> Estimate:
    """D(p|q) from log p, r = log(p/q) and g = |grad r|² at the nodes of a rule that covers both laws."""
    return _finish(divergence, *rule.integrate(at_nodes(divergence, log_p - r, r, g)))


def by_quadrature(divergence: Divergence, log_p: LogDensity, log_q: LogDensity, rule: Rule) -> Estimate:
    """D(p|q) in one or two dimensions; the rule must cover both laws."""
    r, grad = jax.vmap(jax.value_and_grad(lambda x: log_p(x) - log_q(x)))(rule.nodes)
    return from_values(divergence, rule, jax.vmap(log_p)(rule.nodes), r, jnp.sum(grad**2, axis=-1))


def by_monte_carlo(
    divergence: Divergence, p: GaussianMixture, q: GaussianMixture, key: PRNGKey, samples: int
) -> Estimate:
    """D(p|q) in any dimension from `samples` draws of each law; the error is one standard error.

    The integrands average q / p, whose large values draws of p never meet; those of m = (p + q) / 2 do, and
    max(p, q) / m is at most 2.
    """

    def values(x: Float[Array, " d"]) -> Scalar:
        r, grad = jax.value_and_grad(lambda x: p.log_prob(x) - q.log_prob(x))(x)
        return 2 * jax.nn.sigmoid(jnp.abs(r)) * _per_larger(divergence, r, grad @ grad)

    halves = [jax.vmap(values)(law.sample(k, (samples,))) for law, k in zip((p, q), jr.split(key), strict=True)]
    mean = (halves[0].mean() + halves[1].mean()) / 2
    return _finish(divergence, mean, jnp.sqrt((halves[0].var(ddof=1) + halves[1].var(ddof=1)) / samples) / 2)


# Closed forms between Gaussians p = N(m, C) and q = N(n, D), given as mixtures of one component.


def _moments(p: GaussianMixture) -> tuple[Float[Array, " d"], Float[Array, "d d"]]:
    if len(p.log_weights) != 1:
        raise ValueError(f"a closed form needs a Gaussian, got a mixture of {len(p.log_weights)} components")
    return p.means[0], p.covariances[0]


@jax.jit
def gaussian_kl(p: GaussianMixture, q: GaussianMixture) -> Scalar:
    """1/2 [tr(D^-1 C) - d + |m - n|²_(D^-1) + log(det D / det C)]."""
    (m, C), (n, D) = _moments(p), _moments(q)
    eigenvalues = jnp.linalg.eigvals(jnp.linalg.solve(D, C)).real
    shift = (m - n) @ jnp.linalg.solve(D, m - n)
    # Eigenvalues close to 1 cancel term by term, not in the sum.
    return (shift + jnp.sum((eigenvalues - 1) - jnp.log(eigenvalues))) / 2


def gaussian_fisher(p: GaussianMixture, q: GaussianMixture) -> Scalar:
    """E_p |grad log p/q|²: grad log p/q = (D^-1 - C^-1)(x - m) + D^-1 (m - n)."""
    (m, C), (n, D) = _moments(p), _moments(q)
    difference = jnp.linalg.inv(D) - jnp.linalg.inv(C)
    pull = jnp.linalg.solve(D, m - n)
    return jnp.trace(difference @ C @ difference) + pull @ pull


def gaussian_renyi(p: GaussianMixture, q: GaussianMixture, order: float) -> Scalar:
    """q/2 |m - n|²_(S^-1) - log(det S / (det C^(1-q) det D^q)) / (2 (q - 1)), S = (1 - q) C + q D, q = order.

    Gil, Alajaji & Linder 2013, Table 2. Infinite where S is not positive definite.
    """
    (m, C), (n, D) = _moments(p), _moments(q)
    S = (1 - order) * C + order * D
    log_det = jnp.linalg.slogdet(S)[1] - (1 - order) * jnp.linalg.slogdet(C)[1] - order * jnp.linalg.slogdet(D)[1]
    value = order / 2 * (m - n) @ jnp.linalg.solve(S, m - n) - log_det / (2 * (order - 1))
    return jnp.where(jnp.linalg.eigvalsh(S)[0] > 0, value, jnp.inf)


def gaussian_chi2(p: GaussianMixture, q: GaussianMixture) -> Scalar:
    """exp(Renyi divergence of order 2) - 1."""
    return jnp.expm1(gaussian_renyi(p, q, 2.0))


def gaussian_dirichlet(p: GaussianMixture, q: GaussianMixture) -> Scalar:
    """E_q |grad h|² = E_q[h² |grad log h|²], where h² q is (1 + chi2) N(mu, M^-1), M = 2 C^-1 - D^-1.

    Infinite where chi2 is.
    """
    (m, C), (n, D) = _moments(p), _moments(q)
    P, Q = jnp.linalg.inv(C), jnp.linalg.inv(D)
    M = 2 * P - Q
    mu = jnp.linalg.solve(M, 2 * P @ m - Q @ n)
    pull = (Q - P) @ mu + P @ m - Q @ n  # grad log h = (Q - P) x + P m - Q n at mu
    value = (1 + gaussian_chi2(p, q)) * (pull @ pull + jnp.trace((Q - P) @ jnp.linalg.inv(M) @ (Q - P)))
    return jnp.where(jnp.linalg.eigvalsh(M)[0] > 0, value, jnp.inf)


def gaussian_w2(p: GaussianMixture, q: GaussianMixture) -> Scalar:
    """sqrt(|m - n|² + tr(C + D - 2 (D^1/2 C D^1/2)^1/2)). Givens & Shortt 1984."""
    (m, C), (n, D) = _moments(p), _moments(q)
    root = (q.axes[0] * jnp.sqrt(q.variances[0])[None]) @ q.axes[0].T
    cross = jnp.sum(jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(root @ C @ root), 0.0)))
    return jnp.sqrt(jnp.maximum((m - n) @ (m - n) + jnp.trace(C) + jnp.trace(D) - 2 * cross, 0.0))


def gaussian_tv(p: GaussianMixture, q: GaussianMixture) -> Scalar:
    """|P(A) - Q(A)|, A the interval between the two points where the densities cross; d = 1 only.

    With p = N(m, a²), q = N(m + gap, b²) and x = m + y, log p(x) = log q(x) is a quadratic equation,
    (a² - b²) y² - 2 a² gap y + a² gap² + 2 a² b² log(b/a) = 0. For a = b one crossing is at infinity.
    """
    (m, C), (n, D) = _moments(p), _moments(q)
    if p.dim != 1:
        raise ValueError(f"gaussian_tv needs d = 1, got d = {p.dim}")
    gap, a, b = (n - m)[0], jnp.sqrt(C[0, 0]), jnp.sqrt(D[0, 0])
    log_ratio = jnp.log(b / a)
    root = a * b * jnp.sqrt(gap**2 + 2 * (b**2 - a**2) * log_ratio)
    # The larger root directly, the smaller one from their product: no cancellation.
    larger = a**2 * gap + jnp.where(gap < 0, -root, root)
    y = jnp.stack([larger / (a**2 - b**2), a**2 * (gap**2 + 2 * b**2 * log_ratio) / larger])
    p_inside, q_inside = jnp.diff(ndtr(y / a))[0], jnp.diff(ndtr((y - gap) / b))[0]
    return jnp.where(larger == 0, 0.0, jnp.abs(p_inside - q_inside))
