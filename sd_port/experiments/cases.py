"""Scenes to edit, and what the result should be: the same scene, rendered with one thing moved.

Settings are chosen on the scenes of TUNING, and figures reported on those of REPORT: seeds unlike those of any training
and of the model card (`sd_port.nano.measure`).
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sd_port.nano import scenes
from sd_port.nano.captions import facts
from sd_port.nano.scenes import Scene, all_seen, each

TUNING, REPORT = 2_000_003, 3_000_017
POOL = 256  # scenes drawn at once, of which about a fifth can be used
SIZE = 64  # of the pictures that lengths below are given for


class Thing(NamedTuple):
    """What can be dragged sideways: the parameters that go along, and how far to the sides `scenes.draw` puts it."""

    parameters: tuple[str, ...]
    room: tuple[float, float]


THINGS = {
    "sun": Thing(("sun_x", "reflection_x"), (0.1, 0.9)),
    "boat": Thing(("boat_x",), (0.16, 0.84)),
    "peak": Thing(("island_x",), (0.12, 0.88)),
}
LENGTHS = {"short": 8, "long": 20}  # of a drag, in pixels: two and five latent pixels of the bundled model

Check = Callable[[Scene], Bool[Array, " n"]]


class Cases(NamedTuple):
    """Drags of one thing in n scenes, as pictures that are `size` wide and high."""

    thing: str
    length: int  # in pixels of 64
    scene: Scene
    truth: Scene  # with the thing where it is to go
    pictures: Float[np.ndarray, "n size size 3"]
    moved: Float[np.ndarray, "n size size 3"]  # the truth's
    source: Int[np.ndarray, "n points 2"]  # [x, y] in pixels
    target: Int[np.ndarray, "n points 2"]
    masks: Float[np.ndarray, "n size size"]  # 1 where the thing is and goes, and what goes along
    captions: list[str]


def editable(seed: int, n: int, also: Check | None = None) -> Scene:
    """The first n scenes of a seed with a boat and an island in which every drag is possible; leaves on the host.

    `also` says which of some scenes will do besides.
    """
    found, parts = 0, []
    for i in itertools.count():
        if found >= n:
            break
        drawn = scenes.draw(jr.fold_in(jr.key(seed), i), POOL)
        good = np.asarray(_every_drag(drawn) if also is None else _every_drag(drawn) & also(drawn))
        parts.append(jax.tree.map(lambda leaf, good=good: np.asarray(leaf)[good], drawn))
        found += int(good.sum())
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:n], *parts)


def some(scene: Scene, rows: slice) -> Scene:
    """The scenes in these rows."""
    return jax.tree.map(lambda leaf: leaf[rows], scene)


def shifted(scene: Scene, thing: str, by: Float[Array | np.ndarray, "*#n"] | float) -> Scene:
    """The same scenes, in which this thing and what goes along with it are further right by this part of the width."""
    return scene._replace(**{name: getattr(scene, name) + by for name in THINGS[thing].parameters})


def possible(scene: Scene, thing: str, by: float) -> Bool[Array, " n"]:
    """Whether the thing is still where scenes have it, and nothing is hidden by it or hides it."""
    there, (low, high) = shifted(scene, thing, by), THINGS[thing].room
    x = getattr(there, THINGS[thing].parameters[0])
    return (low <= x) & (x <= high) & all_seen(there)


@jax.jit
def _every_drag(scene: Scene) -> Bool[Array, " n"]:
    good = (scene.boat_presence > 0) & (scene.island_presence > 0)
    for thing, length in itertools.product(THINGS, LENGTHS.values()):
        good &= possible(scene, thing, length / SIZE) | possible(scene, thing, -length / SIZE)
    return good


@partial(jax.jit, static_argnames=("thing", "length"))
def moved(scene: Scene, thing: str, length: int) -> Scene:
    """The truth of a drag by this many pixels of 64: every other one to the right, if it is possible."""
    by = length / SIZE
    ways = jnp.where(jnp.arange(len(scene.horizon)) % 2 == 0, by, -by).astype(scene.horizon.dtype)
    right, left = possible(scene, thing, by), possible(scene, thing, -by)
    return shifted(scene, thing, jnp.where(jnp.where(ways > 0, right, left), ways, -ways))


def cases(scene: Scene, thing: str, length: str, points: int, size: int = SIZE) -> Cases:
    """The drags of a thing of these scenes, by one of LENGTHS, with one or two pairs of points."""
    truth = jax.tree.map(np.asarray, moved(scene, thing, LENGTHS[length]))
    name = THINGS[thing].parameters[0]
    way = np.round(SIZE * (getattr(truth, name) - getattr(scene, name))).astype(int) * (size // SIZE)
    source = np.floor(size * _points(scene, thing)[:, points - 1, :points]).astype(int).clip(0, size - 1)
    target = (source + np.stack([way, np.zeros_like(way)], -1)[:, None]).clip(0, size - 1)
    pictures, moved_pictures, masks = painted(scene, size), painted(truth, size), _region(thing, scene, truth, size)
    return Cases(thing, LENGTHS[length], scene, truth, pictures, moved_pictures, source, target, masks, said(scene))


def part(cases: Cases, rows: slice) -> Cases:
    """The drags in these rows."""
    leaves = ("pictures", "moved", "source", "target", "masks", "captions")
    return cases._replace(
        scene=some(cases.scene, rows),
        truth=some(cases.truth, rows),
        **{name: getattr(cases, name)[rows] for name in leaves},
    )


def painted(scene: Scene, size: int = SIZE) -> Float[np.ndarray, "n size size 3"]:
    return np.asarray(scenes.rendered(scene, size))


def said(scene: Scene) -> list[str]:
    """Captions that name every thing and its look, and no position: what an edit moves must not contradict them."""
    return [_caption(facts(one)) for one in each(scene)]


def _caption(of: dict[str, str]) -> str:
    boat = f"a {of['boat_size']} {of['hull']} boat with {of['sail']} sails"
    return f"{boat} and a {of['island_height']} island under a {of['sun_size']} {of['sun']} sun"


def _points(s: Scene, thing: str) -> Float[np.ndarray, "n 2 2 2"]:
    """Where a thing is taken hold of, [x, y] in parts of the width: by one point (repeated), and by two."""
    if thing == "sun":  # the second is the near end of its reflection
        one, two = [(s.sun_x, s.sun_y)], [(s.sun_x, s.sun_y), (s.sun_x, s.horizon + 0.08)]
    elif thing == "boat":  # between hull and sails; each of them
        one = [(s.boat_x, s.boat_y - 0.4 * s.boat_size)]
        two = [(s.boat_x, s.boat_y - 0.15 * s.boat_size), (s.boat_x, s.boat_y - 0.65 * s.boat_size)]
    else:  # the upper half; both slopes
        one = [(s.island_x, s.horizon - 0.6 * s.island_height)]
        two = [(s.island_x + way * s.island_width, s.horizon - 0.3 * s.island_height) for way in (-0.4, 0.4)]
    return np.moveaxis(np.array([one * 2, two]), -1, 0)


def _region(thing: str, one: Scene, other: Scene, size: int) -> Float[np.ndarray, "n size size"]:
    """The mask of a user: a rectangle over where a thing is in both scenes, and over what goes along with it."""
    (left, top, right, bottom), ends = _box(one, thing), _box(other, thing)
    left, top = np.minimum(left, ends[0]), np.minimum(top, ends[1])
    right, bottom = np.maximum(right, ends[2]), np.maximum(bottom, ends[3])
    at = (np.arange(size) + 0.5) / size
    wide = (at >= left[:, None]) & (at < right[:, None])
    high = (at >= top[:, None]) & (at < bottom[:, None])
    return (high[:, :, None] & wide[:, None, :]).astype(np.float32)


def _box(s: Scene, thing: str) -> tuple[Array | np.ndarray, ...]:
    """Left, top, right and bottom."""
    x = getattr(s, THINGS[thing].parameters[0])
    if thing == "sun":  # with its glow, and the sea below it for the reflection
        half, top, bottom = 2 * s.sun_radius, s.sun_y - 2 * s.sun_radius, np.ones_like(s.sun_y)
    elif thing == "boat":  # with its mirror image
        half, top, bottom = 0.5 * s.boat_size, s.boat_y - 1.1 * s.boat_size, s.boat_y + 0.6 * s.boat_size
    else:
        half, top, bottom = 1.1 * s.island_width, s.horizon - 1.2 * s.island_height, s.horizon + 0.9 * s.island_height
    return x - half, top, x + half, bottom
