"""Images in and out: float32 in [0, 1], (height, width, 3), beside the files that people look at."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import ArrayLike
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

RECORD = "blessing"  # the text chunk of a PNG that says how it was made


def read_image(path: str | Path) -> np.ndarray:
    """(height, width, 3) float32 in [0, 1]; transparency is put on white, a camera's rotation is applied.

    Raises ValueError, in one line that names the file, if it cannot be read.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGBA")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as an image ({error})") from None
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image).convert("RGB"), np.float32) / 255


def to_pil(image: ArrayLike) -> Image.Image:
    """The nearest 8-bit image; values outside [0, 1] are clipped."""
    return Image.fromarray(np.round(np.clip(np.asarray(image, np.float32), 0, 1) * 255).astype(np.uint8))


def write_png(path: str | Path, image: ArrayLike, record: Mapping[str, Any]) -> None:
    """Writes the image with what is needed to make it again, as JSON. The file appears whole or not at all."""
    path = Path(path)
    info = PngInfo()
    info.add_itxt(RECORD, json.dumps(record, ensure_ascii=False))
    handle, temporary = tempfile.mkstemp(dir=path.resolve().parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            to_pil(image).save(file, format="PNG", pnginfo=info)
        os.chmod(temporary, 0o644)  # mkstemp's file is for its owner only
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_record(path: str | Path) -> dict[str, Any]:
    """The record of a PNG that write_png made. Raises ValueError if it has none."""
    try:
        with Image.open(path) as file:
            return json.loads(file.info[RECORD])
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: not an image with a record of how it was made ({error})") from None
