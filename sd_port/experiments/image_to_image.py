"""Image to image: a boat of other colours, and another time of day, by SDEdit, DDIB or Cycle-SDE, and DiffEdit.

Each by ODE and by SDE from several t0, none of which is chosen: the higher t0, the more is done, and the more is lost.
"""

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from matplotlib.figure import Figure

from sd_port.edits.translate import Kind, TranslateConfig, difference_mask, translate
from sd_port.experiments.cases import REPORT, editable, painted, said, some
from sd_port.experiments.compare import MEASURES, Cell, differences, summary, to_the_data
from sd_port.experiments.editing import METHODS, STEPS, by_batches, images_of, pipeline, tell
from sd_port.experiments.judge import Judged, Key, Pictures, Task, discrepancy, gathered, judge
from sd_port.experiments.panels import line, pictures
from sd_port.metrics.bootstrap import bootstrap
from sd_port.nano import GUIDANCE
from sd_port.nano.captions import HEIGHTS, TIMES, facts
from sd_port.nano.fresh import at_size, size_of, through_autoencoder
from sd_port.nano.scenes import HIGHEST, HULLS, SAILS, Scene, all_seen, each
from sd_port.pipeline import StableDiffusion
from theory.types import PRNGKey
from toys.results import Row
from toys.store import kept
from toys.style import ODE, SDE, figure, letter, styled

TITLE = "Image to image: SDE against ODE on colours and times of day"
EDITS = ("colour", "time of day")
WAYS: dict[str, tuple[Kind, Kind]] = {  # by ODE and by SDE
    "SDEdit": ("sdedit-ode", "sdedit"),
    "DDIB, Cycle-SDE": ("ddib", "cycle"),
    "DiffEdit": ("ddib", "cycle"),  # the same two, within its mask
}
LOW, HIGH = np.linspace(0.24, 0.36, 5), np.linspace(0.72, 1.0, 5)  # heights of the sun that "at dusk", "at noon" allow
BASELINES = ("the picture as it was", "the truth through the autoencoder")
JUDGED = ("undone", "reflection", "others", "facts", "ghosts", "light", "residual", "rmse")
REPORTED = ("undone", "reflection", "others", "ghosts", "residual", "rmse")
DRAWN = ("undone", "residual", "rmse")


@dataclass(frozen=True)
class Config:
    """The same scenes in every cell of an edit."""

    scenes: int = 200
    t0s: tuple[float, ...] = (0.5, 0.7, 0.9)
    steps: int = STEPS
    batch: int = 50
    model: str = "nano"
    seed: int = 0

    @classmethod
    def tiny(cls) -> "Config":
        return cls(scenes=2, t0s=(0.7,), steps=3, batch=2)


class Arrays(NamedTuple):
    """Measures are the fields of `Judged`, methods ODE and SDE."""

    t0s: np.ndarray  # (t0s,)
    found: np.ndarray  # (edits, ways, t0s, methods, measures, scenes)
    mmd: np.ndarray  # (edits, ways, t0s, methods, 2) squared MMD to the truths of other scenes, and its p-value
    baseline: np.ndarray  # (2, edits, measures, scenes) of BASELINES
    pictures: np.ndarray  # (edits, 2 + ways * methods, 64, 64, 3) before, truth, and by each way at the middle t0


class Wanted(NamedTuple):
    """Pictures of n scenes, and what an edit is to make of them."""

    pictures: Float[np.ndarray, "n size size 3"]
    before: list[str]  # what they show
    after: list[str]  # what they are to show
    truth: Scene
    truths: Float[np.ndarray, "n _ size size 3"]  # all that the text allows, the truth in the middle
    thing: str  # that may go elsewhere; "" for none
    asked: tuple[str, ...]  # the facts that are to be others


