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
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import TiffImageFile

from theory.files import Write, write_whole
from theory.reading import Json, from_json

# A workflow or a colour profile of megabytes is no bomb: one of them may have what Pillow allows to all together.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

# The only ones that are opened: Pillow reads some others with outside programs, such as EPS.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM")
ORIENTATION, LYING = 0x0112, range(5, 9)  # the EXIF tag, and what it is where the picture lies on its side
SIDES = (0x0100, 0x0101)  # the tags of a TIFF's width and height
RECORD = "blessing"  # the text chunk of a PNG that says how it was made

Picture = Float[np.ndarray, "_ _ 3"]


class EditResult(NamedTuple):
    """An edited picture, float32 in [0, 1] and as large as the one that came in, and how it came about."""

    image: Picture
    latents: Float[np.ndarray, "_ _ _"]
    frames: list[Picture]  # after every operation of a drag, if they were asked for
    record: dict[str, Any]  # points, prompts and settings, as JSON; neither the picture that came in nor the key


def read_image(path: str | Path) -> np.ndarray:
    """`read_picture` as (height, width, 3) float32 in [0, 1]."""
    return np.asarray(read_picture(path), np.float32) / 255


def read_picture(path: str | Path) -> Image.Image:
    """The picture in 8-bit RGB; a camera's rotation is applied, transparency is put on white.

    Warns where something is lost: transparency, and grey finer than 8 bits (of finer colours Pillow tells nothing).
    Raises ValueError, in one line that names the file, if it cannot be read.
    """
    with _opened(path) as file:
        image = _8_bits(ImageOps.exif_transpose(file))
        flat = _flat(image, "white").convert("RGB")
        transparent, deep = _is_transparent(image), file.mode.startswith("I;16")
    if deep:
        warnings.warn(f"{path}: read with 8 of its 16 bits", stacklevel=2)
    if transparent:
        warnings.warn(f"{path}: what is transparent becomes white", stacklevel=2)
    return flat


def read_mask(path: str | Path) -> np.ndarray:
    """(height, width), 1 where it is white; what is transparent is black.

    Raises ValueError, naming the file, if it cannot be read.
    """
    return (read_grey(path) > 127).astype(np.float32)


def read_grey(path: str | Path) -> np.ndarray:
    """(height, width), 0 to 255; what is transparent is black. Raises ValueError, naming the file."""
    with _opened(path) as file:
        return np.asarray(_flat(_8_bits(ImageOps.exif_transpose(file)), "black").convert("L"))


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) as `read_image` returns it, from the file's header alone."""
    with _opened(path) as file:
        # Of a TIFF that lies on its side Pillow turns the size at once, since 11, and the tags say what it was.
        width, height = (file.tag_v2[tag] for tag in SIDES) if isinstance(file, TiffImageFile) else file.size
        return (width, height) if file.getexif().get(ORIENTATION) in LYING else (height, width)


def _8_bits(image: Image.Image) -> Image.Image:
    """The image; of 16 bits the upper 8, and what was transparent of them. Raises ValueError for unknown ranges."""
    if image.mode in ("F", "I"):  # nobody can say what is white
        raise ValueError("it holds numbers of no known range; save it with 8 or 16 bits a channel")
    if not image.mode.startswith("I;16"):
        return image
    numbers = np.asarray(image).astype(np.uint16)
    upper, clear = Image.fromarray((numbers >> 8).astype(np.uint8)), image.info.get("transparency")
    if clear is not None:
        upper.putalpha(Image.fromarray(np.where(numbers == clear, 0, 255).astype(np.uint8)))
    return upper


def _is_transparent(image: Image.Image) -> bool:
    """Whether some of it is."""
    return image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] != 255


def _flat(image: Image.Image, ground: str) -> Image.Image:
    """The image on a ground of this colour; the image itself where nothing of it is transparent."""
    if not _is_transparent(image):
        return image
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, ground), layer)


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """The file, of one of the FORMATS. Raises ValueError that names it for whatever goes wrong while it is open."""
    try:
        if not Path(path).is_file():
            raise ValueError("there is no such file" if not Path(path).exists() else "it is not a file")
        Image.init()
        with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as file:
            yield file
    except UnidentifiedImageError:
        raise ValueError(f"{path}: cannot be read as an image (it is none of {', '.join(FORMATS)})") from None
    except Exception as error:  # a damaged or hostile file raises nearly anything
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: cannot be read as an image ({reason})") from None


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
    with _opened(path) as file:
        text = str(file.info.get(RECORD, ""))
    try:
        return from_json(text.encode(), Json, "its record")
    except ValueError as error:
        raise ValueError(f"{path}: not an image with a record of how it was made ({error})") from None
