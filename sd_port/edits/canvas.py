"""From pictures of any size to latents and back: padding, points, masks, and what an edit returns."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from PIL import Image as PILImage

from sd_port.models.layers import Image
from sd_port.pipeline import StableDiffusion
from theory.schedules import DiscreteVP
from theory.solvers import DDIM, DPMSolverPP2M
from theory.types import NoiseFn, Solver

Picture = Float[np.ndarray, "_ _ 3"]
Mask = Float[np.ndarray, "_ _"]
Points = Int[np.ndarray, "_ 2"]


LARGEST = 256 * 256  # cells of a latent: attention over more needs tens of gigabytes


class EditResult(NamedTuple):
    """An edited picture, float32 in [0, 1] and as large as the one that came in, and how it came about."""

    image: Picture
    latents: Float[np.ndarray, "_ _ _"]
    frames: list[Picture]  # after every operation of a drag, if they were asked for
    record: dict[str, Any]  # points, prompts and settings, as JSON; neither the picture that came in nor the key


def check_picture(image: np.ndarray, name: str = "image") -> Picture:
    """Raises ValueError for what is not (height, width, 3) with numbers in [0, 1]."""
    image = np.asarray(image, np.float32)
    if image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise ValueError(f"{name} must be (height, width, 3), got {image.shape}")
    if not np.isfinite(image).all():
        raise ValueError(f"{name} has values that are not finite")
    if image.min() < 0 or image.max() > 1:
        raise ValueError(f"{name} must lie in [0, 1], got {image.min():.3g} to {image.max():.3g}")
    return image


def check_points(points: ArrayLike, size: tuple[int, int], name: str) -> Points:
    """[x, y] to the nearest pixels. Raises ValueError, naming the first outside a picture of this (height, width)."""
    points = np.asarray(points)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) == 0:
        raise ValueError(f"{name} must be at least one point [x, y], got {points.tolist()}")
    points = np.round(points.astype(float))
    if not np.isfinite(points).all():
        raise ValueError(f"{name} has a point that is not finite: {points.tolist()}")
    height, width = size
    for x, y in points:
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(f"{name} [{x:g}, {y:g}] is outside the picture, which is {width} x {height} pixels")
    return points.astype(int)


def check_mask(mask: np.ndarray | None, size: tuple[int, int]) -> Mask:
    """1 where the picture may change; all of it without a mask. Raises ValueError for another size, and for all 0."""
    if mask is None:
        return np.ones(size, np.float32)
    mask = np.asarray(mask, np.float32)
    if mask.shape != size:
        raise ValueError(
            f"the mask is {mask.shape[::-1]} pixels, and the picture is {size[::-1]}: give one of its size"
        )
    if not np.isfinite(mask).all():
        raise ValueError("the mask has values that are not finite")
    if mask.max() <= 0.5:
        raise ValueError("the mask is black: nothing may change; what may change must be white")
    return (mask > 0.5).astype(np.float32)


def padded(images: np.ndarray, factor: int) -> np.ndarray:
    """(batch, height, width, channels) with the edges repeated up to a multiple of the VAE's factor."""
    _, height, width, _ = images.shape
    return np.pad(images, ((0, 0), (0, -height % factor), (0, -width % factor), (0, 0)), mode="edge")


def encode(pipe: StableDiffusion, images: np.ndarray) -> Image:
    """Latents of (batch, height, width, 3) of any size up to `LARGEST` cells. Raises ValueError for a larger one."""
    check_size(images.shape[1:3], pipe.vae.config.factor)
    return pipe.encode(jnp.asarray(padded(images, pipe.vae.config.factor)))


def check_size(size: tuple[int, int], factor: int) -> None:
    """Raises ValueError for a (height, width) of more than `LARGEST` cells."""
    height, width = size
    if -(-height // factor) * -(-width // factor) > LARGEST:
        raise ValueError(
            f"the picture is {width} x {height} pixels, which is too large to edit at once; "
            f"make it smaller: {round(LARGEST**0.5) * factor} x {round(LARGEST**0.5) * factor} is the largest square"
        )


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
    """(batch, height, width, 3) of this size, the padding cut off. Raises FloatingPointError for what is no picture."""
    images = np.asarray(pipe.decode(latents))
    if not (np.isfinite(images).all() and np.isfinite(latents).all()):
        raise FloatingPointError(
            "the edit ended in numbers that are not finite: lower the guidance, or alpha, or take another dtype"
        )
    return images[:, : size[0], : size[1]]


def latent_mask(mask: Mask, factor: int, share: float = 0.5) -> Float[np.ndarray, "_ _ 1"]:
    """The mask on latents: 1 where more than this share of the pixels of a cell may change.

    Raises ValueError where that is nowhere: the edit could change nothing.
    """
    height, width = (-(-side // factor) for side in mask.shape)
    filled = np.pad(mask, ((0, -mask.shape[0] % factor), (0, -mask.shape[1] % factor)), mode="edge")
    small = PILImage.fromarray(filled).resize((width, height), PILImage.Resampling.BOX)
    cells = (np.asarray(small) > share).astype(np.float32)[..., None]
    if not cells.any():
        raise ValueError(f"the mask is too thin: of no cell of {factor} x {factor} pixels may more than half change")
    return cells
