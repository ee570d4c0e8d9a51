"""Reads the tensors of a `torch.save` file from before torch 1.6, as torchvision's and LPIPS's still are.

Such a file is a row of pickles (a magic number, a version, facts of the machine, the dictionary, the names of its
storages), then the storages themselves, each after its length. As in pickles.py no name that a pickle asks for is
looked up, but those that a dictionary of tensors needs.
"""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sd_port.weights.checkpoint import LazyTensor, open_weights, read_at
from sd_port.weights.pickles import as_state_dict
from sd_port.weights.unpickling import LARGEST, Region, Storage, Unpickler, checked, said, shown, storage_of

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
_LENGTH = 8  # bytes that say how many numbers a storage has


def open_any(path: Path) -> Mapping[str, LazyTensor]:
    """The tensors of a weights file of either age; see `sd_port.weights.checkpoint.open_weights`."""
    path = Path(path)
    old = path.suffix in (".pt", ".pth") and path.is_file() and path.stat().st_size and not zipfile.is_zipfile(path)
    return open_legacy(path) if old else open_weights(path)


def open_legacy(path: Path) -> dict[str, LazyTensor]:
    """The tensors of such a file, by name.

    Raises ValueError, in one line with the file, for a pickle that wants anything but tensors, and for damaged files.
    """
    row = _Row(path)
    try:
        with path.open("rb") as file:
            head, place, parts = file.read(min(path.stat().st_size, LARGEST)), 0, []
            for _ in ("magic", "version", "machine", "tensors", "names"):
                data = checked(head, place)
                place += len(data)
                parts.append(_Tensors(data, row).load())
            magic, version, machine, value, names = parts
            if (magic, version) != (_MAGIC, _VERSION):
                raise ValueError("torch.save did not write it")
            if machine.get("little_endian") is not True:
                raise ValueError("its tensors are big-endian")
            row.starts = _starts(file, place, names, row.storages)
    except OSError:
        raise
    except Exception as error:  # a damaged or hostile pickle raises nearly anything
        raise ValueError(f"{path}: not a file of tensors, or a damaged one: {said(error)}") from None
    return as_state_dict(path, value)


def _starts(file: BinaryIO, place: int, names: Any, storages: Mapping[str, Storage]) -> dict[str, int]:
    """Where the numbers of every storage begin. Raises ValueError for storages that are missing or cut."""
    if set(names) != storages.keys():
        raise ValueError("its storages are not those of its tensors")
    starts = {}
    end = file.seek(0, 2)
    for name in names:
        file.seek(place)
        size, storage = int.from_bytes(file.read(_LENGTH), "little"), storages[name]
        if size != storage.size:
            raise ValueError(f"the storage {shown(name)} has {size} numbers where {storage.size} are expected")
        starts[name] = place + _LENGTH
        place += _LENGTH + size * storage.dtype.itemsize
        if place > end:
            raise ValueError(f"truncated: {place - end} bytes are missing")
    return starts


class _Row:
    """The storages that the pickles named, and where they begin, which is known last."""

    def __init__(self, path: Path):
        self.path = path
        self.storages: dict[str, Storage] = {}
        self.starts: Mapping[str, int] = {}

    def read(self, storage: Storage, region: Region) -> np.ndarray:
        start = self.starts[storage.where] + region.offset * storage.dtype.itemsize
        return region.of(read_at(self.path, start, (region.length,), storage.dtype))


class _Tensors(Unpickler):
    """One pickle of the row."""

    def __init__(self, data: bytes, row: _Row):
        super().__init__(data, row.read)
        self.storages = row.storages

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _, size, view = pid
        dtype, size = storage_of(kind, dtype, size)
        if view is not None or not isinstance(key, str):
            raise pickle.UnpicklingError(f"its pickle refers to {shown(kind)} in a way that is not read")
        return self.storages.setdefault(key, Storage(key, dtype, size))
