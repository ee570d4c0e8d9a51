"""Edits by text as commands: sdedit, cycle, ddib, diffedit, reconstruct, and inpaint."""

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import numpy as np

from sd_port.commands.edit import EditCommand, Ready
from sd_port.commands.options import guidance_of
from sd_port.edits.canvas import EditResult, encode
from sd_port.edits.inpaint import InpaintConfig, inpaint
from sd_port.edits.translate import Kind, TranslateConfig, difference_mask, reconstruct, translate


@dataclasses.dataclass(frozen=True)
class _Translate(EditCommand):
    """What translations take."""

    t0: float = 0.7
    """How far up the way goes: 0 is the picture, 1 is noise."""
    steps: int = 50
    """Solver steps between t0 and the picture."""
    order: Literal[1, 2] = 1
    """Of the solver."""
    guidance: float | None = None
    """How much the prompt counts on the way back: by default 7.5, 3 for nano, and 1 for reconstruct."""

    @property
    @abstractmethod
    def kind(self) -> Kind:
        """Which of the translations it is."""

    def config(self) -> TranslateConfig:
        """Raises ValueError for settings that cannot be."""
        return TranslateConfig(self.kind, self.t0, self.steps, self.order, guidance_of(self.model, self.guidance))

    def check(self) -> None:
        super().check()
        self.config()

    def edited(self, pipe, jobs, key, told) -> list[EditResult]:
        before, after = prompts_of(jobs)
        return translate(pipe, images_of(jobs), before, after, self.config(), key=key, masks=self.masks_of(jobs))


@dataclasses.dataclass(frozen=True)
class SdeditCommand(_Translate):
    """SDEdit: noises the picture and solves back with a prompt."""

    name = "sdedit"

    method: Literal["sde", "ode"] = "sde"
    """How the way back is solved."""

    @property
    def kind(self) -> Kind:
        return "sdedit" if self.method == "sde" else "sdedit-ode"


@dataclasses.dataclass(frozen=True)
class CycleCommand(_Translate):
    """CycleDiffusion, the paper's Cycle-SDE: what the two prompts share stays where it is."""

    name = "cycle"

    source_prompt: str = ""
    """What the picture shows."""

    @property
    def kind(self) -> Kind:
        return "cycle"


@dataclasses.dataclass(frozen=True)
class DdibCommand(_Translate):
    """DDIB: inverts the ODE under one prompt and solves back under another."""

    name = "ddib"

    source_prompt: str = ""
    """What the picture shows."""

    @property
    def kind(self) -> Kind:
        return "ddib"


@dataclasses.dataclass(frozen=True)
class DiffeditCommand(_Translate):
    """DiffEdit: finds where two prompts differ, and edits there only, by Cycle-SDE or the ODE."""

    name = "diffedit"

    source_prompt: str = ""
    """What the picture shows."""
    method: Literal["sde", "ode"] = "sde"
    """Cycle-SDE within the mask, or DDIM inversion as published."""
    threshold: float = 0.5
    """The mask is where the difference, relative to three times its mean, is larger."""

    @property
    def kind(self) -> Kind:
        return "cycle" if self.method == "sde" else "ddib"

    def check(self) -> None:
        super().check()
        if not 0 <= self.threshold < 1:
            raise ValueError(f"--threshold {self.threshold}: must lie in [0, 1), or the mask is empty")

    def edited(self, pipe, jobs, key, told) -> list[EditResult]:
        images, (before, after), config = images_of(jobs), prompts_of(jobs), self.config()
        masks = self.masks_of(jobs)
        if masks is None or any(job.mask is None for job in jobs):
            found = difference_mask(
                pipe, images, before, after, key=key, threshold=self.threshold, guidance=config.guidance
            )
            masks = np.stack(
                [mask if job.mask is None else job.mask for job, mask in zip(jobs, found.mask, strict=True)]
            )
        return translate(pipe, images, before, after, config, key=key, masks=masks)


@dataclasses.dataclass(frozen=True)
class ReconstructCommand(_Translate):
    """Goes up and back without an edit, and prints what was lost on the way."""

    name = "reconstruct"

    method: Literal["sde", "ode"] = "sde"
    """Cycle-SDE, which loses nothing, or DDIM inversion."""

    @property
    def kind(self) -> Kind:
        return "cycle" if self.method == "sde" else "ddib"

    def config(self) -> TranslateConfig:
        return TranslateConfig(
            self.kind, self.t0, self.steps, self.order, 1.0 if self.guidance is None else self.guidance
        )

    def check(self) -> None:
        super().check()
        self.refuse(("mask",), "there is nothing to protect where nothing is edited")

    def edited(self, pipe, jobs, key, told) -> list[EditResult]:
        images, prompts = images_of(jobs), [job.request.prompt for job in jobs]
        results = reconstruct(pipe, images, prompts, self.config(), key=key)
        found = []
        for image, latents, result in zip(images, np.asarray(encode(pipe, images)), results, strict=True):
            lost = float(np.linalg.norm(result.latents - latents) / np.linalg.norm(latents))
            decibel = float(-10 * np.log10(np.mean((result.image - image) ** 2)))
            found.append(result._replace(record=result.record | {"latents_lost": lost, "psnr": decibel}))
        return found

    def write(self, job, result, place, model_sha256) -> None:
        super().write(job, result, place, model_sha256)
        lost, decibel = result.record["latents_lost"], result.record["psnr"]
        print(f"{job.name or job.image}: {lost:.2g} of the latents' length lost; picture: {decibel:.1f} dB")


@dataclasses.dataclass(frozen=True)
class InpaintCommand(EditCommand):
    """Makes anew what is under the mask's white, and holds the rest."""

    name = "inpaint"

    method: Literal["sde", "ode"] = "sde"
    """How it is solved."""
    steps: int = 50
    """Solver steps."""
    order: Literal[1, 2] = 1
    """Of the solver."""
    guidance: float | None = None
    """How much the prompt counts; by default 7.5, and 3 for nano."""

    def config(self) -> InpaintConfig:
        """Raises ValueError for settings that cannot be."""
        return InpaintConfig(self.method, self.steps, self.order, guidance_of(self.model, self.guidance))

    def check(self) -> None:
        super().check()
        self.config()

    def check_job(self, job, factor) -> None:
        super().check_job(job, factor)
        if job.mask is None:
            raise ValueError(f"{job.image} has no mask: give --mask; what is white in it is made anew")

    def edited(self, pipe, jobs, key, told) -> list[EditResult]:
        prompts, masks = [job.request.prompt for job in jobs], self.masks_of(jobs)
        assert masks is not None
        return inpaint(pipe, images_of(jobs), masks, prompts, self.config(), key=key)


def images_of(jobs: Sequence[Ready]) -> np.ndarray:
    return np.stack([job.image for job in jobs])


def prompts_of(jobs: Sequence[Ready]) -> tuple[list[str], list[str]]:
    """What the pictures show, and what the results are to show."""
    return [job.request.source_prompt for job in jobs], [job.request.prompt for job in jobs]
