"""Solver steps as Gaussian kernels q(x_s | x_t) = N(mean, std² I) from time t to s.

A kernel computes and never draws: `theory.solve` owns keys, noise and loops. Every stochastic solver here can
therefore record and replay its noise, which is what Cycle-SDE needs (Eq. 8 of the paper).
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax.tree_util import register_static

from theory.arguments import level
from theory.predictions import x0_from_eps
from theory.processes import reverse_diffusion, reverse_drift
from theory.types import Kernel, NoiseFn, Schedule, Time, X


@register_static
@dataclass(frozen=True)
class DDIM:
    """DDIM(eta), Eq. (6) of the paper: eta = 0 is the ODE step, eta = 1 ancestral sampling (DDPM).

    Song et al. 2021 (arXiv 2010.02502), eqs. (12) and (16):
        var  = eta² sigma_s² (1 - snr_t / snr_s)
        mean = alpha_s x0_hat + sqrt(sigma_s² - var) eps.

    Raises ValueError for eta outside [0, 1].
    """

    schedule: Schedule
    eta: float = 0.0

    def __post_init__(self):
        _check("DDIM: eta", self.eta)
        if self.eta > 1:
            raise ValueError(
                f"DDIM: eta must be at most 1, got {self.eta}, where sigma_s² - var may be negative; EulerMaruyama and "
                "DPMSolverPP2M take larger noise levels, as lam"
            )

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def init(self, x: X) -> tuple[()]:
        return ()

    def kernel(self, eps_fn: NoiseFn, x: X, t: Time, s: Time, state: tuple[()]) -> tuple[Kernel, tuple[()]]:
        eps = eps_fn(x, t)
        x0_hat = x0_from_eps(self.schedule, x, eps, t)
        sigma_s = self.schedule.sigma(s)
        var = jnp.zeros_like(s)
        if self.stochastic:  # else 0 * inf on the way up from s = 0
            fresh = -jnp.expm1(self.schedule.log_snr(t) - self.schedule.log_snr(s))
            var = (self.eta * sigma_s) ** 2 * fresh
        mean = self.schedule.alpha(s) * x0_hat + jnp.sqrt(sigma_s**2 - var) * eps
        return Kernel(mean, jnp.sqrt(var)), state


@register_static
@dataclass(frozen=True)
class EulerMaruyama:
    """Euler-Maruyama for the reverse lambda-SDE: lam = 1 is Eq. (4) of the paper, lam = 0 the ODE, Eq. (5).

    mean = x + drift (s - t), std = lam g sqrt(t - s); weak order 1. Kloeden & Platen 1992, Sec. 10.2.
    """

    schedule: Schedule
    lam: float = 1.0

    def __post_init__(self):
        _check("EulerMaruyama: lam", self.lam)

    @property
    def stochastic(self) -> bool:
        return self.lam > 0

    def init(self, x: X) -> tuple[()]:
        return ()

    def kernel(self, eps_fn: NoiseFn, x: X, t: Time, s: Time, state: tuple[()]) -> tuple[Kernel, tuple[()]]:
        mean = x + reverse_drift(self.schedule, eps_fn, x, t, self.lam) * (s - t)
        std = reverse_diffusion(self.schedule, t, self.lam) * jnp.sqrt(jnp.abs(t - s))
        return Kernel(mean, std), state


@register_static
@dataclass(frozen=True)
class Heun:
    """Heun's second-order step of the probability-flow ODE. Karras et al. 2022 (arXiv 2206.00364), Alg. 1.

    In y = x / alpha and k = sigma / alpha the ODE is dy/dk = eps. As in Alg. 1 a step to k = 0 is Euler's: a
    network is not trained there. Two evaluations a step.
    """

    schedule: Schedule

    @property
    def stochastic(self) -> bool:
        return False

    def init(self, x: X) -> tuple[()]:
        return ()

    def kernel(self, eps_fn: NoiseFn, x: X, t: Time, s: Time, state: tuple[()]) -> tuple[Kernel, tuple[()]]:
        alpha_t, alpha_s = self.schedule.alpha(t), self.schedule.alpha(s)
        sigma_s = self.schedule.sigma(s)
        dk = sigma_s / alpha_s - self.schedule.sigma(t) / alpha_t
        eps_t = eps_fn(x, t)
        euler = x / alpha_t + dk * eps_t
        eps_s = jnp.where(sigma_s > 0, eps_fn(alpha_s * euler, s), eps_t)
        y = x / alpha_t + dk * (eps_t + eps_s) / 2
        return Kernel(alpha_s * y, jnp.zeros_like(s)), state


class History(NamedTuple):
    """What a two-step method remembers: the last clean prediction and the size of the last step in log_snr / 2."""

    x0_hat: X
    h: Time


@register_static
@dataclass(frozen=True)
class DPMSolverPP2M:
    """DPM-Solver++(2M) for the reverse lambda-SDE: lam = 0 is the ODE solver, lam = 1 its SDE form.

    Lu et al. 2022 (arXiv 2211.01095), Alg. 2 and App. C; with h = half the step in log_snr and the clean
    prediction extrapolated through the last step, x0 = D_t + h / (2 h_last) (D_t - D_last), the linear part is exact:

        mean = sigma_s / sigma_t exp(-lam² h) x + alpha_s (1 - exp(-(1 + lam²) h)) x0
        std  = sigma_s sqrt(1 - exp(-2 lam² h)).

    The first step, and a step to sigma = 0 (h infinite), do not extrapolate.
    """

    schedule: Schedule
    lam: float = 0.0

    def __post_init__(self):
        _check("DPMSolverPP2M: lam", self.lam)

    @property
    def stochastic(self) -> bool:
        return self.lam > 0

    def init(self, x: X) -> History:
        # An infinite last step weighs the extrapolation by h / inf = 0.
        return History(jnp.zeros_like(x), jnp.array(jnp.inf, x.dtype))

    def kernel(self, eps_fn: NoiseFn, x: X, t: Time, s: Time, state: History) -> tuple[Kernel, History]:
        h = (self.schedule.log_snr(s) - self.schedule.log_snr(t)) / 2
        x0_hat = x0_from_eps(self.schedule, x, eps_fn(x, t), t)
        ratio = jnp.where(jnp.isinf(h), 0.0, h / state.h)
        x0 = x0_hat + ratio / 2 * (x0_hat - state.x0_hat)

        sigma_s = self.schedule.sigma(s)
        shrink = sigma_s / self.schedule.sigma(t)
        std = jnp.zeros_like(s)
        if self.stochastic:  # else 0 * inf at s = 0
            shrink = shrink * jnp.exp(-(self.lam**2) * h)
            std = sigma_s * jnp.sqrt(-jnp.expm1(-2 * self.lam**2 * h))
        mean = shrink * x - self.schedule.alpha(s) * jnp.expm1(-(1 + self.lam**2) * h) * x0
        return Kernel(mean, std), History(x0_hat, h)


def _check(name: str, value: float) -> None:
    try:
        level(value)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None
