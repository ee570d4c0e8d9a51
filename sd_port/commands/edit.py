"""What every edit takes and leaves: one picture or a folder of them in, pictures and JSON files out.

The JSON file beside a picture holds the command's own arguments, the hashes of what it read, and the place that the
picture had in its batch, on which its noise depends: `Replay` makes the same file again from that alone.
"""

import dataclasses
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

import numpy as np
import tyro

from sd_port.checks import check_mask, check_seed, check_size, latent_mask
from sd_port.commands.edit_file import EditFile, read_edit_file
from sd_port.commands.jobs import PICTURES, Job, Ready, about, json_or_none, mask_of, ready
from sd_port.commands.model_options import ModelOptions
from sd_port.commands.options import at_least, new_file
from sd_port.dragbench import Request, read_set
from sd_port.edit_configs import InpaintConfig, TranslateConfig
from sd_port.images import EditResult, as_png, image_size, read_grey, read_mask, read_record
from sd_port.versions import versions
from sd_port.weights.hub import BUNDLED
from theory.command_line import Partly, is_text
from theory.files import Write, folder_held, held, write_new
from theory.progress import progress

if TYPE_CHECKING:  # what computes is loaded after the options have been checked
    from sd_port.pipeline import StableDiffusion
    from theory.types import PRNGKey

OUTPUTS = ("out", "save_frames")  # options that say where things are written, not what
SHOWN = 5  # names that a message spells out
# Options that say where things are read; their hashes say what.
PATHS = ("image", "batch", "edit", "lora", "embedding", "mask")

