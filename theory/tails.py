"""Is chi2(p~_s | p_s) finite? Decided by the tails of the two laws, exactly, not by a number that overflows."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from theory.mixtures import GaussianMixture
from theory.problems import Problem
from theory.ratios import law_gaussian
from theory.types import Time


def chi2_is_finite(given: Problem, s: Time, lam: float | Time) -> Bool[Array, ""]:
    """Whether the integral of p~_s² / p_s is finite, s <= t0.

    Along the ray r u the exponent of N_j² / p is -r²/2 max_k u^T (2 C_j^-1 - C_k^-1) u to leading order. The integral
    is finite if that maximum is positive in every direction u for every component j of p~, and infinite if it is
    negative in one. For a Gaussian target p~_s is known in closed form. On the line the widest component of the target
    prevails in both tails at every time, so that p~_s has the tails it would have for that component alone. In the
    plane this decides at t0, and by data processing at every time after it if chi2 is finite there; see `is_decided`.
    """
    if len(given.target.log_weights) == 1:
        law = law_gaussian(given, s, lam)
        return jnp.all(_gaps(law, given.marginal(s)) > 0)
    if given.target.dim == 1:
        widest = jnp.argmax(given.target.variances[:, 0])[None]
        alone = jax.tree.map(lambda leaf: leaf[widest], given.target)._replace(log_weights=jnp.zeros(1))
        return chi2_is_finite(given._replace(target=alone), s, lam)
    return jnp.all(_gaps(given.start, given.marginal(given.t0)) > 0)


def is_decided(given: Problem, s: Time, lam: float | Time) -> Bool[Array, ""]:
    """Whether `chi2_is_finite` is the truth at s: not where a mixture of the plane had an infinite chi2 before."""
    if len(given.target.log_weights) == 1 or given.target.dim == 1:
        return jnp.array(True)
    return chi2_is_finite(given, s, lam) | (s == given.t0)


def _gaps(law: GaussianMixture, marginal: GaussianMixture) -> Float[Array, " j"]:
    """min over directions u of max over k of u^T (2 C_j^-1 - C_k^-1) u, for every component j of the law."""
    forms = 2 * jnp.linalg.inv(law.covariances)[:, None] - jnp.linalg.inv(marginal.covariances)[None]
    if len(marginal.log_weights) == 1:
        return jnp.linalg.eigvalsh(forms[:, 0])[:, 0]
    if law.dim == 1:
        return forms[:, :, 0, 0].max(axis=1)
    return jax.vmap(_least_of_greatest)(forms)


def _least_of_greatest(forms: Float[Array, "k 2 2"]) -> Float[Array, ""]:
    """min over angles of the greatest of several quadratic forms in the plane.

    u^T A u = a + b cos(phi) + c sin(phi) in twice the angle: the least is where one of them is least, or two cross.
    """
    a, b, c = (forms[:, 0, 0] + forms[:, 1, 1]) / 2, (forms[:, 0, 0] - forms[:, 1, 1]) / 2, forms[:, 0, 1]
    lowest = jnp.arctan2(-c, -b)
    da, db, dc = (part[:, None] - part[None] for part in (a, b, c))
    size = jnp.hypot(db, dc)
    turn = jnp.arccos(jnp.clip(-da / jnp.where(size > 0, size, 1.0), -1.0, 1.0))
    towards = jnp.arctan2(dc, db)
    phi = jnp.concatenate([lowest, (towards + turn).ravel(), (towards - turn).ravel()])
    return jnp.min(jnp.max(a[:, None] + b[:, None] * jnp.cos(phi)[None] + c[:, None] * jnp.sin(phi)[None], axis=0))
