"""Opens a weights file without reading its tensors: names, shapes and dtypes now, values when asked.

`.safetensors` (https://github.com/huggingface/safetensors, "Format"), the index of a sharded checkpoint, and torch's
zip files (pickles.py). Tensors are read at their offset, not mapped: a mapped file counts as resident memory until it
is closed, so that a model would be there twice while it is loaded.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import ml_dtypes
import numpy as np
from msgspec import Meta, Struct
from safetensors import SafetensorError, safe_open

from theory.reading import converted, from_json, read_json, shown

ALIGNMENT = 64  # bytes; JAX on the CPU takes over a numpy array so aligned instead of copying it

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_HEADER = 2**25  # bytes; that of a whole model has 2**18, and decoded it may take twenty times as much memory
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_LFS_POINTER = b"version https://git-lfs"


class LazyTensor(NamedTuple):
    """A tensor in a file, in torch's layout: `load()` reads it, every time it is called."""

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]


Size = Annotated[int, Meta(ge=0, lt=2**62)]


class _Entry(Struct):
    """A tensor in the header of a safetensors file."""

    dtype: str
    shape: Annotated[list[Size], Meta(max_length=32)]
    data_offsets: Annotated[list[Size], Meta(min_length=2, max_length=2)]


class _Index(Struct):
    """The index of a sharded checkpoint: by the name of a tensor its file."""

    weight_map: Annotated[dict[str, str], Meta(min_length=1)]


def open_weights(path: Path) -> Mapping[str, LazyTensor]:
    """The tensors of a `.safetensors`, `.index.json`, `.bin`, `.ckpt`, `.pt` or `.pth` file, by name.

    Raises ValueError, in one line with the file, for whatever is not such a file or is damaged, and
    FileNotFoundError where there is none.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
    if not start:
        raise ValueError(f"{path}: the file is empty; download it again")
    if start == _LFS_POINTER:
        raise ValueError(f"{path}: a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix == ".json" and ".index." in path.name:
        return _open_sharded(path)
    if path.suffix in _PICKLES:
        from sd_port.weights.pickles import open_pickle  # here, as pickles.py needs this module

        return open_pickle(path)
    raise ValueError(
        f"{path}: unknown kind of weights file {path.suffix!r}; "
        f"give .safetensors, .safetensors.index.json, {', '.join(_PICKLES)}"
    )


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that a .safetensors file has beside its tensors; other files have none. Raises ValueError as above."""
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="np") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: its metadata cannot be read ({' '.join(str(error).split())})") from None


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array, aligned so that JAX need not copy it."""
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + size].view(dtype).reshape(shape)


def read_at(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The array whose bytes stand at `offset` of a file. Raises ValueError where the file ends before."""
    array = empty(shape, dtype)
    target = array.reshape(-1).view(np.uint8).data
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while target and (count := file.readinto(target)):  # one read may return less than asked, above 2 GiB
            target = target[count:]
    if target:
        raise ValueError(f"{path}: truncated: {len(target)} bytes are missing; download it again")
    return array


def _open_safetensors(path: Path) -> dict[str, LazyTensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > 100_000_000:  # the format's own limit; a pickle or a web page gives an absurd length
            raise ValueError(f"{path}: not a safetensors file (or a damaged one); download it again")
        if length > _HEADER:
            raise ValueError(f"{path}: its header has {length} bytes; no model needs more than {_HEADER}")
        raw = file.read(length)
    if len(raw) < length:
        raise ValueError(f"{path}: truncated inside its header; download it again")
    header = from_json(raw, dict[str, Any], f"{path}: its header is damaged (download it again)")
    converted(header.pop("__metadata__", {}), dict[str, str], f"{path}: its __metadata__")
    tensors, ends = {}, [(0, 0)]
    for name, entry in header.items():
        tensors[name], where = _entry(path, 8 + length, f"{path}: the tensor {shown(name)}", entry)
        ends.append(where)
    ends.sort()
    if any(begin != end for (_, end), (begin, _) in pairwise(ends)):
        raise ValueError(f"{path}: its tensors overlap, or leave holes; download it again")
    end = 8 + length + ends[-1][1]
    if end != size:
        what = "truncated" if end > size else "longer than its header says"
        raise ValueError(f"{path}: {what}: {size} bytes where {end} are expected; download it again")
    return tensors


def _entry(path: Path, base: int, name: str, raw: Any) -> tuple[LazyTensor, tuple[int, int]]:
    """A tensor, and where it begins and ends behind the header."""
    entry: _Entry = converted(raw, _Entry, name)
    if entry.dtype not in _DTYPES:
        raise ValueError(f"{name}: dtype {shown(entry.dtype)} is not known, only {', '.join(_DTYPES)}")
    dtype, shape = np.dtype(_DTYPES[entry.dtype]), tuple(entry.shape)
    begin, end = entry.data_offsets
    if end - begin != math.prod(shape) * dtype.itemsize or math.prod(filter(None, shape)) >= 2**59:
        raise ValueError(f"{name}: offsets {begin}, {end} do not hold {entry.dtype} of shape {shape}")
    return LazyTensor(shape, dtype, lambda: read_at(path, base + begin, shape, dtype)), (begin, end)


def _open_sharded(path: Path) -> dict[str, LazyTensor]:
    shard_of = read_index(path)
    shards = shard_paths(path, shard_of.values())
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise ValueError(f"{path}: names files that are not beside it: {', '.join(missing)}; download them")
    tensors = {}
    for shard in shards:
        held = open_weights(shard)
        promised = {name for name, file in shard_of.items() if file == shard.name}
        if promised != held.keys():
            name = min(promised ^ held.keys())
            where = "is not there" if name in promised else "is not in the index"
            raise ValueError(f"{shard}: does not match {path.name}: {name} {where}; download both again")
        tensors |= held
    return tensors


def read_index(path: Path) -> dict[str, str]:
    """By the name of a tensor, its file, from the index of a sharded checkpoint. Raises ValueError, with the index."""
    return read_json(path, _Index).weight_map


def shard_paths(index: Path, names: Iterable[str]) -> list[Path]:
    """The files of a sharded checkpoint, which lie beside its index. Raises ValueError for names that lead away."""
    names = sorted(set(names))
    if outside := [name for name in names if Path(name).name != name or "\0" in name]:
        raise ValueError(f"{index}: names a file outside of its folder: {shown(outside[0])}")
    return [index.parent / name for name in names]
