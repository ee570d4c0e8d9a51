"""Image to image by text: SDEdit, DDIB, CycleDiffusion (the paper's Cycle-SDE), DiffEdit, and plain reconstruction.

All are `theory.editing.edit` with a source prompt on the way up and a target prompt on the way back:

    SDEdit          noise the picture (Meng et al. 2022, arXiv 2108.01073), solve back by the ODE or the SDE
    DDIB            invert the ODE under the source (Su et al. 2023, arXiv 2203.08382), solve back under the target
    CycleDiffusion  record the noise of a path under the source (Wu & De la Torre 2023, arXiv 2210.05559), replay it
    DiffEdit        DDIB or CycleDiffusion within a mask found from the two prompts (Couairon et al. 2023,
                    arXiv 2210.11427); the second is the paper's SDE counterpart
    reconstruction  DDIB or CycleDiffusion with one prompt: what the procedure loses by itself
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from sd_port.checks import check_mask, check_picture, latent_mask
from sd_port.edit_configs import Kind, TranslateConfig
from sd_port.edits.canvas import check_text_model, decode, encode, guided, times_at_once
from sd_port.images import EditResult
from sd_port.models.layers import Image
from sd_port.pipeline import StableDiffusion
from theory.editing import Latent, edit
from theory.types import NoiseFn, PRNGKey, Schedule, Solver, Times

ROUNDING = 1e-5  # what two evaluations of a network on the same input may differ by: noise predictions are of size 1

LATENTS: dict[Kind, Latent] = {"sdedit-ode": "noise", "sdedit": "noise", "ddib": "invert", "cycle": "cycle"}


def translate(
    pipe: StableDiffusion,
    images: np.ndarray,
    source_prompts: Sequence[str],
    target_prompts: Sequence[str],
    config: TranslateConfig,
    *,
    key: PRNGKey,
    masks: np.ndarray | None = None,
    batch_size: int = 4,
) -> list[EditResult]:
    """Pictures (batch, height, width, 3) in [0, 1] that showed the source prompts show the target prompts.

    SDEdit does not read the source prompts. Where a mask, (batch, height, width), is 0, latents return to those of
    the picture exactly. `batch_size` as in `sd_port.edits.drag.drag_many`.

    Raises ValueError for pictures or masks that cannot be used and for a model for inpainting, and FloatingPointError
    where the result is not finite.
    """
    check_text_model(pipe, config.kind)
    images = np.stack([check_picture(image) for image in images])
    size, factor, n = images.shape[1:3], pipe.vae.config.factor, len(images)
    if not len(source_prompts) == len(target_prompts) == n:
        raise ValueError(f"{n} pictures need as many prompts, got {len(source_prompts)} and {len(target_prompts)}")
    mask = None
    if masks is not None:
        if len(masks) != n:
            raise ValueError(f"{n} pictures need as many masks, got {len(masks)}")
        mask = jnp.asarray(np.stack([latent_mask(check_mask(one, size), factor) for one in masks]))
    source_eps = guided(pipe, source_prompts, config.source_guidance, config.lora_scale)
    target_eps = guided(pipe, target_prompts, config.guidance, config.lora_scale)
    ts, solver = config.grid(pipe.schedule), config.solver(pipe.schedule)
    x0 = encode(pipe, images)
    at_once = times_at_once(batch_size, n)
    x = _edit(solver, source_eps, target_eps, x0, ts, key, mask, latent=LATENTS[config.kind], batch_size=at_once)
    return [
        EditResult(
            picture,
            np.asarray(latents),
            [],
            {"edit": config.kind, "source_prompt": before, "prompt": after, "config": dataclasses.asdict(config)},
        )
        for picture, latents, before, after in zip(
            decode(pipe, x, size), x, source_prompts, target_prompts, strict=True
        )
    ]


def reconstruct(
    pipe: StableDiffusion,
    images: np.ndarray,
    prompts: Sequence[str],
    config: TranslateConfig,
    *,
    key: PRNGKey,
    batch_size: int = 4,
) -> list[EditResult]:
    """The pictures after the way up and the way back under one prompt, both with `config.guidance`.

    Cycle-SDE gives the latents back to rounding, whatever the guidance and the number of steps; the ODE does not.
    """
    config = dataclasses.replace(config, source_guidance=config.guidance)
    return translate(pipe, images, prompts, prompts, config, key=key, batch_size=batch_size)


class Differences(NamedTuple):
    """Where two prompts want different things of a picture, and the mask made of it."""

    heat: Float[np.ndarray, "batch _ _"]  # on latents: 1 is as different as counts
    mask: Float[np.ndarray, "batch _ _"]  # on pixels: 1 where the edit may change things


def difference_mask(
    pipe: StableDiffusion,
    images: np.ndarray,
    source_prompts: Sequence[str],
    target_prompts: Sequence[str],
    *,
    key: PRNGKey,
    t: float = 0.5,
    draws: int = 10,
    threshold: float = 0.5,
    clip: float = 3.0,
    lora_scale: float = 1.0,
) -> Differences:
    """DiffEdit's mask (its Sec. 3.2): where the noise predictions of the two prompts differ at time t.

    The absolute difference is averaged over draws of the noise and over channels, clipped at `clip` times its mean,
    as in diffusers, divided by that, and cut at the threshold. Guidance would multiply it, and so change nothing.

    Raises ValueError for two prompts that are the same and for a model for inpainting.
    """
    check_text_model(pipe, "diffedit")
    images = np.stack([check_picture(image) for image in images])
    x0 = encode(pipe, images)
    predictions = [guided(pipe, prompts, 1.0, lora_scale) for prompts in (source_prompts, target_prompts)]
    heat = np.asarray(_difference(pipe.schedule, *predictions, x0, jnp.float32(t), jr.split(key, draws)))
    if not (heat.mean(axis=(1, 2)) > ROUNDING).all():
        raise ValueError("the source prompt and the target prompt ask for the same: there is nothing to edit")
    heat = np.minimum(heat / (clip * heat.mean(axis=(1, 2), keepdims=True)), 1)
    factor, (height, width) = pipe.vae.config.factor, images.shape[1:3]
    mask = (heat > threshold).repeat(factor, axis=1).repeat(factor, axis=2)[:, :height, :width]
    return Differences(heat, mask.astype(np.float32))


@partial(jax.jit, static_argnames=("latent", "batch_size"))
def _edit(
    solver: Solver,
    source_eps: NoiseFn,
    target_eps: NoiseFn,
    x0: Image,
    ts: Times,
    key: PRNGKey,
    mask: Image | None,
    *,
    latent: Latent,
    batch_size: int,
) -> Image:
    return edit(solver, source_eps, target_eps, x0, ts, key, latent=latent, mask=mask, batch_size=batch_size)


@partial(jax.jit, static_argnums=0)
def _difference(
    schedule: Schedule,
    source_eps: NoiseFn,
    target_eps: NoiseFn,
    x0: Image,
    t: Float[Array, ""],
    keys: Key[Array, " draws"],
) -> Float[Array, "batch _ _"]:
    def once(key: PRNGKey) -> Float[Array, "batch _ _"]:
        x = schedule.alpha(t) * x0 + schedule.sigma(t) * jr.normal(key, x0.shape, x0.dtype)
        return jnp.abs(target_eps(x, t) - source_eps(x, t)).mean(axis=-1)

    return jax.lax.map(once, keys).mean(axis=0)
