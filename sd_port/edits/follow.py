"""Closed-loop dragging: where is what is dragged by now?

Before every operation the features of the source points are looked for around where they were last, as DragDiffusion
tracks its points (Shi et al. 2024, arXiv 2306.14435, Sec. 3.3). The features are those of DIFT (Tang et al. 2023, arXiv
2306.03881): what the UNet makes of the lightly noised latent.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from flax import nnx
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from sd_port.edits.operation import Move
from sd_port.models.layers import Image
from sd_port.pipeline import StableDiffusion
from theory.schedules import DiscreteVP
from theory.types import PRNGKey

TIMESTEP, UP_BLOCKS, DRAWS = 261, 2, 4  # those of DIFT, with half as many draws
REACH = 3  # latent pixels beyond one step, in which a point is looked for
PATIENCE = 2  # times the operations of a picture's straight way, after which its pursuit ends


class Pursuit(NamedTuple):
    """What is looked for, where it was last, where it is to go, and whether it is on its way: all (batch, points).

    A picture's pursuit depends on nothing that its neighbours in the batch do.
    """

    features: Partial  # of latents
    wanted: Float[Array, "batch points channels"]
    places: np.ndarray  # (batch, points, 2), [x, y] in latent pixels
    target: np.ndarray
    on_its_way: np.ndarray
    left: np.ndarray  # (batch,) operations that may still be made

    def move(self, step_size: float, sequence: bool) -> Move:
        """The next operation: at most one step towards the target; in sequence, of the first point not there yet.

        Of the latent pixels around the end of a straight step, the one that is furthest on the way and no further off
        than the step is long, or one.
        """
        way = (self.target - self.places)[..., None, :]
        length = np.linalg.norm(way, axis=-1, keepdims=True)
        straight = np.abs(way) * np.minimum(step_size / np.maximum(length, 1), 1)
        further = np.array([[False, False], [True, False], [False, True], [True, True]])
        around = np.sign(way) * np.where(further, np.ceil(straight), np.floor(straight))
        progress = np.where(np.linalg.norm(around, axis=-1) <= max(step_size, 1), (around * way).sum(-1), -1)
        best = progress.argmax(-1)[..., None, None]
        step = np.take_along_axis(around, best, axis=-2)[..., 0, :].astype(int)
        active = self.on_its_way & (np.cumsum(self.on_its_way, axis=1) == 1) if sequence else self.on_its_way
        return Move(self.places, self.places + step, active)

    def look(self, x: Image, move: Move) -> "Pursuit":
        """Where the points are after an operation; those that have arrived stay."""
        reach = np.abs(np.asarray(move.target) - move.source).max((1, 2)) + REACH
        found = np.asarray(nearest(self.features(x), self.wanted, self.places, reach))
        places = np.where(move.active[..., None], found, self.places)
        left = self.left - np.any(move.active, axis=1)
        on_its_way = self.on_its_way & (places != self.target).any(-1) & (left > 0)[:, None]
        return self._replace(places=places, on_its_way=on_its_way, left=left)


def begin(pipe: StableDiffusion, x: Image, prompts: Sequence[str], moves: Sequence[Move], key: PRNGKey) -> Pursuit:
    """A pursuit from where the straight ways begin to where they end, of what is there in the latents x."""
    graph, weights = nnx.split(pipe.unet)
    features = Partial(partial(_features, graph, pipe.schedule), weights, pipe.embed(prompts), key)
    source = target = np.full_like(np.asarray(moves[0].source), -1)
    for move in moves:  # in sequence, the ways of some points begin later than those of others
        begins = np.asarray(move.active) & (source[..., 0] < 0)
        source = np.where(begins[..., None], np.asarray(move.source), source)
        target = np.where(np.asarray(move.active)[..., None], np.asarray(move.target), target)
    on_its_way = np.asarray((source != target).any(-1))
    at_source = _at(features(x), np.maximum(source, 0))
    straight = sum(np.asarray(move.active).any(axis=1).astype(int) for move in moves)
    return Pursuit(features, at_source, source, target, on_its_way, PATIENCE * np.asarray(straight))


@partial(jax.jit, static_argnums=(0, 1))
def _features(graph, schedule: DiscreteVP, weights, context, key, x: Image) -> Image:
    """Of unit length, at the size of the latent: the mean over draws of the noise."""
    unet, t = nnx.merge(graph, weights), jnp.float32((TIMESTEP + 1) / schedule.steps)
    timesteps, text_kv = jnp.full(1, TIMESTEP), unet.text_kv(context)

    def once(key: PRNGKey) -> Image:
        noised = schedule.alpha(t) * x + schedule.sigma(t) * jr.normal(key, x.shape, x.dtype)
        return unet.features(noised, timesteps, text_kv, UP_BLOCKS).astype(jnp.float32)

    found = jax.lax.map(once, jr.split(key, DRAWS)).mean(axis=0)
    found = jax.image.resize(found, (*x.shape[:3], found.shape[-1]), "bilinear")
    return found / jnp.linalg.norm(found, axis=-1, keepdims=True)


@jax.jit
@jax.vmap
def _at(features, points):
    return features[points[:, 1], points[:, 0]]


@jax.jit
def nearest(features: Image, wanted, places, reach: Int[Array, " batch"]) -> Array:
    """(batch, points, 2): the latent pixels within `reach` of `places` whose features are most like those wanted."""
    _, height, width, _ = features.shape
    likeness = jnp.einsum("bhwc,bpc->bphw", features, wanted)
    off_x = jnp.abs(jnp.arange(width)[None, None, None, :] - places[..., 0][..., None, None])
    off_y = jnp.abs(jnp.arange(height)[None, None, :, None] - places[..., 1][..., None, None])
    reach = reach[:, None, None, None]
    near = jnp.where((off_x <= reach) & (off_y <= reach), likeness, -jnp.inf)
    best = near.reshape(*near.shape[:2], -1).argmax(-1)
    return jnp.stack([best % width, best // width], axis=-1)
