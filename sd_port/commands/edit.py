"""What every edit takes and leaves: one picture or a folder of them in, pictures and JSON files out.

The JSON file beside a picture holds the command's own arguments, the hashes of what it read, and the place that the
picture had in its batch, on which its noise depends: `Replay` makes the same file again from that alone.
"""

import dataclasses
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import jax.random as jr
import numpy as np
import tyro
from jaxtyping import Array
from rich.console import Console

from sd_port.commands.options import Dtype, at_least, new_file, progress_bar, versions
from sd_port.dragbench import Request, read_request, read_set
from sd_port.edits.canvas import EditResult, check_mask, check_size
from sd_port.images import image_size, read_image, read_mask, read_record, write_png
from sd_port.nano.devices import all_devices
from sd_port.pipeline import StableDiffusion
from theory.files import write_whole

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
OUTPUTS = ("out", "save_frames")  # options that say where things are written, not what

Told = Callable[[int, int], None]


class Job(NamedTuple):
    """One edit to do, not read yet."""

    name: str  # of the item in its folder; "" for a single picture
    image: Path
    mask: Path | np.ndarray | None
    request: Request
    out: Path


class Ready(NamedTuple):
    """The same with its pictures: (height, width, 3), and (height, width) if there is a mask."""

    image: np.ndarray
    mask: np.ndarray | None
    request: Request


