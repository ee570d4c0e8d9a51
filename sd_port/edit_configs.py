"""What edits and adapters can be set to, and the published settings. Read by commands before JAX is loaded."""

import dataclasses
import math
from typing import TYPE_CHECKING, Literal

import numpy as np

from sd_port.checks import check_scale

if TYPE_CHECKING:  # methods load what computes when they are called
    import optax

    from sd_port.noise_fn import Ramp
    from theory.schedules import DiscreteVP
    from theory.types import Solver, Times

PAPER_RADIUS = 5
MOST_STEPS = 100_000  # more than any schedule has, and few enough for a grid of them


@dataclasses.dataclass(frozen=True)
class DragConfig:
    """The settings of a drag, by default the published ones for latents of 64 x 64.

    Only `method`, `steps`, `order`, `compat`, `carry_noise`, and whether there is any guidance compile. `steps` are
    those from t0 to the image: the paper's 200 are of the whole way, and 0.6 of them are 120. Pairs are (at the image,
    at t0), between which guidance goes on a straight line and the scale of LoRA adapters on a cosine. Lengths are in
    latent pixels.

    compat = "reference" takes the timesteps of the published code, diffusers' "linspace" ones with the image at the
    lowest, and its ramps, which overshoot their ends by one part in steps - 1; masks do not hold at t0, and patches
    that a step is too short for are amplified where they are. One gap of its timesteps is shorter than the others (504
    to 500, of 200), and its step there ends at 499, from where the next one starts as if it were 500. Here that step
    ends where the next one starts.

    Beyond the paper: t0 = "auto" is the time at which all cells of a patch together are as far above the noise as those
    of the published patch at 0.6; `alpha_first` amplifies each pair in its first operation only; `carry_noise` moves
    the recorded noise along with the patch, which otherwise remembers what was there before; `follow` looks for what is
    dragged before every operation, copies from where it is by then, and stops when it has arrived
    (`sd_port.edits.follow`).
    """

    method: Literal["sde", "ode"] = "sde"
    t0: float | Literal["auto"] = 0.6
    steps: int = 120
    order: Literal[1, 2] = 1
    step_size: float = 2.0
    radius: int = 5
    alpha: float = 1.1
    beta: float = 0.3
    guidance: tuple[float, float] = (1.0, 3.0)
    lora_scale: tuple[float, float] = (1.0, 0.5)
    sequence: bool = False  # one pair of points after another, instead of all at once
    compat: Literal["clean", "reference"] = "clean"
    alpha_first: bool = False
    carry_noise: bool = False
    follow: bool = False

    def __post_init__(self):
        """Raises ValueError, naming the setting."""
        for name, good in (
            ("t0", self.t0 == "auto" or 0 < self.t0 < 1),
            ("steps", 2 <= self.steps <= MOST_STEPS),
            ("step_size", self.step_size > 0),
            ("radius", 1 <= self.radius < 2**31),
            ("alpha", np.isfinite(self.alpha)),
            ("beta", 0 <= self.beta <= 1),
        ):
            if not good:
                raise ValueError(f"{name} = {getattr(self, name)} cannot be: {_NEEDS[name]}")
        check_scale("guidance", *self.guidance)
        check_scale("lora_scale", *self.lora_scale)
        if self.method == "ode" and self.order == 2:
            raise ValueError("order = 2 cannot be inverted: ODE-Drag takes order 1")
        if self.method == "ode" and self.carry_noise:
            raise ValueError("carry_noise has nothing to carry in ODE-Drag, which records no noise")

    def start(self, schedule: "DiscreteVP") -> float:
        """t0: as given, or where cells * SNR is that of the published patch at 0.6 on Stable Diffusion's schedule."""
        if self.t0 != "auto":
            return self.t0
        import jax.numpy as jnp

        from theory.schedules import ScaledLinearVP

        fewer_cells = jnp.log((PAPER_RADIUS / self.radius) ** 2)
        return float(schedule.t_of_log_snr(ScaledLinearVP().log_snr(jnp.float32(0.6)) + fewer_cells))

    def grid(self, schedule: "DiscreteVP") -> "Times":
        """Times from t0 to the image, (steps + 1,). Raises ValueError where the published grid does not fit."""
        import jax.numpy as jnp

        if self.compat == "clean":
            return _down_to_the_picture(schedule, self.start(schedule), self.steps)
        t0 = self.start(schedule)
        total = math.ceil(self.steps / t0 - 1e-6)  # the fewest of which t0 are `steps`
        if not self.steps < total <= schedule.steps:
            raise ValueError(f"t0 = {t0} and steps = {self.steps} do not fit the published grid of timesteps")
        timesteps = np.round(np.linspace(0, schedule.steps - 1, total + 1))[self.steps + 1 : 0 : -1]
        return jnp.asarray((timesteps + 1) / schedule.steps, jnp.float32)

    def ramps(self, ts: "Times") -> "tuple[Ramp, Ramp]":
        """Guidance and LoRA scale at the times that steps start from."""
        from sd_port.noise_fn import Ramp

        last = self.steps - 1 if self.compat == "reference" else self.steps
        way = (np.arange(1, self.steps + 1) / last).astype(np.float32)
        times, bend = np.asarray(ts)[-2::-1], (1 - np.cos(np.pi * way)) / 2
        (g_image, g_t0), (l_image, l_t0) = self.guidance, self.lora_scale
        return Ramp(times, g_image + (g_t0 - g_image) * way), Ramp(times, l_image + (l_t0 - l_image) * bend)


