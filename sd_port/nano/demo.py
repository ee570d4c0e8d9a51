"""A drag whose truth is known: the sun of a drawn scene goes to the other side, by ODE-Drag and by SDE-Drag."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sd_port.edit_configs import PRESETS
from sd_port.edits.drag import drag
from sd_port.nano.captions import facts
from sd_port.nano.read_out import read_out
from sd_port.nano.scenes import Pixels, Scene, all_seen, draw, each, render
from sd_port.pipeline import StableDiffusion
from theory.types import PRNGKey

FAR = 0.3  # of the width, that the sun goes
SIZE = 64


class Demo(NamedTuple):
    """Pictures (64, 64, 3) in [0, 1] and what is read out of them, by name; points are [x, y] in pixels."""

    prompt: str
    source: tuple[int, int]
    target: tuple[int, int]
    pictures: dict[str, np.ndarray]  # before, ODE-Drag, SDE-Drag, and the scene drawn anew with its sun there
    read: dict[str, dict[str, str]]


def drag_the_sun(pipe: StableDiffusion, seed: int) -> Demo:
    """Draws a scene with a boat and a high sun, and drags the sun sideways; light and reflection have to follow."""
    scene_key, edit_key = jr.split(jr.key(seed))
    (scene, truth), (before, after) = jax.device_get(_drawn(scene_key))
    source, target = (_pixel(one.sun_x, one.sun_y) for one in (scene, truth))
    said = facts(scene)
    prompt = f"a {said['hull']} boat with {said['sail']} sails under a {said['sun']} sun"

    pictures = {"before": before}
    for name, method in (("ODE-Drag", "ode"), ("SDE-Drag", "sde")):
        config = dataclasses.replace(PRESETS["nano"], method=method)
        pictures[name] = drag(pipe, before, [source], [target], None, prompt, config, key=edit_key).image
    pictures["drawn anew"] = after
    scenes = each(read_out(np.stack(list(pictures.values()))).scene)
    read = {name: describe(one) for name, one in zip(pictures, scenes, strict=True)}
    return Demo(prompt, source, target, pictures, read)


@jax.jit
def _drawn(key: PRNGKey) -> tuple[list[Scene], list[Pixels]]:
    """A scene with a boat and a high sun and the same with its sun on the other side, and both rendered."""
    many = draw(key, 64)
    there = many.sun_x + jnp.where(many.sun_x < 0.5, FAR, -FAR)
    anew = many._replace(sun_x=there, reflection_x=there)
    high = many.boat_presence + many.horizon - many.sun_y - jnp.abs(jnp.abs(many.sun_x - 0.5) - FAR / 2)
    best = jnp.argmax(jnp.where(all_seen(anew), high, -jnp.inf))
    scenes = [jax.tree.map(lambda leaf: leaf[best], one) for one in (many, anew)]
    return scenes, [render(scene) for scene in scenes]


def sheet(demo: Demo) -> np.ndarray:
    """The pictures side by side with the way of the sun, what each changed, and where sun and reflection are read."""
    figure = Figure(figsize=(10, 5.6), dpi=120, layout="constrained")
    axes = figure.subplots(2, len(demo.pictures))
    for (above, below), (name, picture) in zip(axes.T, demo.pictures.items(), strict=True):
        above.imshow(picture, extent=(0, SIZE, SIZE, 0), interpolation="nearest")
        above.set_title(name)
        change = np.abs(picture - demo.pictures["before"]).max(-1)
        below.imshow(1 - change, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        below.set_xlabel(
            f"sun at x = {demo.read[name]['sun at x, y'].split(',')[0]}\n"
            f"reflection at x = {demo.read[name]['its reflection at x']}"
        )
        for ax in (above, below):
            ax.set(xticks=[], yticks=[])
    axes[1, 0].set_ylabel("difference to before")
    (x0, y0), (x1, y1) = demo.source, demo.target
    arrow = {"arrowstyle": "-|>", "color": "crimson", "lw": 2, "shrinkA": 0, "shrinkB": 0}
    axes[0, 0].annotate("", (x1 + 0.5, y1 + 0.5), (x0 + 0.5, y0 + 0.5), arrowprops=arrow)
    return _pixels(figure)


def _pixels(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba(), np.float32)[..., :3] / 255


def _pixel(x, y) -> tuple[int, int]:
    return int(SIZE * float(x)), int(SIZE * float(y))


def describe(scene: Scene) -> dict[str, str]:
    """What people would ask of a picture, positions in pixels of 64."""
    said = facts(scene)
    boat, island = said["boat"] == "yes", said["island"] == "yes"
    return {
        "sun at x, y": f"{SIZE * scene.sun_x:.1f}, {SIZE * scene.sun_y:.1f}",
        "its reflection at x": f"{SIZE * scene.reflection_x:.1f}",
        "sun": f"{said['sun_size']}, {said['sun']}",
        "boat": f"{said['boat_size']}, {said['hull']} hull, {said['sail']} sails" if boat else "none",
        "boat at x, y": f"{SIZE * scene.boat_x:.1f}, {SIZE * scene.boat_y:.1f}" if boat else "",
        "island": said["island_height"] if island else "none",
        "peak at x": f"{SIZE * scene.island_x:.1f}" if island else "",
    }
