"""Where a fit may start: the best of what may be in a picture, by looking at it at half its size.

First the two best of a bank of suns over an empty sea, then with either clouds, then the places for an island and for
a boat, none of either included.
"""

from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sd_port.nano.least_squares import EVERYTHING, FLOOR, loss, paint, squares, to_scene, to_units, weight_of
from sd_port.nano.scenes import (
    AMBIENT,
    BOAT_SIZES,
    CLOUDS,
    HEIGHTS,
    HIGHEST,
    ISLAND_HEIGHTS,
    MAST,
    SOFTNESS,
    SUN_SIZES,
    SUNS,
    WOOD,
    Scene,
    between,
    boat_coverage,
    cloud_coverage,
)

HALF = 32
STARTS = 3  # combinations of island and boat that are given
HORIZONS, SUN_XS = np.linspace(0.53, 0.61, 4, dtype=np.float32), np.linspace(0.1, 0.9, 21, dtype=np.float32)
SHORE = 20  # the first row, at half size, below every horizon
VEIL = 0.79  # what a cloud wider than the sky covers of it
_PIXEL = (np.arange(HALF, dtype=np.float32) + 0.5) / HALF


class Bank(NamedTuple):
    """What may be in a picture, on grids; coverages and pictures are of half size."""

    suns: Scene
    sun_pictures: Float[Array, "suns 32 32 3"]
    islands: Float[Array, "islands 3"]  # x, height, width; the first stands for none
    boats: Float[Array, "boats 3"]  # x, y, size
    boat_parts: Float[Array, "boats 3 pixels"]  # what is seen of hull, mast and sails
    boat_covers: Float[Array, "boats 3 pixels"]  # the same times what is seen of the whole boat
    boat_products: Float[Array, "boats 3 3"]  # sums over the pixels of one part times another
    clouds: Float[Array, "clouds 3"]  # x, y, size
    cloud_shapes: Float[Array, "clouds pixels"]


@lru_cache
def bank() -> Bank:
    def grid(*axes):
        return np.stack([np.ravel(g) for g in np.meshgrid(*axes, indexing="ij")], -1).astype(np.float32)

    horizon, x, high, radius, warmth = grid(
        HORIZONS,
        SUN_XS,
        np.linspace(0, 1, 8),
        list(_middles(SUN_SIZES).values()),
        list(SUNS.values()),
    ).T
    middle = jax.vmap(to_scene)(jnp.full((len(x), len(EVERYTHING)), 0.5, jnp.float32))
    suns = middle._replace(
        horizon=jnp.asarray(horizon),
        sun_x=jnp.asarray(x),
        sun_y=jnp.asarray(horizon - radius - (HIGHEST - radius) * high),
        sun_radius=jnp.asarray(radius),
        sun_warmth=jnp.asarray(warmth),
        reflection_x=jnp.asarray(x),
        island_presence=jnp.zeros_like(middle.horizon),
        boat_presence=jnp.zeros_like(middle.horizon),
        cloud_cover=jnp.zeros_like(middle.cloud_cover),
    )
    islands = grid(np.linspace(0.12, 0.88, 20), list(_middles(ISLAND_HEIGHTS).values()), [0.24])
    islands = np.concatenate([islands[:1], islands])
    boats = grid(np.linspace(0.16, 0.84, 23), np.linspace(0.60, 0.90, 13), list(_middles(BOAT_SIZES).values()))
    clouds = grid(np.linspace(0, 1, 11), np.linspace(0.07, 0.46, 7), [0.18, 0.26])

    def boat_parts(x, y, size):
        right, up = jnp.broadcast_arrays((_PIXEL[None, :] - x) / size, (y - _PIXEL[:, None]) / size)

        def cover(distance):
            return jax.nn.sigmoid(SOFTNESS * HALF * size * distance)

        above = cover(up + 0.5 / HALF / size)
        hull, mast, sail = (part * above for part in boat_coverage(right, up, cover))
        mast = MAST * mast
        return jnp.stack([hull, mast * (1 - hull), sail * (1 - mast) * (1 - hull)]).reshape(3, -1)

    def cloud_shape(x, y, size):
        one = to_scene(jnp.zeros(len(EVERYTHING), jnp.float32))._replace(
            cloud_x=x[None], cloud_y=y[None], cloud_size=size[None], cloud_cover=jnp.ones(1, jnp.float32)
        )
        return cloud_coverage(one, 0, _PIXEL[None, :], _PIXEL[:, None]).ravel()

    parts = jax.jit(jax.vmap(boat_parts))(*boats.T)
    return Bank(
        suns=suns,
        sun_pictures=jax.jit(partial(paint, size=HALF))(suns),
        islands=jnp.asarray(islands),
        boats=jnp.asarray(boats),
        boat_parts=parts,
        boat_covers=parts * parts.sum(axis=1, keepdims=True),
        boat_products=parts @ parts.mT,
        clouds=jnp.asarray(clouds),
        cloud_shapes=jax.jit(jax.vmap(cloud_shape))(*clouds.T),
    )


