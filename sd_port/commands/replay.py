"""sd-edit replay: an earlier edit once more."""

import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from sd_port.commands.drag import DragCommand
from sd_port.commands.edit import PATHS, EditCommand
from sd_port.commands.inpaint import InpaintCommand
from sd_port.commands.jobs import Job, ready
from sd_port.commands.translate import (
    CycleCommand,
    DdibCommand,
    DiffeditCommand,
    ReconstructCommand,
    SdeditCommand,
)
from sd_port.versions import versions

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


class Earlier(NamedTuple):
    """What the JSON file of an edit says of how it was made."""

    command: EditCommand
    item: str
    place: tuple[int, int]  # row and rows of its batch
    read: Mapping[str, str]
    model_sha256: str
    made_with: Mapping[str, Any]  # the device and the versions


@dataclasses.dataclass(frozen=True)
class Replay:
    """Makes the picture of an earlier edit again, bit for bit on the same device and versions."""

    result: Annotated[Path, tyro.conf.Positional]
    """The JSON file that lies beside the picture."""
    out: Path = Path("replayed.png")
    """The PNG to write."""

    def run(self) -> None:
        """Raises ValueError if the file is not one of an edit, or if what went into it has changed since.

        Warns where the device or a version is another.
        """
        earlier = self.earlier()
        earlier.command.started_from()
        command, (row, rows) = earlier.command, earlier.place
        command.check_out()
        job = job_of(earlier)
        import jax
        import jax.random as jr

        pipe = command.load()
        if pipe.digest() != earlier.model_sha256:
            raise ValueError(f"--model {command.model}: has other weights than it had")
        for name, now in ({"device": jax.devices()[0].device_kind} | versions()).items():
            if (before := earlier.made_with.get(name)) != now:
                warnings.warn(f"{name} was {before} and is {now}: the picture may differ a little", stacklevel=2)
        key = jr.key(command.started_from())
        result = command.edited(pipe, [ready(job)] * rows, key, lambda done, total: None)[row]
        command.write(job._replace(out=self.out), result, earlier.place, earlier.model_sha256)
        print(self.out)

    def earlier(self) -> Earlier:
        try:
            record = json.loads(self.result.read_text(encoding="utf-8"))
            command = EDITS[record["command"]](**_options(record["arguments"]), out=self.out)
            row, rows = map(int, record["place"])
            if not 0 <= row < rows:
                raise ValueError("there is no such row")
            made_of = str(record["item"]), (row, rows), dict(record["read"]), str(record["model_sha256"])
            return Earlier(command, *made_of, {"device": record["device"]} | record["versions"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{self.result}: not the JSON file that lies beside an edited picture") from None


def job_of(earlier: Earlier) -> Job:
    """What was edited. Raises ValueError if it is not there any more, or has changed since."""
    command = earlier.command
    job = next((job for group in command.groups() for job in group if job.name == earlier.item), None)
    if job is None:
        raise ValueError(f"--batch {command.batch}: has no item {earlier.item} any more")
    paths = {"image": job.image, "lora": command.lora, "embedding": command.embedding, "edit": command.edit}
    for name, found in command.made_of(job).items():
        if earlier.read.get(name) != found:
            raise ValueError(f"{paths.get(name, f'the {name} of {job.image}')} has changed since")
    return job


def _options(values: dict[str, Any]) -> dict[str, Any]:
    made = {name: _tuples(value) for name, value in values.items()}
    return made | {name: Path(made[name]) for name in PATHS if made.get(name) is not None}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
