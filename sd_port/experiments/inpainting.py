"""Inpainting by ODE and SDE with few and many steps of order 1 and 2, as in the paper's first comparison.

Either the boat is made anew as its caption says, or the sea around it, in which the sun's reflection belongs under the
sun that was held. What is made anew need not be what was there, so nearness to the truth says less than the residual.
"""

import itertools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from sd_port.edits.inpaint import InpaintConfig, inpaint
from sd_port.experiments.cases import REPORT, editable, painted, said, some
from sd_port.experiments.compare import MEASURES, Cell, differences, row, summary, to_the_data
from sd_port.experiments.editing import METHODS, by_batches, images_of, pipeline, tell
from sd_port.experiments.judge import Judged, Key, Pictures, Task, discrepancy, gathered, judge
from sd_port.experiments.panels import line, pictures
from sd_port.metrics.bootstrap import bootstrap
from sd_port.nano import GUIDANCE, scenes
from sd_port.nano.fresh import at_size, size_of, through_autoencoder
from sd_port.nano.scenes import Scene
from sd_port.pipeline import StableDiffusion
from theory.types import PRNGKey
from toys.results import Row
from toys.store import kept
from toys.style import ODE, SDE, figure, letter, styled

TITLE = "Inpainting: SDE against ODE, few steps and many"
MASKS = ("boat", "sea")
BOAT = ("boat", "hull", "sail", "boat_size")  # what the caption asks for
JUDGED = ("undone", "reflection", "others", "facts", "ghosts", "residual", "rmse")
REPORTED = ("undone", "reflection", "ghosts", "residual", "rmse")
Order = Literal[1, 2]


@dataclass(frozen=True)
class Config:
    """The same scenes in every cell."""

    scenes: int = 200
    steps: tuple[int, ...] = (25, 50, 100)
    orders: tuple[Order, ...] = (1, 2)
    batch: int = 50
    model: str = "nano"
    seed: int = 0

    @classmethod
    def tiny(cls) -> "Config":
        return cls(scenes=2, steps=(3,), orders=(1,), batch=2)


class Arrays(NamedTuple):
    """Measures are the fields of `Judged`, methods ODE and SDE."""

    steps: np.ndarray  # (steps,)
    orders: np.ndarray  # (orders,)
    found: np.ndarray  # (masks, orders, steps, methods, measures, scenes)
    mmd: np.ndarray  # (masks, orders, steps, methods, 2) squared MMD to other scenes, and its p-value
    truth: np.ndarray  # (measures, scenes) of the pictures themselves, through the autoencoder
    pictures: np.ndarray  # (masks, 4, 64, 64, 3) before, what is given, ODE, SDE: order 1, fewest steps


def run(config: Config) -> Arrays:
    """Raises what loading the model raises."""
    pipe, key = pipeline(config.model), jr.key(config.seed)
    size, scene = size_of(pipe), editable(REPORT, 2 * config.scenes)
    here, others = some(scene, slice(config.scenes)), some(scene, slice(config.scenes, None))
    before, captions, masks = painted(here, size), said(here), masks_of(here, size)
    results: dict[Key, tuple[Pictures, Task]] = {}
    axes = MASKS, config.orders, config.steps, METHODS
    for mask, order, steps, method in itertools.product(*axes):
        tell(f"inpainting: {mask}, order {order}, {steps} steps, {method}")
        settings = InpaintConfig(method, steps, order, GUIDANCE)
        name, given = (mask, order, steps, method), (pipe, before, masks[mask], captions)
        results[name] = kept(name, filled, *given, settings, config.batch, key), task(here, before, mask)
    results["truth",] = at_size(through_autoencoder(pipe, before)), task(here, before, "sea")

    found, data = judge(results), at_size(through_autoencoder(pipe, painted(others, size)))
    mmds = {name: discrepancy(results[name][0], data) for name in itertools.product(*axes)}
    shown = {}
    for mask in MASKS:
        given = np.where(masks[mask][:1, ..., None] > 0, np.float32(0.5), before[:1])
        made = [results[mask, config.orders[0], config.steps[0], method][0][0] for method in METHODS]
        shown |= {(mask, i): one for i, one in enumerate([at_size(before[:1])[0], at_size(given)[0], *made])}
    return Arrays(
        np.array(config.steps),
        np.array(config.orders),
        found=gathered(found, *axes),
        mmd=gathered(mmds, *axes),
        truth=np.array(found["truth",]),
        pictures=gathered(shown, MASKS, range(4)),
    )


