"""A drag benchmark whose truth is known: scenes of which one thing moves sideways, drawn before and after.

It lies on disk as the SDE-Drag set does, with truth.png beside every picture: what the picture is when the sun, the
boat or the island's peak has moved and nothing else has, but for what the laws of the scenes move with it: the sun's
reflection, and the side from which things are lit.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from PIL import Image

from sd_port.experiments.cases import SIZE, THINGS, editable, painted, possible, said, shifted
from sd_port.images import to_pil
from sd_port.nano.scenes import Scene, each
from theory.files import write_whole

ITEMS, SEED = 100, 4_000_037  # a seed of no training, and of no other experiment
SHORTEST, LONGEST = 8, 24  # pixels by which a thing is moved, to either side
CHANGED, ROOM = 0.05, 2  # what counts as a change, and the pixels around it that a mask has besides


class Move(NamedTuple):
    """One thing to be dragged: the scene before and after, and where it is taken hold of, [x, y] in pixels."""

    thing: str
    before: Scene
    after: Scene
    source: tuple[int, int]
    target: tuple[int, int]


def write_set(folder: Path) -> None:
    """Writes the benchmark, if it is not there; it is always the same.

    An item is <number>_<thing>/{origin_image.png, truth.png, mask.png, prompt.json}, pictures of 64 x 64 pixels. The
    mask is a white rectangle around all that the truth changes; prompt.json has source, target, prompt and thing.
    Raises OSError where it cannot be written.
    """
    names = [f"{i:03}_{thing}" for i, thing in enumerate(_things())]
    if all((folder / name / "prompt.json").is_file() for name in names):
        return
    chosen = moves()
    before, after = _together([move.before for move in chosen]), _together([move.after for move in chosen])
    pictures, truths, prompts = painted(before), painted(after), said(before)
    for name, move, picture, truth, prompt in zip(names, chosen, pictures, truths, prompts, strict=True):
        item = folder / name
        item.mkdir(parents=True, exist_ok=True)
        for file, image in (
            ("origin_image.png", to_pil(picture)),
            ("truth.png", to_pil(truth)),
            ("mask.png", Image.fromarray(np.uint8(255 * changed(picture, truth)))),
        ):
            write_whole(item / file, _as_png(image))
        request = {"source": [move.source], "target": [move.target], "prompt": prompt, "thing": move.thing}
        text = json.dumps(request) + "\n"
        write_whole(item / "prompt.json", lambda file, text=text: file.write(text.encode()))  # last: now it is whole


def _together(scenes: list[Scene]) -> Scene:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *scenes)


def _as_png(image: Image.Image) -> Callable[[BinaryIO], None]:
    return lambda file: image.save(file, format="PNG")


def _things() -> list[str]:
    """Each in turn."""
    return [list(THINGS)[i % len(THINGS)] for i in range(ITEMS)]


def moves() -> list[Move]:
    """The drags: by a length drawn from those, to either side, after which everything can still be seen."""
    rng, ways = np.random.default_rng(SEED), [*range(-LONGEST, -SHORTEST + 1), *range(SHORTEST, LONGEST + 1)]
    pool = editable(SEED, ITEMS)
    fit = {thing: np.stack([possible(pool, thing, way / SIZE) for way in ways]) for thing in THINGS}
    made = []
    for i, (thing, scene) in enumerate(zip(_things(), each(pool), strict=True)):
        way = int(rng.choice(np.array(ways)[fit[thing][:, i]]))
        x, y = (int(SIZE * at) for at in hold(scene, thing))
        made.append(Move(thing, scene, shifted(scene, thing, way / SIZE), (x, y), (x + way, y)))
    return made


def hold(scene: Scene, thing: str) -> tuple[float, float]:
    """Where one would take hold of a thing, (x, y) in parts of the width: the sun, the sails, the upper slopes."""
    at = {
        "sun": (scene.sun_x, scene.sun_y),
        "boat": (scene.boat_x, scene.boat_y - 0.4 * scene.boat_size),
        "peak": (scene.island_x, scene.horizon - 0.6 * scene.island_height),
    }
    x, y = at[thing]
    return float(x), float(y)


def changed(
    picture: Float[np.ndarray, "size size 3"], truth: Float[np.ndarray, "size size 3"]
) -> Float[np.ndarray, "size size"]:
    """A rectangle of ones around all that differs between two pictures, as a user would draw it."""
    rows, columns = np.nonzero(np.abs(picture - truth).max(axis=-1) > CHANGED)
    mask = np.zeros(picture.shape[:2], np.float32)
    top, left = (max(int(at.min()) - ROOM, 0) for at in (rows, columns))
    mask[top : rows.max() + ROOM + 1, left : columns.max() + ROOM + 1] = 1
    return mask
