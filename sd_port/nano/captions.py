"""What people might say of a scene, and which facts each caption states.

A caption leaves much out, as people do: an attribute is mentioned about half of the time, a position in fewer than
half of the captions, so that a model trained on them can put what was not said where it likes.
"""

from typing import NamedTuple

import jax
import jax.random as jr
import numpy as np

from sd_port.nano.scenes import BOAT_SIZES, HIGHEST, HULLS, ISLAND_HEIGHTS, SAILS, SUN_SIZES, SUNS, Scene, each
from theory.types import PRNGKey

SIDES = (0.38, 0.62)  # what is left of the first is on the left, right of the second on the right
HEIGHTS = (0.38, 0.70)  # of the sun, as a fraction of its greatest: below the first it is low, above the second high
APART = 0.10  # a thing is said to be left of another if it is so by more than this
SLACK = 0.04  # by how much a position or height may miss what was said of it: about two and a half pixels
SEEN = 0.5  # presence from which on a thing is there
COVERED = 0.3  # cover from which on a cloud is there

WORDS = {
    "small": ("small", "little", "tiny"),
    "large": ("large", "big"),
    "low": ("low", "flat"),
    "tall": ("tall", "steep"),
    "pale": ("pale", "white"),
    "golden": ("golden", "yellow"),
    "orange": ("orange", "red"),
}
BOATS = ("boat", "sailing boat", "sailboat", "yacht")
TIMES = {
    "low": ("at dusk", "at sunset", "in the evening"),
    "middle": ("in the afternoon", "in the golden hour"),
    "high": ("at noon", "at midday", "in broad daylight"),
}
SKIES = {
    "0": ("a clear sky", "no clouds", "a cloudless sky"),
    "1": ("one cloud", "a single cloud"),
    "2": ("two clouds",),
    "some": ("clouds", "a cloudy sky"),
}
EMPTY = ("an empty sea", "the open sea", "a calm sea")
UNDER = ("under", "below", "beneath")
LEFT_OF = {"left": ("left of", "to the left of"), "right": ("right of", "to the right of")}
AT = {
    "left": ("on the left", "at the left"),
    "middle": ("in the middle", "in the centre"),
    "right": ("on the right", "at the right"),
}


class Caption(NamedTuple):
    """A text and the facts it states, such as {"hull": "red", "sun_height": "low"}; `holds` checks them."""

    text: str
    claims: dict[str, str]


def captions(scenes: Scene, key: PRNGKey) -> list[Caption]:
    """One caption for each of n scenes; the same key gives the same ones."""
    rng = np.random.default_rng(np.asarray(jr.key_data(key)))
    return [_Writer(scene, rng).write() for scene in each(scenes)]


def caption(scene: Scene, key: PRNGKey) -> Caption:
    """A caption for one scene."""
    return captions(jax.tree.map(lambda leaf: leaf[None], scene), key)[0]


def facts(scene: Scene) -> dict[str, str]:
    """All that could be said of one scene. What is absent has no attributes; a gap too small has no side."""
    high = (scene.horizon - scene.sun_y) / HIGHEST
    clouds = int(np.sum(np.asarray(scene.cloud_cover) > COVERED))
    said = {
        "sun": _nearest(scene.sun_warmth, SUNS),
        "sun_size": _nearest(scene.sun_radius, SUN_SIZES),
        "sun_height": "low" if high < HEIGHTS[0] else "high" if high > HEIGHTS[1] else "middle",
        "sun_side": _side(scene.sun_x),
        "clouds": str(clouds),
        "boat": "yes" if scene.boat_presence > SEEN else "no",
        "island": "yes" if scene.island_presence > SEEN else "no",
    }
    if said["boat"] == "yes":
        said |= {
            "hull": _nearest(scene.hull, HULLS),
            "sail": _nearest(scene.sail, SAILS),
            "boat_size": _nearest(scene.boat_size, BOAT_SIZES),
            "boat_side": _side(scene.boat_x),
        }
    if said["island"] == "yes":
        said |= {
            "island_height": _nearest(scene.island_height, ISLAND_HEIGHTS),
            "island_side": _side(scene.island_x),
        }
        if said["boat"] == "yes" and abs(scene.boat_x - scene.island_x) > APART:
            said["boat_of_island"] = "left" if scene.boat_x < scene.island_x else "right"
    return said


def holds(claims: dict[str, str], scene: Scene) -> dict[str, bool]:
    """Which claims are true of one scene, such as one read out of a generated image.

    Positions and heights are granted `SLACK`: captions state them up to a sharp border, which a picture may miss
    by a pixel or two.
    """
    true = facts(scene)

    def right(name: str, value: str) -> bool:
        if name == "clouds" and value == "some":
            return true["clouds"] != "0"
        if name.endswith("_side"):
            part = name.removesuffix("_side")
            there = part == "sun" or true[part] == "yes"
            return there and value in {_side(getattr(scene, f"{part}_x") + shift) for shift in (-SLACK, 0, SLACK)}
        if name == "sun_height":
            low, high = (facts(scene._replace(sun_y=scene.sun_y + shift))[name] for shift in (SLACK, -SLACK))
            return value in (low, true[name], high)
        if name == "boat_of_island":
            gap = scene.boat_x - scene.island_x if true["boat"] == true["island"] == "yes" else np.nan
            return bool(gap < SLACK if value == "left" else gap > -SLACK)
        return true.get(name) == value

    return {name: right(name, value) for name, value in claims.items()}


