"""scheduler_config.json against diffusers: schedules and grids of every class, whatever a config lacks."""

import diffusers
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from sd_port.pipeline import StableDiffusion
from sd_port.scheduler import STEPS_OFFSET, USUAL, Scheduler
from sd_port.weights.configs import SCHEDULER_DEFAULTS
from tests.sd_port.pipelines import ours, theirs
from tests.sd_port.torch_models import to_nchw
from theory.solvers import DDIM

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of diffusers' own

BASE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CLASSES = sorted(USUAL.keys() - {"DPMSolverSDE"})  # which needs a package that is not here
# LCM and TCD have grids of a few steps of their own, DPMSolverSinglestep no choice of spacings.
GRIDS = [(name, None) for name in CLASSES if name not in ("LCM", "TCD")]
GRIDS += [(n, s) for n, _ in GRIDS if n != "DPMSolverSinglestep" for s in ("leading", "trailing", "linspace")]
ZERO_SNR = ("DDIM", "DDPM", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep")
COSINE = {"beta_schedule": "squaredcos_cap_v2"}


def both(name: str, config: dict) -> tuple:
    """diffusers' scheduler with this config, as its pipelines use it, and ours."""
    of_class = getattr(diffusers, f"{name}Scheduler")
    plain = {"skip_prk_steps": True} if name == "PNDM" else {}
    offset = {"steps_offset": STEPS_OFFSET} if name != "DPMSolverSinglestep" else {}
    raw = {**SCHEDULER_DEFAULTS, **config, "_class_name": f"{name}Scheduler"}
    return of_class.from_config({**config, **plain, **offset}), Scheduler.from_json(raw)


def timesteps(scheduler, steps: int) -> np.ndarray:
    """Those of the steps: some classes have others between them, or go through one twice."""
    scheduler.set_timesteps(steps)
    found = np.asarray(scheduler.timesteps, float)
    name = type(scheduler).__name__
    if name.startswith(("KDPM2", "Heun")):
        return found[::2]
    return np.unique(found)[::-1] if name.startswith("PNDM") else found


@pytest.mark.parametrize(("name", "spacing"), GRIDS)
def test_grids(name, spacing):
    """Timestep k stands at (k + 1) / 1000. A grid with one step more is told apart."""
    theirs, ours = both(name, BASE if spacing is None else BASE | {"timestep_spacing": spacing})
    for steps in (2, 10, 30, 50):
        expected = (timesteps(theirs, steps) + 1) / 1000
        np.testing.assert_allclose(ours.grid(steps), np.append(expected, 0), rtol=1e-6)
        assert ours.grid(steps + 1).shape != expected.shape


@pytest.mark.parametrize("config", [{}, BASE, COSINE, {"trained_betas": np.linspace(1e-4, 0.02, 1000).tolist()}])
@pytest.mark.parametrize("name", CLASSES)
def test_schedules(name, config):
    """alphas_cumprod, also where the config does not say what they are."""
    theirs, ours = both(name, config)
    np.testing.assert_allclose(ours.schedule.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("config", [{}, BASE])
@pytest.mark.parametrize("name", ZERO_SNR)
def test_zero_terminal_snr(name, config):
    """All but the last, which is 0 in DDIM and 2^-24 in others: here it is small enough to be either."""
    config = config | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    theirs, ours = both(name, config)
    expected, found = theirs.alphas_cumprod.numpy(), np.asarray(ours.schedule.alphas_cumprod)
    np.testing.assert_allclose(found[:-1], expected[:-1], rtol=1e-3, atol=1e-7)
    assert 0 < found[-1] <= 2**-24 and expected[-1] <= 2**-24


def test_pictures_with_zero_terminal_snr(monkeypatch):
    """From pure noise, as Lin et al. ask for: trailing, v, and the very first timestep, against diffusers' DDIM."""
    config = BASE | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    scheduler, ours_too = both("DDIM", config | {"clip_sample": False, "set_alpha_to_one": True})
    noise = np.random.default_rng(5).normal(size=(1, 16, 16, 4)).astype(np.float32)
    pipe = StableDiffusion(**{**vars(ours()), "scheduler": ours_too})
    monkeypatch.setattr(theirs(), "scheduler", scheduler)
    how = {"num_inference_steps": 10, "guidance_scale": 2.0, "latents": to_nchw(noise), "height": 64, "width": 64}
    expected = theirs()("a boat", **how, output_type="np").images

    def made(pipe: StableDiffusion) -> np.ndarray:
        how = {"key": jr.key(0), "steps": 10, "guidance_scale": 2.0, "height": 64, "width": 64}
        return np.asarray(pipe.generate("a boat", **how, latent=jnp.asarray(noise), solver=DDIM(pipe.schedule, 0.0)))

    assert pipe.scheduler.grid(10)[0] == 1
    assert np.abs(made(pipe) - expected).max() < 3e-4  # 1.3e-4: the first x0 has lost digits
    plain = Scheduler.from_json({**SCHEDULER_DEFAULTS, **config, "rescale_betas_zero_snr": False})
    assert np.abs(made(StableDiffusion(**{**vars(pipe), "scheduler": plain})) - expected).max() > 0.01  # control


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prediction_type": "sample"}, "prediction_type = 'sample'"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule = 'sigmoid'"),
        ({"timestep_spacing": "karras"}, "timestep_spacing = 'karras'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name = 'FlowMatchEulerDiscreteScheduler'"),
        ({"rescale_betas_zero_snr": True}, "needs prediction_type = 'v_prediction'"),
    ],
)
def test_unsupported_schedulers_are_named(change, named):
    with pytest.raises(ValueError, match=named):
        Scheduler.from_json({**SCHEDULER_DEFAULTS, **BASE, **change})
    assert Scheduler.from_json({**SCHEDULER_DEFAULTS, **BASE, "_class_name": "FlaxDDIMScheduler"}).spacing == "leading"


@pytest.mark.parametrize("name", ["DDIM", "EulerDiscrete", "DPMSolverMultistep"])
def test_more_steps_than_a_grid_has(name):
    """No step is left out in silence; 999 trailing and 999 leading ones are there."""
    scheduler = both(name, BASE)[1]
    with pytest.raises(ValueError, match=r"1000 steps of 'leading'|1001 steps of 'leading'"):
        scheduler.grid(1000, "leading")
    assert scheduler.grid(1000, "trailing").size == 1001 and scheduler.grid(499, "leading").size == 500
    with pytest.raises(ValueError, match="1001 steps"):
        scheduler.grid(1001, "trailing")
