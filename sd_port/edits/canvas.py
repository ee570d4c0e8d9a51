"""From pictures of any size to latents and back: padding, points, masks, and what an edit returns."""

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np

from sd_port.checks import check_size
from sd_port.models.layers import Image
from sd_port.pipeline import StableDiffusion
from theory.schedules import DiscreteVP
from theory.solvers import DDIM, DPMSolverPP2M
from theory.types import NoiseFn, Solver


def padded(images: np.ndarray, factor: int) -> np.ndarray:
    """(batch, height, width, channels) with the edges repeated up to a multiple of the VAE's factor."""
    _, height, width, _ = images.shape
    return np.pad(images, ((0, 0), (0, -height % factor), (0, -width % factor), (0, 0)), mode="edge")


def encode(pipe: StableDiffusion, images: np.ndarray) -> Image:
    """Latents of (batch, height, width, 3) of any size up to `LARGEST` cells. Raises ValueError for a larger one."""
    check_size(images.shape[1:3], pipe.vae.config.factor)
    return pipe.encode(jnp.asarray(padded(images, pipe.vae.config.factor)))


def check_text_model(pipe: StableDiffusion, what: str) -> None:
    """Raises ValueError for a UNet that sees a mask besides, as only inpainting has one for it."""
    channels = pipe.unet.config.in_channels
    if channels != pipe.vae.config.latent_channels:
        raise ValueError(f"{what}: the UNet takes {channels} channels: a model for inpainting, not for text alone")


def solver_of(schedule: DiscreteVP, method: Literal["sde", "ode"], order: Literal[1, 2]) -> Solver:
    """DDIM(eta) or DPM-Solver++(2M), for the reverse SDE or the probability-flow ODE."""
    level = 1.0 if method == "sde" else 0.0
    return DDIM(schedule, level) if order == 1 else DPMSolverPP2M(schedule, level)


def guided(
    pipe: StableDiffusion,
    prompts: Sequence[str],
    guidance: float,
    lora_scale: float = 1.0,
    condition: Image | None = None,
) -> NoiseFn:
    """The noise prediction under one prompt for every latent; guidance 1 asks the network once, not twice."""
    null = None if guidance == 1 else pipe.embed([""], lora_scale)
    texts = pipe.embed(prompts, lora_scale)
    return pipe.noise_fn(texts, null, guidance, lora_scale, batch=len(prompts), condition=condition)


def times_at_once(batch_size: int, pictures: int) -> int:
    """At how many times of its path Cycle-SDE asks for noise predictions at once: in all of `batch_size` latents.

    What fills a device need not be filled up: on two CPU cores four times of 24 pictures at once take 1.4 times as long
    as one after the other, and four times of one picture three quarters.
    """
    return max(1, batch_size // pictures)


def decode(pipe: StableDiffusion, latents: Image, size: tuple[int, int]) -> np.ndarray:
    """(batch, height, width, 3) of this size, the padding cut off. Raises what `pipe.decode` raises."""
    return np.asarray(pipe.decode(latents))[:, : size[0], : size[1]]
