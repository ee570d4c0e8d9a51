"""Inpainting: what is under the mask is made anew, the rest is held.

With any model the latents outside the mask follow the picture's own noised path (RePaint's constraint, arXiv
2201.09865); a UNet with nine channels sees mask and masked picture besides, as Stable Diffusion's inpainting model
does. Either by ODE or SDE, of order 1 or 2, as in Table 1 of the paper.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from sd_port.checks import check_mask, check_picture, latent_mask
from sd_port.edit_configs import InpaintConfig
from sd_port.edits.canvas import decode, encode, guided, solver_of
from sd_port.images import EditResult
from sd_port.models.layers import Image
from sd_port.pipeline import StableDiffusion
from theory.processes import forward_path
from theory.solve import Constraint, sample
from theory.types import NoiseFn, Path, PRNGKey, Solver, Times


def inpaint(
    pipe: StableDiffusion,
    images: np.ndarray,
    masks: np.ndarray,
    prompts: Sequence[str],
    config: InpaintConfig,
    *,
    key: PRNGKey,
) -> list[EditResult]:
    """Pictures (batch, height, width, 3) in [0, 1], filled in where their masks, (batch, height, width), are 1.

    Pixels outside the masks are those that came in.

    Raises ValueError for pictures or masks that cannot be used, and FloatingPointError where the result is not finite.
    """
    images = np.stack([check_picture(image) for image in images])
    size, factor = images.shape[1:3], pipe.vae.config.factor
    masks = np.stack([check_mask(mask, size) for mask in masks])
    if not len(masks) == len(prompts) == len(images):
        raise ValueError(f"{len(images)} pictures need as many masks and prompts, got {len(masks)} and {len(prompts)}")
    # A cell that is masked in part is made anew whole: its pixels outside the mask are put back below.
    small = jnp.asarray(np.stack([latent_mask(mask, factor, share=0.0) for mask in masks]))
    x0 = encode(pipe, images)
    condition = None
    if pipe.unet.config.in_channels > pipe.vae.config.latent_channels:
        hidden = encode(pipe, np.where(masks[..., None] > 0, np.float32(0.5), images))  # grey where it is to be filled
        condition = jnp.concatenate([small, hidden], axis=-1)
    eps_fn = guided(pipe, prompts, config.guidance, config.lora_scale, condition)
    ts = pipe.scheduler.grid(config.steps).astype(jnp.float32)
    x = _fill(solver_of(pipe.schedule, config.method, config.order), eps_fn, x0, ts, key, small, condition is None)
    filled = decode(pipe, x, size)
    filled = np.where(masks[..., None] > 0, filled, images)
    return [
        EditResult(picture, np.asarray(latents), [], {"edit": "inpaint", "prompt": text} | {"config": settings})
        for picture, latents, text, settings in zip(
            filled, x, prompts, [dataclasses.asdict(config)] * len(prompts), strict=True
        )
    ]


def _fill(solver: Solver, eps_fn: NoiseFn, x0: Image, ts: Times, key: PRNGKey, mask: Image, held: bool) -> Image:
    path_key, start_key, solver_key = jr.split(key, 3)
    x, constraint = jr.normal(start_key, x0.shape, x0.dtype), None
    if held:
        path = _path(solver, x0, ts, path_key)
        constraint = Constraint(mask, path)
        x = constraint.apply(x, path[0])
    return sample(solver, eps_fn, x, ts, solver_key, constraint)


@jax.jit
def _path(solver: Solver, x0: Image, ts: Times, key: PRNGKey) -> Path:
    return forward_path(solver.schedule, x0, ts, key)
