"""Results on disk: arrays with all that made them, figures, and the tables of results.md. Whole files or none."""

import dataclasses
import hashlib
import json
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any
from zipfile import BadZipFile

import numpy as np

from theory.files import write_whole

PACKAGES = ("blessing", "jax", "jaxlib", "flax", "optax", "numpy", "scipy", "matplotlib")
ROOT = Path(__file__).parent.parent


def save(path: Path, arrays: dict[str, np.ndarray], made_by: dict[str, Any]) -> None:
    """The arrays as .npz, and `made_by` beside them as the JSON text `made_by`."""
    contents: Any = {"made_by": np.array(json.dumps(made_by)), **arrays}
    write_whole(path, lambda file: np.savez(file, **contents))


def load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """Arrays and what made them; None where there is no such file, or none that can be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return arrays, json.loads(str(arrays.pop("made_by")))
    except (OSError, EOFError, ValueError, KeyError, BadZipFile):
        return None


def made_by(
    config: Any, folders: tuple[str, ...] = ("theory", "toys"), facts: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """Config with its seed, versions, commit, and a digest of the sources: the same digest gives the same arrays.

    The sources are the modules that lie in these folders of the project. `facts` is what decides the arrays besides.
    """
    return {
        "config": json.loads(json.dumps(dataclasses.asdict(config))),
        "versions": {name: _version(name) for name in PACKAGES},
        "sources": _sources(folders),
        "commit": _commit(),
        **facts,
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two runs must give the same arrays: all but the commit agrees, which also changes with a README."""
    return a | {"commit": ""} == b | {"commit": ""}


_parts: ContextVar[Path | None] = ContextVar("parts", default=None)


@contextmanager
def parts(folder: Path, made_by: dict[str, Any]) -> Iterator[None]:
    """Keeps what is `kept` within, below this folder, for a run that follows one that was cut off.

    Parts of another config, version or source are not those that are asked for.
    """
    asked = json.dumps(made_by | {"commit": ""}, sort_keys=True)
    token = _parts.set(folder / hashlib.sha256(asked.encode()).hexdigest()[:16])
    try:
        yield
    finally:
        _parts.reset(token)


def kept(name: tuple[Any, ...], make: Callable[..., np.ndarray], *args: Any, **kwargs: Any) -> np.ndarray:
    """make(*args, **kwargs), or what it was under this name when the run was cut off; outside of `parts`, just made.

    Raises what `make` raises, and OSError.
    """
    folder = _parts.get()
    if folder is None:
        return make(*args, **kwargs)
    path = folder / f"{hashlib.sha256(repr(name).encode()).hexdigest()[:16]}.npy"
    if path.exists():
        return np.load(path, allow_pickle=False)
    made = make(*args, **kwargs)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: np.save(file, made))
    return made


@cache
def _sources(folders: tuple[str, ...]) -> str:
    paths = sorted(path for folder in folders for path in (ROOT / folder).glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


@cache
def _commit() -> str:
    """Of the checkout, with -dirty where it was changed since; "" for an installed package, in whatever folder."""
    if not (ROOT / ".git").exists():
        return ""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
