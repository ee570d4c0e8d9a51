"""One prediction, four parametrisations: noise eps, clean point x0, score, and v = alpha eps - sigma x0.

All relations are linear in x_t = alpha x0 + sigma eps at a fixed t (Salimans & Ho 2022, arXiv 2202.00512, App. D).
Each function maps an array of the shape of x to another.
"""

from theory.types import Schedule, Time, X


def x0_from_eps(schedule: Schedule, x: X, eps: X, t: Time) -> X:
    """(x_t - sigma eps) / alpha."""
    return (x - schedule.sigma(t) * eps) / schedule.alpha(t)


def eps_from_x0(schedule: Schedule, x: X, x0: X, t: Time) -> X:
    """(x_t - alpha x0) / sigma."""
    return (x - schedule.alpha(t) * x0) / schedule.sigma(t)


def score_from_eps(schedule: Schedule, eps: X, t: Time) -> X:
    """grad log p_t(x_t) = -E[eps | x_t] / sigma. Vincent 2011; Song et al. 2021 (arXiv 2011.13456)."""
    return -eps / schedule.sigma(t)


def eps_from_score(schedule: Schedule, score: X, t: Time) -> X:
    """-sigma score."""
    return -schedule.sigma(t) * score


def v_from_eps(schedule: Schedule, x: X, eps: X, t: Time) -> X:
    """alpha eps - sigma x0."""
    return schedule.alpha(t) * eps - schedule.sigma(t) * x0_from_eps(schedule, x, eps, t)


def eps_from_v(schedule: Schedule, x: X, v: X, t: Time) -> X:
    """sigma x_t + alpha v, over alpha² + sigma² (1 for VP)."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return (sigma * x + alpha * v) / (alpha**2 + sigma**2)


def guide(null_eps: X, eps: X, guidance_scale: float | Time) -> X:
    """Classifier-free guidance eps_null + scale (eps - eps_null). Ho & Salimans 2022 (arXiv 2207.12598).

    Scale 0 is unconditional, 1 conditional; larger values extrapolate.
    """
    return null_eps + guidance_scale * (eps - null_eps)
