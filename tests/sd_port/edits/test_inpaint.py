"""Inpainting: what is held is held, and the model with nine channels fills as diffusers' does."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import diffusers
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import torch
from jax.tree_util import Partial
from PIL import Image

from sd_port.edits.inpaint import InpaintConfig, _fill, inpaint
from sd_port.pipeline import StableDiffusion
from tests.sd_port import tiny
from tests.sd_port.pipelines import theirs
from tests.sd_port.seascapes import noise
from tests.sd_port.torch_models import SMALL_UNET, distance, to_nchw, torch_unet
from tests.tolerances import PIPELINE, STANDARD_ERRORS
from theory.solvers import DDIM

pytestmark = pytest.mark.hasty

QUICK = InpaintConfig(steps=5, guidance=3.0)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("method", ["sde", "ode"])
def test_pixels_outside_are_those_that_came_in(method, order):
    """And those inside are new, other for another seed, whatever was there before."""
    pipe, pictures = StableDiffusion.load(tiny.folder()), noise(2, 61, 64)
    masks = np.zeros((2, 61, 64), np.float32)
    masks[0, 30:, :40], masks[1, 9, 13] = 1, 1  # one pixel: its cell is made anew whole
    config = replace(QUICK, method=method, order=order)

    def filled(pictures, seed):
        results = inpaint(pipe, pictures, masks, ["a boat", ""], config, key=jr.key(seed))
        return np.stack([result.image for result in results])

    found, inside = filled(pictures, 0), masks > 0
    np.testing.assert_array_equal(found[~inside], pictures[~inside])
    assert np.abs(found - pictures)[inside].mean() > 0.01
    assert np.abs(filled(pictures, 1) - found)[inside].mean() > 1e-3


def test_the_first_step_sees_what_is_held():
    """Cells all of one number, of which only its law N(0, 1) is known: the exact prediction fills in that number.

    To the error of its mean over noised cells, sigma / alpha / sqrt(n): the one step must see the picture's own path.
    """
    x0, t, count = np.full((1, 16, 16, 4), 0.8, np.float32), 0.5, 16 * 16 * 4
    schedule = StableDiffusion.load(tiny.folder()).schedule
    mask = np.zeros((1, 16, 16, 1), np.float32)
    mask[0, 5, 7] = 1

    def eps_fn(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        number = alpha * x.sum() / (count * alpha**2 + sigma**2)
        return (x - alpha * number) / sigma

    ts = jnp.array([t, 0.0], jnp.float32)
    given = Partial(eps_fn), jnp.asarray(x0), ts, jr.key(0), jnp.asarray(mask)
    filled = np.asarray(_fill(DDIM(schedule, 0.0), *given, held=True))
    np.testing.assert_array_equal(filled[0, :5], x0[0, :5])
    signal = np.prod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000)[:500] ** 2)  # alpha²
    error = ((1 - signal) / signal / count) ** 0.5
    assert np.abs(filled[0, 5, 7] - 0.8).max() < STANDARD_ERRORS * error < 0.4


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_nine_channels_fill_as_diffusers_does(monkeypatch):
    """Random weights, DDIM, the same noise; the mask at multiples of 8 pixels, where the two shrink it alike."""
    module = diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint
    monkeypatch.setattr(module, "retrieve_latents", lambda output, generator=None: output.latent_dist.mode())
    parts = theirs().components | {"unet": torch_unet(SMALL_UNET | {"in_channels": 9}, size=0.03)}
    other = module.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    with TemporaryDirectory() as folder:
        other.save_pretrained(Path(folder) / "nine")
        pipe = StableDiffusion.load(Path(folder) / "nine")
    factor = pipe.vae.config.factor
    side = 8 * factor
    rng = np.random.default_rng(0)
    picture = np.round(rng.uniform(size=(side, side, 3)) * 255).astype(np.uint8)
    mask = np.zeros((side, side), np.uint8)
    mask[2 * factor : 6 * factor, 3 * factor :] = 255
    key = jr.key(4)
    start = jr.normal(jr.split(key, 3)[1], (1, 8, 8, pipe.vae.config.latent_channels), "float32")
    expected = other(
        "a boat",
        image=Image.fromarray(picture),
        mask_image=Image.fromarray(mask),
        height=side,
        width=side,
        num_inference_steps=5,
        guidance_scale=3.0,
        latents=to_nchw(np.asarray(start)),
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images
    given = picture[None].astype(np.float32) / 255, mask[None].astype(np.float32) / 255
    found = inpaint(pipe, *given, ["a boat"], replace(QUICK, method="ode"), key=key)[0]
    expected = expected.movedim(1, -1).numpy()[0]
    assert distance(found.latents, expected) < PIPELINE
    elsewhere = inpaint(pipe, given[0], 1 - given[1], ["a boat"], replace(QUICK, method="ode"), key=key)[0]
    assert distance(elsewhere.latents, expected) > 10 * PIPELINE


def test_bad_input_is_named():
    pipe, pictures = StableDiffusion.load(tiny.folder()), noise(1, 64, 64)
    with pytest.raises(ValueError, match="the mask is black"):
        inpaint(pipe, pictures, np.zeros((1, 64, 64)), [""], QUICK, key=jr.key(0))
    with pytest.raises(ValueError, match="1 pictures need as many masks and prompts, got 1 and 2"):
        inpaint(pipe, pictures, np.ones((1, 64, 64)), ["", ""], QUICK, key=jr.key(0))
    with pytest.raises(ValueError, match="steps = 0"):
        InpaintConfig(steps=0)
