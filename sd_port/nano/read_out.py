"""Reads scenes out of pictures: the inverse of `scenes.render`, by a search and a robust least squares fit.

The search (`starts.py`) looks at pictures of half the size. The best combinations of what may be in them are improved
by Gauss-Newton steps (`least_squares.py`), and the best of these at full size. What no scene explains, such as a second
boat, counts little in the fit and all in the residual.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sd_port.nano.least_squares import EVERYTHING, ONLY_SUN, improve, loss, to_scene
from sd_port.nano.scenes import Scene
from sd_port.nano.starts import STARTS, bank, starts, suns

Images = Float[Array, "n 64 64 3"] | Float[np.ndarray, "n 64 64 3"]
Tree = TypeVar("Tree")

CHUNK = 16  # pictures fitted at once; the last chunk is filled up, so that everything is compiled once
ROUGH, FINE, LAST = 4, 6, 2  # steps for every start, for the best at half size, and for the best at full size


class ReadOut(NamedTuple):
    """The nearest scenes that were found.

    `residual` is the root mean square difference between a picture and the render of its scene, over all pixels and
    channels: the distance to the manifold of scenes.
    """

    scene: Scene
    residual: Float[Array, " n"]


def read_out(images: Images) -> ReadOut:
    """Fits a scene to each of n pictures in [0, 1].

    All parameters are continuous within `RANGES`. Presences lie between 0 and 1, and parameters of what is absent mean
    nothing. The reflection need not be under the sun. The same picture gives the same scene in any batch, to rounding;
    a picture that is not finite gets a residual that is not finite.

    Raises ValueError for no pictures at all.
    """
    if len(images) == 0:
        raise ValueError("read_out needs at least one picture")
    return in_chunks(_fit, jnp.asarray(images, jnp.float32))


def in_chunks(function: Callable[..., Tree], inputs) -> Tree:
    """function of CHUNK rows of the inputs at a time, the last row repeated to fill the last chunk.

    The devices take turns, each in a thread of its own; results are on the host.
    """
    n, devices = len(jax.tree.leaves(inputs)[0]), jax.devices()
    host = jax.tree.map(np.asarray, inputs)
    filled = jax.tree.map(lambda leaf: np.concatenate([leaf, np.repeat(leaf[-1:], -n % CHUNK, axis=0)]), host)

    def part(i: int) -> Tree:
        rows = slice(i * CHUNK, (i + 1) * CHUNK)
        chunk = jax.device_put(jax.tree.map(lambda leaf: leaf[rows], filled), devices[i % len(devices)])
        return jax.device_get(function(chunk))

    with ThreadPoolExecutor(len(devices)) as pool:
        parts = list(pool.map(part, range(-(-n // CHUNK))))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:n], *parts)


def _fit(images: Float[Array, "n 64 64 3"]) -> ReadOut:
    known = bank()
    small, us = suns(images, known)
    either = [improve(us[:, i], small, ROUGH, ONLY_SUN)[0] for i in range(us.shape[1])]
    begin = starts(jnp.stack(either, axis=1), small, known)
    improved = [improve(begin[:, i], small, ROUGH, EVERYTHING) for i in range(STARTS)]
    us, _ = improve(_best(improved, small), small, FINE, EVERYTHING)
    return _result(*improve(us, images, LAST, EVERYTHING), images)


@jax.jit
@jax.vmap
def _best(improved, image):
    us, pictures = map(jnp.stack, zip(*improved, strict=True))
    return us[jnp.argmin(jax.vmap(loss, in_axes=(0, None))(pictures, image))]


@jax.jit
@jax.vmap
def _result(u, picture, image) -> ReadOut:
    return ReadOut(to_scene(u), jnp.sqrt(jnp.mean((picture - image) ** 2)))