@jax.jit
def suns(images, bank: Bank):
    """The pictures at half size, and for each the two best suns over an empty sea, apart from each other.

    A sun is looked for in the sky and its reflection in the sea, as if they had nothing to do with each other. The
    second sun is for clouds, which are as bright.
    """

    def one(image):
        small = image.reshape(HALF, 2, HALF, 2, 3).mean((1, 3))
        losses = jax.vmap(loss, in_axes=(0, None))
        sky = losses(bank.sun_pictures[:, :SHORE], small[:SHORE]) * SHORE
        sea = losses(bank.sun_pictures[:, SHORE:], small[SHORE:]) * (HALF - SHORE)
        sea = sea.reshape(len(HORIZONS), len(SUN_XS), -1)
        scores = -(sky.reshape(sea.shape) + sea.min(axis=1, keepdims=True)).ravel()

        def with_reflection(i):
            horizon, _, rest = jnp.unravel_index(i, sea.shape)
            sun = jax.tree.map(lambda leaf: leaf[i], bank.suns)
            return to_units(sun._replace(reflection_x=jnp.asarray(SUN_XS)[jnp.argmin(sea[horizon, :, rest])]))

        return small, jax.vmap(with_reflection)(_best_apart(scores, bank.suns.sun_x[:, None], 0.12))

    return jax.lax.map(one, images)


@jax.jit
@partial(jax.vmap, in_axes=(0, 0, None))
def starts(us, small, bank: Bank):
    """The best STARTS of all combinations: either sun, no island or one of two, no boat or one of the two best."""
    scenes = jax.vmap(partial(_combined, small=small, bank=bank))(us)
    scenes = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), scenes)
    order = jnp.argsort(jax.vmap(loss, in_axes=(0, None))(paint(scenes, HALF), small))
    return jax.vmap(to_units)(jax.tree.map(lambda leaf: leaf[order[:STARTS]], scenes))


def _combined(u, small, bank: Bank) -> Scene:
    """All combinations with one sun, and with the clouds that go with it."""
    draw = jax.vmap(partial(paint, size=HALF))
    losses = jax.vmap(loss, in_axes=(0, None))
    scene = jax.lax.fori_loop(0, CLOUDS, partial(_add_cloud, small=small, bank=bank), to_scene(u))

    def with_island(presence, place):
        x, height, width = place
        return scene._replace(island_presence=presence, island_x=x, island_height=height, island_width=width)

    presence = jnp.ones(len(bank.islands), jnp.float32).at[0].set(0)  # the first of the bank is none
    lands = jax.vmap(with_island)(presence, bank.islands)
    pictures = draw(lands)
    scores = jnp.where(presence > 0, -losses(pictures, small), -jnp.inf)
    which = jnp.concatenate([jnp.zeros(1, int), _best_apart(scores, bank.islands[:, :1], 0.09)])
    lands, pictures = jax.tree.map(lambda leaf: leaf[which], (lands, pictures))
    scenes = jax.vmap(partial(_add_boats, small=small, bank=bank))(lands, pictures)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), scenes)


