"""Reads the tensors of a `torch.save` file without torch, and without running what the file says.

Such a file is a zip archive of a pickle and of raw storages. A pickle is a program: here it may build dictionaries,
lists, numbers, strings and tensors; any other name that it asks for is refused before it is looked up.
"""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sd_port.weights.checkpoint import LazyTensor
from sd_port.weights.unpickling import LARGEST, Region, Storage, Unpickler, checked, said, shown, storage_of

_CONVERT = "convert it to .safetensors where you trust it, or take the .safetensors file of the same model"
_SHOWN = 8


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
        most = path.stat().st_size
        entries = {name.partition("/")[2]: archive.getinfo(name) for name in archive.namelist()}
        if "data.pkl" not in entries:
            raise ValueError("it holds no data.pkl, so torch.save did not write it")
        for name in ("byteorder", "data.pkl"):
            if name in entries and entries[name].file_size > min(most, LARGEST):
                raise ValueError(f"{name} has {entries[name].file_size} bytes")
        if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
            raise ValueError("its tensors are big-endian")
        value = _Tensors(archive, entries, most).load()
    except OSError:
        raise
    except Exception as error:  # a damaged or hostile pickle raises nearly anything
        raise ValueError(f"{path}: cannot be read: {said(error)}; {_CONVERT}") from None
    return as_state_dict(path, value)


def as_state_dict(path: Path, value: Any) -> dict[str, LazyTensor]:
    """The dictionary of tensors that a pickle held, its "state_dict" where it has one. Raises ValueError otherwise."""
    if isinstance(value, Mapping) and isinstance(value.get("state_dict"), Mapping):
        value = value["state_dict"]
    if not isinstance(value, Mapping):
        raise ValueError(f"{path}: holds a {type(value).__name__}, not a dictionary of tensors")
    others = [f"{shown(key)} ({type(v).__name__})" for key, v in value.items() if not isinstance(v, LazyTensor)]
    if others or not all(isinstance(key, str) for key in value):
        listed = ", ".join(others[:_SHOWN]) + (f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else "")
        raise ValueError(f"{path}: holds what are no named tensors: {listed}; {_CONVERT}")
    return dict(value)


class _Tensors(Unpickler):
    """The pickle of an archive, whose members are the storages, none larger than the file."""

    def __init__(self, archive: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo], most: int):
        super().__init__(checked(archive.read(entries["data.pkl"])), self._read)
        self.archive, self.entries, self.most = archive, entries, most

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _, size = pid
        dtype, size = storage_of(kind, dtype, size)
        entry = self.entries.get(f"data/{key}") if isinstance(key, str) else None
        if entry is None:
            raise pickle.UnpicklingError(f"the storage data/{shown(key)} is missing")
        if entry.file_size > self.most:
            raise pickle.UnpicklingError(f"the storage data/{key} inflates to {entry.file_size} bytes")
        if entry.file_size < size * dtype.itemsize:
            raise pickle.UnpicklingError(f"the storage data/{key} is shorter than its tensor")
        return Storage(entry, dtype, size)

    def _read(self, storage: Storage, region: Region) -> np.ndarray:
        try:
            raw = self.archive.read(storage.where)  # checks the checksum
        except Exception as error:  # so does a damaged or hostile archive
            raise ValueError(f"{self.archive.filename}: damaged: {said(error)}; download it again") from None
        return region.of(np.frombuffer(raw, storage.dtype, storage.size)[region.offset :])
