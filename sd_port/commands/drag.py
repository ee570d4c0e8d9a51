"""sd-edit drag: SDE-Drag and ODE-Drag on files."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from sd_port.checks import Points, check_points
from sd_port.commands.drag_options import DragOptions
from sd_port.commands.edit import EditCommand
from sd_port.commands.jobs import Job
from sd_port.commands.options import at_least, new_file
from sd_port.dragbench import Request
from sd_port.edit_configs import DragConfig
from sd_port.images import EditResult, image_size, read_image, to_pil
from theory.files import Write


def read_points(words: list[str]) -> tuple[tuple[int, int], ...]:
    """x y x y ..., commas allowed, to the nearest pixels. Raises ValueError for what are no pairs of numbers."""
    try:
        numbers = [round(float(number)) for number in " ".join(words).replace(",", " ").split()]
    except (ValueError, OverflowError):
        raise ValueError("must be numbers: points x y, in pixels") from None
    if len(numbers) % 2:
        raise ValueError(f"must be pairs, points x y in pixels, and are {len(numbers)} numbers")
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def written_points(points: tuple[tuple[int, int], ...]) -> list[str]:
    """What `read_points` reads."""
    return [str(number) for point in points for number in point]


Pixels = Annotated[
    tuple[tuple[int, int], ...],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="X Y ...",
        instance_from_str=read_points,
        is_instance=lambda points: isinstance(points, tuple),
        str_from_instance=written_points,
    ),
]


@dataclasses.dataclass(frozen=True)
class DragCommand(EditCommand, DragOptions):
    """Drags what is at some points of a picture to others: SDE-Drag, or ODE-Drag.

    sd-edit drag sea.png --source 20 40 --target 44 40 --prompt "a red boat"
    """

    name = "drag"

    source: Pixels = ()
    """Points x y, or x,y, in pixels from the upper left corner: where things are. Fractions go to the nearest pixel."""
    target: Pixels = ()
    """As many points: where they are to go."""
    save_frames: Path | None = None
    """A GIF of the picture after every operation."""
    forward_batch: int = 4
    """Latents of the way up to ask the network for at once, all pictures together: more fill a GPU, and need memory."""

    def settings(self) -> DragConfig:
        """Raises ValueError for settings that cannot be."""
        return self.settings_on(self.model, self.brought().settings(DragConfig))

    def check(self) -> None:
        super().check()
        at_least(self, forward_batch=1)
        self.settings()
        if self.lora_steps and self.lora is not None:
            raise ValueError("--lora-steps trains adapters, and --lora brings some: give one of the two")
        if self.lora_steps and self.batch is not None and self.batch_size != 1:
            raise ValueError("--lora-steps trains on one picture: with --batch give --batch-size 1")
        if self.save_frames is not None:
            new_file("--save-frames", self.save_frames, (".gif",))
            if self.batch is not None:
                raise ValueError("--save-frames writes one GIF: give it without --batch")

    def check_files(self, job) -> None:
        super().check_files(job)
        self.ends(job)

    def check_job(self, job, pipe) -> None:
        from sd_port.edits.canvas import check_text_model
        from sd_port.edits.plan import plan

        check_text_model(pipe, "drag")
        super().check_job(job, pipe)
        settings = self.settings()
        settings.grid(pipe.schedule)
        plan(*self.ends(job), pipe.vae.config.factor, settings)

    def ends(self, job: Job) -> tuple[Points, Points]:
        """Sources and targets in the picture. Raises ValueError for points that are not in pairs, or outside of it."""
        size, (source, target) = image_size(job.image), points_of(job.request)
        from_file = self.edit or self.batch
        names = [f"{from_file}: source", f"{from_file}: target"] if from_file else ["--source", "--target"]
        for name, points in zip(names, (source, target), strict=True):
            if len(points) == 0:
                raise ValueError(f"{name}: must be at least one point x y, in pixels")
        if len(source) != len(target):
            raise ValueError(f"{names[1]}: has {len(target)} points, and there are {len(source)} sources: give pairs")
        return check_points(source, size, names[0]), check_points(target, size, names[1])

    def edited(self, pipe, jobs, key, told) -> list[EditResult]:
        import jax.random as jr

        from sd_port.edits.drag import Drag, drag_many
        from sd_port.lora import train_lora

        if self.lora_steps:
            lora_key, key = jr.split(key)
            settings = self.lora_config()
            for job in jobs:
                train_lora(
                    pipe,
                    job.image,
                    job.request.prompt,
                    settings,
                    key=lora_key,
                    progress=lambda done, total, loss: told(done, total),
                )
        masks = self.masks_of(jobs)
        drags = [
            Drag(job.image, *points_of(job.request), None if masks is None else masks[i], job.request.prompt)
            for i, job in enumerate(jobs)
        ]
        return drag_many(
            pipe,
            drags,
            self.settings(),
            key=key,
            progress=told,
            keep_frames=self.save_frames is not None,
            batch_size=self.forward_batch,
        )

    def sidecar_files(self, job, result) -> dict[Path, Write]:
        if self.save_frames is None:
            return {}
        frames = [to_pil(frame) for frame in (read_image(job.image), *result.frames)]
        options: Any = {"save_all": True, "append_images": frames[1:], "duration": 300, "loop": 0}
        return {self.save_frames: lambda file: frames[0].save(file, format="GIF", **options)}


def points_of(request: Request) -> tuple[np.ndarray, np.ndarray]:
    """Sources and targets, (points, 2) each."""
    return np.array(request.source).reshape(-1, 2), np.array(request.target).reshape(-1, 2)
