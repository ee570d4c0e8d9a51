"""Reads the tensors of a `torch.save` file without torch, and without running what the file says.

Such a file is a zip archive of a pickle and of raw storages. A pickle is a program: here it may build dictionaries,
lists, numbers, strings and tensors; any other name that it asks for is refused before it is looked up.
"""

import collections
import io
import math
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sd_port.weights.checkpoint import LazyTensor

STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_CONVERT = "convert it to .safetensors where you trust it, or take the .safetensors file of the same model"
_SHOWN = 8


class _Dtype(NamedTuple):
    """What stands for torch.FloatStorage and its like."""

    dtype: np.dtype


class _Storage(NamedTuple):
    entry: zipfile.ZipInfo
    dtype: np.dtype
    size: int


def open_pickle(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a `.bin`, `.ckpt`, `.pt` or `.pth` file; those under "state_dict" where there is such an entry.

    Raises ValueError, in one line with the file, for the format before torch 1.6, for a pickle that wants anything
    but tensors, and for damaged files.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path}: not a zip file: damaged, or saved in the format before torch 1.6, which is not read; {_CONVERT}"
        )
    try:
        archive = zipfile.ZipFile(path)
        entries = {name.partition("/")[2]: archive.getinfo(name) for name in archive.namelist()}
        if "data.pkl" not in entries:
            raise ValueError("it holds no data.pkl, so torch.save did not write it")
        if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
            raise ValueError("its tensors are big-endian")
        value = _Tensors(archive, entries).load()
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged or hostile pickle raises nearly anything
        raise ValueError(f"{path}: cannot be read: {_line(error)}; {_CONVERT}") from None
    return as_state_dict(path, value)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def as_state_dict(path: Path, value: Any) -> dict[str, LazyTensor]:
    if isinstance(value, Mapping) and isinstance(value.get("state_dict"), Mapping):
        value = value["state_dict"]
    if not isinstance(value, Mapping):
        raise ValueError(f"{path}: holds a {type(value).__name__}, not a dictionary of tensors")
    others = [f"{key!r} ({type(v).__name__})" for key, v in value.items() if not isinstance(v, LazyTensor)]
    if others or not all(isinstance(key, str) for key in value):
        shown = ", ".join(others[:_SHOWN]) + (f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else "")
        raise ValueError(f"{path}: holds what are no named tensors: {shown}; {_CONVERT}")
    return dict(value)


class _Tensors(pickle.Unpickler):
    """An unpickler that knows the seven names a state dict needs."""

    def __init__(self, archive: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo]):
        super().__init__(io.BytesIO(archive.read(entries["data.pkl"])), encoding="utf-8")
        self.archive, self.entries = archive, entries

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        # Functions made for this pickle alone: what it may do to their attributes ends with it.
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, stride, *_: self._tensor(storage, offset, shape, stride)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_: data
        if module in ("torch", "torch.storage") and name in STORAGES:
            return _Dtype(np.dtype(STORAGES[name]))
        raise pickle.UnpicklingError(f"its pickle asks for {module}.{name}, which is refused and was not run")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, _, size = pid
        if kind != "storage" or not isinstance(storage, _Dtype):
            raise pickle.UnpicklingError(f"its pickle refers to {kind!r}, not to a storage")
        entry = self.entries.get(f"data/{key}")
        if entry is None:
            raise pickle.UnpicklingError(f"the storage data/{key} is missing")
        if size < 0 or entry.file_size < size * storage.dtype.itemsize:
            raise pickle.UnpicklingError(f"the storage data/{key} is shorter than its tensor")
        return _Storage(entry, storage.dtype, size)

    def _tensor(self, storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> LazyTensor:
        # as_strided believes what it is told: a hostile stride would read other memory.
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if min((offset, *shape, *stride)) < 0 or (math.prod(shape) and last >= storage.size):
            raise pickle.UnpicklingError(f"a tensor of shape {tuple(shape)} reaches outside of its storage")

        def load() -> np.ndarray:
            try:
                raw = self.archive.read(storage.entry)  # checks the checksum
            except (zipfile.BadZipFile, EOFError) as error:
                raise ValueError(f"{self.archive.filename}: damaged: {_line(error)}; download it again") from None
            flat = np.frombuffer(raw, storage.dtype, storage.size)[offset:]
            if not math.prod(shape):
                return np.zeros(shape, storage.dtype)
            strides = tuple(step * storage.dtype.itemsize for step in stride)
            return np.lib.stride_tricks.as_strided(flat, shape, strides, writeable=False)

        return LazyTensor(tuple(shape), storage.dtype, load)
