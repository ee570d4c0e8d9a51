"""Edits by text as commands: sdedit, cycle, ddib, diffedit, reconstruct, and inpaint."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from sd_port.commands.edit import EditCommand, Ready, masks_of
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

    def config(self, kind: Kind) -> TranslateConfig:
        return TranslateConfig(kind, self.t0, self.steps, self.order, guidance_of(self.model, self.guidance))

    def translated(self, pipe, jobs: Sequence[Ready], key, kind: Kind, masks=None) -> list[EditResult]:
        before, after = prompts_of(jobs)
        masks = masks_of(jobs) if masks is None else masks
        return translate(pipe, images_of(jobs), before, after, self.config(kind), key=key, masks=masks)


@dataclasses.dataclass(frozen=True)
class SdeditCommand(_Translate):
    """SDEdit: noises the picture and solves back with a prompt."""

    name = "sdedit"

    method: Literal["sde", "ode"] = "sde"
    """How the way back is solved."""

    def edited(self, pipe, jobs, key, told) -> list[EditResult]:
        return self.translated(pipe, jobs, key, "sdedit" if self.method == "sde" else "sdedit-ode")


@dataclasses.dataclass(frozen=True)
class CycleCommand(_Translate):
    """CycleDiffusion, the paper's Cycle-SDE: what the two prompts share stays where it is."""

    name = "cycle"

    source_prompt: str = ""
    """What the picture shows."""

    def edited(self, pipe, jobs, key, told) -> list[EditResult]:
        return self.translated(pipe, jobs, key, "cycle")


@dataclasses.dataclass(frozen=True)
class DdibCommand(_Translate):
    """DDIB: inverts the ODE under one prompt and solves back under another."""

    name = "ddib"

    source_prompt: str = ""
    """What the picture shows."""

    def edited(self, pipe, jobs, key, told) -> list[EditResult]:
        return self.translated(pipe, jobs, key, "ddib")


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

    def edited(self, pipe, jobs, key, told) -> list[EditResult]:
        masks = masks_of(jobs)
        if masks is None:
            before, after = prompts_of(jobs)
            guidance = guidance_of(self.model, self.guidance)
            found = difference_mask(
                pipe, images_of(jobs), before, after, key=key, threshold=self.threshold, guidance=guidance
            )
            masks = found.mask
        return self.translated(pipe, jobs, key, "cycle" if self.method == "sde" else "ddib", masks)


@dataclasses.dataclass(frozen=True)
class ReconstructCommand(_Translate):
    """Goes up and back without an edit, and prints what was lost on the way."""

    name = "reconstruct"

    method: Literal["sde", "ode"] = "sde"
    """Cycle-SDE, which loses nothing, or DDIM inversion."""

    def config(self, kind: Kind) -> TranslateConfig:
        guidance = 1.0 if self.guidance is None else self.guidance
        return TranslateConfig(kind, self.t0, self.steps, self.order, guidance)

    def edited(self, pipe, jobs, key, told) -> list[EditResult]:
        images, config = images_of(jobs), self.config("cycle" if self.method == "sde" else "ddib")
        results = reconstruct(pipe, images, [job.request.prompt for job in jobs], config, key=key)
        for image, latents, result in zip(images, np.asarray(encode(pipe, images)), results, strict=True):
            lost = np.linalg.norm(result.latents - latents) / np.linalg.norm(latents)
            decibel = -10 * np.log10(np.mean((result.image - image) ** 2))
            print(f"latents: {lost:.2g} of their length lost; picture: {decibel:.1f} dB")
        return results


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

    def edited(self, pipe, jobs, key, told) -> list[EditResult]:
        if any(job.mask is None for job in jobs):
            raise ValueError("--mask: inpainting needs one; white is made anew")
        masks = np.stack([job.mask for job in jobs if job.mask is not None])
        config = InpaintConfig(self.method, self.steps, self.order, guidance_of(self.model, self.guidance))
        return inpaint(pipe, images_of(jobs), masks, [job.request.prompt for job in jobs], config, key=key)


def images_of(jobs: Sequence[Ready]) -> np.ndarray:
    return np.stack([job.image for job in jobs])


def prompts_of(jobs: Sequence[Ready]) -> tuple[list[str], list[str]]:
    """What the pictures show, and what the results are to show."""
    return [job.request.source_prompt for job in jobs], [job.request.prompt for job in jobs]
