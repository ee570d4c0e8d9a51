"""scheduler_config.json: what a network was trained to predict, on which schedule, and its makers' grid."""

from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

import numpy as np
from jaxtyping import Array, Float

from sd_port.noise_fn import PredictionType
from theory.schedules import DiscreteVP, ScaledLinearVP
from theory.solve import Spacing, time_grid


class Scheduler(NamedTuple):
    """The schedule of training, the prediction, and the default grid."""

    schedule: DiscreteVP
    prediction_type: PredictionType = "epsilon"
    spacing: Spacing = "leading"
    offset: int = 1

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Scheduler":
        """Reads the config of any of diffusers' schedulers; what they sample with is chosen elsewhere.

        Raises ValueError for a schedule or a prediction that is not supported, with its name.
        """
        steps, first, last = raw["num_train_timesteps"], raw["beta_start"], raw["beta_end"]
        prediction, spacing, kind = raw["prediction_type"], raw["timestep_spacing"], raw["beta_schedule"]
        if raw.get("rescale_betas_zero_snr"):
            raise ValueError("scheduler config: rescale_betas_zero_snr = True is not supported: alpha would be 0")
        if prediction not in get_args(PredictionType):
            raise ValueError(f"scheduler config: prediction_type = {prediction!r} is not supported")
        if spacing not in ("leading", "trailing", "linspace"):
            raise ValueError(f"scheduler config: timestep_spacing = {spacing!r} is not supported")
        if raw.get("trained_betas") is not None:
            schedule = DiscreteVP(tuple(np.cumprod(1 - np.asarray(raw["trained_betas"], float)).tolist()))
        elif kind == "scaled_linear":
            schedule = ScaledLinearVP(first, last, steps)
        elif kind == "linear":
            schedule = DiscreteVP(tuple(np.cumprod(1 - np.linspace(first, last, steps)).tolist()))
        else:
            raise ValueError(f"scheduler config: beta_schedule = {kind!r} is not supported")
        return cls(schedule, prediction, spacing, raw["steps_offset"])

    def grid(self, steps: int, spacing: Spacing | None = None) -> Float[Array, " times"]:
        """Decreasing times of `steps` solver steps down to 0."""
        return time_grid(self.schedule, steps, spacing or self.spacing, offset=self.offset)
