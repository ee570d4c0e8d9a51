"""The settings of a drag, one at a time and the others as frozen, on scenes that no figure is reported for.

t0, alpha, beta, the radius r, the number of operations m and of solver steps n; forms of the drag beyond the paper,
each beside the published one: amplifying in the first operation only, carrying the recorded noise along, choosing t0 by
the size of the patch, following what is dragged; and the presets, of which all but nano are for latents of 64 x 64.
"""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.random as jr
import numpy as np
from matplotlib.figure import Figure

from sd_port.edit_configs import PRESETS, DragConfig, Preset
from sd_port.edits.plan import plan
from sd_port.experiments.cases import THINGS, TUNING, Cases, cases, editable
from sd_port.experiments.compare import MEASURES, row
from sd_port.experiments.dragging import task
from sd_port.experiments.editing import DRAG, METHODS, Method, dragged, pipeline, tell
from sd_port.experiments.judge import Judged, Key, Pictures, Task, judge
from sd_port.experiments.panels import line
from sd_port.nano.fresh import size_of
from toys.results import Row
from toys.store import kept
from toys.style import CYCLE, INK, ODE, figure, letter, styled

TITLE = "The settings of a drag, one at a time, on tuning scenes"
PUBLISHED: dict[str, Any] = {"follow": False}
FORMS: dict[str, dict[str, Any]] = {
    "published": PUBLISHED,
    "alpha first": PUBLISHED | {"alpha_first": True},
    "noise carried": PUBLISHED | {"carry_noise": True},
    "t0 by patch": PUBLISHED | {"t0": "auto"},
    "following": {},
}
SWEPT = {"t0": "t0", "alpha": "α", "beta": "β", "radius": "r", "step_size": "m", "steps": "n"}  # fields of DragConfig
DRAWN = ("away", "residual", "rmse")


@dataclass(frozen=True)
class Config:
    """Values to go through; long drags by one point of every thing, each in all of the scenes."""

    t0: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5, 0.6)
    alpha: tuple[float, ...] = (1.0, 1.1, 1.2)
    beta: tuple[float, ...] = (0.0, 0.3, 0.6)
    radius: tuple[int, ...] = (1, 2, 3)
    step_size: tuple[float, ...] = (5.0, 2.0, 1.0)
    steps: tuple[int, ...] = (6, 10, 15, 30)
    forms: tuple[str, ...] = tuple(FORMS)
    presets: tuple[Preset, ...] = tuple(PRESETS)
    things: tuple[str, ...] = tuple(THINGS)
    scenes: int = 64
    frozen_steps: int = DRAG.steps
    batch: int = 64
    model: str = "nano"
    seed: int = 0

    @classmethod
    def tiny(cls) -> "Config":
        one: dict[str, Any] = {"t0": (0.2,), "alpha": (1.0,), "beta": (0.9,), "radius": (1,), "step_size": (5.0,)}
        return cls(
            **one,
            steps=(3,),
            forms=("published", "alpha first"),
            presets=("nano",),
            things=("boat",),
            scenes=2,
            frozen_steps=3,
            batch=2,
        )


class Arrays(NamedTuple):
    """A point is a value of a setting. Measures are the fields of `Judged`, methods ODE-Drag and SDE-Drag."""

    settings: np.ndarray  # (points,) names
    values: np.ndarray  # (points,) as text
    frozen: np.ndarray  # (points,) 1 where the value is the frozen one
    found: np.ndarray  # (points, methods, measures, things * scenes); nan for what a method does not have


def run(config: Config) -> Arrays:
    """Raises what loading the model raises."""
    pipe, key = pipeline(config.model), jr.key(config.seed)
    here, size = editable(TUNING, config.scenes), size_of(pipe)
    drags = {thing: cases(here, thing, "long", 1, size) for thing in config.things}
    base = dataclasses.replace(DRAG, steps=config.frozen_steps)
    points = sweeps(config, drags[config.things[0]], pipe.vae.config.factor)
    results: dict[Key, tuple[Pictures, Task]] = {}
    for (setting, value), changes in points.items():
        for thing, method in itertools.product(config.things, METHODS):
            drag = changed(base, method, changes)
            if drag is not None and (drag, thing) not in results:  # the frozen value is one of each setting's
                tell(f"settings: {setting} = {value}, {thing}, {method}")
                how = {"masked": False, "batch": config.batch, "key": key}
                results[drag, thing] = kept((drag, thing), dragged, pipe, drags[thing], drag, **how), task(drags[thing])
    found = judge(results)
    nothing = np.full((len(Judged._fields), config.scenes * len(config.things)), np.nan)
    values = [
        nothing if drag is None else np.concatenate([np.array(found[drag, thing]) for thing in config.things], axis=1)
        for drag in (changed(base, method, changes) for changes in points.values() for method in METHODS)
    ]
    return Arrays(
        settings=np.array([setting for setting, _ in points]),
        values=np.array([value for _, value in points]),
        frozen=np.array([changed(base, "sde", changes) == base for changes in points.values()], int),
        found=np.array(values).reshape(len(points), len(METHODS), *nothing.shape),
    )


