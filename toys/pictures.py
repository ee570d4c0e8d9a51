"""Small pictures whose law is known, and SDE-Drag's copy-and-paste on them.

A picture is a bump at one of many places on a smooth random background: a mixture of Gaussians. Eq. (12) of the paper,

    target <- alpha source,      source <- beta source + sqrt(1 - beta²) noise,

is linear, so for Gaussian data the edited law is a mean and a covariance, whatever brings it back.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from theory.divergences import gaussian_kl
from theory.mixtures import GaussianMixture, from_covariances
from theory.problems import Problem
from theory.ratios import law_gaussian
from theory.schedules import LinearVP
from theory.types import Time

SIDE, AMPLITUDE, RADIUS = 7, 2.0, 1  # of the grid, of the bump, and of the patch that is copied
SOURCE, TARGET = (1, 3), (5, 3)  # row and column of the bump, and where it is to go
SCHEDULE = LinearVP()
Count = int | Int[Array, ""]


def places() -> np.ndarray:
    """All centres of a bump that stays whole."""
    inner = np.arange(RADIUS, SIDE - RADIUS)
    return np.stack(np.meshgrid(inner, inner, indexing="ij"), axis=-1).reshape(-1, 2)


def pictures() -> GaussianMixture:
    """A bump at any place, on a background with covariance exp(-distance² / 2 length²) and a little white noise."""
    pixels = np.stack(np.meshgrid(*[np.arange(SIDE)] * 2, indexing="ij"), axis=-1).reshape(-1, 2)
    squares = ((pixels[:, None] - pixels[None]) ** 2).sum(-1)
    covariance = 0.25 * np.exp(-squares / (2 * 1.5**2)) + 0.01 * np.eye(SIDE**2)
    centres = places()
    bumps = AMPLITUDE * np.exp(-((pixels[None] - centres[:, None]) ** 2).sum(-1) / (2 * 0.8**2))
    count = len(centres)
    return from_covariances(
        jnp.full(count, -np.log(count)), jnp.asarray(bumps), jnp.broadcast_to(covariance, (count, *covariance.shape))
    )


def noise_fn(law: GaussianMixture) -> Partial:
    """`theory.mixtures.noise_fn` for components that share one covariance, in 1/25 of its products.

    Points are taken to the eigenbasis once, and not once for every component.
    """
    return Partial(_eps, law)


def _eps(law: GaussianMixture, x: Float[Array, "n d"], t: Time) -> Float[Array, "n d"]:
    marginal = law.marginal(SCHEDULE, t)
    whiten = marginal.axes[0] / jnp.sqrt(marginal.variances[0])[None]
    z, means = x @ whiten, marginal.means @ whiten
    logits = marginal.log_weights[None] + z @ means.T - jnp.sum(means**2, axis=-1)[None] / 2
    return SCHEDULE.sigma(t) * (z - jax.nn.softmax(logits) @ means) @ whiten.T


class Operation(NamedTuple):
    """A linear edit x~ = A x + std z, z ~ N(0, I)."""

    A: Float[Array, "*m d d"]
    std: Float[Array, "*m d"]

    def at(self, i: Count) -> "Operation":
        """The i-th of several that are stacked."""
        return Operation(self.A[i], self.std[i])


def operations(m: int, alpha: float, beta: float, size: int | None = None) -> Operation:
    """Eq. (12) for each of the m parts of the way from SOURCE to TARGET, patches (2 RADIUS + 1) wide: stacked.

    Filled up to `size` with the last one, not to be used: of one shape, any m compiles once.
    """
    corners = np.round(np.linspace(SOURCE, TARGET, m + 1)).astype(int)
    made = [_operation(a, b, alpha, beta) for a, b in itertools.pairwise(corners)]
    made += made[-1:] * ((size or m) - m)
    return Operation(*(jnp.stack(parts) for parts in zip(*made, strict=True)))


def _operation(source: np.ndarray, target: np.ndarray, alpha: float, beta: float) -> tuple[Array, Array]:
    reach = np.arange(-RADIUS, RADIUS + 1)
    patch = np.stack(np.meshgrid(reach, reach, indexing="ij"), axis=-1).reshape(-1, 2)
    here, there = ((patch + centre) @ (SIDE, 1) for centre in (source, target))
    A, std = np.eye(SIDE**2), np.zeros(SIDE**2)
    A[here, here], std[here] = beta, np.sqrt(1 - beta**2)
    A[there], std[there] = 0.0, 0.0  # where the patches meet, the copy is on top
    A[there, here] = alpha
    return jnp.asarray(A), jnp.asarray(std)


class Laws(NamedTuple):
    """The Gaussian law of the picture under the ODE, under the SDE with fresh noise, and under recorded noise."""

    ode: GaussianMixture
    fresh: GaussianMixture
    recorded: GaussianMixture


def operated(data: GaussianMixture, laws: Laws, op: Operation, t0: Time) -> Laws:
    """One more operation: up to t0, op, and back, in continuous time and for data N(m_0, V_0).

    ODE-Drag        up and down are one affine map and its inverse.
    fresh noise     up by the forward process, and back with the contraction of Theorem 3.1.
    SDE-Drag        x~_0 = x_0 + K (x~_t0 - x_t0), K = alpha V_0 V_t0^-1, on every path and whatever the law of x_0:
                    the reverse drift is affine with the slope of E[x_0 | x_t0], and the noise is the same.

    With x_t0 = alpha x_0 + sigma z and B = A - 1 the last is x~_0 = (1 + alpha K B) x_0 + sigma K B z + K std z'. Where
    x_0 has the law of the data it is that of fresh noise (Theorem 3.3): at the first operation, and not after it.
    """
    alpha, sigma, marginal = SCHEDULE.alpha(t0), SCHEDULE.sigma(t0), data.marginal(SCHEDULE, t0)
    ode, fresh, law = laws

    def back(at_t0: GaussianMixture, lam: float) -> GaussianMixture:
        edited = _affine(at_t0, op.A, jnp.diag(op.std**2))
        return law_gaussian(Problem(data, edited, SCHEDULE, t0), jnp.zeros(()), lam)

    axes = data.axes[0]
    up = (axes * jnp.sqrt(marginal.variances[0] / data.variances[0])[None]) @ axes.T
    lifted = _affine(ode, up, jnp.zeros_like(up))
    lifted = lifted._replace(means=lifted.means + marginal.means - data.means @ up.T)
    K = (axes * (alpha * data.variances[0] / marginal.variances[0])[None]) @ axes.T
    KB = K @ (op.A - jnp.eye(data.dim))
    noise = sigma**2 * KB @ KB.T + (K * (op.std**2)[None]) @ K.T
    return Laws(
        back(lifted, 0.0), back(fresh.marginal(SCHEDULE, t0), 1.0), _affine(law, jnp.eye(data.dim) + alpha * KB, noise)
    )


def _affine(law: GaussianMixture, J: Float[Array, "d d"], noise: Float[Array, "d d"]) -> GaussianMixture:
    """The law of J x + N(0, noise)."""
    return from_covariances(law.log_weights, law.means @ J.T, J @ law.covariances @ J.T + noise[None])


def dragged_laws(data: GaussianMixture, ops: Operation, m: Count, t0: Time) -> Laws:
    """After the first m of these operations on Gaussian data."""
    return jax.lax.fori_loop(0, m, lambda i, laws: operated(data, laws, ops.at(i), t0), Laws(data, data, data))


@jax.jit
def exact_kl(data: GaussianMixture, ops: Operation, m: Count, t0: Time) -> Float[Array, "3"]:
    """KL(p~_0 | p_0) after m operations of ODE-Drag, the SDE with fresh noise and SDE-Drag."""
    return jnp.stack([gaussian_kl(law, data) for law in dragged_laws(data, ops, m, t0)])
