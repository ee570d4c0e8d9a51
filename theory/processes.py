"""The forward process (Eq. 7 of the paper) and the family of reverse processes (Eqs. 4 and 5).

    forward            dx = f x dt + g dw
    reverse lambda-SDE dx = [f x - (1 + lam²)/2 g² score] dt + lam g dw      (t running backwards)

lam = 1 is the reverse SDE (Anderson 1982), lam = 0 the probability-flow ODE (Song et al. 2021, arXiv 2011.13456,
eqs. (6) and (13)); with the exact score every lam has the marginals of the forward process.
"""

import jax
import jax.numpy as jnp
import jax.random as jr

from theory.arguments import as_static, decreasing, level, prepared
from theory.predictions import score_from_eps
from theory.types import Kernel, Noise, NoiseFn, Path, PRNGKey, Schedule, Time, Times, X


def marginal(schedule: Schedule, x0: X, t: Time) -> Kernel:
    """q(x_t | x_0) = N(alpha x_0, sigma² I). Eq. (7)."""
    return Kernel(schedule.alpha(t) * x0, schedule.sigma(t))


def transition(schedule: Schedule, x_s: X, s: Time, t: Time) -> Kernel:
    """q(x_t | x_s) for s < t: N(c x_s, sigma_t² - c² sigma_s²) with c = alpha_t / alpha_s."""
    scale = jnp.exp(schedule.log_alpha(t) - schedule.log_alpha(s))
    # sigma_t² - c² sigma_s² = sigma_t² (1 - snr_t / snr_s), without the cancellation for t close to s.
    shrink = -jnp.expm1(schedule.log_snr(t) - schedule.log_snr(s))
    return Kernel(scale * x_s, schedule.sigma(t) * jnp.sqrt(shrink))


def ou_time(schedule: Schedule, t: Time | Times) -> Time | Times:
    """log(1 + (sigma / alpha)²), the time at which dx = -x/2 dt + dw has the signal-to-noise ratio of this schedule.

    In it all schedules are smooth, those in steps too, and g² dt = (alpha² + sigma²) d ou_time: what is integrated over
    time is integrated over this one.
    """
    return jax.nn.softplus(-schedule.log_snr(t))


def of_ou_time(schedule: Schedule, ou_time: Time | Times) -> tuple[Time | Times, Time | Times]:
    """The time t, above 0, at which `ou_time` has this value; and dt / d ou_time there, in which steps cancel.

    At t = 0 itself g² may be 0.
    """
    t = schedule.t_of_log_snr(-jnp.log(jnp.expm1(jnp.maximum(ou_time, jnp.finfo(ou_time.dtype).tiny))))
    return t, (schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2) / schedule.beta(t)


@prepared(schedule=as_static, ts=decreasing)
@jax.jit
def forward_path(schedule: Schedule, x: X, ts: Times, key: PRNGKey) -> Path:
    """A path of the forward SDE on the decreasing grid ts that starts from x at ts[-1]: (times, *x), path[-1] = x.

    y = x / alpha is a Brownian motion in the time (sigma / alpha)², so the whole chain of transitions (Eq. 7) is
    one cumulative sum of its independent increments. No network is needed.

    Raises ValueError for a grid that grows.
    """
    return driven_path(schedule, x, ts, jr.normal(key, (ts.size - 1, *x.shape), x.dtype))


def driven_path(schedule: Schedule, x: X, ts: Times, noise: Noise) -> Path:
    """The path that `forward_path` makes of this unit noise, (steps, *x), the noise of the last step first."""
    up = ts[::-1]
    clock = jnp.exp(-schedule.log_snr(up))
    brownian = jnp.cumsum(jax.vmap(jnp.multiply)(jnp.sqrt(jnp.diff(clock)), noise), axis=0)
    alpha = schedule.alpha(up)
    noised = jax.vmap(lambda a, b: a * (x / alpha[0] + b))(alpha[1:], brownian)
    return jnp.concatenate([x[None], noised])[::-1]


@prepared(lam=level)
def reverse_drift(schedule: Schedule, eps_fn: NoiseFn, x: X, t: Time, lam: float | Time = 1.0) -> X:
    """f x - (1 + lam²)/2 g² score, the drift of the reverse lambda-SDE with respect to dt (t decreasing)."""
    score = score_from_eps(schedule, eps_fn(x, t), t)
    return schedule.f(t) * x - (1 + lam**2) / 2 * schedule.beta(t) * score


@prepared(lam=level)
def reverse_diffusion(schedule: Schedule, t: Time, lam: float | Time = 1.0) -> Time:
    """lam g, the diffusion coefficient of the reverse lambda-SDE."""
    return lam * jnp.sqrt(schedule.beta(t))
