"""sd-edit replay: an earlier edit once more."""

import dataclasses
import warnings
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro
from msgspec import Meta, Struct

from sd_port.commands.drag import DragCommand
from sd_port.commands.edit import OUTPUTS, EditCommand
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
from theory.files import held
from theory.reading import Json, entries, read_json, shown

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


Rows = Annotated[int, Meta(ge=0, le=4096)]


class Record(Struct):
    """What the JSON file next to an edited picture says of how it was made."""

    command: str
    arguments: Json
    item: str
    place: tuple[Rows, Rows]  # row and rows of its batch
    read: dict[str, str]
    model_sha256: str
    device: str
    versions: dict[str, str]


class Earlier(NamedTuple):
    """An edit as it was asked for, and how it was made."""

    command: EditCommand
    record: Record


@dataclasses.dataclass(frozen=True)
class Replay:
    """Makes the picture of an earlier edit again, bit for bit on the same device and versions."""

    result: Annotated[Path, tyro.conf.Positional]
    """The JSON file next to the picture."""
    out: Path = Path("replayed.png")
    """The PNG to write."""

    def run(self) -> None:
        """Raises ValueError if the file is not one of an edit, or if what went into it has changed since.

        Warns where the device or a version is another.
        """
        earlier = self.earlier()
        job = job_of(earlier)
        with held(self.out):
            self.make(earlier, job)
        print(self.out)

    def make(self, earlier: Earlier, job: Job) -> None:
        """Edits and writes."""
        command, record = earlier
        row, rows = record.place
        import jax
        import jax.random as jr

        pipe = command.pipeline()
        if pipe.digest() != record.model_sha256:
            raise ValueError(f"--model {command.model}: has other weights than it had")
        made_with = {"device": record.device} | record.versions
        for name, now in ({"device": jax.devices()[0].device_kind} | versions()).items():
            if (before := made_with.get(name)) != now:
                warnings.warn(f"{name} was {before} and is {now}: the picture may differ a little", stacklevel=2)
        key = jr.key(command.started_from())
        result = command.edited(pipe, [ready(job)] * rows, key, lambda done, total: None)[row]
        command.write(job._replace(out=self.out), result, record.place, record.model_sha256)

    def earlier(self) -> Earlier:
        """Raises FileNotFoundError, and ValueError with the file and the place in it, where no edit could write it."""
        if self.result.suffix != ".json":
            raise ValueError(f"{self.result}: give the JSON file next to the picture")
        record: Record = read_json(self.result, Record)
        if record.command not in EDITS:
            raise ValueError(f"{self.result}: command must be {' or '.join(EDITS)}, not {shown(record.command)}")
        edit, name = EDITS[record.command], f"{self.result}, arguments"
        given = entries(record.arguments, edit, name)
        command = edit(**{option: value for option, value in given.items() if option not in OUTPUTS}, out=self.out)
        command.check_out()
        try:  # what it would check of its options; those of a folder write into one
            dataclasses.replace(command, out=self.out if command.batch is None else self.out.parent).check()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        row, rows = record.place
        if rows != (1 if command.batch is None else command.batch_size) or row >= rows:
            raise ValueError(f"{self.result}: place must be a row and the rows of the batch, not {[row, rows]}")
        return Earlier(command, record)


def job_of(earlier: Earlier) -> Job:
    """What was edited. Raises ValueError if it is not there any more, or has changed since."""
    command, record = earlier
    job = next((job for group in command.groups({}) for job in group if job.name == record.item), None)
    if job is None:
        raise ValueError(f"--batch {command.batch}: has no item {record.item} any more")
    paths = {"image": job.image, "lora": command.lora, "embedding": command.embedding, "edit": command.edit}
    for name, found in command.made_of(job).items():
        if record.read.get(name) != found:
            raise ValueError(f"{paths.get(name, f'the {name} of {job.image}')} has changed since")
    return job
