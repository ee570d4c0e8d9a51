"""Mean distance: how far from its target is what was to be dragged there? Three published definitions.

What stood at a handle of the original is looked for in the edited picture, by the cosine similarity of features such as
those of `sd_port.metrics.dift`, and the distance is that of the best match to the target. The definitions differ in how
feature maps are enlarged to the picture, in where the match is looked for, and in the unit; their figures cannot be
compared with one another.

Points are [x, y] in pixels of the picture, (pairs, 2); feature maps are (height, width, channels); size is the (height,
width) of the picture. Every function returns one distance for each pair of points: a mean over all pairs of a set
weighs points, a mean of means weighs pictures.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Features = Float[Array, "h w c"]
Points = Int[Array, "pairs 2"] | Int[np.ndarray, "pairs 2"]
Region = Bool[Array, "regions height width"]  # one for each pair, or one for all
Enlarge = Literal["bilinear", "nearest"]

SMALLEST_REACH = 5  # pixels: the least radius of RegionDrag's discs
NO_LENGTH = 1e-8  # what shorter vectors are taken for, as torch's CosineSimilarity does
EQUAL = 1e-6  # similarities no further apart are one: near its edges a bilinear map is flat but for rounding
EXACT = jax.lax.Precision.HIGHEST  # on a GPU the default keeps ten bits


def dragdiffusion_distance(
    source: Features, edited: Features, handle: Points, target: Points, size: tuple[int, int]
) -> Float[Array, "pairs"]:
    """In pixels; the match may be anywhere in the picture. Shi et al. 2024 (arXiv 2306.14435).

    As in `run_eval_point_matching.py` of its code: bilinear enlargement; the published mean weighs points.
    """
    return _length(matches(source, edited, handle, size, "bilinear") - jnp.asarray(target))


def draglora_distance(
    source: Features, edited: Features, handle: Points, target: Points, mask: Float[np.ndarray, "height width"]
) -> Float[Array, "pairs"]:
    """In pixels; the match must lie where the mask is 1: the m-MD of Xia et al. 2025 (arXiv 2505.12427).

    As in `run_eval_point_matching.py` of its code: else as DragDiffusion's, a mean over points too. mask is as large as
    the picture. Raises ValueError for one of zeros.
    """
    inside = np.asarray(mask) > 0.5
    if not inside.any():
        raise ValueError("the mask is black: there is no pixel in which to look for a match")
    found = matches(source, edited, handle, mask.shape, "bilinear", jnp.asarray(inside)[None])
    return _length(found - jnp.asarray(target))


def regiondrag_distance(
    source: Features, edited: Features, handle: Points, target: Points, size: tuple[int, int]
) -> Float[Array, "pairs"]:
    """As a share of width and height; the match must lie near handle or target. Lu et al. 2024 (arXiv 2407.18247).

    As in `region_utils/evaluator.py` of its code: enlargement by the nearest neighbour, `discs`, the first pixel where
    several match equally, and x over the width, y over the height. Tables give 100 times the mean, which weighs
    pictures. Its features are `dift` of the picture brought to 768 x 768 by `nearest`, without draws.
    """
    found = matches(source, edited, handle, size, "nearest", discs(handle, target, size))
    height, width = size
    return _length((found - jnp.asarray(target)) / jnp.array([[width, height]], jnp.float32))


@partial(jax.jit, static_argnames=("size", "enlarge"))
def matches(
    source: Features,
    edited: Features,
    handle: Points,
    size: tuple[int, int],
    enlarge: Enlarge,
    region: Region | None = None,
) -> Int[Array, "pairs 2"]:
    """The pixel [x, y] of the edited picture that is most like the handle in the source; the first one of equals.

    region: (pairs or 1, height, width), where to look; everywhere unless given.
    """
    likeness = similarity(at_points(source, handle, size, enlarge), edited, size, enlarge)
    if region is not None:
        likeness = jnp.where(jnp.broadcast_to(region, likeness.shape), likeness, -jnp.inf)
    likeness = likeness.reshape(len(likeness), -1)
    best = (likeness >= likeness.max(axis=1, keepdims=True) - EQUAL).argmax(axis=1)
    return jnp.stack([best % size[1], best // size[1]], axis=1)


def at_points(features: Features, points: Points, size: tuple[int, int], enlarge: Enlarge) -> Float[Array, "pairs c"]:
    """The features at pixels [x, y] of the picture, without those of all others."""
    x, y = jnp.asarray(points).T
    if enlarge == "nearest":
        rows, columns = (_nearest(old, new) for old, new in zip(features.shape, size, strict=False))
        return features[jnp.asarray(rows)[y], jnp.asarray(columns)[x]]
    rows, columns = (_bilinear(old, new) for old, new in zip(features.shape, size, strict=False))
    return jnp.einsum("nh,nw,hwc->nc", rows[y], columns[x], features, precision=EXACT)


def similarity(
    wanted: Float[Array, "n c"], features: Features, size: tuple[int, int], enlarge: Enlarge
) -> Float[Array, "n height width"]:
    """Cosine similarity of some vectors with the features of every pixel, in [-1, 1].

    The enlarged map is never whole in memory, where that of a large picture would take gigabytes.
    """
    if enlarge == "nearest":  # the similarities of the small map are those of the large one
        rows, columns = (_nearest(old, new) for old, new in zip(features.shape, size, strict=False))
        return _cosine(wanted, features)[:, rows][:, :, columns]
    rows, columns = (_bilinear(old, new) for old, new in zip(features.shape, size, strict=False))
    wide = jnp.einsum("xw,hwc->hxc", columns, features, precision=EXACT)
    by_row = jax.lax.map(lambda row: _cosine(wanted, jnp.einsum("h,hxc->xc", row, wide, precision=EXACT)), rows)
    return by_row.swapaxes(0, 1)


def _cosine(wanted: Float[Array, "n c"], features: Float[Array, "*places c"]) -> Float[Array, "n *places"]:
    products = jnp.einsum("nc,...c->n...", wanted, features, precision=EXACT)
    lengths = jnp.maximum(jnp.linalg.norm(features, axis=-1), NO_LENGTH)[None]
    own = jnp.maximum(jnp.linalg.norm(wanted, axis=-1), NO_LENGTH).reshape(-1, *(1,) * (products.ndim - 1))
    return products / (own * lengths)


def discs(handle: Points, target: Points, size: tuple[int, int]) -> Bool[Array, "pairs height width"]:
    """RegionDrag's places to look: nearer to handle or target than |target - handle| / sqrt(2), or than 5 pixels.

    In whole numbers, so that a pixel on the rim is outside whatever rounding does.
    """
    handle, target = (jnp.asarray(points)[:, :, None, None] for points in (handle, target))
    x, y = jnp.arange(size[1])[None, None, :], jnp.arange(size[0])[None, :, None]
    twice_reach = jnp.maximum(((target - handle) ** 2).sum(axis=1), 2 * SMALLEST_REACH**2)  # (pairs, 1, 1)

    def near(point: Int[Array, "pairs 2 1 1"]) -> Bool[Array, "pairs height width"]:
        return 2 * ((x - point[:, 0]) ** 2 + (y - point[:, 1]) ** 2) < twice_reach

    return near(handle) | near(target)


def nearest(image: Float[np.ndarray, "_ _ c"], size: tuple[int, int]) -> Float[np.ndarray, "_ _ c"]:
    """A picture brought to (height, width) by the nearest neighbour, as torch's interpolate does unless told."""
    rows, columns = (_nearest(old, new) for old, new in zip(image.shape, size, strict=False))
    return image[rows][:, columns]


def _nearest(old: int, new: int) -> Int[np.ndarray, " new"]:
    """Indices into `old` for each of `new`; in float32, whose rounding is part of torch's definition."""
    places = np.floor(np.arange(new, dtype=np.float32) * (np.float32(old) / np.float32(new)))
    return np.minimum(places.astype(int), old - 1)


def _bilinear(old: int, new: int) -> Float[Array, "new old"]:
    """The matrix that enlarges a line of numbers: straight lines between the middles of pixels, flat outside."""
    return jax.image.resize(jnp.eye(old, dtype=jnp.float32), (new, old), "linear", antialias=False)


def _length(way: Array) -> Float[Array, "pairs"]:
    return jnp.linalg.norm(way.astype(jnp.float32), axis=1)
