"""Edits of many scenes, a batch at a time, by the model under test; and the settings that figures are reported for."""

import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal

import jax
import jax.random as jr
import numpy as np
from jaxtyping import Float, Int

from sd_port.edit_configs import PRESETS, DragConfig
from sd_port.edits.drag import Drag, drag_many
from sd_port.experiments.cases import Cases
from sd_port.images import EditResult
from sd_port.lora import LoRAConfig
from sd_port.nano.devices import all_devices
from sd_port.nano.fresh import at_size
from sd_port.pipeline import StableDiffusion
from theory.types import PRNGKey

Method = Literal["ode", "sde"]
METHODS: tuple[Method, ...] = ("ode", "sde")

# Chosen on the scenes of TUNING (see `settings`), one for both methods, for latents of 16 x 16; the rest is not tuned.
DRAG = PRESETS["nano"]
LORA = LoRAConfig(rank=4, steps=100, learning_rate=1e-3, batch=4)
T0, STEPS = 0.7, 50  # of translations

OneBatch = Callable[[Int[np.ndarray, " batch"], PRNGKey], Float[np.ndarray, "batch *rest"]]


@cache
def pipeline(model: str) -> StableDiffusion:
    """The model, loaded once, on all devices. Raises what `StableDiffusion.load` raises."""
    return StableDiffusion.load(model, mesh=all_devices())


def tell(what: str) -> None:
    """A line of progress: what takes long is about to begin."""
    print(what, file=sys.stderr, flush=True)


def batches(n: int, batch: int) -> list[Int[np.ndarray, " batch"]]:
    """n rows in parts of one size, at most `batch` but for what makes it even over the devices, so that one compiles.

    The last part is filled up with the last row.
    """
    size = part_size(n, batch)
    return [np.minimum(np.arange(start, start + size), n - 1) for start in range(0, n, size)]


def part_size(n: int, batch: int) -> int:
    """Of the parts of n rows."""
    size = -(-n // -(-n // batch))
    return size + -size % jax.device_count()


def by_batches(n: int, batch: int, key: PRNGKey, edit: OneBatch) -> Float[np.ndarray, "n *rest"]:
    """edit(rows, key) of n rows in parts."""
    return np.concatenate([edit(rows, jr.fold_in(key, int(rows[0]))) for rows in batches(n, batch)])[:n]


def images_of(results: Sequence[EditResult]) -> Float[np.ndarray, "batch 64 64 3"]:
    """The pictures, at the size at which they are judged."""
    return at_size(np.stack([result.image for result in results]))


def drag_results(
    pipe: StableDiffusion, cases: Cases, config: DragConfig, *, masked: bool, batch: int, key: PRNGKey
) -> list[EditResult]:
    """The results of these drags.

    Without its mask a drag has one that allows everything: it is the same, and compiles with the others.
    """
    masks, results = cases.masks if masked else np.ones_like(cases.masks), []
    for rows in batches(len(cases.pictures), batch):
        drags = [
            Drag(cases.pictures[i], cases.source[i], cases.target[i], masks[i], cases.captions[i])
            for i in rows.tolist()
        ]
        results += drag_many(pipe, drags, config, key=jr.fold_in(key, int(rows[0])))
    return results[: len(cases.pictures)]


def dragged(
    pipe: StableDiffusion, cases: Cases, config: DragConfig, *, masked: bool, batch: int, key: PRNGKey
) -> Float[np.ndarray, "n 64 64 3"]:
    """The pictures of `drag_results`."""
    return images_of(drag_results(pipe, cases, config, masked=masked, batch=batch, key=key))
