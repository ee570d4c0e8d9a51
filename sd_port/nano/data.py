"""Captioned pictures to train on: drawn scenes, or a user's folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import jax.random as jr
import numpy as np
from jaxtyping import UInt8
from msgspec import Meta, Struct
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import track

from sd_port.images import read_picture
from sd_port.nano import scenes
from sd_port.nano.captions import captions
from theory.reading import from_json, read_bytes
from theory.types import PRNGKey

CHUNK = 512  # scenes drawn at once
LISTING = 2**30  # bytes of a metadata.jsonl, some million captions


class Pictures(NamedTuple):
    """Images of one size, and one or more captions of each."""

    images: UInt8[np.ndarray, "images size size 3"]
    captions: list[Sequence[str]]


class _Line(Struct):
    """A picture in metadata.jsonl."""

    file_name: str
    text: str | Annotated[list[str], Meta(min_length=1)]


def drawn(key: PRNGKey, count: int, size: int, each: int = 4) -> Pictures:
    """`count` scenes with `each` captions; chunk i is drawn with fold_in(key, i)."""
    images, texts = np.empty((count, size, size, 3), np.uint8), []
    for start in track(range(0, count, CHUNK), description="Drawing", console=Console(stderr=True)):
        draw_key, caption_key = jr.split(jr.fold_in(key, start // CHUNK))
        drawing = scenes.draw(draw_key, CHUNK)
        here = slice(start, min(start + CHUNK, count))
        images[here] = np.round(np.asarray(scenes.rendered(drawing, size)) * 255)[: here.stop - start]
        columns = [captions(drawing, one) for one in jr.split(caption_key, each)]
        texts += [[caption.text for caption in row] for row in zip(*columns, strict=True)][: here.stop - start]
    return Pictures(images, texts)


def from_folder(folder: str | Path, size: int) -> Pictures:
    """The pictures that metadata.jsonl names: {"file_name": ..., "text": ...} on every line, text or a list of texts.

    This is the Hub's layout for image datasets. Pictures are cropped to a square at their middle and resized.
    Raises ValueError, naming the file and the line, for what cannot be read.
    """
    folder = Path(folder)
    listing = folder / "metadata.jsonl"
    if not listing.is_file():
        raise ValueError(f'{listing} is missing: one line for each picture, {{"file_name": "a.png", "text": "a boat"}}')
    images, texts = [], []
    for number, line in enumerate(read_bytes(listing, LISTING).split(b"\n"), start=1):
        if not line.strip():
            continue
        entry: _Line = from_json(line, _Line, f"{listing}, line {number}")
        name, said = entry.file_name, [entry.text] if isinstance(entry.text, str) else entry.text
        try:
            picture = read_picture(folder / name)
        except ValueError as error:
            raise ValueError(f"{listing}, line {number}: {error}") from None
        images.append(np.asarray(ImageOps.fit(picture, (size, size), Image.Resampling.BOX)))
        texts.append(said)
    if not images:
        raise ValueError(f"{listing} names no pictures")
    return Pictures(np.stack(images), texts)
