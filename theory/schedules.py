"""Noise schedules: x_t = alpha x_0 + sigma eps, the marginal of dx = f x dt + g dw.

A variance-preserving (VP) schedule is one function, log alpha(t); all else follows (Song et al. 2021, arXiv
2011.13456, Sec. 3.4; Kingma et al. 2021, arXiv 2107.00630):

    sigma² = 1 - alpha²,   f = d log(alpha) / dt,   g² = beta = -2 f,   log_snr = 2 log(alpha / sigma).
"""

import abc
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_static
from jaxtyping import Array, Float

T = Float[Array, "*t"]


class VariancePreserving(abc.ABC):
    """A schedule with alpha² + sigma² = 1, given by log alpha and its inverse."""

    @abc.abstractmethod
    def log_alpha(self, t: T) -> T:
        """log of the signal scale; 0 at t = 0 and decreasing."""

    @abc.abstractmethod
    def t_of_log_alpha(self, log_alpha: T) -> T:
        """The time at which log alpha has this value."""

    def alpha(self, t: T) -> T:
        return jnp.exp(self.log_alpha(t))

    def sigma(self, t: T) -> T:
        # expm1: 1 - alpha² would lose every digit near the data, where alpha is close to 1.
        return jnp.sqrt(-jnp.expm1(2 * self.log_alpha(t)))

    def log_snr(self, t: T) -> T:
        log_alpha = self.log_alpha(t)
        return 2 * log_alpha - jnp.log(-jnp.expm1(2 * log_alpha))

    def t_of_log_snr(self, log_snr: T) -> T:
        return self.t_of_log_alpha(-jax.nn.softplus(-log_snr) / 2)

    def f(self, t: T) -> T:
        return jax.jvp(self.log_alpha, (t,), (jnp.ones_like(t),))[1]

    def beta(self, t: T) -> T:
        return -2 * self.f(t)


