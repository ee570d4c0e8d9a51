"""Scenes are read out of pictures: clean, noisy and blurred ones to half a pixel, and what is no scene is noticed."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.ndimage

from sd_port.nano.captions import facts
from sd_port.nano.counting import counts
from sd_port.nano.read_out import ReadOut, read_out
from sd_port.nano.scenes import Scene, each, objects, render
from tests.sd_port.seascapes import drawn

N = 32  # pictures in all: one call, so that the time goes into compiling once
CLEAN, NOISY, BLURRED, MOVED, TWO, GHOSTS = (
    slice(i, j) for i, j in ((0, 10), (10, 15), (15, 20), (20, 24), (24, 28), (28, 32))
)
ABSENT = (0, 1)  # clean pictures without a boat, and without an island
HALF_A_PIXEL = 0.5 / 64


class Case(NamedTuple):
    truth: Scene
    images: np.ndarray
    read: ReadOut


@pytest.fixture(scope="module")
def case() -> Case:
    """Fresh scenes; from MOVED on their reflections, boats or both are not as the laws want them."""
    paint = jax.jit(render)
    truth = jax.tree.map(jnp.asarray, drawn(77, N))
    present = jnp.ones(N, jnp.float32)
    truth = truth._replace(
        boat_presence=present.at[ABSENT[0]].set(0),
        island_presence=present.at[ABSENT[1]].set(0),
        reflection_x=truth.reflection_x.at[MOVED].add(jnp.where(truth.sun_x[MOVED] < 0.5, 0.4, -0.4)),
    )
    images = np.array(paint(truth))
    # The second boat is well apart from the first, as seen from its own side of the picture.
    other = truth._replace(boat_x=jnp.where(truth.boat_x < 0.5, truth.boat_x + 0.35, truth.boat_x - 0.35))
    others, place = np.asarray(paint(other)), np.asarray(jax.jit(objects)(other)["boat"])
    images[NOISY] += 0.02 * np.asarray(jr.normal(jr.key(78), images[NOISY].shape))
    images[BLURRED] = scipy.ndimage.gaussian_filter(images[BLURRED], (0, 0.45, 0.45, 0), mode="nearest")
    images[TWO] = np.where(place[TWO][..., None], others[TWO], images[TWO])
    images[GHOSTS] = 0.65 * images[GHOSTS] + 0.35 * others[GHOSTS]
    images = np.clip(images, 0, 1).astype(np.float32)
    return Case(truth, images, read_out(images))


def apart(a: Scene, b: Scene, name: str) -> np.ndarray:
    return np.abs(np.asarray(getattr(a, name)) - np.asarray(getattr(b, name)))


def present(truth: Scene, name: str) -> np.ndarray:
    part = name.split("_")[0]
    return np.asarray(getattr(truth, f"{part}_presence", np.ones(N))) > 0.5


@pytest.mark.parametrize("which", [CLEAN, NOISY, BLURRED, MOVED], ids=["clean", "noisy", "blurred", "moved"])
def test_positions_are_read_to_half_a_pixel(case, which):
    """Those with displaced reflections are read as such: their error is that of the others."""
    for name in ("sun_x", "sun_y", "reflection_x", "island_x", "boat_x", "boat_y"):
        wrong = (apart(case.truth, case.read.scene, name) > HALF_A_PIXEL) & present(case.truth, name)
        assert not np.any(wrong[which]), name


def words(scene: Scene) -> list[dict[str, str]]:
    """The facts of each scene that do not depend on a border between two sides."""
    unclear = ("clouds", "sun_height", "sun_side", "boat_side", "island_side", "boat_of_island")
    return [{name: word for name, word in facts(one).items() if name not in unclear} for one in each(scene)]


def test_words_are_right(case):
    """All of them, of all pictures that show one scene; the number of clouds nearly always: two may look like one."""
    true, found = words(case.truth), words(case.read.scene)
    assert true[: TWO.start] == found[: TWO.start]
    assert found[ABSENT[0]]["boat"] == "no" and found[ABSENT[1]]["island"] == "no"
    clouds = [[facts(one)["clouds"] for one in each(scene)[: TWO.start]] for scene in (case.truth, case.read.scene)]
    assert np.mean([a == b for a, b in zip(*clouds, strict=True)]) > 0.8


def test_the_residual_is_the_distance_to_scenes(case):
    """Nearly nothing for renders, the noise for noisy ones, and more for what is no scene."""
    residual = np.asarray(case.read.residual)
    assert np.median(residual[CLEAN]) < 2e-3 and residual[CLEAN].max() < 0.025
    np.testing.assert_allclose(residual[NOISY], 0.02, atol=3e-3)
    assert residual[BLURRED].max() < 0.02
    # A scene with a displaced reflection is in the reach of the renderer, one with two boats is not.
    assert np.median(residual[MOVED]) < 5e-3
    assert residual[TWO].min() > 0.025 and np.median(residual[TWO]) > 5 * np.median(residual[CLEAN])
    assert np.median(residual[GHOSTS]) > 5 * np.median(residual[CLEAN])


def test_of_two_boats_one_is_read(case):
    """The fit does not settle between a boat and another."""
    x = np.asarray(case.truth.boat_x)
    other = np.where(x < 0.5, x + 0.35, x - 0.35)
    found = np.asarray(case.read.scene.boat_x)
    nearest = np.minimum(np.abs(found - x), np.abs(found - other))
    assert nearest[TWO.start :].max() < 1.5 / 64


def test_boats_and_islands_are_counted(case):
    boats, islands = counts(case.images, case.read)
    np.testing.assert_array_equal(boats[: TWO.start], np.asarray(case.truth.boat_presence)[: TWO.start])
    np.testing.assert_array_equal(islands, np.asarray(case.truth.island_presence))
    np.testing.assert_array_equal(boats[TWO], 2)


def test_a_picture_is_read_the_same_in_any_batch(case):
    some = np.array([1, 12, 30])
    alone = read_out(case.images[some])
    np.testing.assert_allclose(alone.residual, np.asarray(case.read.residual)[some], atol=1e-4)
    np.testing.assert_allclose(alone.scene.sun_x, np.asarray(case.read.scene.sun_x)[some], atol=1e-3)
    with pytest.raises(ValueError, match="at least one"):
        read_out(case.images[:0])


def test_shuffled_pictures_do_not_match(case):
    """The comparisons above would notice a read out of the wrong picture."""
    shuffled = jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=0), case.read.scene)
    assert np.mean(apart(case.truth, shuffled, "sun_x") > HALF_A_PIXEL) > 0.9
    assert np.mean([a == b for a, b in zip(words(case.truth), words(shuffled), strict=True)]) < 0.2
