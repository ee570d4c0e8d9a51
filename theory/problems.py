"""The question: what happens to a wrong start on the way back? And the form of the answer."""

from typing import NamedTuple

import jax.numpy as jnp

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

    Raises ValueError for t0 outside (0, 1], for laws in different dimensions, and without float64, in which exact laws
    are computed.
    """
    at = jnp.asarray(t0, float)
    if at.dtype != jnp.float64:
        raise ValueError(
            'exact laws need float64: call jax.config.update("jax_enable_x64", True) first, or set JAX_ENABLE_X64=1'
        )
    if not 0 < t0 <= 1:
        raise ValueError(f"t0 must lie in (0, 1], got {t0}")
    if target.dim != start.dim:
        raise ValueError(f"target and start must have one dimension, got d = {target.dim} and d = {start.dim}")
    return Problem(target, start, schedule, at)


class Curve(NamedTuple):
    """The distance of p~_s to p_s on a grid of times; every estimate holds arrays of shape (times,).

    `f` are the f-divergences of `theory.divergences.F_DIVERGENCES` by name, and `rates` what they lose: along the
    reverse lambda-SDE dD_f/dt = lam²/2 g² rate. A chi2 that is infinite, or beyond floats, is inf; nan
    where neither is decided (a mixture of the plane whose chi2 was infinite at t0). `w2` is nan for mixtures in two
    dimensions, where it has no formula, and `tv` in more. `mode_weights`, (times, k), is the mean posterior
    probability of each component of the target under p~_s: how much of the edited law sits in each mode. `mass` is the
    integral of p~_s.
    """

    ts: Times
    f: dict[str, Estimate]
    rates: dict[str, Estimate]
    tv: Estimate
    w2: Estimate
    mass: Estimate
    mode_weights: Estimate

    @property
    def kl(self) -> Estimate:
        return self.f["kl"]

    @property
    def fisher(self) -> Estimate:
        """E_p~ |grad log h|², which KL loses at the rate lam²/2 g²."""
        return self.rates["kl"]

    @property
    def chi2(self) -> Estimate:
        return self.f["chi2"]

    @property
    def dirichlet(self) -> Estimate:
        """E_p |grad h|², which chi2 loses at the rate lam² g²."""
        value, error = self.rates["chi2"]
        return Estimate(value / 2, error / 2)


class InexactCurve(NamedTuple):
    """What an inexact score makes of a law, on a grid of times; estimates of shape (times,).

    dKL/dtau = -lam²/2 g² fisher + (1 + lam²)/2 g² error, tau running backwards: `fisher` is E_p~ |grad log h|², and
    `error` is E_p~ [e . grad log h] with e what is added to the score. `mode_weights` as in `Curve`, (times, k).
    """

    ts: Times
    kl: Estimate
    fisher: Estimate
    error: Estimate
    mode_weights: Estimate