@register_static
@dataclass(frozen=True)
class LinearVP(VariancePreserving):
    """beta(t) = beta_min + t (beta_max - beta_min). Song et al. 2021 (arXiv 2011.13456), eq. (32).

    The paper's toy is consistent with LinearVP(0.1, 10): the integral of beta over [0, 1] is 5.05.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self):
        if not (0 <= self.beta_min <= self.beta_max < float("inf") and self.beta_max > 0):
            raise ValueError(
                f"LinearVP needs 0 <= beta_min <= beta_max and beta_max > 0, got {self.beta_min}, {self.beta_max}"
            )

    def log_alpha(self, t: T) -> T:
        return -t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min)) / 2

    def t_of_log_alpha(self, log_alpha: T) -> T:
        # The root of slope/2 t² + beta_min t = total, in the form that does not cancel for small totals.
        total, slope = -2 * log_alpha, self.beta_max - self.beta_min
        if self.beta_min == 0:  # 0 / 0 at total = 0, where the derivative is infinite
            return jnp.sqrt(2 * total / slope)
        return 2 * total / (self.beta_min + jnp.sqrt(self.beta_min**2 + 2 * slope * total))

    def f(self, t: T) -> T:
        return -(self.beta_min + t * (self.beta_max - self.beta_min)) / 2


@register_static
@dataclass(frozen=True)
class CosineVP(VariancePreserving):
    """alpha(t) = cos(pi/2 (u + offset) / (1 + offset)) / cos(pi/2 offset / (1 + offset)), u = end t.

    Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. (17). alpha vanishes at u = 1, where log_snr and beta are
    infinite, so the schedule stops at `end`: 0.9946, as in DPM-Solver (arXiv 2206.00927).
    """

    offset: float = 0.008
    end: float = 0.9946

    def __post_init__(self):
        if not (0 <= self.offset < float("inf") and 0 < self.end < 1):
            raise ValueError(f"CosineVP needs finite offset >= 0 and 0 < end < 1, got {self.offset}, {self.end}")

    def _angle(self, u: T) -> T:
        return jnp.pi / 2 * u / (1 + self.offset)

    def log_alpha(self, t: T) -> T:
        # cos(start + turn) / cos(start) - 1, expanded: the quotient is close to 1 near the data.
        start, turn = self._angle(jnp.full_like(t, self.offset)), self._angle(self.end * t)
        return jnp.log1p(-2 * jnp.sin(turn / 2) ** 2 - jnp.tan(start) * jnp.sin(turn))

    def t_of_log_alpha(self, log_alpha: T) -> T:
        # sin²(angle / 2) = (1 - cos(angle)) / 2 keeps the digits that arccos loses near 1.
        start = self._angle(jnp.full_like(log_alpha, self.offset))
        half_sine2 = jnp.sin(start / 2) ** 2 - jnp.cos(start) * jnp.expm1(log_alpha) / 2
        turn = 2 * jnp.arcsin(jnp.sqrt(half_sine2)) - start
        return turn * 2 / jnp.pi * (1 + self.offset) / self.end

    def f(self, t: T) -> T:
        return -jnp.pi / 2 * self.end / (1 + self.offset) * jnp.tan(self._angle(self.end * t + self.offset))


@register_static
@dataclass(frozen=True)
class DiscreteVP(VariancePreserving):
    """The schedule of a network trained on integer timesteps, made continuous.

    `alphas_cumprod[k]` is alpha² after k + 1 of N noising steps (Ho et al. 2020, arXiv 2006.11239, eq. (4)); it
    stands at t = (k + 1) / N, and log alpha is linear in between, with log alpha = 0 at t = 0. So f and beta
    are constant within a step.
    """

    alphas_cumprod: tuple[float, ...]

    def __post_init__(self):
        object.__setattr__(self, "alphas_cumprod", tuple(float(a) for a in self.alphas_cumprod))
        if not (self.alphas_cumprod and np.all(np.diff((1.0, *self.alphas_cumprod, 0.0)) < 0)):
            raise ValueError("DiscreteVP needs one or more alphas_cumprod that decrease strictly inside (0, 1)")

    def __repr__(self) -> str:  # a message that names a solver should not print a thousand numbers
        first, last = self.alphas_cumprod[0], self.alphas_cumprod[-1]
        return f"DiscreteVP({self.steps} alphas_cumprod from {first:g} to {last:g})"

    @property
    def steps(self) -> int:
        """N, the number of timesteps the network was trained on."""
        return len(self.alphas_cumprod)

    def _log_alphas(self) -> np.ndarray:
        return np.concatenate([[0.0], np.log(self.alphas_cumprod) / 2])

    def _step(self, t: T) -> Array:
        return jnp.clip(jnp.floor(t * self.steps).astype(int), 0, self.steps - 1)

    def log_alpha(self, t: T) -> T:
        table = jnp.asarray(self._log_alphas(), t.dtype)
        k = self._step(t)
        return table[k] + (t * self.steps - k) * (table[k + 1] - table[k])

    def t_of_log_alpha(self, log_alpha: T) -> T:
        table = self._log_alphas()
        times = np.arange(self.steps + 1) / self.steps
        dtype = log_alpha.dtype
        return jnp.interp(log_alpha, jnp.asarray(table[::-1], dtype), jnp.asarray(times[::-1], dtype))

    def f(self, t: T) -> T:
        slopes = jnp.asarray(np.diff(self._log_alphas()) * self.steps, t.dtype)
        return slopes[self._step(t)]


def ScaledLinearVP(  # named as the schedule it makes
    beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = 1000
) -> DiscreteVP:
    """Stable Diffusion's schedule: sqrt(beta_k) equally spaced; the defaults are those of SD 1.x and 2.x.

    Rombach et al. 2022 (arXiv 2112.10752), configuration `linear_start`, `linear_end`.
    """
    if not (0 < beta_start < 1 and 0 < beta_end < 1 and steps >= 1):
        raise ValueError(
            "ScaledLinearVP needs beta_start and beta_end inside (0, 1) and steps >= 1, "
            f"got beta_start={beta_start}, beta_end={beta_end}, steps={steps}"
        )
    betas = np.linspace(beta_start**0.5, beta_end**0.5, steps) ** 2
    return DiscreteVP(tuple(np.cumprod(1 - betas).tolist()))


@register_static
@dataclass(frozen=True)
class VarianceExploding:
    """The same diffusion seen through y = x / alpha: y_t = x_0 + (sigma / alpha) eps, so f = 0.

    Change of variables of Karras et al. 2022 (arXiv 2206.00364), App. B: `vp` supplies sigma / alpha as a function
    of t; log_snr is unchanged, and g² = d(sigma² / alpha²) / dt = beta_vp / alpha_vp².
    """

    vp: VariancePreserving

    def log_alpha(self, t: T) -> T:
        return jnp.zeros_like(t)

    def alpha(self, t: T) -> T:
        return jnp.ones_like(t)

    def sigma(self, t: T) -> T:
        return self.vp.sigma(t) / self.vp.alpha(t)

    def log_snr(self, t: T) -> T:
        return self.vp.log_snr(t)

    def t_of_log_snr(self, log_snr: T) -> T:
        return self.vp.t_of_log_snr(log_snr)

    def f(self, t: T) -> T:
        return jnp.zeros_like(t)

    def beta(self, t: T) -> T:
        return self.vp.beta(t) / self.vp.alpha(t) ** 2