@dataclasses.dataclass(frozen=True)
class EditCommand(ABC):
    """The options that all edits have."""

    name: ClassVar[str]

    image: Annotated[Path | None, tyro.conf.Positional] = None
    """The picture to edit: any format and size that Pillow reads."""
    out: Path = Path("edited.png")
    """The PNG to write; a JSON file of the same name goes beside it. Nothing is overwritten."""
    batch: Path | None = None
    """A folder instead of a picture: of pictures, or of items as in DragBench; --out then names a folder. What is there
    already from an earlier call is not made again."""
    batch_size: int = 4
    """Pictures of one size to edit at once, with --batch; they are split over the devices."""
    edit: Path | None = None
    """A JSON file with source, target and prompt, such as DragBench's prompt.json or the file beside an earlier result,
    in place of these options."""
    prompt: str = ""
    """What the result shows; for drag, reconstruct and ODE inversion what the picture shows."""
    model: str = "nano"
    """nano (bundled), a diffusers folder, a single .safetensors file, or an id on the Hub (see sd-edit models)."""
    lora: Path | None = None
    """A LoRA file (kohya, diffusers or PEFT)."""
    mask: Path | None = None
    """A picture of the same size, white where things may change; without one everything may."""
    seed: int = 0
    """Same seed, same picture."""
    dtype: Dtype = "float32"
    """Of weights and activations: bfloat16 on a GPU or a TPU, float32 on a CPU."""

    @abstractmethod
    def edited(self, pipe: StableDiffusion, jobs: Sequence[Ready], key: Array, told: Told) -> list[EditResult]:
        """The results of jobs whose pictures have one size."""

    def check(self) -> None:
        """Raises ValueError for options that cannot be, before anything is read."""
        at_least(self, batch_size=1)
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"--seed {self.seed}: must be a number of at most 63 bits")
        if (self.image is None) == (self.batch is None):
            raise ValueError("give one picture to edit, or --batch with a folder of them")
        if self.edit is not None:
            self.refuse(("source", "target", "prompt", "source_prompt"), f"--edit {self.edit} brings its own")
        if self.batch is None:
            self.check_out()
        elif self.out.suffix.lower() in PICTURES or (self.out.exists() and not self.out.is_dir()):
            raise ValueError(f"--out {self.out}: with --batch give a folder, which is made if it is not there")

    def check_job(self, job: Job, factor: int) -> None:
        """Raises ValueError for a job that cannot be done, by all that is known without reading its picture."""
        size = image_size(job.image)
        check_size(size, factor)
        if job.mask is not None:
            check_mask(read_mask(job.mask) if isinstance(job.mask, Path) else job.mask, size)

    def check_out(self) -> None:
        """Raises ValueError if one of the two files is there already."""
        new_file("--out", self.out)
        if self.out.with_suffix(".json").exists():
            raise ValueError(f"--out {self.out}: {self.out.with_suffix('.json')} exists already; give another name")

    def refuse(self, options: Sequence[str], why: str) -> None:
        """Raises ValueError for the first of these options that was given."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in options:
            if name in defaults and getattr(self, name) != defaults[name]:
                raise ValueError(f"--{name.replace('_', '-')}: {why}; leave it out")

    def run(self) -> None:
        """Raises ValueError or OSError for what cannot be done, before anything is written."""
        self.check()
        groups = self.groups()
        made = [job for group in groups for job in group if job.out.exists()]
        for job in made:
            record = read_record(job.out)
            if record.get("arguments") != self.arguments():
                raise ValueError(f"{job.out}: was made with other options; give another folder as --out")
            if record.get("read") != self.read(job):
                raise ValueError(f"{job.out}: what it was made of has changed since; delete it, or give another --out")
        todo = [group for group in groups if not all(job.out.exists() for job in group)]
        if todo:
            self.make(todo)
        print(self.out)

    def make(self, groups: list[list[Job]]) -> None:
        """Edits and writes, a batch after another, what is not there yet; checks all of it first."""
        pipe = self.load()
        for job in (job for group in groups for job in group):
            self.check_job(job, pipe.vae.config.factor)
        digest = pipe.digest()
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with progress_bar() as progress:
            pictures = progress.add_task("Pictures", total=sum(map(len, groups)), visible=self.batch is not None)
            for group in groups:
                task = progress.add_task("Compiling, then editing", total=None)

                def told(done: int, total: int, task=task) -> None:
                    progress.update(task, completed=done, total=total, description="Editing")

                ready = [_read(job) for job in group]
                rows = len(ready) if self.batch is None else self.batch_size
                filled = ready + ready[-1:] * (rows - len(ready))  # one shape for all batches of a size
                results = self.edited(pipe, filled, jr.key(self.seed), told)
                for row, (job, result) in enumerate(zip(group, results, strict=False)):
                    if not job.out.exists():
                        self.write(job, result, (row, rows), digest)
                progress.remove_task(task)
                progress.advance(pictures, len(group))

    def groups(self) -> list[list[Job]]:
        """What to do, in batches that do not depend on how much of it is done already."""
        if self.batch is None:
            assert self.image is not None
            return [[Job("", self.image, self.mask, self.request(), self.out)]]
        by_size: dict[tuple[int, int], list[Job]] = {}
        for job in self._folder(self.batch):
            by_size.setdefault(image_size(job.image), []).append(job)
        size = self.batch_size
        return [jobs[i : i + size] for jobs in by_size.values() for i in range(0, len(jobs), size)]

    def request(self) -> Request:
        """Points and prompts: those of --edit, or of the options that this command has."""
        if self.edit is not None:
            return read_request(self.edit)
        return Request(**{name: getattr(self, name) for name in Request._fields if hasattr(self, name)})

    def _folder(self, folder: Path) -> list[Job]:
        if not folder.is_dir():
            raise ValueError(f"--batch {folder}: is not a folder")
        if (folder / "prompt.json").exists():
            raise ValueError(f"--batch {folder}: is one item; give its picture and --edit, or the folder above it")
        pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
        if pictures:
            jobs = [(path.stem, path, self.mask, self.request()) for path in pictures]
        else:
            brings = ("edit", "source", "target", "prompt", "source_prompt", "mask")
            self.refuse(brings, f"the items in {folder} bring their own")
            jobs = [(item.name, item.image, item.mask, item.request) for item in read_set(folder)]
        names = [job[0] for job in jobs]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"--batch {folder}: has several pictures called {name}; rename one")
        return [Job(*job, out=self.out / f"{job[0]}.png") for job in jobs]

    def load(self) -> StableDiffusion:
        mesh = all_devices() if self.batch is not None and len(jax.devices()) > 1 else None
        with Console(stderr=True).status(f"Loading {self.model}"):
            pipe = StableDiffusion.load(self.model, dtype=self.dtype, mesh=mesh)
            if self.lora is not None:
                pipe.load_lora(self.lora)
        return pipe

    def masks_of(self, jobs: Sequence[Ready]) -> np.ndarray | None:
        """(batch, height, width), all 1 where there is none; nothing at all for a single picture without one.

        In a folder all pictures have one, so that what becomes of one does not depend on its neighbours.
        """
        if self.batch is None and all(job.mask is None for job in jobs):
            return None
        return np.stack([np.ones(job.image.shape[:2], np.float32) if job.mask is None else job.mask for job in jobs])

    def read(self, job: Job) -> dict[str, str]:
        """The hashes of all that a job is made of, but for the model: of files by their paths, and of its item."""
        files = [path for path in (job.image, job.mask, self.lora, self.edit) if isinstance(path, Path)]
        for path in files:
            if not path.is_file():
                raise ValueError(f"{path} is not there")
        found = {str(path): sha256(path.read_bytes()) for path in files}
        if isinstance(job.mask, np.ndarray):
            found["mask"] = sha256(job.mask.tobytes())
        return found | {"request": sha256(json.dumps(job.request).encode())}

    def write(self, job: Job, result: EditResult, place: tuple[int, int], model_sha256: str) -> None:
        """The JSON file first: where the picture is, all is."""
        record = result.record | {
            "command": self.name,
            "arguments": self.arguments(),
            "item": job.name,
            "place": list(place),
            "read": self.read(job),
            "model_sha256": model_sha256,
            "device": jax.devices()[0].device_kind,
            "versions": versions(),
        }
        job.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        write_whole(job.out.with_suffix(".json"), lambda file: file.write(text.encode()))
        write_png(job.out, result.image, record)

    def arguments(self) -> dict[str, Any]:
        """What decides the pictures, as JSON: the options but for those that say where to write."""
        options = {name: value for name, value in dataclasses.asdict(self).items() if name not in OUTPUTS}
        return json.loads(json.dumps(options, default=str))

    def again(self, item: str, place: tuple[int, int], read: dict[str, str], model_sha256: str) -> None:
        """Makes one picture of an earlier call once more, at `self.out`, in a batch of as many at the same place.

        Raises ValueError if the item is not there any more, or if it or the model has changed since.
        """
        self.check_out()
        job = next((job for group in self.groups() for job in group if job.name == item), None)
        if job is None:
            raise ValueError(f"--batch {self.batch}: has no item {item} any more")
        for name, found in self.read(job).items():
            if read.get(name) != found:
                what = f"the {name} of {job.image}" if name in ("mask", "request") else name
                raise ValueError(f"{what} has changed since")
        pipe = self.load()
        if pipe.digest() != model_sha256:
            raise ValueError(f"--model {self.model}: has other weights than it had")
        row, rows = place
        result = self.edited(pipe, [_read(job)] * rows, jr.key(self.seed), lambda done, total: None)[row]
        self.write(job._replace(out=self.out), result, place, model_sha256)
        print(self.out)


def _read(job: Job) -> Ready:
    mask = read_mask(job.mask) if isinstance(job.mask, Path) else job.mask
    return Ready(read_image(job.image), mask, job.request)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
