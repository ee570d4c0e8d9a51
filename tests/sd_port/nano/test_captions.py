"""Captions: what they say is so, they leave much out, and what is not so is noticed."""

from functools import cache

import jax
import jax.random as jr
import numpy as np
import pytest

from sd_port.nano.captions import SLACK, caption, captions, facts, holds
from sd_port.nano.scenes import Scene, each
from tests.sd_port.seascapes import drawn

pytestmark = pytest.mark.hasty

N = 300


@cache
def scenes(seed: int = 0, n: int = N) -> tuple[Scene, list[Scene]]:
    """n scenes as one, and one by one on the host."""
    together = drawn(seed, n)
    return together, each(together)


def test_all_claims_are_true_of_their_scene_and_few_of_another():
    """Claims hold for the scene that was described; shuffled scenes break most captions."""
    together, each = scenes()
    said = captions(together, jr.key(1))
    assert all(all(holds(c.claims, scene).values()) for c, scene in zip(said, each, strict=True))
    wrong = [all(holds(c.claims, scene).values()) for c, scene in zip(said, each[1:] + each[:1], strict=True)]
    assert np.mean(wrong) < 0.15


def test_a_claim_is_in_the_text():
    """A colour is named when it is claimed, and only then."""
    together, _ = scenes()
    for text, claims in captions(together, jr.key(2)):
        for name in ("hull", "sail"):
            if name in claims:
                assert claims[name] in text
        if not {"hull", "sail"} & claims.keys():
            assert not any(f" {colour} " in text for colour in ("green", "brown", "blue"))


def test_many_phrasings_that_leave_much_out():
    """Hundreds of texts; positions in fewer than half of them; no fact in nearly all, none in nearly none."""
    together, each = scenes()
    said = captions(together, jr.key(3))
    assert len({c.text for c in said}) > 0.7 * N
    placed = [any(name.endswith("_side") or name == "boat_of_island" for name in c.claims) for c in said]
    assert 0.2 < np.mean(placed) < 0.5
    known = [facts(scene) for scene in each]
    for name in ("hull", "sail", "sun", "sun_size", "sun_height", "boat_size", "island_height", "clouds"):
        possible = [name in true for true in known]
        assert 0.2 < np.sum([name in c.claims for c in said]) / np.sum(possible) < 0.8, name


def test_the_key_decides():
    together, _ = scenes(n=20)
    assert captions(together, jr.key(4)) == captions(together, jr.key(4))
    assert captions(together, jr.key(4)) != captions(together, jr.key(5))
    first = jax.tree.map(lambda leaf: leaf[0], together)
    assert caption(first, jr.key(4)) == captions(together, jr.key(4))[0]


def test_the_border_of_a_side_is_granted_some_pixels():
    """Said to be on the left, the sun may lie a little right of the border, and no further."""
    _, each = scenes(n=1)
    border = np.float32(0.38)
    at = [each[0]._replace(sun_x=border + shift) for shift in (-0.1, 0.9 * SLACK, 1.5 * SLACK)]
    assert [holds({"sun_side": "left"}, scene)["sun_side"] for scene in at] == [True, True, False]


def test_what_is_absent_has_no_attributes():
    _, each = scenes(n=1)
    empty = each[0]._replace(boat_presence=np.float32(0), island_presence=np.float32(0))
    assert not {"hull", "sail", "boat_size", "boat_side", "island_height", "boat_of_island"} & facts(empty).keys()
    claims = {"boat": "yes", "hull": "red", "boat_side": "left", "boat_of_island": "left"}
    assert not any(holds(claims, empty).values())
    assert all(holds({"boat": "no", "island": "no"}, empty).values())
