"""Reads the tensors of a `torch.save` file from before torch 1.6, as torchvision's and LPIPS's still are.

Such a file is a row of pickles (a magic number, a version, facts of the machine, the dictionary, the names of its
storages), then the storages themselves, each after its length. As in pickles.py no name that a pickle asks for is
looked up, but those that a dictionary of tensors needs.
"""

import collections
import math
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from sd_port.weights.checkpoint import LazyTensor, open_weights, read_at
from sd_port.weights.pickles import STORAGES, as_state_dict

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
_LENGTH = 8  # bytes that say how many numbers a storage has


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    size: int


def open_any(path: Path) -> Mapping[str, LazyTensor]:
    """The tensors of a weights file of either age; see `sd_port.weights.checkpoint.open_weights`."""
    path = Path(path)
    old = path.suffix in (".pt", ".pth") and path.is_file() and path.stat().st_size and not zipfile.is_zipfile(path)
    return open_legacy(path) if old else open_weights(path)


def open_legacy(path: Path) -> dict[str, LazyTensor]:
    """The tensors of such a file, by name.

    Raises ValueError, in one line with the file, for a pickle that wants anything but tensors, and for damaged files.
    """
    storages: dict[str, _Storage] = {}
    starts: dict[str, int] = {}
    try:
        with path.open("rb") as file:
            magic, version, machine = (_Tensors(file, path, storages, starts).load() for _ in range(3))
            if (magic, version) != (_MAGIC, _VERSION):
                raise ValueError("torch.save did not write it")
            if machine.get("little_endian") is not True:
                raise ValueError("its tensors are big-endian")
            value = _Tensors(file, path, storages, starts).load()
            names = _Tensors(file, path, storages, starts).load()
            starts |= _starts(file, names, storages)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged or hostile pickle raises nearly anything
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: not a file of tensors, or a damaged one: {said}") from None
    return as_state_dict(path, value)


def _starts(file: BinaryIO, names: Any, storages: Mapping[str, _Storage]) -> dict[str, int]:
    """Where the numbers of every storage begin. Raises ValueError for storages that are missing or cut."""
    if set(names) != storages.keys():
        raise ValueError("its storages are not those of its tensors")
    starts, place = {}, file.tell()
    end = file.seek(0, 2)
    for name in names:
        file.seek(place)
        size, storage = int.from_bytes(file.read(_LENGTH), "little"), storages[name]
        if size != storage.size:
            raise ValueError(f"the storage {name} has {size} numbers where {storage.size} are expected")
        starts[name] = place + _LENGTH
        place += _LENGTH + size * storage.dtype.itemsize
        if place > end:
            raise ValueError(f"truncated: {place - end} bytes are missing")
    return starts


class _Tensors(pickle.Unpickler):
    """One pickle of the row. `starts` is filled later: the tensors come before their numbers."""

    def __init__(self, file: BinaryIO, path: Path, storages: dict[str, _Storage], starts: Mapping[str, int]):
        super().__init__(file, encoding="utf-8")
        self.path, self.storages, self.starts = path, storages, starts

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        # A function made for this pickle alone: what it may do to its attributes ends with it.
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, stride, *_: self._tensor(storage, offset, shape, stride)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_: data
        if module == "torch" and name in STORAGES:
            return np.dtype(STORAGES[name])
        raise pickle.UnpicklingError(f"its pickle asks for {module}.{name}, which is refused and was not run")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, size, view = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or view is not None or size < 0:
            raise pickle.UnpicklingError(f"its pickle refers to {kind!r} in a way that is not read")
        return self.storages.setdefault(key, _Storage(key, dtype, size))

    def _tensor(self, storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> LazyTensor:
        # as_strided believes what it is told: a hostile stride would read other memory.
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if min((offset, *shape, *stride)) < 0 or (math.prod(shape) and last >= storage.size):
            raise pickle.UnpicklingError(f"a tensor of shape {tuple(shape)} reaches outside of its storage")

        def load() -> np.ndarray:
            if not math.prod(shape):
                return np.zeros(shape, storage.dtype)
            start = self.starts[storage.key] + offset * storage.dtype.itemsize
            flat = read_at(self.path, start, (last - offset + 1,), storage.dtype)
            strides = tuple(step * storage.dtype.itemsize for step in stride)
            return np.lib.stride_tricks.as_strided(flat, shape, strides, writeable=False)

        return LazyTensor(tuple(shape), storage.dtype, load)
