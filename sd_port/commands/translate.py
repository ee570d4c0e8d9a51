"""Edits by text as commands: sdedit, cycle, ddib, diffedit, and reconstruct."""

import dataclasses
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import numpy as np

from sd_port.commands.edit import EditCommand, Ready
from sd_port.commands.options import at_least, guidance_of
from sd_port.edit_configs import Kind, TranslateConfig
from sd_port.images import EditResult


@dataclasses.dataclass(frozen=True)
class _Translate(EditCommand):
    """What translations take."""

    t0: float | None = None
    """How far up the way goes: 0 is the picture, 1 is noise; 0.7 by default."""
    steps: int | None = None
    """Solver steps between t0 and the picture; 50 by default."""
    order: Literal[1, 2] | None = None
    """Of the solver; 1 by default."""
    guidance: float | None = None
    """How much the prompt counts on the way back: by default 7.5, 3 for nano, and 1 for reconstruct."""
    lora_scale: float | None = None
    """How much the LoRA counts; 1 by default."""

    @property
    @abstractmethod
    def kind(self) -> Kind:
        """Which of the translations it is."""

    def settings(self) -> TranslateConfig:
        """Raises ValueError for settings that cannot be."""
        kind = self.brought().config.get("kind", self.kind)
        if kind != self.kind:
            raise ValueError(
                f"--edit {self.edit}: is for {kind}, and this is {self.kind}; give another command or method"
            )
        return self.settled(TranslateConfig, guidance=self.default_guidance())

    def default_guidance(self) -> float:
        return guidance_of(self.model, None)

    def check(self) -> None:
        super().check()
        self.settings()

    def check_job(self, job, pipe) -> None:
        from sd_port.edits.canvas import check_text_model

        check_text_model(pipe, self.name)
        super().check_job(job, pipe)
        self.settings().grid(pipe.schedule)


@dataclasses.dataclass(frozen=True)
class SdeditCommand(_Translate):
    """SDEdit: noises the picture and solves back with a prompt."""

    name = "sdedit"

    method: Literal["sde", "ode"] = "sde"
    """How the way back is solved."""

    @property
    def kind(self) -> Kind:
        return "sdedit" if self.method == "sde" else "sdedit-ode"

    def edited(self, pipe, jobs, key, told) -> list[EditResult]:
        from sd_port.edits.translate import translate

        before, after = prompts_of(jobs)
        return translate(pipe, images_of(jobs), before, after, self.settings(), key=key, masks=self.masks_of(jobs))


@dataclasses.dataclass(frozen=True)
class _FromPrompt(_Translate):
    """What translations from one prompt to another take."""

    source_prompt: str = ""
    """What the picture shows."""
    source_guidance: float | None = None
    """How much it counts on the way up; 1 by default."""
    forward_batch: int = 4
    """Latents of the way up to ask the network for at once, all pictures together: more fill a GPU, and need memory."""

    def check(self) -> None:
        super().check()
        at_least(self, forward_batch=1)

    def check_files(self, job) -> None:
        super().check_files(job)
        before, after, config = job.request.source_prompt, job.request.prompt, self.settings()
        if before == after and (not after or config.guidance == config.source_guidance):
            raise ValueError(
                f"{job.image}: nothing would change, as its prompts are the same: say in --source-prompt what it "
                "shows, and in --prompt what it is to show"
            )

    def edited(self, pipe, jobs, key, told) -> list[EditResult]:
        from sd_port.edits.translate import translate

        before, after = prompts_of(jobs)
        return translate(
            pipe,
            images_of(jobs),
            before,
            after,
            self.settings(),
            key=key,
            masks=self.masks_of(jobs),
            batch_size=self.forward_batch,
        )


@dataclasses.dataclass(frozen=True)
class CycleCommand(_FromPrompt):
    """CycleDiffusion, the paper's Cycle-SDE: what the two prompts share stays where it is."""

    name = "cycle"

    @property
    def kind(self) -> Kind:
        return "cycle"


@dataclasses.dataclass(frozen=True)
class DdibCommand(_FromPrompt):
    """DDIB: inverts the ODE under one prompt and solves back under another."""

    name = "ddib"

    @property
    def kind(self) -> Kind:
        return "ddib"


