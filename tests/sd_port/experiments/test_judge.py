"""The judge on pictures whose verdict is known: what was not done is seen, what was done is not held against it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_port.experiments.cases import REPORT, THINGS, cases, editable, painted, some
from sd_port.experiments.dragging import task
from sd_port.experiments.judge import Judged, Key, Task, discrepancy, distance, false, gathered, judge
from sd_port.nano import scenes
from sd_port.nano.captions import facts
from sd_port.nano.scenes import HULLS, each

PIXEL = 0.7  # the read-out's error on clean pictures, with some room
APART = 0.2  # of a reflection from below its sun, as a part of the width


@pytest.fixture(scope="module")
def found() -> dict[Key, Judged]:
    """Two scenes for every drag, left as they were and as they should be; then one picture for each other mistake.

    Sixteen pictures, which are read out at once.
    """
    scene, given = editable(REPORT, 2), {}
    for thing in THINGS:
        drags = cases(scene, thing, "long", 1)
        given |= {("before", thing): (drags.pictures, task(drags)), ("truth", thing): (drags.moved, task(drags))}
    before, wanted = given["before", "sun"]
    both = np.concatenate([wanted.pictures, before[:, None]], axis=1)[:1]
    given["either",] = before[:1], wanted._replace(pictures=both, truth=some(wanted.truth, slice(1)))

    one = some(scene, slice(1))
    right = Task(one, painted(one)[:, None], "")
    # Another boat beside the first, seen from its own side of the picture.
    other = one._replace(boat_x=one.boat_x + np.where(one.boat_x < 0.5, 0.35, -0.35).astype(np.float32))
    place = np.asarray(scenes.objects(jax.tree.map(jnp.asarray, other))["boat"])
    given["two boats",] = np.where(place[..., None], painted(other), painted(one)), right
    way = np.where(one.sun_x < 0.5, APART, -APART).astype(np.float32)
    given["reflection",] = painted(one._replace(reflection_x=one.reflection_x + way)), right
    colour = "blue" if facts(each(one)[0])["hull"] == "red" else "red"
    hull = one._replace(hull=np.array([HULLS[colour]], np.float32))
    given["another hull",] = painted(hull), right._replace(asked=("sail",))
    assert sum(len(images) for images, _ in given.values()) <= 16
    return judge(given)


@pytest.mark.parametrize("thing", THINGS)
def test_what_did_not_move_is_as_far_as_the_drag_is_long(found, thing):
    before = found["before", thing]
    np.testing.assert_allclose(before.away, 20, atol=PIXEL)
    assert np.all(before.rmse > 0.02) and np.all(before.residual < 0.01)
    assert np.all(before.others < PIXEL) and np.all(before.reflection < PIXEL)


@pytest.mark.parametrize("thing", THINGS)
def test_the_truth_has_nothing_wrong(found, thing):
    """All measures near nothing: the read-out of a truth finds the target."""
    truth = found["truth", thing]
    for name in ("away", "reflection", "others"):
        assert np.all(getattr(truth, name) < PIXEL), name
    for name in ("undone", "facts", "ghosts", "light", "rmse"):
        np.testing.assert_allclose(getattr(truth, name), 0, atol=1e-6, err_msg=name)
    assert np.all(truth.residual < 0.01)


def test_the_light_follows_the_sun(found):
    """A sun that is elsewhere lights peak and boat otherwise: before the drag they are not as in the truth."""
    assert np.all(found["before", "sun"].light > 3e-3)


def test_one_wrong_thing_is_seen_as_that(found):
    """A second boat is a ghost, a displaced reflection as far as it was displaced, another hull a fact lost."""
    np.testing.assert_array_equal(found["two boats",].ghosts, 1)
    np.testing.assert_allclose(found["reflection",].reflection, 64 * APART, atol=PIXEL)
    assert found["reflection",].facts == 0 and found["reflection",].residual < 0.01  # which is all that is wrong
    assert found["another hull",].facts > 0 and found["another hull",].undone == 0


def test_what_is_asked_for_is_undone_or_not():
    """The same hull counts as undone where it was asked for, and what was said of nothing is not false."""
    one = editable(REPORT, 1)
    true = [facts(scene) for scene in each(one)]
    wrong = true[0] | {"hull": "blue" if true[0]["hull"] == "red" else "red"}
    assert false([wrong], one, ("hull", "sail")) == 0.5 and false(true, one, ("hull", "sail")) == 0
    assert false(true, one, ()) == 0


def test_what_is_not_there_is_as_far_as_is_said():
    one = editable(REPORT, 2)
    gone = one._replace(boat_presence=np.array([0.0, 1.0], np.float32))
    np.testing.assert_array_equal(distance(gone, one, "boat", 20.0), [20, 0])


def test_the_nearest_of_several_truths_counts(found):
    np.testing.assert_allclose(found["either",].rmse, 0, atol=1e-6)
    np.testing.assert_allclose(found["either",].away, 20, atol=PIXEL)


def test_discrepancy_sees_another_law():
    """Scenes against others of the same law, and against the same ones made darker."""
    pictures = painted(editable(REPORT, 40))
    assert discrepancy(pictures[:20], pictures[20:]).p_value > 0.01
    assert discrepancy(0.7 * pictures[:20], pictures[20:]).p_value < 0.01


def test_gathered_has_an_axis_for_every_name():
    numbers = {(a, b): np.array([i, j]) for i, a in enumerate("xy") for j, b in enumerate("pqr")}
    array = gathered(numbers, "xy", "pqr")
    assert array.shape == (2, 3, 2) and array[1, 2].tolist() == [1, 2]
