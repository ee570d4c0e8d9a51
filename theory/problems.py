"""The question: what happens to a wrong start on the way back? And the form of the answer."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from theory.arguments import as_static, prepared
from theory.mixtures import GaussianMixture
from theory.types import Estimate, Schedule, Time, Times


class Problem(NamedTuple):
    """A reverse process that starts from the wrong law: data law, law of the edited latent at t0, schedule, t0."""

    target: GaussianMixture
    start: GaussianMixture
    schedule: Schedule
    t0: Time

    def marginal(self, s: Time) -> GaussianMixture:
        """p_s, the right law at time s."""
        return self.target.marginal(self.schedule, s)


@prepared(schedule=as_static)
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


class InexactCurve(NamedTuple):
    """What an inexact score makes of a law, on a grid of times; estimates of shape (times,).

    dKL/dtau = -lam²/2 g² fisher + (1 + lam²)/2 g² error, tau running backwards: `fisher` is E_p~ |grad log h|², and
    `error` is E_p~ [e . grad log h] with e what is added to the score. `mode_weights` as in `Curve`, (times, k).
    """

    ts: Times
    kl: Estimate
    fisher: Estimate
    error: Estimate
    mode_weights: Array
