"""The options of a drag, which one picture and a whole benchmark share."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from sd_port.edit_configs import PRESETS, DragConfig, LoRAConfig, Preset

NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class DragOptions:
    """How to drag; see `DragConfig`."""

    preset: Preset | None = None
    """Where the settings come from that are not given here: by default paper, and nano for that model."""
    method: Literal["sde", "ode"] | None = None
    """SDE-Drag or ODE-Drag."""
    t0: float | Literal["auto"] | None = None
    """How far up the edit is made: 0 is the picture, 1 is noise; auto: where a patch of this radius is as well known as
    the published one is at 0.6."""
    steps: int | None = None
    """Solver steps between t0 and the picture."""
    order: Literal[1, 2] | None = None
    """Of the solver."""
    step_size: float | None = None
    """Latent pixels that a patch goes in one operation."""
    radius: int | None = None
    """Half the width of a patch, in latent pixels."""
    alpha: float | None = None
    """By how much the copy is amplified."""
    alpha_first: bool = False
    """In the first operation of each pair only: in every one it inflates what is dragged far."""
    beta: float | None = None
    """How much of the source stays where it was."""
    guidance: tuple[float, float] | None = None
    """How much the prompt counts at the picture and at t0."""
    lora_scale: tuple[float, float] | None = None
    """How much the LoRA counts at the picture and at t0."""
    sequence: bool = False
    """One pair of points after another, instead of all at once."""
    follow: Literal["on", "off"] | None = None
    """on: every operation copies from where the thing is by then, and the last is the one in which it arrives; off: as
    published, from where it should be. By default on for the preset nano alone."""
    carry_noise: bool = False
    """The recorded noise goes along with the patch (SDE-Drag)."""
    compat: Literal["clean", "reference"] | None = None
    """reference: the published code's timesteps, overshoot, and masks that do not hold at t0."""
    lora_steps: int = 0
    """Steps of training adapters on the picture first, with which more of it is kept; see sd-edit lora."""
    lora_rank: int = 16
    """The rank of these adapters."""
    lora_learning_rate: float = 2e-4
    """Of AdamW for these adapters; smaller models bear larger ones."""
    lora_batch: int = 1
    """Draws of noise and time in a step of it."""

    def settings_on(self, model: str, brought: Mapping[str, Any] = NOTHING) -> DragConfig:
        """The preset, with what was said otherwise; what a file brings takes the place of a preset that is not given.

        Raises ValueError for settings that cannot be.
        """
        names = {field.name for field in dataclasses.fields(DragConfig)}
        options = {name: getattr(self, name) for name in names}
        given = {name: value for name, value in options.items() if value is not None and value is not False}
        if self.follow is not None:
            given["follow"] = self.follow == "on"
        preset = self.preset or ("nano" if model == "nano" else "paper")
        return dataclasses.replace(PRESETS[preset], **{**(brought if self.preset is None else NOTHING), **given})

    def lora_config(self) -> LoRAConfig:
        return LoRAConfig(self.lora_rank, self.lora_steps, self.lora_learning_rate, self.lora_batch)
