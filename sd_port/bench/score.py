"""The scores of edited pictures, beside those of pictures that anybody could make."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.random as jr
import numpy as np

from sd_port.bench.edits import item_key
from sd_port.dragbench import Item
from sd_port.metrics.dift import REGIONDRAG, DIFTConfig, dift
from sd_port.metrics.distance import (
    Features,
    dragdiffusion_distance,
    draglora_distance,
    nearest,
    regiondrag_distance,
)
from sd_port.metrics.lpips import LPIPS, image_fidelity
from sd_port.metrics.pixels import Mask, Picture, composited, mean_change, pasted, rmse
from sd_port.pipeline import StableDiffusion
from theory.files import write_whole
from theory.reading import read_json

NOISE_SEED = 0  # of the features: the same for all edits of an item, so that they differ by the edit alone


class Networks(NamedTuple):
    """What judges pictures; None for what is not at hand."""

    features: StableDiffusion | None
    lpips: LPIPS | None


class Score(NamedTuple):
    """One picture of one item; None for what cannot be said. Distances are one for each pair of points."""

    item: str
    picture: str
    pairs: int
    md: list[float] | None  # pixels
    m_md: list[float] | None  # pixels
    region_md: list[float] | None  # of width and height
    image_fidelity: float | None  # 1 - LPIPS
    fidelity_outside: float | None  # the same with the original's pixels where things may change
    change_outside: float | None  # mean absolute difference to the original where nothing may change, in [0, 1]
    change_inside: float | None  # the same where things may change
    rmse_to_truth: float | None  # in [0, 1]


def candidates(
    item: Item, original: Picture, edited: Picture, truth: Picture | None, composite: bool
) -> dict[str, Picture]:
    """The edit, the edit with original pixels outside of the mask, and what it has to be better than.

    `identity` is the original; `copy-paste` has discs cut out around the sources and laid on the targets; `truth` is
    what the edit should have made, where that is known.
    """
    pictures = {"edit": edited}
    if composite:
        pictures["composited"] = composited(original, edited, item.mask)
    pictures |= {"identity": original, "copy-paste": pasted(original, item.source, item.target)}
    return pictures if truth is None else pictures | {"truth": truth}


def scores(
    networks: Networks, item: Item, original: Picture, pictures: dict[str, Picture], truth: Picture | None
) -> list[Score]:
    """One for each picture, all of the original's size. Raises ValueError as `dift` does."""
    distances = _distances(networks.features, item, original, pictures)
    found = []
    for name, picture in pictures.items():
        outside = None if item.mask is None else mean_change(original, picture, 1 - item.mask)
        found.append(
            Score(
                item.name,
                name,
                len(item.source),
                *distances.get(name, (None, None, None)),
                *_fidelities(networks.lpips, original, picture, item.mask),
                outside,
                mean_change(original, picture, item.mask),
                None if truth is None else rmse(picture, truth),
            )
        )
    return found


def kept(path: Path, of: dict[str, Any], make: Callable[[], list[Score]]) -> list[Score]:
    """The scores in this file, if they are of the same things (pictures and judges); else they are made, and kept."""
    try:
        found = read_json(path)
        if found["of"] == of:
            return [Score(**score) for score in found["scores"]]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass  # there is none yet, or it is damaged
    made = make()
    text = json.dumps({"of": of, "scores": [score._asdict() for score in made]}, indent=1) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))
    return made


def _fidelities(
    lpips: LPIPS | None, original: Picture, picture: Picture, mask: Mask | None
) -> tuple[float | None, float | None]:
    if lpips is None:
        return None, None
    everywhere = image_fidelity(lpips, original, picture)
    return everywhere, None if mask is None else image_fidelity(lpips, original, composited(picture, original, mask))


def region_side(pipe: StableDiffusion) -> int:
    """Pixels to which RegionDrag's definition brings pictures: 768, the size that its SD 2.1 was trained on."""
    return pipe.unet.config.sides[0] * pipe.vae.config.factor


def _distances(
    pipe: StableDiffusion | None, item: Item, original: Picture, pictures: dict[str, Picture]
) -> dict[str, tuple[list[float], list[float], list[float]]]:
    """The three mean distances of every picture, pair by pair."""
    if pipe is None:
        return {}
    size, points = original.shape[:2], (item.source, item.target)
    mask = np.ones(size, np.float32) if item.mask is None else item.mask
    keys = jr.split(item_key(NOISE_SEED, item.name))  # the two pictures of a comparison have different noise

    def seen(picture: Picture, number: int) -> tuple[Features, Features]:
        side = region_side(pipe)
        square = nearest(picture, (side, side))
        return (
            dift(pipe, picture, item.prompt, DIFTConfig(), key=keys[number]),
            dift(pipe, square, item.prompt, REGIONDRAG, key=keys[number]),
        )

    before, before_square = seen(original, 0)
    found = {}
    for name, picture in pictures.items():
        after, after_square = seen(picture, 1)
        three = (
            dragdiffusion_distance(before, after, *points, size),
            draglora_distance(before, after, *points, mask),
            regiondrag_distance(before_square, after_square, *points, size),
        )
        found[name] = tuple(np.asarray(distance).tolist() for distance in three)
    return found
