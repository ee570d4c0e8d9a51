"""Cases of drags: in the truth nothing but the thing is elsewhere, and points, masks and captions are about it."""

import itertools
from functools import cache

import numpy as np
import pytest

from sd_port.experiments.cases import LENGTHS, REPORT, THINGS, TUNING, Cases, cases, editable, part
from sd_port.nano import scenes
from sd_port.nano.captions import AT, LEFT_OF, TIMES, facts
from sd_port.nano.fresh import FRESH
from sd_port.nano.scenes import Scene, each

N = 12
every_drag = pytest.mark.parametrize(("thing", "length"), list(itertools.product(THINGS, LENGTHS)))


@cache
def drawn() -> Scene:
    return editable(REPORT, N)


@cache
def drags(thing: str, length: str, points: int = 2) -> Cases:
    return cases(drawn(), thing, length, points)


@every_drag
def test_only_the_thing_is_elsewhere(thing, length):
    """Its x by the length, to either side; the sun's reflection with it. Everything else is as it was."""
    case, way = drags(thing, length), LENGTHS[length] / 64
    gone = {name: getattr(case.truth, name) - getattr(case.scene, name) for name in Scene._fields}
    for name, change in gone.items():
        if name in THINGS[thing].parameters:
            np.testing.assert_allclose(np.abs(change), way, atol=1e-6)
        else:
            np.testing.assert_array_equal(change, 0)
    assert {-1.0, 1.0} == set(np.sign(gone[THINGS[thing].parameters[0]]))
    np.testing.assert_array_equal(case.truth.reflection_x, case.truth.sun_x)
    low, high = THINGS[thing].room
    x = np.asarray(getattr(case.truth, THINGS[thing].parameters[0]))
    assert np.all((x >= low) & (x <= high))


@every_drag
def test_the_mask_covers_what_changes(thing, length):
    """Outside there is the light of a moved sun, and no more than a trace of anything else; all of it is much more."""
    case = drags(thing, length)
    squares = ((case.moved - case.pictures) ** 2).sum(-1)
    outside = (squares * (1 - case.masks)).sum((1, 2)) / squares.sum((1, 2))
    assert np.median(outside) < (0.15 if thing == "sun" else 0.01)
    assert np.all(squares.sum((1, 2)) > 1) and np.all(case.masks.mean((1, 2)) < 0.75)


@every_drag
def test_points_are_on_the_thing_and_go_with_it(thing, length):
    """Sources lie in the thing's own pixels, targets in those of the truth; the ways are whole latent pixels."""
    case = drags(thing, length)
    way = case.target - case.source
    there = np.asarray(getattr(case.truth, THINGS[thing].parameters[0]))
    here = np.asarray(getattr(case.scene, THINGS[thing].parameters[0]))
    np.testing.assert_array_equal(way[..., 1], 0)
    np.testing.assert_array_equal(way[..., 0], (np.sign(there - here) * LENGTHS[length])[:, None].repeat(2, 1))
    assert LENGTHS[length] % 4 == 0
    one = drags(thing, length, 1)
    if thing == "peak":
        off = np.abs(one.source[:, 0, 0] + 0.5 - 64 * here)
        height = 64 * np.asarray(case.scene.horizon) - one.source[:, 0, 1]
        assert np.all(off <= 1) and np.all((height > 0) & (height < 64 * np.asarray(case.scene.island_height)))
        return
    for scene, points in ((case.scene, one.source), (case.truth, one.target)):
        inside = np.asarray(scenes.objects(scene)[thing])
        assert inside[np.arange(N), points[:, 0, 1], points[:, 0, 0]].all()


def test_captions_say_no_positions():
    """All things and their looks, true of the scene before and after; no sides, heights or times of day."""
    captions, words = drags("boat", "long").captions, ("left", "right", "middle", "low", "high", "top")
    banned = {word for group in (AT, LEFT_OF, TIMES) for phrases in group.values() for word in phrases}
    for text, scene, truth in zip(captions, each(drawn()), each(drags("boat", "long").truth), strict=True):
        said = facts(scene)
        assert f"{said['hull']} boat with {said['sail']} sails" in text and f"{said['sun']} sun" in text
        assert facts(truth)["hull"] == said["hull"]
        assert not any(phrase in text for phrase in banned)
        assert not set(words) & set(text.replace("low island", "flat island").split())


def test_scenes_are_set_apart():
    """The same seed gives the same scenes, whatever their number; no seed is that of another purpose."""
    few = editable(REPORT, 3)
    for name in Scene._fields:
        np.testing.assert_array_equal(getattr(few, name), getattr(drawn(), name)[:3])
    tuning = editable(TUNING, N)
    assert not set(tuning.sun_x.tolist()) & set(drawn().sun_x.tolist())
    assert len({TUNING, REPORT, *(FRESH + seed for seed in range(10))}) == 12
    assert np.all(drawn().boat_presence == 1) and np.all(drawn().island_presence == 1)


def test_larger_pictures_have_the_same_drags():
    """At twice the size points are where they were, and ways twice as many pixels."""
    small, large = drags("sun", "long", 1), cases(drawn(), "sun", "long", 1, 128)
    assert large.pictures.shape[1:] == (128, 128, 3) and large.masks.shape[1:] == (128, 128)
    np.testing.assert_array_equal(large.target - large.source, 2 * (small.target - small.source))
    np.testing.assert_array_equal(large.source // 2, small.source)


def test_parts():
    one = part(drags("sun", "long", 1), slice(4, 5))
    np.testing.assert_array_equal(one.pictures[0], drags("sun", "long", 1).pictures[4])
    assert one.captions == drags("sun", "long", 1).captions[4:5] and len(one.truth.horizon) == 1
