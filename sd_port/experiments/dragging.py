"""SDE-Drag against ODE-Drag: sun, boat and peak, over short and long ways, by one and two points, in a mask, with LoRA.

Did the thing arrive, did the reflection and the light follow, what else changed, and how far is the result from the
same scene rendered with the thing moved?
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.random as jr
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from sd_port.edit_configs import DragConfig
from sd_port.experiments.cases import LENGTHS, REPORT, THINGS, Cases, cases, editable, part, some
from sd_port.experiments.compare import MEASURES, TO_TRUTHS, Cell, differences, row, summary, to_the_data
from sd_port.experiments.editing import DRAG, LORA, METHODS, dragged, pipeline, tell
from sd_port.experiments.judge import Judged, Key, Pictures, Task, discrepancy, gathered, judge
from sd_port.experiments.panels import forest, legend, pictures
from sd_port.lora import train_lora
from sd_port.metrics.bootstrap import bootstrap
from sd_port.nano.fresh import at_size, size_of, through_autoencoder
from sd_port.pipeline import StableDiffusion
from theory.types import PRNGKey
from toys.results import Row
from toys.store import kept
from toys.style import figure, letter, styled

TITLE = "Dragging: SDE-Drag against ODE-Drag"
VARIANTS = {"one point": (1, False), "two points": (2, False), "mask": (1, True)}  # points, and whether there is a mask
BASELINES = ("the picture as it was", "the truth through the autoencoder")
JUDGED = ("away", "reflection", "others", "facts", "ghosts", "light", "residual", "rmse")
REPORTED = ("away", "reflection", "others", "ghosts", "residual", "rmse")
DRAWN = ("away", "reflection", "residual", "rmse")
NEAR = 3.0  # pixels of 64, within which a thing has arrived


@dataclass(frozen=True)
class Config:
    """The same scenes in every cell; LoRA is trained on each picture alone, so on few, and for long ways."""

    scenes: int = 200
    lora_scenes: int = 16
    lora_steps: int = LORA.steps
    steps: int = DRAG.steps
    variants: tuple[str, ...] = tuple(VARIANTS)
    things: tuple[str, ...] = tuple(THINGS)
    lengths: tuple[str, ...] = tuple(LENGTHS)
    batch: int = 50
    model: str = "nano"
    seed: int = 0

    @classmethod
    def tiny(cls) -> "Config":
        return cls(scenes=2, lora_scenes=1, lora_steps=2, steps=3, things=("sun", "boat"), lengths=("long",), batch=2)


class Arrays(NamedTuple):
    """Measures are the fields of `Judged`, methods ODE-Drag and SDE-Drag."""

    variants: np.ndarray  # (variants,) names
    things: np.ndarray  # (things,)
    lengths: np.ndarray  # (lengths,)
    found: np.ndarray  # (variants, things, lengths, methods, measures, scenes)
    mmd: np.ndarray  # (variants, things, lengths, methods, 2) squared MMD to truths of other scenes, and its p-value
    baseline: np.ndarray  # (2, things, lengths, measures, scenes) of BASELINES
    baseline_mmd: np.ndarray  # (2, things, lengths, 2)
    lora: np.ndarray  # (things, methods, measures, LoRA's scenes) by one point, over the last of the lengths
    pictures: np.ndarray  # (things, 4, 64, 64, 3) before, truth, ODE, SDE: by one point, over the last of the lengths


def run(config: Config) -> Arrays:
    """Raises what loading the model raises."""
    pipe, key = pipeline(config.model), jr.key(config.seed)
    size, settings = size_of(pipe), replace(DRAG, steps=config.steps)
    scene = editable(REPORT, 2 * config.scenes)
    here, others = some(scene, slice(config.scenes)), some(scene, slice(config.scenes, None))
    results: dict[Key, tuple[Pictures, Task]] = {}
    grid = list(itertools.product(config.variants, config.things, config.lengths))
    for i, (variant, thing, length) in enumerate(grid):
        tell(f"dragging: {variant}, {thing}, {length}")
        points, masked = VARIANTS[variant]
        drags, cell_key = cases(here, thing, length, points, size), jr.fold_in(key, i)
        for method in METHODS:
            way = replace(settings, method=method)
            name, how = (variant, thing, length, method), {"masked": masked, "batch": config.batch, "key": cell_key}
            results[name] = kept(name, dragged, pipe, drags, way, **how), task(drags)
    for thing, length in itertools.product(config.things, config.lengths):
        drags = cases(here, thing, length, 1, size)
        results["before", thing, length] = at_size(drags.pictures), task(drags)
        results["truth", thing, length] = at_size(through_autoencoder(pipe, drags.moved)), task(drags)
    lora_scenes = min(config.lora_scenes, config.scenes)
    long = [part(cases(here, thing, config.lengths[-1], 1, size), slice(lora_scenes)) for thing in config.things]
    results |= with_lora(pipe, long, settings, config.lora_steps, jr.fold_in(key, len(grid)))

    found, axes = judge(results), (config.variants, config.things, config.lengths, METHODS)
    # Scenes with a thing moved are of another law than scenes: the middle is fuller.
    data = {
        (thing, length): at_size(through_autoencoder(pipe, cases(others, thing, length, 1, size).moved))
        for thing, length in itertools.product(config.things, config.lengths)
    }
    mmds = {name: discrepancy(results[name][0], data[name[1:3]]) for name in itertools.product(*axes)}
    ends = ["before", "truth"], *axes[1:3]
    mmds |= {name: discrepancy(results[name][0], data[name[1:]]) for name in itertools.product(*ends)}
    lora = gathered(found, ["LoRA"], config.things, METHODS, range(lora_scenes))
    shown = {
        (thing, i): image
        for thing, drags in zip(config.things, long, strict=True)
        for i, image in enumerate(
            (
                at_size(drags.pictures[:1])[0],
                at_size(drags.moved[:1])[0],
                *(results[config.variants[0], thing, config.lengths[-1], method][0][0] for method in METHODS),
            )
        )
    }
    return Arrays(
        *map(np.array, axes[:3]),
        found=gathered(found, *axes),
        mmd=gathered(mmds, *axes),
        baseline=gathered(found, *ends),
        baseline_mmd=gathered(mmds, *ends),
        lora=np.moveaxis(lora[0, ..., 0], 2, -1),
        pictures=gathered(shown, config.things, range(4)),
    )


def task(drags: Cases) -> Task:
    """What a drag is to do."""
    return Task(drags.truth, at_size(drags.moved)[:, None], drags.thing, drags.length)


def with_lora(
    pipe: StableDiffusion, drags: Sequence[Cases], config: DragConfig, steps: int, key: PRNGKey
) -> dict[Key, tuple[Pictures, Task]]:
    """Results of each of the drags by both methods, with adapters trained on each scene's picture alone."""
    results: dict[Key, tuple[Pictures, Task]] = {}
    for i in range(len(drags[0].pictures)):
        tell(f"dragging: LoRA on picture {i + 1} of {len(drags[0].pictures)}")
        of_picture = [part(all_of_it, slice(i, i + 1)) for all_of_it in drags]
        images = kept(("LoRA", i), adapted, pipe, of_picture, config, steps, jr.fold_in(key, i))
        for (j, one), (m, method) in itertools.product(enumerate(of_picture), enumerate(METHODS)):
            results["LoRA", one.thing, method, i] = images[j, m], task(one)
    return results