_NEEDS = {
    "t0": "it must lie between 0 and 1",
    "steps": f"it must lie in [2, {MOST_STEPS}]",
    "step_size": "it must be positive",
    "radius": "it must be at least 1, and 31 bits",
    "alpha": "it must be a number",
    "beta": "it must lie in [0, 1]",
}


def _down_to_the_picture(schedule: "DiscreteVP", t0: float, steps: int) -> "Times":
    """Times from t0 to the first timestep, (steps + 1,). Raises ValueError for a t0 that is no later."""
    import jax.numpy as jnp

    from theory.solve import time_grid

    if t0 * schedule.steps <= 1:
        least = 2 / schedule.steps
        raise ValueError(f"t0 = {t0:g} cannot be: there the picture itself stands; the least that works is {least:g}")
    return time_grid(schedule, steps, start=t0, end=1 / schedule.steps).astype(jnp.float32)


Preset = Literal["paper", "fast", "draft", "nano"]
PRESETS: dict[Preset, DragConfig] = {
    "paper": DragConfig(),
    "fast": DragConfig(steps=12, order=2),
    "draft": DragConfig(steps=6, order=2, step_size=4.0),
    "nano": DragConfig(t0=0.4, steps=15, radius=2, step_size=1.0, guidance=(1.0, 1.0), follow=True),
}


@dataclasses.dataclass(frozen=True)
class InpaintConfig:
    """A solver of this order for the ODE or the SDE, on the model's own grid of times, from pure noise."""

    method: Literal["sde", "ode"] = "sde"
    steps: int = 50
    order: Literal[1, 2] = 1
    guidance: float = 7.5
    lora_scale: float = 1.0

    def __post_init__(self):
        """Raises ValueError, naming the setting."""
        if not 1 <= self.steps <= MOST_STEPS:
            raise ValueError(f"steps = {self.steps} cannot be: it must lie in [1, {MOST_STEPS}]")
        for name in ("guidance", "lora_scale"):
            check_scale(name, getattr(self, name))


Kind = Literal["sdedit-ode", "sdedit", "ddib", "cycle"]


@dataclasses.dataclass(frozen=True)
class TranslateConfig:
    """How to translate: up to t0 and back in this many steps of a solver of this order, guidance on the way back.

    The way up, where there is one through the network, has `source_guidance`, 1 by default: a larger one is seldom
    undone by the way back. Only `kind`, `steps`, `order`, and whether there is guidance compile.
    """

    kind: Kind = "cycle"
    t0: float = 0.7
    steps: int = 50
    order: Literal[1, 2] = 1
    guidance: float = 7.5
    source_guidance: float = 1.0
    lora_scale: float = 1.0

    def __post_init__(self):
        """Raises ValueError, naming the setting."""
        if not 0 < self.t0 <= 1:
            raise ValueError(f"t0 = {self.t0} cannot be: it must lie in (0, 1]")
        if not 1 <= self.steps <= MOST_STEPS:
            raise ValueError(f"steps = {self.steps} cannot be: it must lie in [1, {MOST_STEPS}]")
        for name in ("guidance", "source_guidance", "lora_scale"):
            check_scale(name, getattr(self, name))
        if self.kind == "ddib" and self.order == 2:
            raise ValueError("order = 2 cannot be inverted: DDIB takes order 1")

    def solver(self, schedule: "DiscreteVP") -> "Solver":
        from sd_port.edits.canvas import solver_of

        return solver_of(schedule, "sde" if self.kind in ("sdedit", "cycle") else "ode", self.order)

    def grid(self, schedule: "DiscreteVP") -> "Times":
        """From t0 to the image, which stands at the first timestep: noise cannot be recorded down to t = 0."""
        return _down_to_the_picture(schedule, self.t0, self.steps)


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """AdamW at a constant rate. The defaults are those of SDE-Drag's interface; its benchmark took rank 4."""

    rank: int = 16
    steps: int = 100
    learning_rate: float = 2e-4
    batch: int = 1
    weight_decay: float = 1e-2

    def __post_init__(self):
        """Raises ValueError, naming the setting."""
        for name in ("rank", "steps", "batch", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)} cannot be: it must be positive")

    def optimizer(self) -> "optax.GradientTransformation":
        import optax

        return optax.adamw(self.learning_rate, weight_decay=self.weight_decay)


@dataclasses.dataclass(frozen=True)
class Dragging:
    """What decides the pictures, beside the items and the model."""

    config: DragConfig
    lora: LoRAConfig | None  # adapters trained on every picture first
    seed: int
    dtype: str
    prediction_type: str | None = None  # of a single file that does not say it; the weights do not tell
