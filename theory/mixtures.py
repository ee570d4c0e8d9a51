"""Gaussian mixtures under the forward process: every law, score and reverse kernel in closed form.

A mixture stores the eigenbasis of each covariance. Noising scales the eigenvalues and leaves the basis alone,
    N(m, Q diag(v) Q^T)  ->  N(alpha m, Q diag(alpha² v + sigma²) Q^T),
so marginals, scores and posteriors at any t are matrix products and need no factorisation.
"""

from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from theory.arguments import as_static, prepared
from theory.components import components
from theory.types import PRNGKey, Schedule, Time

Points = Float[Array, "*batch d"]
Values = Float[Array, "*batch"]


class GaussianMixture(NamedTuple):
    """sum_k w_k N(m_k, Q_k diag(v_k) Q_k^T) in d dimensions; a Gaussian is a mixture of one.

    Build one with `mixture` or `gaussian`, which check their input. Points are (*batch, d), other shapes raise
    ValueError. What is often called by itself is jitted: each of its operations would compile alone.
    """

    log_weights: Float[Array, "*batch k"]
    means: Float[Array, "*batch k d"]
    variances: Float[Array, "*batch k d"]  # eigenvalues v_k
    axes: Float[Array, "*#batch k d d"]  # eigenvectors, the columns of Q_k

    @property
    def weights(self) -> Float[Array, "*batch k"]:
        return jnp.exp(self.log_weights)

    @property
    def covariances(self) -> Float[Array, "*batch k d d"]:
        return jnp.einsum("...kij,...kj,...klj->...kil", self.axes, self.variances, self.axes)

    @property
    def dim(self) -> int:
        return self.means.shape[-1]

    def mean(self) -> Float[Array, " d"]:
        return self.weights @ self.means

    def covariance(self) -> Float[Array, "d d"]:
        centred = self.means - self.mean()[None]
        between = jnp.einsum("k,ki,kj->ij", self.weights, centred, centred)
        return jnp.einsum("k,kij->ij", self.weights, self.covariances) + between

    @prepared(schedule=as_static)
    @jax.jit
    def marginal(self, schedule: Schedule, t: Time) -> "GaussianMixture":
        """The law of x_t = alpha x_0 + sigma eps when x_0 has this law."""
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return self._replace(means=alpha * self.means, variances=alpha**2 * self.variances + sigma**2)

    def component_log_probs(self, x: Points) -> Float[Array, "k *batch"]:
        """log(w_k N(x; m_k, C_k)), the component axis first."""
        return self._log_joint(self._whiten(x))

    @jax.jit
    def log_prob(self, x: Points) -> Values:
        return jax.nn.logsumexp(self.component_log_probs(x), axis=0)

    @jax.jit
    def responsibilities(self, x: Points) -> Float[Array, "k *batch"]:
        """P(component k | x)."""
        return _softmax(self.component_log_probs(x))

    @jax.jit
    def score(self, x: Points) -> Points:
        """grad log p(x) = -sum_k P(k | x) C_k^-1 (x - m_k)."""
        z = self._whiten(x)
        pull = jnp.einsum("k...j,kj,kij->k...i", z, self.variances**-0.5, self.axes)
        return -reduce(jnp.add, _softmax(self._log_joint(z))[..., None] * pull)

    @partial(jax.jit, static_argnames="shape")
    def sample(self, key: PRNGKey, shape: tuple[int, ...] = ()) -> Points:
        """Independent draws, (*shape, d)."""
        choose, normal = jr.split(key)
        k = jr.categorical(choose, self.log_weights, shape=shape)
        z = jnp.sqrt(self.variances)[k] * jr.normal(normal, (*shape, self.dim), self.means.dtype)
        return self.means[k] + jnp.einsum("...ij,...j->...i", self.axes[k], z)

    def reverse_kernel(self, schedule: Schedule, x_t: Float[Array, " d"], t: Time, s: Time) -> "GaussianMixture":
        """q(x_s | x_t), s < t, when x_0 has this law: a mixture again, so exact reverse draws need no solver.

        x_t = c x_s + tau eps, so each component is updated as in Gaussian regression, and its weight is the
        responsibility of that component for x_t. Use `jax.vmap` for many x_t.
        """
        prior = self.marginal(schedule, s)
        c = jnp.exp(schedule.log_alpha(t) - schedule.log_alpha(s))
        tau2 = -(schedule.sigma(t) ** 2) * jnp.expm1(schedule.log_snr(t) - schedule.log_snr(s))
        gain = c * prior.variances / (c**2 * prior.variances + tau2)
        logits = self.marginal(schedule, t).component_log_probs(x_t)
        residual = jnp.einsum("ki,kij->kj", x_t[None] - c * prior.means, self.axes)
        means = prior.means + jnp.einsum("kij,kj->ki", self.axes, gain * residual)
        return GaussianMixture(jax.nn.log_softmax(logits), means, prior.variances * (1 - c * gain), self.axes)

    def _whiten(self, x: Points) -> Float[Array, "k *batch d"]:
        """C_k^-1/2 (x - m_k) in the eigenbasis of each component."""
        if x.shape[-1:] != (self.dim,):
            hint = ": use x[:, None]" if self.dim == 1 and x.ndim == 1 else ""
            raise ValueError(f"points must be (*batch, d) with d = {self.dim}, got {x.shape}{hint}")
        lifted = (-1, *[1] * (x.ndim - 1), self.dim)  # (k, 1, ..., d) against (1, *batch, d)
        centred = x[None] - self.means.reshape(lifted)
        return jnp.einsum("k...i,kij->k...j", centred, self.axes) * self.variances.reshape(lifted) ** -0.5

    def _log_joint(self, z: Float[Array, "k *batch d"]) -> Float[Array, "k *batch"]:
        """log(w_k N(x; m_k, C_k)) at the whitened points."""
        constants = self.log_weights - 0.5 * jnp.sum(jnp.log(2 * jnp.pi * self.variances), axis=-1)
        return constants.reshape(-1, *[1] * (z.ndim - 2)) - 0.5 * jnp.sum(z**2, axis=-1)