def adapted(
    pipe: StableDiffusion, drags: Sequence[Cases], config: DragConfig, steps: int, key: PRNGKey
) -> Float[np.ndarray, "drags methods 1 64 64 3"]:
    """Drags of one picture by both methods, with adapters trained on it, which are taken away again."""
    train_key, drag_key = jr.split(key)
    try:
        train_lora(pipe, drags[0].pictures[0], drags[0].captions[0], replace(LORA, steps=steps), key=train_key)
        ways = [replace(config, method=method) for method in METHODS]
        images = [dragged(pipe, one, way, masked=False, batch=1, key=drag_key) for one in drags for way in ways]
    finally:
        pipe.unload_lora()
    return np.reshape(images, (len(drags), len(METHODS), *images[0].shape))


def cells(arrays: Arrays) -> list[Cell]:
    """ODE-Drag and SDE-Drag under the same settings; LoRA last."""
    names = itertools.product(arrays.variants, arrays.things, arrays.lengths)
    made = zip(names, arrays.found.reshape(-1, *arrays.found.shape[3:]), strict=True)
    plain = [Cell(f"{thing}, {length}, {variant}", *_judged(values)) for (variant, thing, length), values in made]
    lora = [
        Cell(f"{thing}, {arrays.lengths[-1]}, LoRA", *_judged(arrays.lora[i])) for i, thing in enumerate(arrays.things)
    ]
    return plain + lora