def _add_cloud(i, scene: Scene, small, bank: Bank) -> Scene:
    """Puts cloud i where it explains most: its shape times the way from the sky's colour to that of clouds."""
    sizes = jnp.stack([scene.cloud_size, scene.cloud_size.at[i].set(1e3)])
    covers = jnp.stack([scene.cloud_cover, scene.cloud_cover.at[i].set(1)])
    veil = jax.vmap(lambda size, cover: scene._replace(cloud_size=size, cloud_cover=cover))(sizes, covers)
    picture, veiled = paint(veil, HALF)
    toward = (veiled - picture) / VEIL
    weight = weight_of(squares(picture, small))
    along = bank.cloud_shapes @ (weight * jnp.sum((small - picture) * toward, -1)).ravel()
    power = bank.cloud_shapes**2 @ (weight * jnp.sum(toward**2, -1)).ravel() + FLOOR
    cover = jnp.clip(along / power, 0, 0.9)
    best = jnp.argmax(2 * cover * along - cover**2 * power)
    x, y, size = bank.clouds[best]
    return scene._replace(
        cloud_x=scene.cloud_x.at[i].set(x),
        cloud_y=scene.cloud_y.at[i].set(y),
        cloud_size=scene.cloud_size.at[i].set(size),
        cloud_cover=scene.cloud_cover.at[i].set(cover[best]),
    )


def _add_boats(land: Scene, picture, small, bank: Bank) -> Scene:
    """The scene without a boat, and with each of the two boats that bring its picture nearest to the given one.

    A boat covers the picture by its parts, hull C_h + mast C_m + sail C_s + (1 - hull - mast - sail) picture, so that
    the best colours C_h and C_s at every place solve two linear equations. Its mast has a known colour.
    """
    ambient = between(jnp.clip((land.horizon - land.sun_y) / HIGHEST, 0, 1), HEIGHTS, AMBIENT)[0]
    wood, under, over = ambient * WOOD[0], picture.reshape(-1, 3), (small - picture).reshape(-1, 3)
    along = bank.boat_parts @ over + bank.boat_covers @ under  # (boats, parts, 3): products with what is to be covered
    product = bank.boat_products[..., None]
    h, s = (along[:, i] - product[:, i, 1] * wood for i in (0, 2))
    hh, hs, ss = product[:, 0, 0], product[:, 0, 2], product[:, 2, 2]
    hull = jnp.clip((ss * h - hs * s) / (hh * ss - hs**2), 0, ambient)
    sail = jnp.clip((hh * s - hs * h) / (hh * ss - hs**2), 0, ambient)
    squares = 2 * bank.boat_parts.sum(1) @ (over * under) + bank.boat_covers.sum(1) @ under**2
    squares += product[:, 1, 1] * wood**2 - 2 * wood * along[:, 1]
    squares += hh * hull**2 + 2 * hs * hull * sail + ss * sail**2 - 2 * hull * h - 2 * sail * s
    best = _best_apart(-squares.sum(-1), bank.boats[:, :2], 0.07)

    def with_boat(presence, place, hull, sail):
        x, y, size = place
        look = {"hull": hull / ambient[0], "sail": sail / ambient[0]}
        return land._replace(boat_presence=presence, boat_x=x, boat_y=y, boat_size=size, **look)

    which = jnp.concatenate([best[:1], best])
    presence = jnp.array([0, 1, 1], jnp.float32)
    return jax.vmap(with_boat)(presence, bank.boats[which], hull[which], sail[which])


def _best_apart(scores, places, apart: float):
    """The indices of the best place and the best that is not near it."""
    first = jnp.argmax(scores)
    near = jnp.all(jnp.abs(places - places[first][None]) < apart, -1)
    return jnp.stack([first, jnp.argmax(jnp.where(near, -jnp.inf, scores))])


def _middles(ranges: dict[str, tuple[float, float]]) -> dict[str, float]:
    return {name: (low + high) / 2 for name, (low, high) in ranges.items()}