def _softmax(logits: Float[Array, "k *batch"]) -> Float[Array, "k *batch"]:
    """exp(l_k) / sum_j exp(l_j) over the components.

    Unrolled over k, all of it is elementwise, and XLA fuses the score with the solver step around it. A reduction
    over a short leading axis is a kernel of its own: on a CPU that made sampling ten times slower.
    """
    top = reduce(jnp.maximum, logits)
    weights = jnp.exp(logits - jax.lax.stop_gradient(top)[None])
    return weights / reduce(jnp.add, weights)[None]


def mixture(weights: ArrayLike, means: ArrayLike, covariances: ArrayLike) -> GaussianMixture:
    """A mixture from weights (k,), means (k, d) and covariances (k, d, d).

    Raises ValueError, naming the component, for values that are not finite, shapes that do not fit, weights that
    are not positive or do not sum to one, and covariances that are not symmetric positive definite.
    """
    w, m, c = components(weights, means, covariances)
    variances, axes = np.linalg.eigh(c)
    return GaussianMixture(*map(jax.device_put, (np.log(w), m, variances, axes)))


def from_covariances(
    log_weights: Float[Array, " k"], means: Float[Array, "k d"], covariances: Float[Array, "k d d"]
) -> GaussianMixture:
    """The mixture with these moments, unchecked: the form for laws computed under jit."""
    variances, axes = jnp.linalg.eigh(covariances)
    return GaussianMixture(log_weights, means, variances, axes)


def gaussian(mean: ArrayLike, covariance: ArrayLike) -> GaussianMixture:
    """N(mean, covariance) as a mixture of one; mean (d,), covariance (d, d)."""
    return mixture([1.0], np.asarray(mean)[None], np.asarray(covariance)[None])


def mixture_1d(weights: ArrayLike, means: ArrayLike, stds: ArrayLike) -> GaussianMixture:
    """A mixture on the line from weights, means and standard deviations, each (k,)."""
    means, stds = np.asarray(means, float), np.asarray(stds, float)
    return mixture(weights, means[:, None], stds[:, None, None] ** 2)


@prepared(schedule=as_static)
def noise_fn(target: GaussianMixture, schedule: Schedule) -> Partial:
    """The exact noise prediction eps(x, t) = E[eps | x_t = x] = -sigma grad log p_t(x) of data with this law."""
    return Partial(_exact_eps, target, schedule)


def _exact_eps(target: GaussianMixture, schedule: Schedule, x: Points, t: Time) -> Points:
    return -schedule.sigma(t) * target.marginal(schedule, t).score(x)
