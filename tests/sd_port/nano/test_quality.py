"""Figures of quality on pictures and read-outs whose answers are known, without a network."""

import jax
import jax.random as jr
import numpy as np
import pytest

from sd_port.nano.captions import captions
from sd_port.nano.quality import PLACES, Sample, discrepancies, errors, judged, spread
from sd_port.nano.read_out import ReadOut
from sd_port.nano.scenes import Scene, render
from tests.sd_port.seascapes import drawn

pytestmark = pytest.mark.hasty

N = 96


@pytest.fixture(scope="module")
def scene() -> Scene:
    return drawn(5, N)


def read(scene: Scene, residual: float = 0.01) -> ReadOut:
    """As if these scenes had been read out."""
    return ReadOut(scene, np.full(len(scene.horizon), residual, np.float32))


def test_errors_are_distances_in_pixels(scene):
    """A perfect answer has none; one that is 0.7 pixels off is within one and not within half of one."""
    perfect = errors(read(scene), scene)
    off = errors(read(scene._replace(sun_x=scene.sun_x + 0.7 / 64, hull=1 - scene.hull)), scene)
    for name in PLACES:
        assert perfect[name] == {"50%": 0, "90%": 0, "99%": 0, "within 1/2": 1, "within 1": 1}
    assert perfect["hull"] == perfect["island"] == 1 and off["hull"] < 0.1
    np.testing.assert_allclose([off["sun_x"][q] for q in ("50%", "90%", "99%")], 0.7, rtol=1e-4)
    assert off["sun_x"]["within 1/2"] == 0 and off["sun_x"]["within 1"] == 1
    assert off["boat_x"] == perfect["boat_x"]


def test_what_is_absent_has_no_place(scene):
    """Where there is no boat in truth, what the read-out says of its place is no error."""
    away = np.where(scene.boat_presence > 0, scene.boat_x, np.float32(0.02))
    assert errors(read(scene._replace(boat_x=away)), scene)["boat_x"]["99%"] == 0


def test_pictures_are_judged_by_their_captions(scene):
    """Renders satisfy their own captions, and have one boat where one is; the captions of others are wrong of them."""
    images, said = np.asarray(jax.jit(render)(scene)), captions(scene, jr.key(6))
    own = judged(Sample(images, said, read(scene, 0.02)), 0.01)
    assert own["n"] == N and own["residual_ratio"] == pytest.approx(2)
    assert own["claims_right"] == own["all_claims_right"] == own["reflection_within_2_pixels"] == 1
    assert own["one_boat_where_said"] > 0.95 and own["one_island_where_said"] > 0.95
    aside = read(scene._replace(reflection_x=scene.reflection_x + 3 / 64))
    others = judged(Sample(images, said[1:] + said[:1], aside), 0.01)
    assert others["claims_right"] < 0.8 and others["reflection_within_2_pixels"] == 0


def test_spread_is_a_ratio_of_standard_deviations(scene):
    middle = scene.sun_x.mean()
    half = scene._replace(sun_x=middle + (scene.sun_x - middle) / 2)
    found = spread(half, scene)
    assert found["sun_x"] == pytest.approx(0.5, rel=1e-4) and found["boat_x"] == found["horizon"] == 1


def test_discrepancies_tell_laws_apart(scene):
    """Two draws of scenes are of one law; scenes at dusk alone are of another, in what is read and in pixels."""
    paint = jax.jit(render)
    other = drawn(7, N)
    dusk = other._replace(sun_y=other.horizon - 0.1 * (other.horizon - other.sun_y))
    one, same, different = ((np.asarray(paint(s)), read(s)) for s in (scene, other, dusk))
    alike, unlike = discrepancies(one, same), discrepancies(one, different)
    for on in ("parameters", "pixels"):
        assert alike[on]["p_value"] > 0.01 and unlike[on]["p_value"] < 0.01
        assert unlike[on]["squared"] > 10 * abs(alike[on]["squared"])


def test_nothing_that_is_there_gives_numbers(scene):
    """Without a single boat there is still a number."""
    none = scene._replace(boat_presence=np.zeros(N, np.float32))
    images = np.asarray(jr.uniform(jr.key(8), (N, 64, 64, 3)))
    assert np.isfinite(discrepancies((images, read(none)), (images, read(none)))["parameters"]["squared"])