class _Writer:
    """Words for one scene, and what they claim of it."""

    def __init__(self, scene: Scene, rng: np.random.Generator):
        self.true, self.rng = facts(scene), rng
        self.claims: dict[str, str] = {}
        self.places = rng.random() < 0.4

    def some(self, chance: float) -> bool:
        return bool(self.rng.random() < chance)

    def pick(self, words) -> str:
        return str(self.rng.choice(words))

    def state(self, name: str, chance: float = 0.5) -> str | None:
        """The value of a fact if it is to be mentioned, which is a claim then."""
        if name not in self.true or not self.some(chance):
            return None
        self.claims[name] = self.true[name]
        return self.true[name]

    def adjective(self, name: str) -> list[str]:
        value = self.state(name)
        return [] if value is None else [self.pick(WORDS.get(value, (value,)))]

    def place(self, name: str) -> str:
        side = self.state(name, 0.6) if self.places else None
        return "" if side is None else " " + self.pick(AT[side])

    def boat(self) -> str:
        self.claims["boat"] = "yes"
        size, hull, sail = self.adjective("boat_size"), self.state("hull", 0.6), self.state("sail", 0.6)
        if hull is not None and self.some(0.3):
            sails = f" and {sail} sails" if sail else ""
            return _noun([*size, self.pick(BOATS)]) + f" with a {hull} hull" + sails
        return _noun([*size, *([hull] if hull else []), self.pick(BOATS)]) + (f" with {sail} sails" if sail else "")

    def island(self) -> str:
        self.claims["island"] = "yes"
        return _noun([*self.adjective("island_height"), "island"])

    def sun(self) -> str:
        middle = self.true["sun_height"] == "middle"
        height = [] if middle else self.adjective("sun_height") if self.some(0.5) else []
        height = ["low" if word == "flat" else word for word in height]
        words = [*height, *self.adjective("sun_size"), *self.adjective("sun"), "sun"]
        return _noun(words) + self.place("sun_side")

    def things(self) -> list[str]:
        """The boat and the island, in words that place one by the other or both in the picture."""
        true = self.true
        boat, island = true["boat"] == "yes" and self.some(0.9), true["island"] == "yes" and self.some(0.8)
        if boat and island and self.places and "boat_of_island" in true and self.some(0.6):
            side = self.claims["boat_of_island"] = true["boat_of_island"]
            return [f"{self.boat()} {self.pick(LEFT_OF[side])} {self.island()}"]
        things = [self.boat() + self.place("boat_side")] if boat else []
        things += [self.island() + self.place("island_side")] if island else []
        self.rng.shuffle(things)
        return things

    def write(self) -> Caption:
        true, claims = self.true, self.claims
        things, ends = self.things(), []
        if true["boat"] == "no" and true["island"] == "no" and self.some(0.6):
            claims |= {"boat": "no", "island": "no"}
            things.append(self.pick(EMPTY))
        else:
            ends += ["no boat"] if true["boat"] == "no" and self.state("boat", 0.5) else []
            ends += ["no island"] if true["island"] == "no" and self.state("island", 0.5) else []
        text = " and ".join(things) if len(things) < 3 else ", ".join(things)
        if self.some(0.75) or not things:
            light = self.sun()
            above = things and self.some(0.6)
            text = f"{text} {self.pick(UNDER)} {light}" if above else f"{light} over {text}" if things else light
        if self.some(0.4):
            value = "some" if true["clouds"] != "0" and self.some(0.5) else true["clouds"]
            claims["clouds"] = value
            ends.append(self.pick(SKIES[value]))
        if "sun_height" not in claims and self.some(0.35):
            claims["sun_height"] = true["sun_height"]
            ends.append(self.pick(TIMES[true["sun_height"]]))
        self.rng.shuffle(ends)
        return Caption(", ".join([text, *ends]), claims)


def _noun(words: list[str]) -> str:
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


def _side(x) -> str:
    return "left" if x < SIDES[0] else "right" if x > SIDES[1] else "middle"


def _nearest(value, choices: dict) -> str:
    """The name of the nearest choice: a number, a colour, or the middle of a range."""
    value, near = np.asarray(value), {name: np.asarray(choice) for name, choice in choices.items()}
    middles = {name: choice if choice.shape == value.shape else choice.mean() for name, choice in near.items()}
    return min(middles, key=lambda name: float(np.linalg.norm(value - middles[name])))
