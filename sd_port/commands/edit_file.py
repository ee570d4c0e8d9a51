"""The JSON file of --edit: a superset of DragBench's prompt.json, of which the file beside a result is one too."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from sd_port.dragbench import Request, read_request

KNOWN = {*Request._fields, "config", "seed"}
RECORDED = {"edit", "command", "arguments", "operations", "item", "place", "read", "model_sha256", "device", "versions"}
RECORDED |= {"latents_lost", "psnr"}  # what the file beside a result has besides, and an edit does not read


class EditFile(NamedTuple):
    """Points and prompts, settings, and a seed, if the file has them."""

    path: Path
    request: Request
    config: Mapping[str, Any]
    seed: int | None

    def settings(self, kind: type) -> dict[str, Any]:
        """The config as arguments of a dataclass of settings. Raises ValueError for what this one does not have."""
        hints, made = get_type_hints(kind), {}
        for name, value in self.config.items():
            if name not in {field.name for field in dataclasses.fields(kind)}:
                raise ValueError(f"{self.path}: this edit has no setting {name}, which its config has; take it out")
            if not _fits(value, hints[name]):
                raise ValueError(f"{self.path}: {name} = {value} cannot be: it is of the wrong kind")
            made[name] = tuple(value) if isinstance(value, list) else value
        return made


def read_edit_file(path: Path) -> EditFile:
    """Raises ValueError, naming the file, for one that cannot be read and for keys that mean nothing."""
    request = read_request(path)
    raw = json.loads(path.read_text(encoding="utf-8"))
    unknown = sorted(raw.keys() - KNOWN - RECORDED)
    if unknown:
        raise ValueError(f"{path}: has {', '.join(unknown)}, which means nothing; it takes {', '.join(sorted(KNOWN))}")
    config, seed = raw.get("config", {}), raw.get("seed")
    if not isinstance(config, dict) or not _fits(seed, int | None):
        raise ValueError(f'{path}: "config" must be a dictionary of settings, "seed" a whole number')
    return EditFile(path, request, config, seed)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value out of JSON is of this type."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in args)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in args)
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(args) and all(map(_fits, value, args))
    if hint is type(None):
        return value is None
    return type(value) in ((int, float) if hint is float else (hint,))
