"""What an edit asks of its picture, points and mask; checked by commands before JAX is loaded."""

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from PIL import Image

from sd_port.images import Picture

Mask = Float[np.ndarray, "_ _"]
Points = Int[np.ndarray, "_ 2"]

LARGEST = 256 * 256  # cells of a latent: attention over more needs tens of gigabytes
STRONGEST = 1000  # guidance, or scale of a LoRA: people use up to 30
SEEDS = 2**32  # from 0: of a larger seed JAX's keys take the last 32 bits, and of two such seeds one is the other


def check_seed(seed: int, name: str = "--seed", seeds: int = SEEDS) -> int:
    """The seed. Raises ValueError, naming it, for one that shares its key with another: of 0 ... seeds - 1 none do."""
    if not 0 <= seed < seeds:
        raise ValueError(f"{name} {seed}: must lie in 0 ... {seeds - 1}, or it would be another seed's double")
    return seed


def check_scale(name: str, *values: float) -> None:
    """Raises ValueError, naming the setting, for a guidance or a LoRA's scale that is not finite, or beyond all use."""
    for value in values:
        if not abs(value) <= STRONGEST:
            raise ValueError(f"{name} = {value} cannot be: it must lie between -{STRONGEST} and {STRONGEST}")


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


def check_size(size: tuple[int, int], factor: int) -> None:
    """Raises ValueError for a (height, width) of more than `LARGEST` cells."""
    height, width = size
    if -(-height // factor) * -(-width // factor) > LARGEST:
        raise ValueError(
            f"the picture is {width} x {height} pixels, which is too large to edit at once; "
            f"make it smaller: {round(LARGEST**0.5) * factor} x {round(LARGEST**0.5) * factor} is the largest square"
        )


def latent_mask(mask: Mask, factor: int, share: float = 0.5) -> Float[np.ndarray, "_ _ 1"]:
    """The mask on latents: 1 where more than this share of the pixels of a cell may change.

    Raises ValueError where that is nowhere: the edit could change nothing.
    """
    height, width = (-(-side // factor) for side in mask.shape)
    filled = np.pad(mask, ((0, -mask.shape[0] % factor), (0, -mask.shape[1] % factor)), mode="edge")
    small = Image.fromarray(filled).resize((width, height), Image.Resampling.BOX)
    cells = (np.asarray(small) > share).astype(np.float32)[..., None]
    if not cells.any():
        raise ValueError(f"the mask is too thin: of no cell of {factor} x {factor} pixels may more than half change")
    return cells
