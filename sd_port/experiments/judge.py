"""How good edited pictures are: what is read out of them, beside the truth that they should show."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from sd_port.experiments.cases import SIZE, THINGS, some
from sd_port.nano import scenes
from sd_port.nano.captions import SEEN, facts, holds
from sd_port.nano.counting import counts
from sd_port.nano.read_out import ReadOut, read_out
from sd_port.nano.scenes import Scene, each
from sd_port.nano.two_samples import MMD, mmd

Key = tuple[Any, ...]  # names of what was done
Pictures = Float[np.ndarray, "_ 64 64 3"]
POSITIONS = ("sun_side", "boat_side", "island_side", "boat_of_island")  # facts about places, which are measured instead


class Task(NamedTuple):
    """What an edit of n pictures is to do."""

    truth: Scene
    pictures: Float[np.ndarray, "_ truths 64 64 3"]  # of it; several where the text leaves something open
    thing: str  # that may be elsewhere than before: its place is not one of the others'. "" for none
    length: int = 0  # pixels that a drag takes it; 0 for what is no drag
    asked: tuple[str, ...] = ()  # facts that the text asks for


class Judged(NamedTuple):
    """One number for each of n results; of all of them less is better. Pixels are of 64, colours in [0, 1]."""

    away: Float[np.ndarray, " n"]  # pixels from a dragged thing to its target
    undone: Float[np.ndarray, " n"]  # share of the facts asked for that are not so
    reflection: Float[np.ndarray, " n"]  # pixels from the sun's reflection to below the sun
    others: Float[np.ndarray, " n"]  # pixels by which the other things moved, mean
    facts: Float[np.ndarray, " n"]  # share of what else could be said of the truth that is not so any more
    ghosts: Float[np.ndarray, " n"]  # boats and islands too many
    light: Float[np.ndarray, " n"]  # RMS difference to the truth on the peak and the boat, which the sun lights
    residual: Float[np.ndarray, " n"]  # RMS difference to the nearest scene that was found
    rmse: Float[np.ndarray, " n"]  # RMS difference to the truth


def judge(results: Mapping[Key, tuple[Pictures, Task]]) -> dict[Key, Judged]:
    """What is to be said of each set of results.

    All are read out in one go, which pays where sets are small, and the same pictures once, whatever they are for.
    """
    different = {images.tobytes(): images for images, _ in results.values()}
    scene, residual = jax.tree.map(np.asarray, read_out(np.concatenate(list(different.values()))))
    ends = np.cumsum([len(images) for images in different.values()])
    rows = {name: slice(end - len(images), end) for (name, images), end in zip(different.items(), ends, strict=True)}
    return {
        key: _judged(images, some(scene, where := rows[images.tobytes()]), residual[where], task)
        for key, (images, task) in results.items()
    }


def gathered(found: Mapping[Key, Any], *axes: Sequence[Any]) -> np.ndarray:
    """What was found under all combinations of names, as one array with an axis for each of them."""
    values = np.array([found[key] for key in itertools.product(*axes)])
    return values.reshape(*map(len, axes), *values.shape[1:])


def _judged(images: Pictures, scene: Scene, residual: Float[np.ndarray, " _"], task: Task) -> Judged:
    """`scene` and `residual` are read out of the images."""
    truth, read = task.truth, ReadOut(*jax.tree.map(jnp.asarray, (scene, residual)))
    boats, islands = counts(images, read)
    claims = [facts(one) for one in each(truth)]
    kept = [name for name in claims[0] if name not in (*POSITIONS, *task.asked)]
    squares = ((images[:, None] - task.pictures) ** 2).mean(-1)
    nearest = np.take_along_axis(squares, squares.mean((2, 3)).argmin(1)[:, None, None, None], axis=1)[:, 0]
    return Judged(
        away=distance(scene, truth, task.thing, float(task.length)) if task.length else np.zeros(len(images)),
        undone=false(claims, scene, task.asked),
        reflection=SIZE * np.abs(scene.reflection_x - scene.sun_x),
        others=_others(scene, truth, task.thing),
        facts=false(claims, scene, kept),
        ghosts=np.maximum(boats - truth.boat_presence, 0) + np.maximum(islands - truth.island_presence, 0),
        light=np.sqrt((nearest * (lit := _lit(truth))).sum((1, 2)) / lit.sum((1, 2))),
        residual=residual,
        rmse=np.sqrt(nearest.mean((1, 2))),
    )


def distance(scene: Scene, truth: Scene, thing: str, lost: float) -> Float[np.ndarray, " n"]:
    """Pixels between the places of a thing in two scenes; `lost` where it is not in the first."""
    apart = SIZE * np.linalg.norm(_place(scene, thing) - _place(truth, thing), axis=-1)
    return np.where(_there(scene, thing), apart, lost)


def false(claims: list[dict[str, str]], scene: Scene, names: Sequence[str]) -> Float[np.ndarray, " n"]:
    """The share of the claims of these names that do not hold of each scene; 0 of none."""
    held = [holds({name: one[name] for name in names}, s) for one, s in zip(claims, each(scene), strict=True)]
    return np.array([sum(not true for true in truths.values()) / max(len(names), 1) for truths in held])


def discrepancy(images: Pictures, data: Pictures) -> MMD:
    """Whether results follow the law of the data: the kernel two-sample test on pixels at a quarter of the size."""
    return mmd(*(one.reshape(len(one), 16, 4, 16, 4, 3).mean((2, 4)).reshape(len(one), -1) for one in (images, data)))


def _others(scene: Scene, truth: Scene, thing: str) -> Float[np.ndarray, " n"]:
    """The mean distance of the things that may not move, of those that are there; what is not there is a fact lost."""
    names = [name for name in THINGS if name != thing]
    far = np.stack([distance(scene, truth, name, 0.0) for name in names])
    return far.sum(0) / np.maximum(sum(_there(scene, name) for name in names), 1)


def _place(s: Scene, thing: str) -> Float[np.ndarray, "n 2"]:
    x, y = {
        "sun": (s.sun_x, s.sun_y),
        "boat": (s.boat_x, s.boat_y),
        "peak": (s.island_x, s.horizon - s.island_height),
    }[thing]
    return np.stack([x, y], axis=-1)


def _there(s: Scene, thing: str) -> Bool[np.ndarray, " n"]:
    presence = {"sun": np.ones_like(s.sun_x), "boat": s.boat_presence, "peak": s.island_presence}[thing]
    return presence > SEEN


def _lit(truth: Scene) -> Bool[np.ndarray, "n 64 64"]:
    parts = scenes.objects(jax.tree.map(jnp.asarray, truth), SIZE)
    return np.asarray(parts["peak"] | parts["boat"])