def sweeps(config: Config, drags: Cases, factor: int) -> dict[tuple[str, str], dict[str, Any]]:
    """What changes at each value of each setting. Step sizes go by the number of operations that they make."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for name, setting in SWEPT.items():
        for value in getattr(config, name):
            changes = {name: value}
            operations = plan(drags.source[0], drags.target[0], factor, dataclasses.replace(DRAG, **changes))
            found[setting, str(len(operations)) if name == "step_size" else f"{value:g}"] = changes
    found |= {("form", name): FORMS[name] for name in config.forms}
    return found | {("preset", name): vars(PRESETS[name]) for name in config.presets}


def changed(base: DragConfig, method: Method, changes: dict[str, Any]) -> DragConfig | None:
    """The settings with these changes; None where the method does not have them."""
    if method == "ode" and (changes.get("carry_noise") or changes.get("order") == 2):  # no noise, and no inverse
        return None
    return dataclasses.replace(base, **changes | {"method": method})


def rows(arrays: Arrays) -> list[Row]:
    found = []
    for setting in dict.fromkeys(arrays.settings.tolist()):
        here = np.flatnonzero(arrays.settings == setting)
        means = arrays.found[here].mean(axis=-1)  # (points, methods, measures)
        best = np.nan_to_num(means[..., Judged._fields.index("rmse")], nan=np.inf).argmin(axis=0)
        for i, (m, method) in itertools.product(range(len(here)), enumerate(METHODS)):
            of = Judged(*arrays.found[here[i], m])
            if np.isnan(of.rmse).all():
                continue
            marks = ["frozen"] * int(arrays.frozen[here[i]]) + ["nearest to the truth of these"] * int(best[m] == i)
            also = [f"{of.away.mean():.3g} px from the target", f"residual {of.residual.mean():.3g}"]
            error = float(of.rmse.std() / np.sqrt(len(of.rmse)))
            what = f"{setting} = {arrays.values[here[i]]}, {method.upper()}-Drag: {MEASURES['rmse'].what}"
            found.append(Row(what, float(of.rmse.mean()), error, remark="; ".join(also + marks)))
    return found + _against_published(arrays)


def _against_published(arrays: Arrays) -> list[Row]:
    """Every form of the drag less the first, which is the published one, on the same scenes."""
    found, (first, *others) = [], np.flatnonzero(arrays.settings == "form").tolist()
    for i, (m, method), name in itertools.product(others, enumerate(METHODS), DRAWN):
        published, other = (arrays.found[at, m, Judged._fields.index(name)] for at in (first, i))
        if not np.isnan(other).all():
            names = str(arrays.values[first]), str(arrays.values[i])
            found.append(row(f"{method.upper()}-Drag: {MEASURES[name].what}", published, other, names))
    return found


@styled
def plot(arrays: Arrays) -> Figure:
    settings = list(dict.fromkeys(arrays.settings.tolist()))
    made = figure(4.6)
    widths = [1 + np.sum(arrays.settings == setting) for setting in settings]
    axes = made.subplots(len(DRAWN), len(settings), sharey="row", width_ratios=widths)
    for (j, setting), (i, name) in itertools.product(enumerate(settings), enumerate(DRAWN)):
        here, axis = np.flatnonzero(arrays.settings == setting), axes[i, j]
        for m, colour in enumerate((ODE, CYCLE)):
            values = arrays.found[here, m, Judged._fields.index(name)]
            lines = "" if setting in ("form", "preset") else ("--", "-")[m]
            line(
                axis, np.arange(len(here)) + 0.1 * m, values, color=colour, ls=lines, label=f"{METHODS[m].upper()}-Drag"
            )
        for at in np.flatnonzero(arrays.frozen[here]):
            axis.axvline(at, color=INK, lw=0.5, ls=":")
        turned = 90 if setting in ("form", "preset") else 0
        words = arrays.values[here].tolist() if i == len(DRAWN) - 1 else []
        axis.set_xticks(range(len(here)), words, rotation=turned, fontsize=6.5)
        axis.set(title=setting if i == 0 else "", ylabel=MEASURES[name].short if j == 0 else "")
    handles = axes[0, 0].get_legend_handles_labels()
    made.legend(*handles, loc="outside lower center", ncols=2)
    letter(list(axes[0]))
    return made
