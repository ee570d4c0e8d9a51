"""The renderer: smooth everywhere, nothing inside out, the same at every size; and draws that follow their laws."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from sd_port.nano.scenes import BOAT_SIZES, HIGHEST, HULLS, SAILS, Scene, draw, objects, render
from tests.sd_port.seascapes import DRAWN
from tests.sd_port.seascapes import drawn as drawn_scenes

SUN_LEFT = Scene(
    horizon=jnp.float32(0.57),
    sun_x=jnp.float32(0.2),
    sun_y=jnp.float32(0.3),
    sun_radius=jnp.float32(0.08),
    sun_warmth=jnp.float32(0.5),
    reflection_x=jnp.float32(0.2),
    island_presence=jnp.float32(1),
    island_x=jnp.float32(0.45),
    island_height=jnp.float32(0.2),
    island_width=jnp.float32(0.2),
    boat_presence=jnp.float32(1),
    boat_x=jnp.float32(0.75),
    boat_y=jnp.float32(0.75),
    boat_size=jnp.float32(0.4),
    hull=jnp.asarray(HULLS["red"], jnp.float32),
    sail=jnp.asarray(SAILS["blue"], jnp.float32),
    cloud_x=jnp.zeros(2, jnp.float32),
    cloud_y=jnp.full(2, 0.1, jnp.float32),
    cloud_size=jnp.full(2, 0.2, jnp.float32),
    cloud_cover=jnp.zeros(2, jnp.float32),
)
SUN_RIGHT = SUN_LEFT._replace(sun_x=jnp.float32(0.8), reflection_x=jnp.float32(0.8), boat_x=jnp.float32(0.25))


def stack(*scenes: Scene) -> Scene:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *scenes)


def at(picture, x: float, y: float) -> np.ndarray:
    return np.asarray(picture)[int(64 * y), int(64 * x)]


pytestmark = pytest.mark.hasty

N = 48
paint = jax.jit(render)  # for N scenes at once


@pytest.fixture(scope="module")
def drawn() -> tuple[Scene, np.ndarray]:
    scenes = drawn_scenes(0, N)
    return scenes, np.asarray(paint(scenes))


@pytest.fixture
def pictures_of(drawn) -> Callable[..., np.ndarray]:
    """Pictures of a few scenes; the rest of the batch is filled up, so that `paint` compiles once."""

    def pictures(*scenes: Scene) -> np.ndarray:
        some = stack(*scenes)
        filled = jax.tree.map(lambda few, all: jnp.concatenate([few, all[len(scenes) :]]), some, drawn[0])
        return np.asarray(paint(filled))[: len(scenes)]

    return pictures


def test_draws_are_reproducible_and_follow_the_laws():
    """The same key gives the same scenes; parts are where they can be seen; lower suns are warmer."""
    scenes, again, other = draw(jr.key(3), DRAWN), draw(jr.key(3), DRAWN), draw(jr.key(4), DRAWN)
    jax.tree.map(np.testing.assert_array_equal, scenes, again)
    assert not np.array_equal(scenes.sun_x, other.sun_x)
    assert all(leaf.dtype == jnp.float32 for leaf in scenes)
    np.testing.assert_array_equal(scenes.reflection_x, scenes.sun_x)
    high = np.asarray((scenes.horizon - scenes.sun_y) / HIGHEST)
    assert np.all((high > 0.1) & (high <= 1))
    assert np.corrcoef(high, scenes.sun_warmth)[0, 1] < -0.3
    # Selection favours empty scenes a little, so the shares are not those of single tries.
    for presence, low in ((scenes.boat_presence, 0.88), (scenes.island_presence, 0.85)):
        assert set(np.unique(presence)) == {0, 1}
        assert low < np.mean(presence) < 0.995
    for colours, choices in ((scenes.hull, HULLS), (scenes.sail, SAILS)):
        apart = np.abs(np.asarray(colours)[:, None] - np.array(list(choices.values()))).max(-1)
        assert np.all(apart.min(1) < 0.021)
        shares = np.bincount(apart.argmin(1), minlength=len(choices)) / DRAWN
        assert np.all((shares > 0.15) & (shares < 0.35))
    sizes = np.asarray(scenes.boat_size)
    assert np.all(np.any([(low <= sizes) & (sizes <= high) for low, high in BOAT_SIZES.values()], axis=0))
    # Neither the sun nor the peak is behind the boat.
    boat = jax.jit(objects)(scenes)["boat"]
    for x, y in ((scenes.sun_x, scenes.sun_y), (scenes.island_x, scenes.horizon - scenes.island_height)):
        rows, columns = np.int64(64 * np.asarray(y)), np.int64(64 * np.asarray(x))
        hidden = np.asarray(boat)[np.arange(DRAWN), rows, columns]
        assert not np.any(hidden & ((y is scenes.sun_y) | (np.asarray(scenes.island_presence) > 0)))


def test_pictures_lie_in_the_unit_interval_and_vary(drawn):
    pictures = drawn[1]
    assert pictures.shape == (N, 64, 64, 3)
    assert pictures.min() >= 0 and pictures.max() <= 1
    assert np.all(pictures.std((1, 2)).max(-1) > 0.05)


def test_derivatives_are_finite_and_those_of_differences():
    """At draws and at the edges of what can be drawn; central differences in float64 at the draws."""
    drawn = drawn_scenes(1, 2)
    edges = [
        SUN_LEFT._replace(boat_presence=jnp.float32(0), island_presence=jnp.float32(0)),
        SUN_LEFT._replace(sun_y=SUN_LEFT.horizon),  # on the horizon
        SUN_LEFT._replace(sun_x=jnp.float32(16.5 / 32), sun_y=jnp.float32(8.5 / 32)),  # in the middle of a pixel
        SUN_LEFT._replace(boat_x=jnp.float32(0), island_x=jnp.float32(1)),
        SUN_LEFT._replace(island_x=jnp.float32(16.5 / 32), boat_x=jnp.float32(16.5 / 32), boat_y=jnp.float32(1)),
        SUN_LEFT._replace(sun_y=SUN_LEFT.horizon - HIGHEST, sun_warmth=jnp.float32(1)),  # ends of the palettes
    ]
    scenes = jax.tree.map(lambda *leaves: jnp.concatenate(leaves).astype(float), drawn, stack(*edges))
    vectors, unravel = (
        jax.vmap(lambda s: ravel_pytree(s)[0])(scenes),
        ravel_pytree(jax.tree.map(lambda s: s[0], scenes))[1],
    )
    picture = jax.jit(jax.vmap(lambda v: render(unravel(v), 32)))
    jacobians = jax.jit(jax.vmap(jax.jacfwd(lambda v: render(unravel(v), 32))))(vectors)
    assert np.all(np.isfinite(jacobians))
    single = jax.jit(jax.vmap(jax.jacfwd(lambda v: render(unravel(v), 32))))(vectors.astype(np.float32))
    assert single.dtype == np.float32 and np.all(np.isfinite(single))  # which is what scenes are fitted in
    step = 1e-6
    for scene in (0, 1):
        moved = vectors[scene][None] + step * jnp.concatenate([jnp.eye(28), -jnp.eye(28)])
        plus, minus = jnp.split(picture(moved), 2)
        differences = jnp.moveaxis((plus - minus) / (2 * step), 0, -1)
        # A clip or a maximum may bend between the two points: there, and only there, the two differ.
        wrong = np.abs(differences - jacobians[scene]) > 1e-5 * (1 + np.abs(jacobians[scene]))
        assert np.mean(wrong) < 1e-5
    assert np.all(np.abs(jacobians[0]).max((0, 1, 2))[:6] > 0.01)  # the sun and its reflection change the picture


def test_nothing_is_inside_out(pictures_of):
    """Colours are where they belong, light comes from the sun, and the mirror images are below."""
    bare = SUN_LEFT._replace(island_presence=jnp.float32(0), boat_presence=jnp.float32(0))
    left, right, without, empty, moved, noon, dusk = pictures_of(
        SUN_LEFT,
        SUN_RIGHT,
        SUN_LEFT._replace(boat_presence=jnp.float32(0)),
        bare,
        bare._replace(reflection_x=jnp.float32(0.6)),
        bare._replace(sun_y=jnp.float32(0.57 - 0.40)),
        bare._replace(sun_y=jnp.float32(0.57 - 0.09)),
    )
    # The boat stands above its water line: the hull right above it, the sails higher.
    hull, sail = at(left, 0.75, 0.71), at(left, 0.80, 0.60)
    assert hull[0] > 2.5 * hull[1:].max()
    assert sail[2] > 1.5 * sail[0]
    changed = np.abs(left - without).max(-1)
    assert changed[: int(64 * 0.33)].max() < 0.02  # nothing above the mast
    assert changed[int(64 * 0.36) : 48].sum() > 2 * changed[48:].sum() > 0  # most of it is above the water line
    # The island's peak stands above the horizon, and its slope toward the sun is the lighter one.
    assert at(left, 0.45, 0.57 - 0.15).mean() < at(left, 0.45, 0.57 - 0.3).mean() - 0.1
    for picture, lighter, darker in ((left, 0.40, 0.50), (right, 0.50, 0.40)):
        assert at(picture, lighter, 0.50).mean() > at(picture, darker, 0.50).mean() + 0.05
    # The sea is brightest where the reflection is.
    for picture, x in ((empty, 0.2), (moved, 0.6)):
        assert abs((np.argmax(picture[38:].mean((0, 2))) + 0.5) / 64 - x) < 0.04
    np.testing.assert_allclose(at(left, 0.2, 0.3), (1.0, 0.83, 0.34), atol=0.02)
    # The sky is lighter near the horizon, the sea darker near the viewer, and noon is brighter than dusk.
    assert at(empty, 0.9, 0.52).mean() > at(empty, 0.9, 0.05).mean()
    assert at(empty, 0.9, 0.60).mean() > at(empty, 0.9, 0.97).mean()
    assert noon.mean() > dusk.mean() + 0.1


def test_larger_pictures_show_the_same(drawn):
    """Antialiasing is a pixel wide at either size, so the two differ at edges, and nowhere else."""
    scenes, pictures = drawn
    few = jax.tree.map(lambda leaf: leaf[:8], scenes)
    large = jax.jit(partial(render, size=128))(few)
    difference = np.abs(np.asarray(large).reshape(8, 64, 2, 64, 2, 3).mean((2, 4)) - pictures[:8])
    # A step's coverage differs by a tenth at the pixels beside it; masts are thinner than a pixel of the small picture.
    assert difference.max() < 0.25
    assert np.median(difference) < 1e-3
    assert difference.mean() < 0.006


def test_masks_contain_their_objects(drawn):
    scenes, pictures = drawn
    masks = jax.tree.map(np.asarray, jax.jit(objects)(scenes))
    without = np.asarray(paint(scenes._replace(boat_presence=jnp.zeros(N, jnp.float32))))
    changed = np.abs(pictures - without).max(-1)
    assert not np.any((changed > 0.2) & ~masks["boat"])  # the mirror image's faint tip is longer than the mask
    assert np.mean(changed[masks["boat"]] > 0.1) > 0.25
    there = np.asarray(scenes.island_presence) > 0
    rows = np.int64(64 * np.asarray(scenes.horizon - scenes.island_height))
    columns = np.int64(64 * np.asarray(scenes.island_x))
    np.testing.assert_array_equal(masks["peak"][np.arange(N), rows, columns], there)
    rows, columns = np.int64(64 * np.asarray(scenes.sun_y)), np.int64(64 * np.asarray(scenes.sun_x))
    assert np.all(masks["sun"][np.arange(N), rows, columns])
    # The sun's mask holds the whole disc: no pixel outside of it has the disc's colour.
    assert np.all((masks["sun"].sum((1, 2)) > 25) & (masks["sun"].sum((1, 2)) < 200))
