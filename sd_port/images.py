"""Images in and out: float32 in [0, 1], (height, width, 3), beside the files that people look at."""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from theory.files import Write, write_whole

ORIENTATION, LYING = 0x0112, range(5, 9)  # the EXIF tag, and what it is where the picture lies on its side
RECORD = "blessing"  # the text chunk of a PNG that says how it was made

Picture = Float[np.ndarray, "_ _ 3"]


class EditResult(NamedTuple):
    """An edited picture, float32 in [0, 1] and as large as the one that came in, and how it came about."""

    image: Picture
    latents: Float[np.ndarray, "_ _ _"]
    frames: list[Picture]  # after every operation of a drag, if they were asked for
    record: dict[str, Any]  # points, prompts and settings, as JSON; neither the picture that came in nor the key


def read_image(path: str | Path) -> np.ndarray:
    """(height, width, 3) float32 in [0, 1]; a camera's rotation is applied, transparency is put on white.

    Warns where something is lost: transparency, and grey finer than 8 bits (of finer colours Pillow tells nothing).
    Raises ValueError, in one line that names the file, if it cannot be read.
    """
    with _opened(path) as file:
        image = _known(path, ImageOps.exif_transpose(file))
        if image.mode.startswith("I;16"):
            warnings.warn(f"{path}: read with 8 of its 16 bits", stacklevel=2)
            image = _8_bits(image)
        flat = _flat(image, "white")
        if flat is not image:
            warnings.warn(f"{path}: what is transparent becomes white", stacklevel=2)
        return np.asarray(flat.convert("RGB"), np.float32) / 255


def read_mask(path: str | Path) -> np.ndarray:
    """(height, width), 1 where it is white; what is transparent is black.

    Raises ValueError, naming the file, if it cannot be read.
    """
    return (read_grey(path) > 127).astype(np.float32)


def read_grey(path: str | Path) -> np.ndarray:
    """(height, width), 0 to 255; what is transparent is black. Raises ValueError, naming the file."""
    with _opened(path) as file:
        image = _known(path, ImageOps.exif_transpose(file))
        if image.mode.startswith("I;16"):
            image = _8_bits(image)
        return np.asarray(_flat(image, "black").convert("L"))


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) as `read_image` returns it, from the file's header alone."""
    with _opened(path) as file:
        width, height = file.size
        return (width, height) if file.getexif().get(ORIENTATION) in LYING else (height, width)


def _known(path: str | Path, image: Image.Image) -> Image.Image:
    """The image. Raises ValueError for one of which nobody can say what is white."""
    if image.mode in ("F", "I"):
        raise ValueError(f"{path}: holds numbers of no known range; save it with 8 or 16 bits a channel")
    return image


def _8_bits(image: Image.Image) -> Image.Image:
    return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))


def _flat(image: Image.Image, ground: str) -> Image.Image:
    """The image on a ground of this colour; the image itself where nothing of it is transparent."""
    if not image.has_transparency_data:
        return image
    layer = image.convert("RGBA")
    if layer.getchannel("A").getextrema()[0] == 255:
        return image
    return Image.alpha_composite(Image.new("RGBA", layer.size, ground), layer)


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as file:
            yield file
    except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as an image ({getattr(error, 'strerror', None) or error})") from None


def to_pil(image: ArrayLike) -> Image.Image:
    """The nearest 8-bit image; values outside [0, 1] are clipped."""
    return Image.fromarray(np.round(np.clip(np.asarray(image, np.float32), 0, 1) * 255).astype(np.uint8))


def write_png(path: str | Path, image: ArrayLike, record: Mapping[str, Any]) -> None:
    """Writes the image as `as_png` does. The file appears whole or not at all."""
    write_whole(path, as_png(image, record))


def as_png(image: ArrayLike, record: Mapping[str, Any]) -> Write:
    """What writes the image to a binary file, with what is needed to make it again, as JSON."""
    info = PngInfo()
    info.add_itxt(RECORD, json.dumps(record, ensure_ascii=False))
    return lambda file: to_pil(image).save(file, format="PNG", pnginfo=info)


def read_record(path: str | Path) -> dict[str, Any]:
    """The record of a PNG that write_png made. Raises ValueError if it has none."""
    try:
        with Image.open(path) as file:
            return json.loads(file.info[RECORD])
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: not an image with a record of how it was made ({error})") from None
