"""What quality costs: seconds and network evaluations of inpainting, translation and dragging, by ODE and by SDE.

Seconds are those of the device that `results.md` names, by batches, without compiling.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax.random as jr
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from sd_port.edits.follow import DRAWS
from sd_port.edits.inpaint import InpaintConfig
from sd_port.edits.translate import TranslateConfig
from sd_port.experiments import dragging, image_to_image, inpainting
from sd_port.experiments.cases import REPORT, cases, editable, painted, part, said
from sd_port.experiments.compare import MEASURES, Cell, differences
from sd_port.experiments.editing import (
    DRAG,
    METHODS,
    T0,
    Method,
    drag_results,
    images_of,
    part_size,
    pipeline,
    tell,
)
from sd_port.experiments.image_to_image import WAYS, colours, translated
from sd_port.experiments.inpainting import filled, masks_of
from sd_port.experiments.judge import Judged, Key, Pictures, Task, gathered, judge
from sd_port.experiments.panels import line
from sd_port.nano import GUIDANCE
from sd_port.nano.devices import device_name
from sd_port.nano.fresh import size_of
from sd_port.pipeline import StableDiffusion
from toys.results import Row
from toys.style import ODE, SDE, figure, letter, styled

TITLE = "What quality costs: time and network evaluations"
EDITS = {"inpainting": "residual", "translation": "rmse", "dragging": "rmse"}  # and what tells their quality
TICKS = (1, 1.5, 2, 3, 5, 7)  # of every power of ten


@dataclass(frozen=True)
class Config:
    """Steps of the solver to go through."""

    scenes: int = 100
    steps: tuple[int, ...] = (10, 25, 50)
    batch: int = 50
    model: str = "nano"
    seed: int = 0

    @classmethod
    def tiny(cls) -> "Config":
        return cls(scenes=2, steps=(3,), batch=2)


class Arrays(NamedTuple):
    """Measures are the fields of `Judged`; methods are ODE and SDE, for translation DDIB and Cycle-SDE."""

    steps: np.ndarray  # (steps,)
    found: np.ndarray  # (edits, steps, methods, measures, scenes)
    seconds: np.ndarray  # (edits, steps, methods) for one picture
    evaluations: np.ndarray  # (edits, steps, methods) of the network, on one latent, for one picture on average
    device: np.ndarray  # () its name


class Made(NamedTuple):
    """Pictures, and how often the network was asked for one of them, on average."""

    pictures: Pictures
    evaluations: float


class Edit(NamedTuple):
    """An edit of some scenes by either method with any number of steps, and what it is to do."""

    of: Callable[[int, Method, slice], Made]
    task: Task


def run(config: Config) -> Arrays:
    """Raises what loading the model raises."""
    pipe = pipeline(config.model)
    results: dict[Key, tuple[Pictures, Task]] = {}
    seconds, evaluations, axes = {}, {}, (tuple(EDITS), config.steps, METHODS)
    edits = {name: make(pipe, config) for name, make in zip(EDITS, (_inpainting, _translation, _dragging), strict=True)}
    part = min(part_size(config.scenes, config.batch), config.scenes)
    for name, steps, method in itertools.product(*axes):
        tell(f"cost: {name}, {steps} steps, {method}")
        made = edits[name].of(steps, method, slice(config.scenes))
        start = time.perf_counter()
        edits[name].of(steps, method, slice(part))  # one part once more: all is compiled now
        seconds[name, steps, method] = (time.perf_counter() - start) / part
        evaluations[name, steps, method] = made.evaluations
        results[name, steps, method] = made.pictures, edits[name].task
    return Arrays(
        np.array(config.steps),
        found=gathered(judge(results), *axes),
        seconds=gathered(seconds, *axes),
        evaluations=gathered(evaluations, *axes),
        device=np.array(device_name()),
    )


def _inpainting(pipe: StableDiffusion, config: Config) -> Edit:
    """The sea; guidance asks the network twice a step."""
    scene, size = editable(REPORT, config.scenes), size_of(pipe)
    before, masks, captions = painted(scene, size), masks_of(scene, size)["sea"], said(scene)

    def of(steps: int, method: Method, rows: slice) -> Made:
        settings = InpaintConfig(method, steps, 1, GUIDANCE)
        given = (pipe, before[rows], masks[rows], captions[rows])
        return Made(filled(*given, settings, config.batch, jr.key(config.seed)), 2 * steps)

    return Edit(of, inpainting.task(scene, before, "sea"))


def _translation(pipe: StableDiffusion, config: Config) -> Edit:
    """Colours, by DDIB and Cycle-SDE: the way up asks once a step, the way back twice."""
    wanted = colours(config.scenes, size_of(pipe))

    def of(steps: int, method: Method, rows: slice) -> Made:
        settings = TranslateConfig(WAYS["DDIB, Cycle-SDE"][METHODS.index(method)], T0, steps, 1, GUIDANCE)
        some = image_to_image.part(wanted, rows)
        everywhere = np.ones(some.pictures.shape[:3], np.float32)
        made = translated(pipe, some, settings, everywhere, config.batch, jr.key(config.seed))
        return Made(made, 3 * steps)

    return Edit(of, image_to_image.task(wanted))


def _dragging(pipe: StableDiffusion, config: Config) -> Edit:
    """The sun over the long way by one point: every operation goes up and back, and then looks for the sun."""
    drags = cases(editable(REPORT, config.scenes), "sun", "long", 1, size_of(pipe))

    def of(steps: int, method: Method, rows: slice) -> Made:
        settings, how = replace(DRAG, method=method, steps=steps), {"masked": False, "batch": config.batch}
        made = drag_results(pipe, part(drags, rows), settings, **how, key=jr.key(config.seed))
        operations = float(np.mean([one.record["operations"] for one in made]))
        return Made(images_of(made), 2 * steps * operations + DRAWS * (operations + 1))

    return Edit(of, dragging.task(drags))


def cells(arrays: Arrays) -> list[Cell]:
    """Both methods with as many steps."""
    names = itertools.product(EDITS, arrays.steps)
    return [
        Cell(f"{edit}, {steps} steps", *(Judged(*values) for values in both))
        for (edit, steps), both in zip(names, arrays.found.reshape(-1, *arrays.found.shape[2:]), strict=True)
    ]


def rows(arrays: Arrays) -> list[Row]:
    found = differences(cells(arrays), ("residual", "rmse"))
    for (i, edit), (j, steps), (m, method) in itertools.product(*map(enumerate, (EDITS, arrays.steps, METHODS))):
        remark = f"{arrays.evaluations[i, j, m]:.0f} network evaluations, on {arrays.device}"
        what = f"{edit}, {steps} steps, {method.upper()}: seconds a picture"
        found.append(Row(what, float(arrays.seconds[i, j, m]), remark=remark))
    return found


@styled
def plot(arrays: Arrays) -> Figure:
    made = figure(4.2)
    axes = made.subplots(2, len(EDITS))
    scales = ((arrays.evaluations, "network evaluations a picture"), (arrays.seconds, "seconds a picture"))
    for (i, edit), (j, (cost, label)) in itertools.product(enumerate(EDITS), enumerate(scales)):
        axis, field = axes[j, i], Judged._fields.index(EDITS[edit])
        for m, (colour, marks) in enumerate(((ODE, "--"), (SDE, "-"))):
            line(axis, cost[i, :, m], arrays.found[i, :, m, field], color=colour, ls=marks, label=METHODS[m].upper())
        axis.set(xscale="log", xlabel=label, ylabel=MEASURES[EDITS[edit]].short, title=edit if j == 0 else "")
        axis.xaxis.set_major_locator(LogLocator(subs=TICKS))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(NullLocator())
    made.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    letter(list(axes.ravel()))
    return made
