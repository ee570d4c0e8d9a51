"""sd-edit replay: an earlier edit once more."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import tyro

from sd_port.commands.drag import DragCommand
from sd_port.commands.edit import EditCommand
from sd_port.commands.translate import (
    CycleCommand,
    DdibCommand,
    DiffeditCommand,
    InpaintCommand,
    ReconstructCommand,
    SdeditCommand,
)

EDITS: dict[str, type[EditCommand]] = {
    edit.name: edit
    for edit in (
        DragCommand,
        InpaintCommand,
        SdeditCommand,
        CycleCommand,
        DdibCommand,
        DiffeditCommand,
        ReconstructCommand,
    )
}
PATHS = ("image", "batch", "edit", "lora", "mask")  # options of edits that are paths


@dataclasses.dataclass(frozen=True)
class Replay:
    """Makes the picture of an earlier edit again, bit for bit on the same device and versions."""

    result: Annotated[Path, tyro.conf.Positional]
    """The JSON file that lies beside the picture."""
    out: Path = Path("replayed.png")
    """The PNG to write."""

    def run(self) -> None:
        """Raises ValueError if the file is not one of an edit, or if what went into it has changed since."""
        try:
            record = json.loads(self.result.read_text(encoding="utf-8"))
            command = EDITS[record["command"]](**_options(record["arguments"]), out=self.out)
            row, rows = map(int, record["place"])
            if not 0 <= row < rows:
                raise ValueError("there is no such row")
            made_of = str(record["item"]), (row, rows), dict(record["read"]), str(record["model_sha256"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{self.result}: not the JSON file that lies beside an edited picture") from None
        command.again(*made_of)


def _options(values: dict[str, Any]) -> dict[str, Any]:
    made = {name: _tuples(value) for name, value in values.items()}
    return made | {name: Path(made[name]) for name in PATHS if made[name] is not None}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
