"""SDE-Drag and ODE-Drag: pull what is at some points of a picture to others (Sec. 4.3 of the paper).

A drag is a chain of operations (`sd_port.edits.operation`). Each reaches the latent at t0, moves patches one step
towards their targets and solves back: SDE-Drag by Cycle-SDE, ODE-Drag by DDIM inversion. The next operation starts from
the latent of the last, without a trip through pixels. Facts of the implementation follow github.com/ML-GSAI/SDE-Drag.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from numpy.typing import ArrayLike

from sd_port.checks import check_mask, check_picture, check_points, latent_mask
from sd_port.edit_configs import PRESETS, DragConfig
from sd_port.edits import follow
from sd_port.edits.canvas import check_text_model, decode, encode, solver_of, times_at_once
from sd_port.edits.operation import operate
from sd_port.edits.plan import plan, together
from sd_port.images import EditResult
from sd_port.pipeline import StableDiffusion
from theory.types import NoiseFn, PRNGKey, Times

Progress = Callable[[int, int], None]  # operations done, operations in all


class Drag(NamedTuple):
    """One picture to edit: source and target are [x, y] in its pixels, the mask is 1 where it may change."""

    image: np.ndarray
    source: ArrayLike
    target: ArrayLike
    mask: np.ndarray | None = None
    prompt: str = ""


def drag(
    pipe: StableDiffusion,
    image: np.ndarray,
    source: ArrayLike,
    target: ArrayLike,
    mask: np.ndarray | None = None,
    prompt: str = "",
    config: DragConfig = PRESETS["paper"],
    *,
    key: PRNGKey,
    progress: Progress | None = None,
    keep_frames: bool = False,
) -> EditResult:
    """Drags what is at the source points of a picture, (height, width, 3) in [0, 1], to the targets; see `Drag`.

    Raises ValueError for a picture, points or a mask that cannot be used and for a model for inpainting, and
    FloatingPointError where the result is not finite.
    """
    drags = [Drag(image, source, target, mask, prompt)]
    return drag_many(pipe, drags, config, key=key, progress=progress, keep_frames=keep_frames)[0]


def drag_many(
    pipe: StableDiffusion,
    drags: Sequence[Drag],
    config: DragConfig = PRESETS["paper"],
    *,
    key: PRNGKey,
    progress: Progress | None = None,
    keep_frames: bool = False,
    batch_size: int = 4,
) -> list[EditResult]:
    """Pictures of one size at once, each with its own points, mask and prompt; `drag` is this for one.

    A picture whose drag needs fewer operations than others rests in the later ones. With keep_frames the results hold
    the picture after every operation, each of which costs a decoding. `batch_size` is of how many latents
    the way up asks for noise predictions at once, at least of one of every picture: more of them fill a GPU.

    Raises ValueError for pictures of several sizes, and as `drag` does.
    """
    check_text_model(pipe, "drag")
    images = [check_picture(one.image) for one in drags]
    size = images[0].shape[:2]
    if any(image.shape[:2] != size for image in images):
        raise ValueError("drag_many takes pictures of one size")
    factor = pipe.vae.config.factor
    plans = [
        plan(check_points(one.source, size, "source"), check_points(one.target, size, "target"), factor, config)
        for one in drags
    ]
    masks = [check_mask(one.mask, size) for one in drags]
    mask = None
    if any(one.mask is not None for one in drags):
        mask = jnp.asarray(np.stack([latent_mask(one, factor) for one in masks]))

    prompts = [one.prompt for one in drags]
    ts, solver = config.grid(pipe.schedule), solver_of(pipe.schedule, config.method, config.order)
    eps_fn = _noise_fn(pipe, prompts, config, ts)
    x = encode(pipe, np.stack(images))
    moves, frames = together(plans), []
    pursuit = follow.begin(pipe, x, prompts, moves, jr.fold_in(key, 2**31)) if config.follow else None
    counts, moved = np.zeros(len(drags), int), np.zeros(np.shape(moves[0].active), bool)
    most = len(moves) if pursuit is None else follow.PATIENCE * len(moves)
    for i in range(most):
        move = moves[i] if pursuit is None else pursuit.move(config.step_size, config.sequence)
        if not move.active.any():
            break
        counts += move.active.any(axis=1)
        x = operate(
            solver,
            eps_fn,
            x,
            ts,
            jr.fold_in(key, i),
            move,
            np.where(config.alpha_first & moved, 1, config.alpha).astype(np.float32),
            np.float32(config.beta),
            np.int32(config.radius),
            mask,
            method=config.method,
            carry_noise=config.carry_noise,
            mask_latent=config.compat == "clean",
            batch_size=times_at_once(batch_size, len(drags)),
        )
        moved |= np.asarray(move.active)
        if keep_frames:
            frames.append(decode(pipe, x, size))
        if pursuit is not None:
            pursuit = pursuit.look(x, move)
        if progress is not None:
            jax.block_until_ready(x)
            progress(i + 1, most)
    edited, latents, results = decode(pipe, x, size), np.asarray(x), []
    for i, one in enumerate(drags):
        record = {
            "edit": "drag",
            "source": np.asarray(one.source).tolist(),
            "target": np.asarray(one.target).tolist(),
            "prompt": one.prompt,
            "operations": int(counts[i]),
            "config": dataclasses.asdict(config),
        }
        results.append(EditResult(edited[i], latents[i], [frame[i] for frame in frames[: counts[i]]], record))
    return results


def _noise_fn(pipe: StableDiffusion, prompts: list[str], config: DragConfig, ts: Times) -> NoiseFn:
    guidance, lora_scale = config.ramps(ts)
    null = None if config.guidance == (1.0, 1.0) else pipe.embed([""])
    return pipe.noise_fn(pipe.embed(prompts), null, guidance, lora_scale, batch=len(prompts))
