"""The edits that a command is asked for: what they are made of, and how they are read."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sd_port.dragbench import Request
from sd_port.images import read_image, read_mask
from theory.reading import read_json

PICTURES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")


class Job(NamedTuple):
    """One edit to do, not read yet."""

    name: str  # of the item in its folder; "" for a single picture
    image: Path
    mask: Path | np.ndarray | None
    request: Request
    out: Path

    def made_of(self, **others: Path | None) -> dict[str, str]:
        """The hashes of all that the edit is made of, but for the model; others are files that it shares with its kin.

        Raises ValueError for a file that is not there.
        """
        files = {"image": self.image, "mask": self.mask} | others
        found = {name: _hash_of(path) for name, path in files.items() if isinstance(path, Path)}
        if isinstance(self.mask, np.ndarray):
            found["mask"] = sha256(self.mask.tobytes())
        return found | {"request": sha256(json.dumps(self.request).encode())}


class Ready(NamedTuple):
    """The same with its pictures: (height, width, 3), and (height, width) if there is a mask."""

    image: np.ndarray
    mask: np.ndarray | None
    request: Request


def ready(job: Job) -> Ready:
    """Raises ValueError, naming the file, for a picture that cannot be read."""
    mask = read_mask(job.mask) if isinstance(job.mask, Path) else job.mask
    return Ready(read_image(job.image), mask, job.request)


def mask_of(job: Job) -> str:
    """What its mask is called in messages."""
    return f"--mask {job.mask}" if isinstance(job.mask, Path) else f"the mask of {job.image}"


@contextmanager
def about(what: str | Path) -> Iterator[None]:
    """A ValueError within says what it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def json_or_none(path: Path) -> Any:
    """None where there is no JSON file."""
    try:
        return read_json(path, Any)
    except (OSError, ValueError):
        return None


def _hash_of(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path} is not there")
    about = path.stat()
    return _file_sha256(path, about.st_mtime_ns, about.st_size)


@cache
def _file_sha256(path: Path, mtime_ns: int, size: int) -> str:
    """Of a file as it was at that time: a LoRA that a whole folder shares is read once."""
    return sha256(path.read_bytes())


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