def masks_of(scene: Scene, size: int) -> dict[str, Float[np.ndarray, "n size size"]]:
    """The boat's box, and all of the sea but that."""
    boat = np.asarray(scenes.objects(jax.tree.map(jnp.asarray, scene), size)["boat"])
    below = (np.arange(size) + 0.5)[None, :, None] / size > np.asarray(scene.horizon)[:, None, None]
    return {"boat": boat.astype(np.float32), "sea": (below & ~boat).astype(np.float32)}


def task(scene: Scene, before: Float[np.ndarray, "n _ _ 3"], mask: str) -> Task:
    """What is to be under the mask: the boat of the caption, wherever it is, or the sea with the reflection."""
    return Task(scene, at_size(before)[:, None], "boat" if mask == "boat" else "", asked=BOAT)


def filled(
    pipe: StableDiffusion,
    images: Float[np.ndarray, "n _ _ 3"],
    masks: Float[np.ndarray, "n _ _"],
    captions: list[str],
    config: InpaintConfig,
    batch: int,
    key: PRNGKey,
) -> Pictures:
    """The pictures, filled in where the masks are 1."""

    def edit(rows: Int[np.ndarray, " batch"], key: PRNGKey) -> Pictures:
        texts = [captions[i] for i in rows.tolist()]
        return images_of(inpaint(pipe, images[rows], masks[rows], texts, config, key=key))

    return by_batches(len(images), batch, key, edit)


def cells(arrays: Arrays) -> list[Cell]:
    """ODE and SDE at the same number of steps."""
    names = itertools.product(MASKS, arrays.orders, arrays.steps)
    return [
        Cell(f"{mask}, order {order}, {steps} steps", *(Judged(*values) for values in both))
        for (mask, order, steps), both in zip(names, arrays.found.reshape(-1, *arrays.found.shape[3:]), strict=True)
    ]


def rows(arrays: Arrays) -> list[Row]:
    compared = cells(arrays)
    found = summary(compared, JUDGED) + _few_against_many(arrays) + differences(compared, REPORTED)
    found += to_the_data(compared, arrays.mmd)
    truth = Judged(*arrays.truth)
    for name in JUDGED:
        mean = bootstrap(getattr(truth, name))
        found.append(Row(f"the pictures through the autoencoder: {MEASURES[name].what}", mean.mean, mean.error))
    return found


def _few_against_many(arrays: Arrays) -> list[Row]:
    """The paper's claim: the SDE with the fewest steps beats the ODE with the most, of whatever order."""
    few, many, found = arrays.steps[0], arrays.steps[-1], []
    for i, mask in enumerate(MASKS):
        for name in REPORTED:
            ode, sde = (arrays.found[i, :, at, m, Judged._fields.index(name)] for at, m in ((-1, 0), (0, 1)))
            ode, sde = (values[values.mean(axis=1).argmin()] for values in (ode, sde))
            names = f"ODE, {many} steps", f"SDE, {few} steps"
            found.append(row(f"{mask}, the better order of each: {MEASURES[name].what}", ode, sde, names))
    return found


@styled
def plot(arrays: Arrays) -> Figure:
    made = figure(3.4)
    parts: Any = made.subfigures(2, 1, height_ratios=[1, 1.8])
    strips = parts[0].subplots(1, 4 * len(MASKS), squeeze=False)
    few = arrays.steps[0]
    names = [name for mask in MASKS for name in ("before", f"{mask} hidden", f"ODE, n = {few}", f"SDE, n = {few}")]
    pictures(strips, arrays.pictures.reshape(1, -1, *arrays.pictures.shape[2:]), [""], names)
    axes = parts[1].subplots(1, 4)
    panels = (("boat", "undone"), ("boat", "residual"), ("sea", "reflection"), ("sea", "residual"))
    for axis, (mask, name) in zip(axes, panels, strict=True):
        field = Judged._fields.index(name)
        for (i, order), (m, colour) in itertools.product(enumerate(arrays.orders), enumerate((ODE, SDE))):
            label = f"{METHODS[m].upper()}, order {order}"
            values = arrays.found[MASKS.index(mask), i, :, m, field]
            beside = arrays.steps * (1.04 if m else 1)  # so that bars do not lie on one another
            line(axis, beside, values, color=colour, ls=("-", "--")[order - 1], label=label)
        axis.axhline(arrays.truth[field].mean(), color="black", ls=":", lw=0.8)
        axis.set(xscale="log", xlabel="steps n", title=f"{mask} made anew", ylabel=MEASURES[name].short)
        axis.set_xticks(arrays.steps, [f"{n}" for n in arrays.steps])
        axis.set_xticks([], minor=True)
    axes[0].plot([], [], color="black", ls=":", lw=0.8, label="the picture itself")
    parts[1].legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    letter([strips[0, 0], *axes])
    return made
