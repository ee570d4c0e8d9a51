"""How good pictures of scenes are: what is read out of them, beside the truth, their captions, or other pictures."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sd_port.nano.captions import Caption, facts, holds
from sd_port.nano.counting import counts
from sd_port.nano.fresh import SIZE
from sd_port.nano.read_out import ReadOut
from sd_port.nano.scenes import Scene, each
from sd_port.nano.two_samples import mmd

PLACES = ("sun_x", "sun_y", "reflection_x", "island_x", "boat_x", "boat_y")
COLOURS = ("sun", "hull", "sail")


def errors(read: ReadOut, truth: Scene) -> dict[str, Any]:
    """Distances in pixels of 64, median, 90 and 99 percent, and shares within half and one; colours; the residual."""
    there = {"boat": truth.boat_presence > 0, "island": truth.island_presence > 0}
    found = [facts(one) for one in each(read.scene)]
    true = [facts(one) for one in each(truth)]
    result: dict[str, Any] = {}
    for name in PLACES:
        rows = there.get(name.split("_")[0], np.ones(len(true), bool))
        off = SIZE * np.abs(np.asarray(getattr(read.scene, name)) - getattr(truth, name))[rows]
        result[name] = dict(zip(("50%", "90%", "99%"), np.quantile(off, (0.5, 0.9, 0.99)).tolist(), strict=True))
        result[name] |= {"within 1/2": float((off <= 0.5).mean()), "within 1": float((off <= 1).mean())}
    for name in (*COLOURS, "boat", "island", "sun_size", "boat_size", "island_height"):
        pairs = [(f.get(name), t[name]) for f, t in zip(found, true, strict=True) if name in t]
        result[name] = float(np.mean([a == b for a, b in pairs]))
    result["residual"] = float(np.median(read.residual))
    return result


class Sample(NamedTuple):
    """Generated pictures, the captions they were asked for, and what is read out of them."""

    images: np.ndarray
    captions: list[Caption]
    read: ReadOut


def judged(sample: Sample, residual: float) -> dict[str, Any]:
    """How good the pictures are: `residual` is that of real scenes through the autoencoder."""
    read = sample.read
    truths = [holds(caption.claims, one) for caption, one in zip(sample.captions, each(read.scene), strict=True)]
    kinds = sorted({name for truth in truths for name in truth})
    boats, islands = counts(sample.images, read)
    said = [caption.claims for caption in sample.captions]
    one = {
        name: _share([bool(count == 1) for count, c in zip(found, said, strict=True) if c.get(name) == "yes"])
        for name, found in (("boat", boats), ("island", islands))
    }
    gap = SIZE * np.abs(np.asarray(read.scene.reflection_x) - np.asarray(read.scene.sun_x))
    return {
        "n": len(truths),
        "residual": float(np.median(read.residual)),
        "residual_ratio": float(np.median(read.residual)) / residual,
        "claims_right": float(np.mean([right for truth in truths for right in truth.values()])),
        "all_claims_right": float(np.mean([all(truth.values()) for truth in truths])),
        "claims_right_by_kind": {k: float(np.mean([t[k] for t in truths if k in t])) for k in kinds},
        "reflection_within_2_pixels": float((gap <= 2).mean()),
        "one_boat_where_said": one["boat"],
        "one_island_where_said": one["island"],
        "at_most_one_boat": float(np.mean(boats <= 1)),
        "at_most_one_island": float(np.mean(islands <= 1)),
    }


def spread(found: Scene, real: Scene) -> dict[str, float]:
    """Standard deviation of each parameter over that of real scenes, where the part is there."""
    ratios = {}
    for name in (*PLACES, "horizon", "sun_radius", "sun_warmth", "island_height", "island_width", "boat_size"):
        part = f"{name.split('_')[0]}_presence"
        values = [
            np.asarray(getattr(s, name))[np.asarray(getattr(s, part, np.ones_like(s.horizon))) > 0.5]
            for s in (found, real)
        ]
        ratios[name] = float(values[0].std() / values[1].std())
    return ratios


def discrepancies(a: tuple[np.ndarray, ReadOut], b: tuple[np.ndarray, ReadOut]) -> dict[str, Any]:
    """Kernel two-sample tests on what is read out, and on pixels at a quarter of the size."""
    (images_a, read_a), (images_b, read_b) = a, b
    pixels = [
        images.reshape(-1, 16, 4, 16, 4, 3).mean((2, 4)).reshape(len(images), -1) for images in (images_a, images_b)
    ]
    parameters = mmd(_features(read_a.scene), _features(read_b.scene))
    return {"parameters": parameters._asdict(), "pixels": mmd(*pixels)._asdict()}


def _features(scene: Scene) -> np.ndarray:
    """Parameters as columns; those of what is absent are set to their mean over what is there, or to 0."""
    columns = []
    for name, value in scene._asdict().items():
        value = np.asarray(value).reshape(len(scene.horizon), -1)
        part = name.split("_")[0] if name.split("_")[0] in ("boat", "island") else "boat" if name in COLOURS[1:] else ""
        if part and not name.endswith("presence"):
            there = np.asarray(getattr(scene, f"{part}_presence"))[:, None] > 0.5
            value = np.where(there, value, value[there[:, 0]].mean(0) if there.any() else 0)
        if name.startswith("cloud"):
            continue  # which of the two comes first is arbitrary; their total is below
        columns.append(value)
    return np.concatenate([*columns, np.asarray(scene.cloud_cover).sum(1)[:, None]], axis=1)


def _share(values: Sequence[bool]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
