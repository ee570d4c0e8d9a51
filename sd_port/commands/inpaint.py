"""sd-edit inpaint: what is under a mask is made anew."""

import dataclasses
from typing import Literal

from sd_port.commands.edit import EditCommand
from sd_port.commands.options import guidance_of
from sd_port.commands.translate import images_of
from sd_port.edit_configs import InpaintConfig
from sd_port.images import EditResult


@dataclasses.dataclass(frozen=True)
class InpaintCommand(EditCommand):
    """Makes anew what is under the mask's white, and holds the rest."""

    name = "inpaint"
    share = 0.0

    method: Literal["sde", "ode"] | None = None
    """How it is solved; sde by default."""
    steps: int | None = None
    """Solver steps; 50 by default."""
    order: Literal[1, 2] | None = None
    """Of the solver; 1 by default."""
    guidance: float | None = None
    """How much the prompt counts; by default 7.5, and 3 for nano."""
    lora_scale: float | None = None
    """How much the LoRA counts; 1 by default."""

    def settings(self) -> InpaintConfig:
        """Raises ValueError for settings that cannot be."""
        return self.settled(InpaintConfig, guidance=guidance_of(self.model, None))

    def check(self) -> None:
        super().check()
        self.settings()

    def check_files(self, job) -> None:
        super().check_files(job)
        if job.mask is None:
            raise ValueError(f"{job.image} has no mask: give --mask; what is white in it is made anew")

    def check_job(self, job, pipe) -> None:
        super().check_job(job, pipe)
        pipe.scheduler.grid(self.settings().steps)

    def edited(self, pipe, jobs, key, told) -> list[EditResult]:
        from sd_port.edits.inpaint import inpaint

        prompts, masks = [job.request.prompt for job in jobs], self.masks_of(jobs)
        assert masks is not None
        return inpaint(pipe, images_of(jobs), masks, prompts, self.settings(), key=key)