def _judged(values: Float[np.ndarray, "methods measures n"]) -> list[Judged]:
    return [Judged(*of_method) for of_method in values]


def rows(arrays: Arrays) -> list[Row]:
    compared = cells(arrays)
    found = summary(compared, JUDGED) + differences(compared, REPORTED)
    for cell in compared:
        ode, sde = (1.0 * (of.away > NEAR) for of in (cell.ode, cell.sde))
        found.append(row(f"{cell.name}: share beyond {NEAR:g} px", ode, sde))
    found += to_the_data(compared[: -len(arrays.things)], arrays.mmd)
    return found + _variants(arrays) + _baselines(arrays)


def _variants(arrays: Arrays) -> list[Row]:
    """What another point, a mask, and LoRA change for each method."""
    found, lora_scenes = [], arrays.lora.shape[-1]
    for j, k, m in np.ndindex(*arrays.found.shape[1:4]):
        where = f"{arrays.things[j]}, {arrays.lengths[k]}, {METHODS[m].upper()}-Drag"
        one, *more = (Judged(*values) for values in arrays.found[:, j, k, m])
        for variant, other in zip(arrays.variants[1:], more, strict=True):
            found.append(row(f"{where}: {MEASURES['rmse'].what}", one.rmse, other.rmse, (arrays.variants[0], variant)))
        if k == len(arrays.lengths) - 1:
            adapted = Judged(*arrays.lora[j, m])
            for name in ("away", "rmse"):
                without = getattr(one, name)[:lora_scenes]
                what, names = f"{where}: {MEASURES[name].what}", ("without", "with LoRA")
                found.append(row(what, without, getattr(adapted, name), names))
    return found


def _baselines(arrays: Arrays) -> list[Row]:
    """What the measures say of a picture in which nothing was done, and of the truth."""
    found = []
    for i, j, k in np.ndindex(*arrays.baseline.shape[:3]):
        of = Judged(*arrays.baseline[i, j, k])
        where = f"{arrays.things[j]}, {arrays.lengths[k]}, {BASELINES[i]}"
        for name in REPORTED:
            mean = bootstrap(getattr(of, name))
            found.append(Row(f"{where}: {MEASURES[name].what}", mean.mean, mean.error))
        squared, p_value = arrays.baseline_mmd[i, j, k]
        found.append(Row(f"{where}: {TO_TRUTHS}", float(squared), remark=f"p = {p_value:.2g}"))
    return found


@styled
def plot(arrays: Arrays) -> Figure:
    compared = cells(arrays)
    made = figure(1.1 * len(arrays.things) + 0.14 * len(compared) + 1.2)
    parts: Any = made.subfigures(2, 1, height_ratios=[1.1 * len(arrays.things), 0.14 * len(compared) + 1.0])
    strips = parts[0].subplots(len(arrays.things), 4, squeeze=False)
    pictures(strips, arrays.pictures, arrays.things.tolist(), ("before", "truth", "ODE-Drag", "SDE-Drag"))
    axes = list(parts[1].subplots(1, len(DRAWN)))
    forest(axes, compared, DRAWN)
    legend(axes[0])
    parts[1].legend(loc="outside lower center", ncols=3)
    letter([strips[0, 0], *axes])
    return made
