"""The same trajectory as diffusers' schedulers: same noise, same timesteps, same noise prediction, float32.

The noise prediction is the exact one of a mixture, written twice: in torch below, with Stable Diffusion's
alphas_cumprod in numpy, and in theory.mixtures. diffusers evaluates timestep k at t = (k + 1) / 1000, and its DDIM and
DDPM step by 1000 // steps whatever the timesteps are, so only regular grids can be compared with them.
"""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests import tolerances
from tests.cases import assert_close, plane
from theory.mixtures import noise_fn
from theory.schedules import ScaledLinearVP
from theory.solve import replay, time_grid
from theory.solvers import DDIM, DPMSolverPP2M

# DPMSolverMultistepScheduler.set_timesteps copies a torch tensor in a way that numpy 2 deprecates.
pytestmark = [pytest.mark.hasty, pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")]

SCHEDULE = ScaledLinearVP()
CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
PLAIN = CONFIG | {"clip_sample": False}
CUMPROD = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
LAW = plane()
POINTS = 16


def torch_eps(x: torch.Tensor, timestep: int) -> torch.Tensor:
    """-sigma grad log p_t of the mixture, by torch's densities and autograd, in float64."""
    alpha2 = float(CUMPROD[timestep])
    weights, means, covariances = (torch.tensor(np.array(a)) for a in (LAW.weights, LAW.means, LAW.covariances))
    noised = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(weights),
        torch.distributions.MultivariateNormal(
            alpha2**0.5 * means, alpha2 * covariances + (1 - alpha2) * torch.eye(2, dtype=torch.float64)
        ),
    )
    x64 = x.double().detach().requires_grad_()
    (score,) = torch.autograd.grad(noised.log_prob(x64).sum(), x64)
    return (-((1 - alpha2) ** 0.5) * score).to(x.dtype)


def start_and_noise(steps: int, dtype=np.float32) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(POINTS, 2)).astype(dtype), rng.normal(size=(steps, POINTS, 2)).astype(dtype)


def diffusers_path(scheduler, steps: int, step, dtype=np.float32) -> np.ndarray:
    """x at every timestep and after the last step: (steps + 1, points, 2)."""
    start, noise = start_and_noise(steps, dtype)
    path = [torch.tensor(start)]
    for timestep, w in zip(scheduler.timesteps, torch.tensor(noise), strict=True):
        path.append(step(torch_eps(path[-1], int(timestep)), int(timestep), path[-1], w).prev_sample)
    assert scheduler.timesteps.shape == (steps,)
    return torch.stack(path).numpy()


def our_path(solver, ts, dtype=np.float32) -> jax.Array:
    law = jax.tree.map(lambda a: a.astype(dtype), LAW)
    start, noise = start_and_noise(ts.size - 1, dtype)
    path = replay(solver, noise_fn(law, SCHEDULE), jnp.array(start), ts.astype(dtype), jnp.array(noise))
    assert path.dtype == dtype
    return path


def assert_parity(ours, theirs, rtol=tolerances.PARITY_32):
    """Over the whole trajectory, relative to its largest magnitude."""
    assert np.abs(theirs[-1] - theirs[0]).max() > 0.5  # the trajectory went somewhere
    assert_close(ours, theirs, rtol)


# spacing, diffusers' steps_offset, set_alpha_to_one: if not, the last step goes to timestep 0, t = 1/1000
GRIDS = [("leading", 0, True), ("leading", 1, True), ("leading", 1, False), ("trailing", 0, True)]


def ddim_path(steps, eta, grid, dtype=np.float32):
    spacing, offset, to_one = grid
    config = {"timestep_spacing": spacing, "steps_offset": offset, "set_alpha_to_one": to_one}
    scheduler = diffusers.DDIMScheduler(**PLAIN, **config)
    if dtype == np.float64:
        scheduler.alphas_cumprod = torch.tensor(CUMPROD)
        scheduler.final_alpha_cumprod = torch.tensor(1.0 if to_one else CUMPROD[0], dtype=torch.float64)
    scheduler.set_timesteps(steps)

    def step(eps, timestep, x, w):
        return scheduler.step(eps, timestep, x, eta=eta, variance_noise=w if eta else None)

    return diffusers_path(scheduler, steps, step, dtype)


def ddim_grid(steps, grid):
    spacing, offset, to_one = grid
    return time_grid(SCHEDULE, steps, spacing, offset=offset, end=0.0 if to_one else 1e-3)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [20, 50])
