"""How fast must the SDE contract, in any dimension? Rates from simple facts about the data.

    log-Sobolev   Ent_p(f²) <= 2 C E_p |grad f|²   gives   KL_s <= exp(-integral g² / C(p_t) dt) KL_t0.

In y = x / alpha the forward process is y = x_0 + sqrt(tau) z, tau = (sigma / alpha)². There C(p_t) = alpha² C(tau) and
g² dt = alpha² dtau, so the exponent is the integral of 1 / C(tau) dtau, whatever the schedule. On the line
`theory.inequalities` knows constants from both sides.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_static
from jaxtyping import Array, Float

from theory.mixtures import GaussianMixture
from theory.types import Schedule, Time

Scalar = Float[Array, ""]
T = Float[Array, "*t"]


@register_static
@dataclass(frozen=True)
class Fact:
    """What is known of data x_0 = u + sqrt(blur) z with z ~ N(0, I) independent of u, in any dimension.

    convexity   Hess(-log density of u) >= convexity I; negative, or -inf where nothing is known
    diameter    the largest distance between two points of u; inf where nothing is known

    A Gaussian of covariance V has convexity 1 / max V; images with d values in [-1, 1] have diameter 2 sqrt(d); modes
    of one width have the diameter of the set of their means, and blur = their variance.

    With R = diameter / 2 and kappa = convexity, the covariance of u given y is at most
        1 / (kappa + 1 / tau)   if that is positive (Brascamp & Lieb 1976),   and   R²   (Popoviciu's inequality),
    so Hess log p_tau = Cov(u | y) / tau² - I / tau is at most
        theta = -kappa / (1 + kappa tau)                                      and   R² / tau² - 1 / tau.
    The flow dy/dtau = -1/2 grad log p_tau from tau_1 to tau is Lipschitz with constant exp(1/2 integral theta), a
    Lipschitz image has at most its square times the constant (both: Kim & Milman 2012, arXiv 1002.0373), and where
    theta < 0 the constant is at most -1 / theta (Bakry & Emery 1985). With the smaller theta at every time:
        kappa R² >= 1    C(tau) = 1 / kappa + tau
        else             C(tau) = tau exp(R² / tau)                       for tau >= R² / (1 - kappa R²)
                         C(tau) = R² exp(1 - kappa R²) (1 + kappa tau)    below
    as Mikulincer & Shenfeld 2022 (arXiv 2201.01382, Theorem 1 at tau = 0) with diameters for R; `blur` adds to tau.
    For bounded u this is below the 6 (4 R² + tau) exp(4 R² / tau) of Chen, Chewi & Niles-Weed (arXiv 2102.11476).

    Raises ValueError where nothing follows: neither convexity > 0 nor a finite diameter; and for values that cannot be.
    """

    convexity: float = -np.inf
    diameter: float = np.inf
    blur: float = 0.0

    def __post_init__(self):
        if not (self.diameter >= 0 and 0 <= self.blur < np.inf and self.convexity < np.inf):
            raise ValueError(f"{self}: needs convexity < inf, diameter >= 0 and finite blur >= 0")
        if self.convexity <= 0 and self.diameter == np.inf:
            raise ValueError(f"{self}: no rate follows without convexity > 0 or a finite diameter")

    @property
    def _convex(self) -> bool:
        """Whether convexity alone decides."""
        return bool(self.convexity > 0 and self.convexity * self.diameter**2 / 4 >= 1)

    @property
    def _turn(self) -> tuple[float, float]:
        """The tau below which convexity counts, and C there over 1 + kappa tau."""
        r2 = self.diameter**2 / 4
        excess = 1 - self.convexity * r2 if r2 else 1.0
        return r2 / excess, r2 * np.exp(excess) if excess < 700 else np.inf

    def constant(self, tau: T) -> T:
        """C(tau), an upper bound of the log-Sobolev constant of x_0 + sqrt(tau) z."""
        total = tau + self.blur
        if self._convex:
            return 1 / self.convexity + total
        turn, scale = self._turn
        if turn == 0:
            return jnp.where(total == 0, 0.0 if self.diameter == 0 else jnp.inf, _transported(self.diameter, total))
        near = scale * (1 + self.convexity * total)
        return jnp.where(total < turn, near, _transported(self.diameter, jnp.maximum(total, turn)))

    def exponent(self, tau: T, tau_0: T) -> T:
        """The integral of 1 / C from tau to tau_0 >= tau."""
        low, high = tau + self.blur, tau_0 + self.blur
        kappa = self.convexity
        if self._convex:
            return jnp.log((1 / kappa + high) / (1 / kappa + low))
        if self.diameter == 0:
            return jnp.log(high / low)
        turn, scale = self._turn
        r2 = self.diameter**2 / 4
        # The integral of exp(-R² / tau) / tau, from the turn on.
        far = _exp1(r2 / jnp.maximum(high, turn)) - _exp1(r2 / jnp.maximum(low, turn))
        if turn == 0:
            return far
        a, b = jnp.minimum(low, turn), jnp.minimum(high, turn)
        near = (b - a) if kappa == 0 else jnp.log1p(kappa * (b - a) / (1 + kappa * a)) / kappa
        return far + near / scale


def _transported(diameter: float, tau: T) -> T:
    """tau exp(R² / tau)."""
    return tau * jnp.exp(diameter**2 / 4 / tau)


def _exp1(x: T) -> T:
    """E_1(x) = integral_x^inf exp(-u) / u du, x > 0; jax.scipy.special.exp1 does not end for some batches.

    Abramowitz & Stegun 1964, 5.1.11 and 5.1.22.
    """
    small, large = jnp.minimum(x, 1.5), jnp.clip(x, 1.5, 1e4)

    def add(k: Array, sums: tuple[T, T]) -> tuple[T, T]:
        power = sums[1] * -small / k
        return sums[0] - power / k, power

    def divide(i: Array, fraction: T) -> T:
        n = 80.0 - i
        return n**2 / (large + 2 * n + 1 - fraction)

    series, _ = jax.lax.fori_loop(1, 30, add, (-np.euler_gamma - jnp.log(small), jnp.ones_like(x)))
    fraction = jax.lax.fori_loop(0, 80, divide, jnp.zeros_like(x))
    return jnp.where(x < 1.5, series, jnp.exp(-large) / (large + 1 - fraction))


@jax.jit
def log_sobolev_bound(fact: Fact, schedule: Schedule, t: T) -> T:
    """An upper bound of the log-Sobolev constant of p_t, and so of its Poincaré constant: alpha² C(tau)."""
    return schedule.alpha(t) ** 2 * fact.constant(jnp.exp(-schedule.log_snr(t)))


@jax.jit
def rate(fact: Fact, schedule: Schedule, s: Time, t0: Time) -> Scalar:
    """exp(-integral_s^t0 g² / C(p_t) dt), in closed form: KL_s <= rate KL_t0, and chi2_s <= rate chi2_t0.

    An equality for a Gaussian N(m, v I), convexity 1 / v, and a start whose mean alone is wrong.
    """
    return jnp.exp(-fact.exponent(jnp.exp(-schedule.log_snr(s)), jnp.exp(-schedule.log_snr(t0))))


class Constants(NamedTuple):
    """Upper bounds of the Poincaré and of the log-Sobolev constant; inf where none is known."""

    poincare: Float[Array, "*batch"]
    log_sobolev: Float[Array, "*batch"]


@jax.jit
def mixture_constants(law: GaussianMixture) -> Constants:
    """Constants of a Gaussian mixture in any dimension, from its components. A Gaussian has its largest variance.

    One covariance V for all. V^-1/2 x is a blur of variance 1 of points of diameter D, so (see `Fact`)
        C <= max V exp(D² / 4),   D² = max_kl (m_k - m_l)^T V^-1 (m_k - m_l).

    Any covariances. Let v_l be the largest variance of N_l, the constant of N_l. For every pair, (E_k f - E_l f)²
    is at most chi2(N_k | N_l) Var_l f by Cauchy and Schwarz; k -> l says that this way round it is used. Then
    Var f = sum_l w_l Var_l f + sum_{k<l} w_k w_l (E_k f - E_l f)² gives
        C_P <= max_l v_l [1 + sum_{k -> l} w_k chi2(N_k | N_l)].
    Ent f² = sum_l w_l Ent_l f² + Ent_w g² with g_l² = E_l f². Ent_w g² <= c Var_w g, c = log(1/w - 1) / (1 - 2 w) and w
    the least weight (Diaconis & Saloff-Coste 1996, App. A), and (g_k - g_l)² <= (E_k f - E_l f)² + Var_k f + Var_l f,
    the triangle inequality for vectors (E f, sd f), as in Menz & Schlichting 2014 (arXiv 1202.1510):
        C <= max_l v_l [1 + c/2 (1 - w_l + sum_{k -> l} w_k chi2(N_k | N_l))].
    inf where for some pair chi2 is infinite both ways, as with variances 1 and 4 in turned axes.
    """
    largest = law.variances.max(axis=1)
    chi2 = _pairwise_chi2(law)
    k, count = jnp.arange(len(law.means)), len(law.means)
    cost = law.weights[:, None] * chi2 * largest[None]
    # The cheaper way round; of equal ones that from the larger index, so that every pair is used once.
    used = (cost < cost.T) | ((cost == cost.T) & (k[:, None] > k[None]))
    between = jnp.where(used, cost, 0.0).sum(axis=0)
    half = _two_point(law.log_weights.min()) / 2 if count > 1 else 0.0
    pairs = Constants(jnp.max(largest + between), jnp.max(largest + half * (largest * (1 - law.weights) + between)))
    same = jnp.all(law.variances == law.variances[:1]) & jnp.all(law.axes == law.axes[:1])
    white = jnp.einsum("ki,ij->kj", law.means, law.axes[0]) / jnp.sqrt(law.variances[:1])
    d2 = jnp.max(jnp.sum((white[:, None] - white[None]) ** 2, axis=-1))
    moved = jnp.where(same, largest[0] * jnp.exp(d2 / 4), jnp.inf)
    log_sobolev = jnp.minimum(pairs.log_sobolev, moved)
    return Constants(jnp.minimum(pairs.poincare, log_sobolev), log_sobolev)


def _two_point(log_w: Scalar) -> Scalar:
    """log(1/w - 1) / (1 - 2 w), which is 2 at w = 1/2."""
    u = 1 - 2 * jnp.exp(log_w)  # (1 - w) / w = (1 + u) / (1 - u)
    small = u < 1e-4
    return jnp.where(small, 2 + 2 * u**2 / 3, (jnp.log1p(u) - jnp.log(2.0) - log_w) / jnp.where(small, 1.0, u))


def _pairwise_chi2(law: GaussianMixture) -> Float[Array, "k k"]:
    """chi2(N_k | N_l) = integral N_k² / N_l - 1, inf unless 2 C_k^-1 - C_l^-1 is positive definite."""
    P = jnp.einsum("kij,kj,klj->kil", law.axes, 1 / law.variances, law.axes)
    log_dets = -jnp.log(law.variances).sum(axis=1)  # of the precisions
    values, axes = jnp.linalg.eigh(2 * P[:, None] - P[None])
    finite = values[..., 0] > 0
    values = jnp.where(finite[..., None], values, 1.0)
    pull = jnp.einsum("kij,klj->kli", P, law.means[:, None] - law.means[None])
    turned = jnp.einsum("kli,klij->klj", pull, axes)
    quadratic = 2 * jnp.sum(turned**2 / values, axis=-1)
    quadratic -= jnp.einsum("kli,kli->kl", law.means[:, None] - law.means[None], pull)
    log_integral = log_dets[:, None] - log_dets[None] / 2 - jnp.log(values).sum(axis=-1) / 2 + quadratic
    return jnp.where(finite, jnp.expm1(jnp.maximum(log_integral, 0.0)), jnp.inf)
