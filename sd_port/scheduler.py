"""scheduler_config.json: what a network was trained to predict, on which schedule, and its makers' grid."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np
from jaxtyping import Array, Float

from sd_port.noise_fn import PredictionType
from theory.schedules import DiscreteVP
from theory.solve import Spacing, time_grid

# How a class lays its steps: "rounded" to timesteps, as time_grid does; "exact", where linspace is not rounded;
# "inner", a grid of one step more without its last timestep, unless it is trailing.
Layout = Literal["rounded", "exact", "inner"]

STEPS_OFFSET = 1  # of leading grids: diffusers' pipelines take no other, whatever a config says
CLOSE_TO_ZERO = 2**-24  # alpha² where it would be 0, as in diffusers' solvers: in float32 neither eps nor x0 is lost


class _Usual(NamedTuple):
    """What a class of diffusers' takes where its config does not say otherwise (0.42)."""

    spacing: Spacing = "leading"
    layout: Layout = "rounded"
    beta_schedule: str = "linear"
    beta_start: float = 0.0001
    beta_end: float = 0.02


_DDIM = _Usual()
_EULER = _Usual("linspace", "exact")
_HEUN = _Usual("linspace", "exact", beta_start=0.00085, beta_end=0.012)
_DPM_SOLVER = _Usual("linspace", "inner")
_LCM = _Usual(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
USUAL: dict[str, _Usual] = {
    **dict.fromkeys(("PNDM", "DDIM", "DDIMParallel", "DDPM", "DDPMParallel"), _DDIM),
    **dict.fromkeys(("EulerDiscrete", "EulerAncestralDiscrete", "LMSDiscrete"), _EULER),
    **dict.fromkeys(("HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE"), _HEUN),
    **dict.fromkeys(("DPMSolverMultistep", "DPMSolverSinglestep"), _DPM_SOLVER),
    **dict.fromkeys(("DEISMultistep", "UniPCMultistep", "SASolver"), _DPM_SOLVER),
    **dict.fromkeys(("LCM", "TCD"), _LCM),
}


class Scheduler(NamedTuple):
    """The schedule of training, the prediction, and the default grid."""

    schedule: DiscreteVP
    prediction_type: PredictionType = "epsilon"
    spacing: Spacing = "leading"
    layout: Layout = "rounded"

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Scheduler":
        """Reads the config of diffusers' schedulers for Stable Diffusion; what they sample with is chosen elsewhere.

        Raises ValueError for a class, a schedule or a prediction that is not supported, with its name.
        """
        name, prediction = raw["_class_name"], raw["prediction_type"]
        usual = USUAL.get(str(name).removeprefix("Flax").removesuffix("Scheduler"))
        if usual is None:
            raise ValueError(f"scheduler config: _class_name = {name!r} is not supported")
        spacing = raw.get("timestep_spacing", usual.spacing)
        if prediction not in get_args(PredictionType):
            raise ValueError(f"scheduler config: prediction_type = {prediction!r} is not supported")
        if spacing not in ("leading", "trailing", "linspace"):
            raise ValueError(f"scheduler config: timestep_spacing = {spacing!r} is not supported")
        alphas_cumprod = np.cumprod(1 - _betas(usual._asdict() | dict(raw)))
        if raw.get("rescale_betas_zero_snr"):
            if prediction == "epsilon":
                raise ValueError(
                    "scheduler config: rescale_betas_zero_snr = True needs prediction_type = 'v_prediction': "
                    "noise that is predicted from nothing but noise says nothing of the picture"
                )
            alphas_cumprod = _zero_snr(alphas_cumprod)
        return cls(DiscreteVP(tuple(alphas_cumprod.tolist())), prediction, spacing, usual.layout)

    def grid(self, steps: int, spacing: Spacing | None = None) -> Float[Array, " times"]:
        """Decreasing times of `steps` solver steps down to 0, those of the config's class in diffusers.

        Raises ValueError where there are not as many.
        """
        spacing, total = spacing or self.spacing, self.schedule.steps
        if self.layout == "exact" and spacing == "linspace" and 1 <= steps <= total:
            return jax.device_put(np.append((np.linspace(0, total - 1, steps)[::-1] + 1) / total, 0))
        inner = self.layout == "inner" and spacing in ("leading", "linspace")
        ts = np.asarray(time_grid(self.schedule, steps + inner, spacing, offset=STEPS_OFFSET))
        if inner:
            ts = np.delete(ts, -2)
        if ts.size != steps + 1:
            raise ValueError(f"{steps} steps of {spacing!r} do not fit on {total} timesteps; give fewer, or 'trailing'")
        return jax.device_put(ts)


def _betas(raw: Mapping[str, Any]) -> Float[np.ndarray, " steps"]:
    steps, first, last, kind = (raw[key] for key in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule"))
    if raw.get("trained_betas") is not None:
        return np.asarray(raw["trained_betas"], float)
    if kind == "scaled_linear":
        return np.linspace(first**0.5, last**0.5, steps) ** 2
    if kind == "linear":
        return np.linspace(first, last, steps)
    if kind == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021 (arXiv 2102.09672), Eq. (17)
        alphas_cumprod = np.cos((np.linspace(0, 1, steps + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0.999)
    raise ValueError(f"scheduler config: beta_schedule = {kind!r} is not supported")


def _zero_snr(alphas_cumprod: Float[np.ndarray, " steps"]) -> Float[np.ndarray, " steps"]:
    """The schedule drawn out until no signal is left. Lin et al. 2024 (arXiv 2305.08891), Alg. 1.

    No signal is a signal too small to matter: the logarithm of alpha stays finite, and eps gives x0 back.
    """
    alphas = np.sqrt(alphas_cumprod)
    drawn_out = ((alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])) ** 2
    drawn_out[-1] = min(CLOSE_TO_ZERO, drawn_out[-2] / 2)
    return drawn_out
