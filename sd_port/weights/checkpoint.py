"""Opens a weights file without reading its tensors: names, shapes and dtypes now, values when asked.

`.safetensors` (https://github.com/huggingface/safetensors, "Format"), the index of a sharded checkpoint, and torch's
zip files (pickles.py). Tensors are read at their offset, not mapped: a mapped file counts as resident memory until it
is closed, so that a model would be there twice while it is loaded.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

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
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_LFS_POINTER = b"version https://git-lfs"


class LazyTensor(NamedTuple):
    """A tensor in a file, in torch's layout: `load()` reads it, every time it is called."""

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]


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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError, or ValueError with the file and the place in it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:  # also what is not UTF-8
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object is expected, not {type(value).__name__}")
    return value


def _open_safetensors(path: Path) -> dict[str, LazyTensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        # 100 MB is the format's own limit. A pickle or a web page gives an absurd length here.
        if size < 8 or length > 100_000_000:
            raise ValueError(f"{path}: not a safetensors file (or a damaged one); download it again")
        raw = file.read(length)
    if len(raw) < length:
        raise ValueError(f"{path}: truncated inside its header; download it again")
    try:
        header = json.loads(raw)
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        tensors = {name: _entry(path, 8 + length, entry) for name, entry in entries}
        end = 8 + length + max((entry["data_offsets"][1] for _, entry in entries), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{path}: not a safetensors file, its header is damaged ({error}); download it again"
        ) from None
    if end != size:
        what = "truncated" if end > size else "longer than its header says"
        raise ValueError(f"{path}: {what}: {size} bytes where {end} are expected; download it again")
    return tensors


def _entry(path: Path, base: int, entry: Mapping[str, Any]) -> LazyTensor:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"dtype {entry['dtype']!r} is not known")
    dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if any(n < 0 for n in shape) or begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"offsets {begin}, {end} do not hold {entry['dtype']} of shape {shape}")
    return LazyTensor(shape, dtype, lambda: read_at(path, base + begin, shape, dtype))


def _open_sharded(path: Path) -> dict[str, LazyTensor]:
    shard_of = read_json(path).get("weight_map")
    if not (isinstance(shard_of, dict) and shard_of and all(isinstance(s, str) for s in shard_of.values())):
        raise ValueError(f"{path}: no weight_map of tensors to files; it is not the index of a sharded checkpoint")
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


def shard_paths(index: Path, names: Iterable[str]) -> list[Path]:
    """The files of a sharded checkpoint, which lie beside its index. Raises ValueError for names that lead away."""
    names = sorted(set(names))
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{index}: names a file outside of its folder: {outside[0]}")
    return [index.parent / name for name in names]