@dataclasses.dataclass(frozen=True)
class DiffeditCommand(_FromPrompt):
    """DiffEdit: finds where two prompts differ, and edits there only, by Cycle-SDE or the ODE."""

    name = "diffedit"

    method: Literal["sde", "ode"] = "sde"
    """Cycle-SDE within the mask, or DDIM inversion as published."""
    threshold: float = 0.5
    """The mask is where the difference, relative to `clip` times its mean, is larger."""
    clip: float = 3.0
    """Differences count up to this many times their mean."""
    mask_t: float = 0.5
    """The time at which they are taken: 0 is the picture, 1 is noise."""
    draws: int = 10
    """Of the noise, over which they are averaged."""

    @property
    def kind(self) -> Kind:
        return "cycle" if self.method == "sde" else "ddib"

    def check(self) -> None:
        super().check()
        at_least(self, draws=1)
        if not 0 <= self.threshold < 1:
            raise ValueError(f"--threshold {self.threshold}: must lie in [0, 1), or the mask is empty")
        if not 0 < self.mask_t <= 1:
            raise ValueError(f"--mask-t {self.mask_t}: must lie in (0, 1]")
        if not 0 < self.clip < np.inf:
            raise ValueError(f"--clip {self.clip}: must be a positive number")

    def edited(self, pipe, jobs, key, told) -> list[EditResult]:
        import jax.random as jr

        from sd_port.edits.translate import difference_mask, translate

        images, (before, after), config = images_of(jobs), prompts_of(jobs), self.settings()
        masks = self.masks_of(jobs)
        if masks is None or any(job.mask is None for job in jobs):
            found = difference_mask(
                pipe,
                images,
                before,
                after,
                key=jr.fold_in(key, 2**31),  # the edit takes the key itself
                t=self.mask_t,
                draws=self.draws,
                threshold=self.threshold,
                clip=self.clip,
                lora_scale=config.lora_scale,
            ).mask
            pairs = zip(jobs, found, strict=True)
            masks = np.stack([self.found(mask) if job.mask is None else job.mask for job, mask in pairs])
        batch_size = self.forward_batch
        return translate(pipe, images, before, after, config, key=key, masks=masks, batch_size=batch_size)

    def found(self, mask: np.ndarray) -> np.ndarray:
        """The mask, or where nothing stands out, everything: the prompts may ask for a change of all of it."""
        if mask.any():
            return mask
        warnings.warn(
            f"nowhere do the prompts differ by more than --threshold {self.threshold}: all of the picture is edited",
            stacklevel=2,
        )
        return np.ones_like(mask)


@dataclasses.dataclass(frozen=True)
class ReconstructCommand(_Translate):
    """Goes up and back without an edit, and prints what was lost on the way."""

    name = "reconstruct"

    method: Literal["sde", "ode"] = "sde"
    """Cycle-SDE, which loses nothing, or DDIM inversion."""
    forward_batch: int = 4
    """Latents of the way up to ask the network for at once, all pictures together: more fill a GPU, and need memory."""

    @property
    def kind(self) -> Kind:
        return "cycle" if self.method == "sde" else "ddib"

    def default_guidance(self) -> float:
        return 1.0

    def check(self) -> None:
        super().check()
        at_least(self, forward_batch=1)
        self.refuse(("mask",), "there is nothing to protect where nothing is edited")

    def edited(self, pipe, jobs, key, told) -> list[EditResult]:
        from sd_port.edits.canvas import encode
        from sd_port.edits.translate import reconstruct

        images, prompts = images_of(jobs), [job.request.prompt for job in jobs]
        results = reconstruct(pipe, images, prompts, self.settings(), key=key, batch_size=self.forward_batch)
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


def images_of(jobs: Sequence[Ready]) -> np.ndarray:
    return np.stack([job.image for job in jobs])


def prompts_of(jobs: Sequence[Ready]) -> tuple[list[str], list[str]]:
    """What the pictures show, and what the results are to show."""
    return [job.request.source_prompt for job in jobs], [job.request.prompt for job in jobs]