Settings = TypeVar("Settings", InpaintConfig, TranslateConfig)
Told = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class EditCommand(ModelOptions, ABC):
    """The options that all edits have."""

    name: ClassVar[str]
    share: ClassVar[float] = 0.5  # of a cell of the latent that must be white in the mask to be edited

    image: Annotated[Path | None, tyro.conf.Positional] = None
    """The picture to edit, of any size: PNG, JPEG, WebP, TIFF, BMP, GIF, AVIF, JPEG 2000 or PPM."""
    out: Path = Path("edited.png")
    """The PNG to write; a JSON file of the same name goes beside it. Nothing is overwritten."""
    batch: Path | None = None
    """A folder instead of a picture: of pictures, or of items as in DragBench; --out then names a folder. What is there
    already from an earlier call is not made again."""
    batch_size: int = 4
    """Pictures of one size to edit at once, with --batch; the devices share them if they can do so evenly."""
    edit: Path | None = None
    """A JSON file with source, target and prompt, such as DragBench's prompt.json or the file beside an earlier result,
    in place of these options; if it has a config or a seed, they hold where options do not say otherwise."""
    prompt: str = ""
    """What the result shows; for drag, reconstruct and ODE inversion what the picture shows."""
    lora: Path | None = None
    """A LoRA file (kohya, diffusers or PEFT)."""
    embedding: Path | None = None
    """A file of textual inversion, whose token means its vectors in prompts: <name> in diffusers' files, the name of
    the file in webui's."""
    mask: Path | None = None
    """A picture of the same size, white where things may change; without one everything may."""
    seed: int | None = None
    """Same seed, same picture; from 0, which it is unless --edit brings one, to 2^32 - 1."""

    @abstractmethod
    def edited(self, pipe: "StableDiffusion", jobs: Sequence[Ready], key: "PRNGKey", told: Told) -> list[EditResult]:
        """The results of jobs whose pictures have one size."""

    def check(self) -> None:
        """Raises ValueError for options that cannot be, before anything is read."""
        at_least(self, batch_size=1)
        self.started_from()
        if (self.image is None) == (self.batch is None):
            raise ValueError("give one picture to edit, or --batch with a folder of them")
        if self.edit is not None:
            self.refuse(("source", "target", "prompt", "source_prompt"), f"--edit {self.edit} brings its own")
        if self.batch is None:
            self.check_out()
        elif self.out.suffix.lower() in PICTURES or (self.out.exists() and not self.out.is_dir()):
            raise ValueError(f"--out {self.out}: with --batch give a folder, which is made if it is not there")
        elif self.out.resolve() == self.batch.resolve():
            raise ValueError(f"--out {self.out}: is the folder of --batch, whose pictures stay; give another")

    def check_files(self, job: Job) -> None:
        """Raises ValueError for a job that no model can do, before one is loaded: its picture is read whole."""
        mask = ready(job).mask
        with about(mask_of(job)):
            if isinstance(job.mask, Path) and mask is not None and not mask.any():
                highest = read_grey(job.mask).max()
                raise ValueError(f"its highest value of 0 ... 255 is {highest}; what may change must be more than 127")
            if mask is not None:
                check_mask(mask, image_size(job.image))
        if not is_text(job.request.prompt + job.request.source_prompt):
            raise ValueError(f"{job.image}: its prompt is not Unicode text; write it anew")

    def check_job(self, job: Job, pipe: "StableDiffusion") -> None:
        """Raises ValueError for a job that this model cannot do, before any is begun."""
        size, factor = image_size(job.image), pipe.vae.config.factor
        with about(job.image):
            check_size(size, factor)
        if job.mask is not None:
            mask = read_mask(job.mask) if isinstance(job.mask, Path) else job.mask
            with about(mask_of(job)):
                latent_mask(check_mask(mask, size), factor, self.share)

    def check_out(self) -> None:
        """Raises ValueError if one of the two files is there already."""
        new_file("--out", self.out)
        self.check_sidecar(self.out)

    def check_sidecar(self, out: Path) -> None:
        """Raises ValueError if the JSON file is there, unless this command was ended between it and the picture."""
        sidecar = out.with_suffix(".json")
        if sidecar.exists() and not self.is_mine(json_or_none(sidecar)):
            raise ValueError(f"--out {self.out}: {sidecar} exists already; give another name")

    def is_mine(self, record: Any) -> bool:
        """Whether a record says that this command made it, from whatever place."""
        if not isinstance(record, dict) or not isinstance(record.get("arguments"), dict):
            return False
        defaults = {field.name: field.default for field in dataclasses.fields(self) if field.name not in OUTPUTS}
        theirs, ours = ({**defaults, **of, **dict.fromkeys(PATHS)} for of in (record["arguments"], self.arguments()))
        return record.get("command") == self.name and theirs == ours

    def refuse(self, options: Sequence[str], why: str) -> None:
        """Raises ValueError for the first of these options that was given."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in options:
            if name in defaults and getattr(self, name) != defaults[name]:
                raise ValueError(f"--{name.replace('_', '-')}: {why}; leave it out")

    def run(self) -> None:
        """Raises ValueError or OSError for what cannot be done, before anything is written.

        Of a folder, what cannot be edited is left out; in the end raises `Partly`, which says what and why.
        """
        self.check()
        left_out: dict[Path, str] = {}
        groups = self.groups(left_out)
        made: dict[Path, Any] = {}  # what is there, and the hash of the weights that made it
        for job in (job for group in groups for job in group):
            if not job.out.exists():
                self.check_sidecar(job.out)
                continue
            record = read_record(job.out)
            if not self.is_mine(record):
                raise ValueError(f"{job.out}: was made with other options; give another folder as --out")
            if record.get("read") != self.made_of(job):
                raise ValueError(f"{job.out}: what it was made of has changed since; delete it, or give another --out")
            made[job.out] = record.get("model_sha256")
        todo = [group for group in groups if any(job.out not in made for job in group)]
        todo = self.without(self.check_files, todo, left_out)
        if any(job.out not in made for group in todo for job in group):
            with self.reserved():
                self.make(todo, made, left_out)
        if left_out and not any(job.out.exists() for group in groups for job in group):
            raise ValueError(next(iter(left_out.values())))
        print(self.out)
        if left_out:
            raise Partly(*(f"left out: {why}" for why in left_out.values()))

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """No other process writes where this one will, which is found to be possible before anything is computed."""
        with ExitStack() as places:
            if self.batch is not None:
                places.enter_context(folder_held(self.out))
            else:
                for path in (getattr(self, name, None) for name in OUTPUTS):
                    if path is not None:
                        places.enter_context(held(path))
            yield

    def without(
        self, check: Callable[[Job], object], groups: list[list[Job]], left_out: dict[Path, str]
    ) -> list[list[Job]]:
        """The groups less the jobs that check(job) refuses; why is added to `left_out`, under what is not written.

        Raises ValueError instead where only one picture is asked for.
        """
        for job in (job for group in groups for job in group):
            try:
                check(job)
            except ValueError as error:
                if self.batch is None:
                    raise
                why = str(error)
                left_out[job.out] = why if str(job.image) in why else f"{job.image}: {why}"
        rest = [[job for job in group if job.out not in left_out] for group in groups]
        return [group for group in rest if group]

    def make(self, groups: list[list[Job]], made: Mapping[Path, Any], left_out: dict[Path, str]) -> None:
        """Edits and writes, a batch after another, what is not there yet; checks all of it first.

        made: the pictures that are there, and the hashes of the weights that made them.
        """
        import jax.random as jr

        from sd_port.nano.known import warn_of_unknown

        pipe = self.pipeline()
        groups = self.without(lambda job: self.check_job(job, pipe), groups, left_out)
        digest = pipe.digest()
        for path, other in made.items():
            if other != digest:
                raise ValueError(f"{path}: was made with other weights of {self.model}; give another folder as --out")
        with progress() as bar:
            pictures = bar.add_task("Pictures", total=sum(map(len, groups)), visible=self.batch is not None)
            for group in groups:
                task = bar.add_task("Compiling, once, then editing", total=None)

                def told(done: int, total: int, task=task) -> None:
                    bar.update(task, completed=done, total=total, description="Editing")

                read = [ready(job) for job in group]
                rows = len(read) if self.batch is None else self.batch_size
                filled = read + read[-1:] * (rows - len(read))  # one shape for all batches of a size
                if self.model in BUNDLED:
                    warn_of_unknown(pipe, np.stack([job.image for job in filled]), [job.image for job in group])
                results = self.edited(pipe, filled, jr.key(self.started_from()), told)
                for row, (job, result) in enumerate(zip(group, results, strict=False)):
                    if job.out not in made:
                        self.write(job, result, (row, rows), digest)
                bar.remove_task(task)
                bar.advance(pictures, len(group))

    def groups(self, left_out: dict[Path, str]) -> list[list[Job]]:
        """What to do, in batches that do not depend on how much of it is done already.

        Of pictures in a folder that are no pictures, or have no name to write, it is said in `left_out`.
        """
        if self.batch is None:
            assert self.image is not None
            return [[Job("", self.image, self.mask, self.request(), self.out)]]
        by_size: dict[tuple[int, int], list[Job]] = {}
        for [job] in self.without(check_picture, [[job] for job in self._folder(self.batch, left_out)], left_out):
            by_size.setdefault(image_size(job.image), []).append(job)
        size = self.batch_size
        return [jobs[i : i + size] for jobs in by_size.values() for i in range(0, len(jobs), size)]

    def request(self) -> Request:
        """Points and prompts: those of --edit, or of the options that this command has."""
        if self.edit is not None:
            return self.brought().request
        return Request(**{name: getattr(self, name) for name in Request._fields if hasattr(self, name)})

    def brought(self) -> EditFile:
        """What --edit brings, if it is given."""
        return EditFile(Path(), Request(), {}, None) if self.edit is None else read_edit_file(self.edit)

    def settled(self, kind: type[Settings], **defaults: Any) -> Settings:
        """The settings of an edit: its options, else what --edit brings, else these defaults, else its own."""
        options = {field.name: getattr(self, field.name, None) for field in dataclasses.fields(kind)}
        given = {name: value for name, value in options.items() if value is not None}
        return kind(**{**defaults, **self.brought().settings(kind), **given})

    def started_from(self) -> int:
        """The seed. Raises ValueError, saying where it was given, for one that no key is made of."""
        if self.seed is not None:
            return check_seed(self.seed)
        brought = self.brought()
        return 0 if brought.seed is None else check_seed(brought.seed, f"{brought.path}: seed")

    def _folder(self, folder: Path, left_out: dict[Path, str]) -> list[Job]:
        if not folder.is_dir():
            raise ValueError(f"--batch {folder}: is not a folder")
        if (folder / "prompt.json").exists():
            raise ValueError(f"--batch {folder}: is one item; give its picture and --edit, or the folder above it")
        shown = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        pictures = [path for path in shown if path.suffix.lower() in PICTURES]
        if pictures:
            others = [path.name for path in shown if path not in pictures and path.is_file()]
            if others:
                what = f"{', '.join(others[:SHOWN])}{', ...' if len(others) > SHOWN else ''}"
                warnings.warn(f"--batch {folder}: left out, as no pictures by their names: {what}", stacklevel=2)
            jobs = [(path.stem, path, self.mask, self.request()) for path in pictures]
        elif not shown:
            raise ValueError(f"--batch {folder}: is empty; give a folder of pictures, or of items as in DragBench")
        else:
            jobs = [(item.name, item.image, item.mask, item.request) for item in read_set(folder, broken=left_out)]
            brings = ("edit", "source", "target", "prompt", "source_prompt", "mask")
            self.refuse(brings, f"the items in {folder} bring their own")
        names = [job[0] for job in jobs]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"--batch {folder}: has several pictures called {name}; rename one")
        return [Job(*job, out=self.out / f"{job[0]}.png") for job in jobs]

    def pipeline(self) -> "StableDiffusion":
        """The model, with the adapters if there are any, on all devices that a batch can be split over."""
        import jax

        from sd_port.nano.devices import all_devices

        devices, mesh = len(jax.devices()), None
        if self.batch is not None and devices > 1 and self.batch_size % devices == 0:
            mesh = all_devices()
        return self.load(self.lora, self.embedding, mesh)

    def masks_of(self, jobs: Sequence[Ready]) -> np.ndarray | None:
        """(batch, height, width), all 1 where there is none; nothing at all for a single picture without one.

        In a folder all pictures have one, so that what becomes of one does not depend on its neighbours.
        """
        if self.batch is None and all(job.mask is None for job in jobs):
            return None
        return np.stack([np.ones(job.image.shape[:2], np.float32) if job.mask is None else job.mask for job in jobs])

    def made_of(self, job: Job) -> dict[str, str]:
        """The hashes of what was read for it."""
        return job.made_of(lora=self.lora, embedding=self.embedding, edit=self.edit)

    def write(self, job: Job, result: EditResult, place: tuple[int, int], model_sha256: str) -> None:
        """The picture last: where it is, all is. Nothing, where something cannot be written."""
        import jax

        record = result.record | {
            "command": self.name,
            "arguments": self.arguments(),
            "seed": self.started_from(),
            "item": job.name,
            "place": list(place),
            "read": self.made_of(job),
            "model_sha256": model_sha256,
            "device": jax.devices()[0].device_kind,
            "versions": versions(),
        }
        job.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        sidecar = job.out.with_suffix(".json")
        if self.is_mine(json_or_none(sidecar)):  # a killed run wrote it, and not the picture
            sidecar.unlink()
        files = {sidecar: lambda file: file.write(text.encode()), **self.sidecar_files(job, result)}
        write_new(files | {job.out: as_png(result.image, record)})

    def sidecar_files(self, job: Job, result: EditResult) -> dict[Path, Write]:
        """What else is written with the picture, all of it or none."""
        return {}

    def arguments(self) -> dict[str, Any]:
        """What decides the pictures, as JSON: the options but for those that say where to write; paths are absolute."""
        options = {name: value for name, value in dataclasses.asdict(self).items() if name not in OUTPUTS}
        options |= self.from_anywhere()
        return json.loads(json.dumps(options, default=lambda path: str(path.absolute())))


def check_picture(job: Job) -> None:
    """Raises ValueError for what has no size, and for a name that JSON cannot hold."""
    if not is_text(str(job.image)):
        raise ValueError(f"{job.image}: the name is not UTF-8; rename the file")
    image_size(job.image)