def run(config: Config) -> Arrays:
    """Raises what loading the model raises."""
    pipe, key = pipeline(config.model), jr.key(config.seed)
    size, middle, axes = size_of(pipe), config.t0s[len(config.t0s) // 2], (tuple(WAYS), config.t0s, METHODS)
    results: dict[Key, tuple[Pictures, Task]] = {}
    mmds, shown = {}, {}
    for edit, every in (("colour", colours), ("time of day", times)):
        wanted = every(2 * config.scenes, size)
        here, others = part(wanted, slice(config.scenes)), part(wanted, slice(config.scenes, None))
        data, truth = (at_size(through_autoencoder(pipe, _middle(one))) for one in (others, here))
        everywhere = np.ones(here.pictures.shape[:3], np.float32)
        masks = dict.fromkeys(WAYS, everywhere) | {"DiffEdit": differing(pipe, here, config.batch, key)}
        for i, (way, t0, method) in enumerate(itertools.product(*axes)):
            tell(f"image to image: {edit}, {way}, t0 = {t0:g}, {method}")
            settings = TranslateConfig(WAYS[way][METHODS.index(method)], t0, config.steps, 1, GUIDANCE)
            name, cell_key = (edit, way, t0, method), jr.fold_in(key, i // len(METHODS))
            images = kept(name, translated, pipe, here, settings, masks[way], config.batch, cell_key)
            results[name] = images, task(here)
            mmds[name] = discrepancy(images, data)
        results["before", edit] = at_size(here.pictures), task(here)
        results["truth", edit] = truth, task(here)
        made = [results[edit, way, middle, method][0] for way, method in itertools.product(WAYS, METHODS)]
        shown |= {(edit, i): images[0] for i, images in enumerate([at_size(here.pictures), truth, *made])}
    found = judge(results)
    return Arrays(
        np.array(config.t0s),
        found=gathered(found, EDITS, *axes),
        mmd=gathered(mmds, EDITS, *axes),
        baseline=gathered(found, ["before", "truth"], EDITS),
        pictures=gathered(shown, EDITS, range(2 + 2 * len(WAYS))),
    )


def colours(n: int, size: int) -> Wanted:
    """Hull and sails get other colours, each of the others as often as the rest."""
    scene, rng = editable(REPORT, n), np.random.default_rng(REPORT)
    said_of = [facts(one) for one in each(scene)]
    hulls, sails = (
        np.array([choices[_other(choices, one[name], rng)] for one in said_of], np.float32)
        for name, choices in (("hull", HULLS), ("sail", SAILS))
    )
    truth = scene._replace(hull=hulls, sail=sails)
    return Wanted(
        painted(scene, size), said(scene), said(truth), truth, painted(truth, size)[:, None], "", ("hull", "sail")
    )


def _other(choices: dict, name: str, rng: np.random.Generator) -> str:
    return str(rng.choice([other for other in choices if other != name]))


def times(n: int, size: int) -> Wanted:
    """A low sun rises to noon, a high one sets: with it go the colours of sky and sea, and the light on everything."""
    scene = editable(REPORT, n, also=_can_turn)
    low = np.asarray(_is_low(scene))
    truths = [
        at_height(scene, np.where(low, high, dusk).astype(np.float32)) for dusk, high in zip(LOW, HIGH, strict=True)
    ]
    dusk, noon = TIMES["low"][0], TIMES["high"][0]
    texts = said(scene)
    return Wanted(
        painted(scene, size),
        [f"{text}, {dusk if is_low else noon}" for text, is_low in zip(texts, low, strict=True)],
        [f"{text}, {noon if is_low else dusk}" for text, is_low in zip(texts, low, strict=True)],
        truths[len(truths) // 2],
        np.stack([painted(truth, size) for truth in truths], axis=1),
        "sun",
        ("sun_height",),
    )


def at_height(scene: Scene, share: Float[Array | np.ndarray, " n"]) -> Scene:
    """The scenes with the sun at this share of its greatest height."""
    return scene._replace(sun_y=scene.horizon - HIGHEST * share)


def _is_low(scene: Scene) -> Bool[Array | np.ndarray, " n"]:
    return (scene.horizon - scene.sun_y) / HIGHEST < HEIGHTS[0]


@jax.jit
def _can_turn(scene: Scene) -> Bool[Array, " n"]:
    """Scenes of dusk and of noon in which the sun would be seen at all heights of the other."""
    low = jnp.asarray(_is_low(scene))
    good = low | ((scene.horizon - scene.sun_y) / HIGHEST > HEIGHTS[1])
    for dusk, noon in zip(LOW.tolist(), HIGH.tolist(), strict=True):
        good &= all_seen(at_height(scene, jnp.where(low, noon, dusk)))
    return good


def task(wanted: Wanted) -> Task:
    """What the edit is to do."""
    n, k = wanted.truths.shape[:2]
    truths = at_size(wanted.truths.reshape(n * k, *wanted.truths.shape[2:]))
    return Task(wanted.truth, truths.reshape(n, k, *truths.shape[1:]), wanted.thing, asked=wanted.asked)


def part(wanted: Wanted, rows: slice) -> Wanted:
    """The pictures in these rows."""
    lists = {name: getattr(wanted, name)[rows] for name in ("pictures", "before", "after", "truths")}
    return wanted._replace(truth=some(wanted.truth, rows), **lists)


def _middle(wanted: Wanted) -> Float[np.ndarray, "n _ _ 3"]:
    return wanted.truths[:, wanted.truths.shape[1] // 2]


def differing(pipe: StableDiffusion, wanted: Wanted, batch: int, key: PRNGKey) -> Float[np.ndarray, "n _ _"]:
    """DiffEdit's masks; everything where the two texts differ evenly, so that nothing stands out."""

    def masks(rows: Int[np.ndarray, " batch"], key: PRNGKey) -> Float[np.ndarray, "batch _ _"]:
        texts = ([texts[i] for i in rows.tolist()] for texts in (wanted.before, wanted.after))
        return difference_mask(pipe, wanted.pictures[rows], *texts, key=key).mask

    found = by_batches(len(wanted.pictures), batch, key, masks)
    return np.where(found.any(axis=(1, 2), keepdims=True), found, np.float32(1))


def translated(
    pipe: StableDiffusion,
    wanted: Wanted,
    config: TranslateConfig,
    masks: Float[np.ndarray, "n _ _"],
    batch: int,
    key: PRNGKey,
) -> Pictures:
    """The results of one way, within masks."""

    def edit(rows: Int[np.ndarray, " batch"], key: PRNGKey) -> Pictures:
        before, after = ([texts[i] for i in rows.tolist()] for texts in (wanted.before, wanted.after))
        return images_of(translate(pipe, wanted.pictures[rows], before, after, config, key=key, masks=masks[rows]))

    return by_batches(len(wanted.pictures), batch, key, edit)


def cells(arrays: Arrays) -> list[Cell]:
    """The ODE and the SDE of each way from the same t0."""
    names = itertools.product(EDITS, WAYS, arrays.t0s)
    return [
        Cell(f"{edit}, {way}, t0 = {t0:g}", *(Judged(*values) for values in both))
        for (edit, way, t0), both in zip(names, arrays.found.reshape(-1, *arrays.found.shape[3:]), strict=True)
    ]


def rows(arrays: Arrays) -> list[Row]:
    compared = cells(arrays)
    found = summary(compared, JUDGED) + differences(compared, REPORTED) + to_the_data(compared, arrays.mmd)
    for i, j in np.ndindex(*arrays.baseline.shape[:2]):
        of = Judged(*arrays.baseline[i, j])
        for name in JUDGED:
            mean = bootstrap(getattr(of, name))
            found.append(Row(f"{EDITS[j]}, {BASELINES[i]}: {MEASURES[name].what}", mean.mean, mean.error))
    return found


@styled
def plot(arrays: Arrays) -> Figure:
    made = figure(5.4)
    parts: Any = made.subfigures(2, 1, height_ratios=[1, 1.4])
    strips = parts[0].subplots(len(EDITS), arrays.pictures.shape[1])
    names = [_label(way, m).replace(", ", "\n") for way in WAYS for m in range(len(METHODS))]
    edits = [f"{edit}\nt0 = {arrays.t0s[len(arrays.t0s) // 2]:g}" for edit in EDITS]
    pictures(strips, arrays.pictures, edits, ("before", "truth", *names))
    axes = parts[1].subplots(len(EDITS), len(DRAWN))
    for (i, edit), (j, name) in itertools.product(enumerate(EDITS), enumerate(DRAWN)):
        field = Judged._fields.index(name)
        for (k, way), (m, colour) in itertools.product(enumerate(WAYS), enumerate((ODE, SDE))):
            values = arrays.found[i, k, :, m, field]
            line(axes[i, j], arrays.t0s, values, color=colour, ls=("-", "--", ":")[k], label=_label(way, m))
        axes[i, j].set(title=f"{edit}: {MEASURES[name].short}", xlabel="t0" if i else "")
    parts[1].legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    letter([strips[0, 0], *axes.ravel()])
    return made


def _label(way: str, method: int) -> str:
    return way.split(", ")[method] if "," in way else f"{way}, {METHODS[method].upper()}"
