"""One operation of a drag: up to t0, Eq. (12) of the paper on patches, and back.

target <- alpha source,      source <- beta source + sqrt(1 - beta²) noise
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sd_port.models.layers import Image
from theory.editing import edit, replayed
from theory.types import Noise, NoiseFn, PRNGKey, Solver, Times


class Move(NamedTuple):
    """One operation on each of some latents: patches around `source`, [x, y] in latent pixels, go to `target`."""

    source: Int[Array | np.ndarray, "batch points 2"]
    target: Int[Array | np.ndarray, "batch points 2"]
    active: Bool[Array | np.ndarray, "batch points"]


@partial(jax.jit, static_argnames=("method", "carry_noise", "mask_latent", "batch_size"))
def operate(
    solver: Solver,
    eps_fn: NoiseFn,
    x: Image,
    ts: Times,
    key: PRNGKey,
    move: Move,
    alpha: Float[Array, "batch points"],
    beta: Float[Array, ""],
    radius: Int[Array, ""],
    mask: Image | None,
    *,
    method: Literal["sde", "ode"],
    carry_noise: bool,
    mask_latent: bool,
    batch_size: int,
) -> Image:
    """One operation: up to ts[0], copy and paste, back. Latents of which no point is active stay as they are.

    carry_noise moves the recorded noise too (`carry`); mask_latent as in `theory.editing.edit`.
    """
    edit_key, patch_key = jr.split(key)
    y = edit(
        solver,
        eps_fn,
        eps_fn,
        x,
        ts,
        edit_key,
        latent="cycle" if method == "sde" else "invert",
        manipulate=lambda x: _paste_all(x, move, alpha, beta, radius, patch_key),
        manipulate_noise=partial(carry, move=move, radius=radius, key=patch_key) if carry_noise else replayed,
        mask=mask,
        mask_latent=mask_latent,
        batch_size=batch_size,
    )
    return jnp.where(jnp.any(move.active, axis=1)[:, None, None, None], y, x)


def carry(noise: Noise, move: Move, radius: Int[Array, ""], key: PRNGKey) -> Noise:
    """Recorded noise, (steps, batch, height, width, channels), goes with the patch at every step, and fresh noise takes
    its place: Eq. (12) with alpha = 1 and beta = 0, after which it is unit noise as before.
    """
    keys, ones = jr.split(jr.fold_in(key, 1), len(noise)), jnp.ones(move.active.shape, noise.dtype)
    each_step = jax.vmap(_paste_all, in_axes=(0, None, None, None, None, 0))
    return each_step(noise, move, ones, jnp.float32(0), radius, keys)


def _paste_all(x: Image, move: Move, alpha, beta, radius, key: PRNGKey) -> Image:
    """`copy_paste` on every latent of a batch."""
    return jax.vmap(copy_paste, in_axes=(0, 0, 0, None, None, 0))(x, move, alpha, beta, radius, jr.split(key, len(x)))


def copy_paste(
    x: Float[Array, "height width channels"],
    move: Move,
    alpha: Float[Array, " points"],
    beta: Float[Array, ""],
    radius: Int[Array, ""],
    key: PRNGKey,
) -> Float[Array, "height width channels"]:
    """Eq. (12) on one latent, one pair of points after another, each with noise of its own, of fold_in(key, pair).

    move's leaves here have no batch axis.

    A patch is [p - radius, p + radius) along both axes, less what would leave the latent at the source or the target;
    as in the published code its upper end stays below the last row and column.
    """
    height, width, _ = x.shape
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
    last = jnp.array([width - 1, height - 1])

    def one(i: Array, x: Array) -> Array:
        source, target = move.source[i], move.target[i]
        noise = jr.normal(jr.fold_in(key, i), x.shape, x.dtype)
        below = jnp.minimum(radius, jnp.minimum(source, target))
        above = jnp.minimum(radius, jnp.minimum(last - source, last - target))

        def patch(point: Array) -> Array:
            inside = (columns >= point[0] - below[0]) & (columns < point[0] + above[0])
            inside &= (rows >= point[1] - below[1]) & (rows < point[1] + above[1])
            return (inside & move.active[i])[..., None]

        moved = jnp.roll(x, (target - source)[::-1], axis=(0, 1))
        left = jnp.where(patch(source), beta * x + jnp.sqrt(1 - beta**2) * noise, x)
        return jnp.where(patch(target), alpha[i] * moved, left)

    return jax.lax.fori_loop(0, move.active.shape[0], one, x)