def test_ddim(steps, eta, grid):
    """DDIMScheduler with variance_noise; another eta, or a grid shifted by one timestep, is told apart."""
    theirs, ts = ddim_path(steps, eta, grid), ddim_grid(steps, grid)
    assert_parity(our_path(DDIM(SCHEDULE, eta), ts), theirs)
    with pytest.raises(AssertionError):
        assert_parity(our_path(DDIM(SCHEDULE, abs(eta - 1e-3)), ts), theirs)
    with pytest.raises(AssertionError):
        assert_parity(our_path(DDIM(SCHEDULE, eta), ts.at[1].add(1e-3)), theirs)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_in_float64(eta):
    """With float64 tables in diffusers only rounding is left: the float32 differences are diffusers' tables."""
    theirs = ddim_path(50, eta, GRIDS[0], np.float64)
    assert_parity(our_path(DDIM(SCHEDULE, eta), ddim_grid(50, GRIDS[0]), np.float64), theirs, tolerances.PARITY_64)


@pytest.mark.parametrize("grid", [GRIDS[0], GRIDS[3]])
@pytest.mark.parametrize("steps", [20, 50])
def test_ddpm_is_ddim_with_eta_1(steps, grid):
    """DDPMScheduler draws its noise from a generator: the test draws the same from a twin. Not so eta = 0.9."""
    scheduler = diffusers.DDPMScheduler(**PLAIN, timestep_spacing=grid[0])
    scheduler.set_timesteps(steps)
    generator, twin = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    theirs = diffusers_path(scheduler, steps, lambda eps, k, x, w: scheduler.step(eps, k, x, generator=generator))
    noise = torch.stack([torch.randn(POINTS, 2, generator=twin) for _ in range(steps)]).numpy()

    law = jax.tree.map(lambda a: a.astype(np.float32), LAW)
    ts = ddim_grid(steps, grid).astype(np.float32)
    start = jnp.array(theirs[0])
    assert_parity(replay(DDIM(SCHEDULE, 1.0), noise_fn(law, SCHEDULE), start, ts, jnp.array(noise)), theirs)
    with pytest.raises(AssertionError):
        assert_parity(replay(DDIM(SCHEDULE, 0.9), noise_fn(law, SCHEDULE), start, ts, jnp.array(noise)), theirs)


def dpm_path(ts, algorithm_type, order, **config):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **CONFIG, algorithm_type=algorithm_type, solver_order=order, lower_order_final=False, **config
    )
    timesteps = np.rint(np.asarray(ts[:-1]) * 1000).astype(int) - 1
    scheduler.set_timesteps(timesteps=timesteps.tolist())

    def step(eps, timestep, x, w):
        return scheduler.step(eps, timestep, x, variance_noise=w if "sde" in algorithm_type else None)

    return diffusers_path(scheduler, len(timesteps), step)


@pytest.mark.parametrize("algorithm_type", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [20, 50])
def test_dpm_solver_second_order(steps, spacing, algorithm_type):
    """DPMSolverMultistepScheduler, solver_order 2, midpoint, on any grid; the other lambda is told apart.

    diffusers takes a first-order last step to sigma = 0, as DPMSolverPP2M does since h is infinite there.
    """
    ts = time_grid(SCHEDULE, steps, spacing)
    theirs, lam = dpm_path(ts, algorithm_type, 2), float("sde" in algorithm_type)
    assert_parity(our_path(DPMSolverPP2M(SCHEDULE, lam), ts), theirs)
    with pytest.raises(AssertionError):
        assert_parity(our_path(DPMSolverPP2M(SCHEDULE, 1 - lam), ts), theirs)


def test_dpm_solver_to_the_smallest_sigma():
    """final_sigmas_type "sigma_min" ends at t = 1/1000 with a second-order step; ending at 0 is told apart."""
    ts = time_grid(SCHEDULE, 20, "trailing", end=1e-3)
    theirs = dpm_path(ts, "dpmsolver++", 2, final_sigmas_type="sigma_min")
    assert_parity(our_path(DPMSolverPP2M(SCHEDULE, 0.0), ts), theirs)
    with pytest.raises(AssertionError):
        assert_parity(our_path(DPMSolverPP2M(SCHEDULE, 0.0), ts.at[-1].set(0.0)), theirs)


@pytest.mark.parametrize(("algorithm_type", "eta"), [("dpmsolver++", 0.0), ("sde-dpmsolver++", 1.0)])
@pytest.mark.parametrize("steps", [20, 50])
def test_dpm_solver_first_order_is_ddim(steps, algorithm_type, eta):
    """solver_order 1 is DDIM(0) as an ODE and DDIM(1) as an SDE, also on an irregular grid; order 2 is not."""
    ts = time_grid(SCHEDULE, steps, "linspace")
    assert_parity(our_path(DDIM(SCHEDULE, eta), ts), dpm_path(ts, algorithm_type, 1))
    with pytest.raises(AssertionError):
        assert_parity(our_path(DDIM(SCHEDULE, eta), ts), dpm_path(ts, algorithm_type, 2))
