"""The JSON file of --edit: a superset of DragBench's prompt.json, of which the file beside a result is one too."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from msgspec import field

from sd_port.dragbench import Asked, Request
from theory.reading import Json, converted, entries, read_json

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
        return entries(self.config, kind, f"{self.path}, config")


class _Written(Asked, forbid_unknown_fields=True):
    """What an edit reads of it."""

    config: Json = field(default_factory=dict)
    seed: int | None = None


def read_edit_file(path: Path) -> EditFile:
    """Raises FileNotFoundError, and ValueError with the file and the place in it, also for keys that mean nothing."""
    raw = read_json(path)
    written: _Written = converted({name: raw[name] for name in raw.keys() - RECORDED}, _Written, str(path))
    return EditFile(path, written.request, written.config, written.seed)
