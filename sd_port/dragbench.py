"""The drag benchmarks on disk: the SDE-Drag set, the DragDiffusion set, and the repack of both with regions.

    SDE-Drag        <item>/{origin_image.png, mask.png, prompt.json}
    DragDiffusion   <category>/<item>/{original_image.png, meta_data.pkl}
    repack          [<category>/]<item>/{original_image.png, meta_data.pkl, meta_data_region.pkl}

meta_data.pkl is a pickle from the net: it may build dictionaries, lists, text, numbers and numpy arrays of numbers,
and any other name that it asks for is refused before it is looked up.
"""

import codecs
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sd_port.images import read_mask


class Request(NamedTuple):
    """What is asked for: points [x, y] in pixels, in pairs, and what the picture shows before and after."""

    source: Sequence[Sequence[int]] = ()
    target: Sequence[Sequence[int]] = ()
    prompt: str = ""
    source_prompt: str = ""


class Item(NamedTuple):
    """One edit: where its picture lies, and what is asked for. Points are [x, y] in pixels, (pairs, 2)."""

    name: str  # the folder, relative to that of the set: "animals/JH_2023"
    image: Path
    mask: np.ndarray | None  # (height, width), 1 where things may change; None: everywhere
    source: np.ndarray
    target: np.ndarray
    prompt: str
    source_prompt: str = ""

    @property
    def request(self) -> Request:
        return Request(self.source.tolist(), self.target.tolist(), self.prompt, self.source_prompt)


def read_set(folder: str | Path, *, regions: bool = False) -> list[Item]:
    """All items under a folder of one of the three layouts, by name. regions: the repack's dense pairs of points.

    Raises ValueError, in one line that names the file, for an item that cannot be read and for a folder without any.
    """
    folder = Path(folder)
    pickled = "meta_data_region.pkl" if regions else "meta_data.pkl"
    pattern = pickled if regions else "prompt.json"
    found = {path.parent for name in {pattern, pickled} for path in folder.rglob(name)}
    if not found:
        raise ValueError(f"{folder}: holds no item: neither prompt.json nor {pickled} in any folder below it")
    return [_item(folder, path, pickled) for path in sorted(found)]


def _item(root: Path, folder: Path, pickled: str) -> Item:
    name = str(folder.relative_to(root))
    if (folder / pickled).is_file():
        return _pickled_item(name, folder, folder / pickled)
    path = folder / "prompt.json"
    request = read_request(path)
    source, target = (np.array(points, int).reshape(-1, 2) for points in (request.source, request.target))
    _check_pairs(path, source, target)
    mask = folder / "mask.png"
    found = read_mask(mask) if mask.is_file() else None
    return Item(name, _there(folder, "origin_image.png"), found, source, target, request.prompt, request.source_prompt)


def read_request(path: str | Path) -> Request:
    """A prompt.json, or any JSON object with some of its keys. Raises ValueError, naming the file, for another."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
        source, target = (_points(raw.get(key, [])) for key in ("source", "target"))
        texts = [raw.get(key, "") for key in ("prompt", "source_prompt")]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("a prompt is a text")
    except (ValueError, TypeError, AttributeError, OverflowError):
        raise ValueError(
            f'{path}: must be JSON like {{"source": [[x, y]], "target": [[x, y]], "prompt": ""}}'
        ) from None
    return Request(source, target, *texts)


def _points(raw: Any) -> list[list[int]]:
    """Pairs of numbers, to the nearest pixels. Raises ValueError or OverflowError for anything else."""
    points = np.array(raw, float).reshape(-1, 2) if len(raw) == 0 else np.array(raw, float)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError("a point is [x, y]")
    return [[round(x), round(y)] for x, y in points.tolist()]


def _pickled_item(name: str, folder: Path, path: Path) -> Item:
    try:
        with path.open("rb") as file:
            raw = _Plain(file).load()
        points = np.array(raw["points"], float).round().astype(int).reshape(-1, 2)
        prompt, mask = str(raw.get("prompt", "")), raw.get("mask")
        mask = None if mask is None else (np.asarray(mask, np.float32) > 0).astype(np.float32)
        if mask is not None and mask.ndim != 2:
            raise ValueError(f"the mask has the shape {mask.shape}")
    except OSError:
        raise
    except Exception as error:  # a damaged or hostile pickle raises nearly anything
        raise ValueError(f"{path}: cannot be read ({' '.join(str(error).split()) or type(error).__name__})") from None
    source, target = points[0::2], points[1::2]  # handle, target, handle, target, ...
    _check_pairs(path, source, target)
    if mask is not None and not mask.any():  # none was drawn
        mask = None
    return Item(name, _there(folder, "original_image.png"), mask, source, target, prompt)


def _dtype(*args: Any) -> np.dtype:
    """Only numbers: an array of objects could hold anything."""
    made = np.dtype(*args)
    if made.hasobject:
        raise pickle.UnpicklingError("it holds an array of objects")
    return made


class _Plain(pickle.Unpickler):
    """Loads arrays of numbers, and what needs no import at all."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core", "numpy._core")  # as numpy 1 called it
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which points, masks and prompts do not need")
        return _ALLOWED[module, name]


# What numpy's own pickles ask for, in any protocol; the functions as this numpy has them.
_ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
    ("numpy._core.multiarray", "_reconstruct"): np.zeros(1).__reduce_ex__(2)[0],
    ("numpy._core.multiarray", "scalar"): np.float64(1).__reduce_ex__(2)[0],
    ("numpy._core.numeric", "_frombuffer"): np.zeros(1).__reduce_ex__(5)[0],
    ("_codecs", "encode"): codecs.encode,  # bytes, in protocol 2
}


def _there(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise ValueError(f"{folder / name} is missing")
    return folder / name


def _check_pairs(path: Path, source: np.ndarray, target: np.ndarray) -> None:
    if len(source) != len(target) or len(source) == 0:
        raise ValueError(f"{path}: has {len(source)} source and {len(target)} target points; they come in pairs")
