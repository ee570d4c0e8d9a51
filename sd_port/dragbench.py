"""The drag benchmarks on disk: the SDE-Drag set, the DragDiffusion set, and the repack of both with regions.

    SDE-Drag        <item>/{origin_image.png, mask.png, prompt.json}
    DragDiffusion   <category>/<item>/{original_image.png, meta_data.pkl}
    repack          [<category>/]<item>/{original_image.png, meta_data.pkl, meta_data_region.pkl}

meta_data.pkl is a pickle from the net: it may build dictionaries, lists, text, numbers and arrays of numbers, the last
from stand-ins for what numpy's pickles ask for; any other name is refused before it is looked up.
"""

import io
import pickle
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from msgspec import Meta, Struct

from sd_port.images import read_mask
from sd_port.weights.unpickling import checked, said
from theory.reading import read_json

LARGEST_PICKLE = 2**28  # bytes: a mask of 8k x 8k pixels in float32
FURTHEST = 2**31  # pixels from the corner, which no picture has

Coordinate = Annotated[float, Meta(gt=-FURTHEST, lt=FURTHEST)]
Point = Annotated[list[Coordinate], Meta(min_length=2, max_length=2)]
Points = Annotated[list[Point], Meta(max_length=10_000)]
Prompt = Annotated[str, Meta(max_length=100_000)]


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


def read_set(folder: str | Path, *, regions: bool = False, broken: dict[Path, str] | None = None) -> list[Item]:
    """All items under a folder of one of the three layouts, by name. regions: the repack's dense pairs of points.

    Raises ValueError, in one line that names the file, for a folder without any item, and for an item that cannot be
    read; where `broken` is given that is said there, by the item's folder, and the item is left out.
    """
    folder = Path(folder)
    pickled = "meta_data_region.pkl" if regions else "meta_data.pkl"
    pattern = pickled if regions else "prompt.json"
    found = {path.parent for name in {pattern, pickled} for path in folder.rglob(name)}
    if not found:
        wanted = " or ".join(sorted({pattern, pickled}, reverse=True))
        raise ValueError(f"{folder}: holds no item: no {wanted} in any folder below it")
    items = []
    for path in sorted(found):
        try:
            items.append(_item(folder, path, pickled))
        except ValueError as error:
            if broken is None:
                raise
            broken[path] = str(error)
    return items


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


class Asked(Struct):
    """What a prompt.json may say."""

    source: Points = []
    target: Points = []
    prompt: Prompt = ""
    source_prompt: Prompt = ""

    @property
    def request(self) -> Request:
        return Request(_points(self.source), _points(self.target), self.prompt, self.source_prompt)


def read_request(path: str | Path) -> Request:
    """A prompt.json, or any JSON object with some of its keys.

    Raises FileNotFoundError, and ValueError with the file and the place in it for another.
    """
    return read_json(path, Asked).request


def _points(raw: Iterable[Any]) -> list[list[int]]:
    """Pairs of numbers, to the nearest pixels. Raises ValueError, TypeError or OverflowError for anything else."""
    points = [[round(float(x)), round(float(y))] for x, y in raw]
    if any(abs(number) >= FURTHEST for point in points for number in point):
        raise OverflowError("a point is outside of any picture")
    return points


def _pickled_item(name: str, folder: Path, path: Path) -> Item:
    try:
        if path.stat().st_size > LARGEST_PICKLE:
            raise ValueError(f"it has more than {LARGEST_PICKLE} bytes, and points and a mask need fewer")
        raw = _Plain(io.BytesIO(checked(path.read_bytes()))).load()
        points = np.array(_points(raw["points"]), int).reshape(-1, 2)
        prompt, mask = raw.get("prompt", ""), raw.get("mask")
        if not isinstance(prompt, str) or not isinstance(mask, _Array | None):
            raise ValueError("its prompt must be a text, its mask an array")
        mask = None if mask is None else (mask.numbers > 0).astype(np.float32)
        if mask is not None and mask.ndim != 2:
            raise ValueError(f"the mask has the shape {mask.shape}")
    except OSError:
        raise
    except Exception as error:  # a damaged or hostile pickle raises nearly anything
        raise ValueError(f"{path}: cannot be read ({said(error)})") from None
    source, target = points[0::2], points[1::2]  # handle, target, handle, target, ...
    _check_pairs(path, source, target)
    if mask is not None and not mask.any():  # none was drawn
        mask = None
    return Item(name, _there(folder, "original_image.png"), mask, source, target, prompt)


class _Dtype:
    """Stands for numpy.dtype: kind, size and byte order of numbers. What else a pickle says of it is not read."""

    def __init__(self, code: str):
        if not re.fullmatch("[biuf][1248]", code):
            raise pickle.UnpicklingError(f"it holds an array of {code!r}, which are not numbers (objects, or text)")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for numpy.ndarray, whose own constructor and state may hold pointers."""

    def __init__(self, numbers: np.ndarray | None = None):
        self.numbers = np.zeros(0) if numbers is None else numbers

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Dtype, bool, bytes]) -> None:
        _, shape, dtype, fortran, raw = state
        self.numbers = _array(dtype, raw, shape, "F" if fortran else "C")

    def __iter__(self) -> Iterator[Any]:
        return iter(self.numbers)


def _array(dtype: Any, raw: Any, shape: tuple[int, ...], order: Literal["C", "F"] = "C") -> np.ndarray:
    """The numbers in these bytes; numpy checks that they are as many as the shape says."""
    if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes | bytearray):
        raise pickle.UnpicklingError("it holds an array that is not made of numbers")
    return np.frombuffer(bytes(raw), dtype.dtype).reshape(shape, order=order)


def _latin1(text: str, encoding: str) -> bytes:
    """Bytes, as protocol 2 writes them."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding}")
    return text.encode("latin1")


class _Plain(pickle.Unpickler):
    """Loads arrays of numbers, and what needs no import at all."""

    def find_class(self, module: str, name: str) -> Any:
        # What numpy's pickles ask for, in any protocol. Functions made for this pickle alone: what it may do to their
        # attributes ends with it.
        known = {
            ("numpy", "ndarray"): "ndarray",
            ("numpy", "dtype"): lambda code, *_: _Dtype(code),
            ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(),
            ("numpy._core.multiarray", "scalar"): lambda dtype, raw: _array(dtype, raw, (1,)).item(),
            ("numpy._core.numeric", "_frombuffer"): lambda raw, dtype, shape, order, *_: _Array(
                _array(dtype, raw, shape, order)
            ),
            ("_codecs", "encode"): lambda text, encoding: _latin1(text, encoding),
        }
        module = module.replace("numpy.core", "numpy._core")  # as numpy 1 called it
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which points, masks and prompts do not need")
        return known[module, name]


def _there(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise ValueError(f"{folder / name} is missing")
    return folder / name


def _check_pairs(path: Path, source: np.ndarray, target: np.ndarray) -> None:
    if len(source) != len(target) or len(source) == 0:
        raise ValueError(f"{path}: has {len(source)} source and {len(target)} target points; they come in pairs")
