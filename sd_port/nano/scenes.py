"""Seascapes with a truth: what is in the picture is known, and can be read back out of it (`read_out.py`).

A scene is a few numbers; `render` is a smooth function of them, so pictures can be drawn, differentiated and fitted.
Three laws tie its parts together, and an edit that breaks one of them shows: the sun's reflection lies under the sun,
the island and the sails are lit from the sun's side, and the sky's colours follow the sun's height.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float

from theory.types import PRNGKey

Pixels = Float[Array, "*n size size 3"]

CLOUDS = 2
SOFTNESS = 2.2  # of edges: coverage is sigmoid(SOFTNESS * distance in pixels), about a pixel wide
HIGHEST = 0.40  # the sun's greatest height above the horizon
CANDIDATES = 24  # half of all tries are good: a scene fails once in 10^7
NEAR = 1e-3  # keeps powers and roots away from zero, where their derivatives are not finite

HULLS = {
    "red": (0.80, 0.10, 0.08),
    "blue": (0.10, 0.22, 0.75),
    "green": (0.06, 0.52, 0.22),
    "brown": (0.33, 0.18, 0.08),
}
SAILS = {
    "white": (0.96, 0.95, 0.90),
    "red": (0.85, 0.16, 0.12),
    "yellow": (0.97, 0.76, 0.12),
    "blue": (0.22, 0.42, 0.88),
}
SUNS = {"pale": 0.0, "golden": 0.5, "orange": 1.0}  # the sun's warmth
SUN_SIZES = {"small": (0.046, 0.056), "large": (0.076, 0.090)}  # radius
BOAT_SIZES = {"small": (0.27, 0.30), "large": (0.37, 0.41)}  # height of the mast
ISLAND_HEIGHTS = {"low": (0.075, 0.105), "tall": (0.17, 0.23)}

# The light by the sun's height, from dusk to noon.
HEIGHTS = np.array([0.0, 0.3, 0.62, 1.0], np.float32)
ZENITH = np.array([(0.13, 0.11, 0.33), (0.22, 0.24, 0.52), (0.22, 0.42, 0.73), (0.12, 0.42, 0.82)], np.float32)
HAZE = np.array([(0.82, 0.33, 0.26), (0.95, 0.58, 0.34), (0.90, 0.76, 0.60), (0.68, 0.84, 0.94)], np.float32)
DEEP = np.array([(0.05, 0.05, 0.17), (0.07, 0.12, 0.29), (0.06, 0.20, 0.40), (0.05, 0.26, 0.50)], np.float32)
AMBIENT = np.array([(0.70, 0.58, 0.62), (0.88, 0.76, 0.70), (1.0, 0.93, 0.85), (1.0, 1.0, 1.0)], np.float32)
WARMTHS = np.array([0.0, 0.5, 1.0], np.float32)
SUN_COLOURS = np.array([(1.0, 0.98, 0.88), (1.0, 0.83, 0.34), (1.0, 0.45, 0.20)], np.float32)
ROCK, GRASS = (np.array([[rgb]], np.float32) for rgb in ((0.17, 0.19, 0.20), (0.55, 0.52, 0.33)))
WOOD = np.array([[(0.20, 0.13, 0.08)]], np.float32)
MAST = 0.85  # its opacity


class Scene(NamedTuple):
    """What is in a picture. Lengths are fractions of its width, x to the right, y down; leaves share leading axes.

    A `presence` is 1 or 0; a fit may find anything between, as it may find a reflection that is not under the sun.
    """

    horizon: Float[Array, "*n"]
    sun_x: Float[Array, "*n"]
    sun_y: Float[Array, "*n"]
    sun_radius: Float[Array, "*n"]
    sun_warmth: Float[Array, "*n"]  # 0 pale, 1 orange
    reflection_x: Float[Array, "*n"]
    island_presence: Float[Array, "*n"]
    island_x: Float[Array, "*n"]  # of the peak
    island_height: Float[Array, "*n"]  # of the peak above the horizon
    island_width: Float[Array, "*n"]  # from the peak to the shore
    boat_presence: Float[Array, "*n"]
    boat_x: Float[Array, "*n"]
    boat_y: Float[Array, "*n"]  # of the water line
    boat_size: Float[Array, "*n"]  # height of the mast above the water
    hull: Float[Array, "*n 3"]  # colours in daylight
    sail: Float[Array, "*n 3"]
    cloud_x: Float[Array, "*n clouds"]
    cloud_y: Float[Array, "*n clouds"]
    cloud_size: Float[Array, "*n clouds"]
    cloud_cover: Float[Array, "*n clouds"]  # opacity


@partial(jax.jit, static_argnums=1)
def draw(key: PRNGKey, n: int) -> Scene:
    """n scenes, float32, whose parts can all be seen: nothing hides the sun, the peak or all of the reflection.

    Of `CANDIDATES` tries for each scene the first that shows everything is taken.
    """
    tries = _tries(key, n * CANDIDATES)
    chosen = jnp.arange(n) * CANDIDATES + jnp.argmax(all_seen(tries).reshape(n, CANDIDATES), axis=1)
    return jax.tree.map(lambda leaf: leaf[chosen], tries)


def _tries(key: PRNGKey, n: int) -> Scene:
    keys = iter(jr.split(key, 32))

    def uniform(low, high, *shape):
        return jr.uniform(next(keys), (n, *shape), jnp.float32, low, high)

    def one_of(choices, weights=None):  # the rows of an array, by index
        choices = jnp.asarray(list(choices), jnp.float32)
        return choices[jr.categorical(next(keys), jnp.zeros(len(choices)) if weights is None else weights, shape=(n,))]

    def in_one_of(ranges):
        low, high = one_of(ranges.values()).T
        return low + (high - low) * uniform(0, 1)

    horizon, sun_x, sun_radius, high = uniform(0.52, 0.62), uniform(0.1, 0.9), in_one_of(SUN_SIZES), uniform(0, 1)
    elevation = sun_radius + (HIGHEST - sun_radius) * high  # the whole sun is above the horizon
    warmth = one_of(SUNS.values(), jnp.stack([2.5 * (high - 0.5), jnp.zeros(n), 2.5 * (0.5 - high)], -1))
    return Scene(
        horizon=horizon,
        sun_x=sun_x,
        sun_y=horizon - elevation,
        sun_radius=sun_radius,
        sun_warmth=warmth + uniform(-0.08, 0.08),
        reflection_x=sun_x,
        island_presence=jr.bernoulli(next(keys), 0.94, (n,)).astype(jnp.float32),
        island_x=uniform(0.12, 0.88),
        island_height=in_one_of(ISLAND_HEIGHTS),
        island_width=uniform(0.18, 0.30),
        boat_presence=jr.bernoulli(next(keys), 0.97, (n,)).astype(jnp.float32),
        boat_x=uniform(0.16, 0.84),
        boat_y=horizon + uniform(0.08, 0.28),
        boat_size=in_one_of(BOAT_SIZES),
        hull=one_of(HULLS.values()) + uniform(-0.02, 0.02, 3),
        sail=one_of(SAILS.values()) + uniform(-0.02, 0.02, 3),
        cloud_x=uniform(0, 1, CLOUDS),
        cloud_y=horizon[:, None] * uniform(0.12, 0.75, CLOUDS),
        cloud_size=uniform(0.16, 0.30, CLOUDS),
        cloud_cover=jr.bernoulli(next(keys), 0.55, (n, CLOUDS)) * uniform(0.55, 0.9, CLOUDS),
    )


def all_seen(s: Scene) -> Bool[Array, "n"]:
    """Whether nothing hides the sun, the peak, or all of the reflection: scenes are drawn so."""
    island, boat = s.island_presence > 0, s.boat_presence > 0

    def behind_boat(x, y, room):
        wide = jnp.abs(x - s.boat_x) < 0.42 * s.boat_size + room
        return boat & wide & (y > s.boat_y - s.boat_size - room)

    land = jnp.stack([_ridge(s, s.sun_x + shift * s.sun_radius) for shift in (-0.7, 0.0, 0.7)]).max(0)
    hidden_sun = island & (s.horizon - s.sun_y < land + 0.2 * s.sun_radius)
    hidden_peak = island & behind_boat(s.island_x, s.horizon - s.island_height, 0.02)
    hidden_reflection = boat & (jnp.abs(s.boat_x - s.sun_x) < 0.2 * s.boat_size + 0.6 * s.sun_radius)
    return ~(hidden_sun | behind_boat(s.sun_x, s.sun_y, 0.6 * s.sun_radius) | hidden_peak | hidden_reflection)


def each(scene: Scene) -> list[Scene]:
    """The scenes along the first axis one by one, on the host."""
    host = jax.tree.map(np.asarray, scene)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], host) for i in range(len(host.horizon))]


def render(scene: Scene, size: int = 64) -> Pixels:
    """Pictures in [0, 1], size pixels wide; edges are antialiased to about a pixel, and all derivatives are finite."""
    paint = partial(_render, size=size)
    for _ in range(scene.horizon.ndim):
        paint = jax.vmap(paint)
    return paint(scene)


rendered = jax.jit(render, static_argnums=1)  # one for all, so that it is traced once for each number and size


def _render(s: Scene, size: int) -> Float[Array, "size size 3"]:
    pixel = (jnp.arange(size, dtype=s.horizon.dtype) + 0.5) / size
    x, y = pixel[None, :], pixel[:, None]

    def cover(distance):  # how much of a pixel lies inside, from the distance to the edge
        return jax.nn.sigmoid(SOFTNESS * size * distance)

    high = jnp.clip((s.horizon - s.sun_y) / HIGHEST, 0, 1)
    zenith, haze, deep, ambient = (between(high, HEIGHTS, colours) for colours in (ZENITH, HAZE, DEEP, AMBIENT))
    sun_colour = between(s.sun_warmth, WARMTHS, SUN_COLOURS)

    # Sky, thin clouds, and the sun that shines through them.
    altitude = jnp.clip((s.horizon - y) / s.horizon, 0, 1)
    picture = _mix(haze, zenith, (altitude + NEAR) ** 0.8)
    for i in range(CLOUDS):
        picture = _mix(picture, 0.55 * ambient + 0.45 * haze, cloud_coverage(s, i, x, y))
    distance = jnp.sqrt((x - s.sun_x) ** 2 + (y - s.sun_y) ** 2 + NEAR**2)
    glow = 0.55 * jnp.exp(-distance / (2.2 * s.sun_radius))
    picture = _mix(picture, sun_colour, glow)
    picture = _mix(picture, sun_colour, cover(s.sun_radius - distance))

    # Sea: the sky's mirror, darker with nearness, with ripples, and the sun's reflection.
    depth = jnp.clip((y - s.horizon) / (1 - s.horizon), 0, 1)
    phase = 2 * jnp.pi * (3.4 * jnp.log1p(2.2 * depth) + 0.35 * jnp.sin(2 * jnp.pi * (1.5 * x + depth)))
    sea = _mix(0.62 * haze + 0.38 * deep, deep, (depth + NEAR) ** 0.6)
    sea = sea * (1 + 0.10 * (jnp.sin(phase) * depth)[..., None])
    width = s.sun_radius * (0.75 + 1.1 * depth)
    column = jnp.exp(-0.5 * ((x - s.reflection_x) / width) ** 2) * (0.80 - 0.35 * depth)
    sea = _mix(sea, sun_colour, column * (0.78 + 0.22 * jnp.sin(phase + 0.9)))
    picture = _mix(picture, sea, cover(y - s.horizon))

    # Island, brighter on the sun's side, and its mirror image.
    toward_sun = jnp.tanh(6 * (s.sun_x - s.island_x))
    lit = 0.5 + 0.5 * toward_sun * jnp.tanh(3.5 * (x - s.island_x) / s.island_width)
    slope = _mix(ambient * ROCK, ambient * GRASS, lit)
    ridge = _ridge(s, x)
    land = cover(ridge - (s.horizon - y)) * cover(s.horizon + 0.004 - y) * cover(ridge - 0.006) * s.island_presence
    mirror = cover(0.7 * ridge - (y - s.horizon)) * cover(y - s.horizon) * cover(ridge - 0.006) * s.island_presence
    picture = _mix(picture, 0.55 * slope + 0.45 * deep, 0.6 * mirror)
    picture = _mix(picture, slope, land)

    # Boat, its sails brighter toward the sun, and its mirror image, which the ripples move.
    side = 0.5 + 0.5 * jnp.tanh(6 * (s.sun_x - s.boat_x)) * jnp.tanh(3 * (x - s.boat_x) / s.boat_size)
    hull = ambient * s.hull[None, None]
    sail = ambient * s.sail[None, None] * (0.78 + 0.22 * side)[..., None]
    right = (x - s.boat_x) / s.boat_size
    up = (s.boat_y - y) / s.boat_size
    swing = 0.03 * jnp.sin(phase)
    below = cover(y - s.boat_y) * s.boat_presence * jnp.clip(0.55 + 0.45 * up, 0.1, 1)
    mirrored = boat_coverage(right + swing, -1.25 * up, lambda d: cover(d * s.boat_size))
    above = cover(s.boat_y - y + 0.5 / size) * s.boat_presence
    upright = boat_coverage(right, up, lambda d: cover(d * s.boat_size))
    for (hulls, masts, sails), seen in ((mirrored, 0.62 * below), (upright, above)):
        picture = _mix(picture, sail, sails * seen)
        picture = _mix(picture, ambient * WOOD, MAST * masts * seen)
        picture = _mix(picture, hull, hulls * seen)
    return picture


def objects(scene: Scene, size: int = 64) -> dict[str, Bool[Array, "*n size size"]]:
    """The pixels of the parts that matter most: the sun's disc, the island's peak, the boat with its mirror image."""
    pixel = (jnp.arange(size, dtype=scene.horizon.dtype) + 0.5) / size
    leading = (1,) * scene.horizon.ndim
    x, y = pixel.reshape(*leading, 1, size), pixel.reshape(*leading, size, 1)
    s = Scene(*(leaf[..., None, None] for leaf in scene))  # the leaves with an axis of their own are not used
    sun = (x - s.sun_x) ** 2 + (y - s.sun_y) ** 2 < (1.3 * s.sun_radius) ** 2
    peak = (jnp.abs(x - s.island_x) < 0.08) & (jnp.abs(s.horizon - s.island_height - y) < 0.05)
    boat = (jnp.abs(x - s.boat_x - 0.05 * s.boat_size) < 0.42 * s.boat_size) & (y > s.boat_y - 1.03 * s.boat_size)
    boat &= y < s.boat_y + 0.4 * s.boat_size
    return {"sun": sun, "peak": peak & (s.island_presence > 0), "boat": boat & (s.boat_presence > 0)}


def _mix(under, over, coverage):
    """Painting `over` on `under`: colours on the last axis, coverage in [0, 1] without it."""
    coverage = coverage[..., None]
    return under + (over - under) * coverage


def between(value: Array, at: np.ndarray, colours: np.ndarray) -> Float[Array, "1 1 3"]:
    """The colour at a value, between those at given ones."""
    return jnp.stack([jnp.interp(value, at, channel) for channel in colours.T])[None, None]


def _ridge(s: Scene, x) -> Float[Array, "..."]:
    """Height of the island above the horizon: a peak, and a shoulder on its right."""
    u = (x - s.island_x) / s.island_width
    peak = jnp.clip(1 - jnp.sqrt(u**2 + 0.05**2) + 0.05, 0, None) ** 1.35
    shoulder = 0.42 * jnp.clip(1 - ((u - 0.5) / 0.42) ** 2, 0, None) ** 1.5
    return s.island_height * jnp.maximum(peak, shoulder)


def cloud_coverage(s: Scene, i: int, x, y) -> Float[Array, "..."]:
    """A flat bank of three puffs."""
    u, v = (x - s.cloud_x[i]) / s.cloud_size[i], (y - s.cloud_y[i]) / (0.3 * s.cloud_size[i])
    puffs = sum(
        a * jnp.exp(-(((u - du) / w) ** 2) - (v - dv) ** 2)
        for a, du, dv, w in ((1.0, 0.0, 0.0, 0.7), (0.7, 0.62, 0.25, 0.5), (0.6, -0.66, 0.3, 0.45))
    )
    return s.cloud_cover[i] * (1 - jnp.exp(-1.3 * puffs))


def boat_coverage(right, up, cover):
    """Coverage of hull, mast and sails, in units of the mast's height, with the water line at up = 0."""
    hull = cover(0.20 - up) * cover(up + 0.02) * cover(0.30 + 0.45 * up - jnp.abs(right - 0.02))
    mast = cover(0.018 - jnp.abs(right)) * cover(up - 0.15) * cover(1.0 - up)
    main = cover(right - 0.035) * cover(up - 0.27) * cover((0.42 - right) * 0.87 - (up - 0.27) * 0.5)
    jib = cover(-0.035 - right) * cover(up - 0.27) * cover((0.31 + right) * 0.90 - (up - 0.27) * 0.43)
    return hull, mast, main + jib - main * jib
