"""Diffusion features against diffusers' networks with the same weights, noise and draws."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from sd_port.metrics.dift import REGIONDRAG, DIFTConfig, _features, dift
from sd_port.pipeline import StableDiffusion
from tests.sd_port.pipelines import SCHEDULER, ours, theirs
from tests.sd_port.torch_models import SMALL_UNET, distance, to_nchw, to_nhwc, torch_unet, unet_like
from tests.tolerances import PARITY_32

PROMPT, SMALL = "a boat under the sun", DIFTConfig(ensemble=3)
# Of three levels: up block 1 is neither the first nor the last.
UNET = SMALL_UNET | {
    "block_out_channels": [32, 48, 64],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}
PICTURE = np.random.default_rng(0).uniform(size=(45, 62, 3)).astype(np.float32)  # neither side divided by 4


@cache
def networks() -> tuple[StableDiffusion, torch.nn.Module]:
    """Ours, and the UNet of diffusers."""
    unet = torch_unet(UNET, size=0.03)
    return replace(ours(), unet=unet_like(unet, UNET)), unet


@pytest.fixture(autouse=True)
def compile_in_haste():
    """These networks take longer to compile than to run."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@torch.no_grad()
def published(image: np.ndarray, config: DIFTConfig, key) -> np.ndarray:
    """Encode, noise, one pass of the UNet, a look at what leaves up block 1, and the mean over the ensemble."""
    pipe, unet = theirs(), networks()[1]
    posterior = pipe.vae.encode((to_nchw(image[None]) - 0.5) * 2).latent_dist
    shape = (config.ensemble, *to_nhwc(posterior.mean).shape[1:])
    draw, noise = (to_nchw(jr.normal(one, shape, "float32")) for one in jr.split(key))
    latent = posterior.mean + posterior.std * draw if config.vae_draws else posterior.mode().expand(*draw.shape)
    timestep = torch.tensor(config.timestep)
    scheduler = DDIMScheduler(**SCHEDULER)
    noised = scheduler.add_noise(latent * pipe.vae.config.scaling_factor, noise, timestep)
    text = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0].expand(config.ensemble, -1, -1)
    seen = []
    hook = unet.up_blocks[config.up_blocks - 1].register_forward_hook(lambda block, given, made: seen.append(made))
    unet(noised, timestep, text)
    hook.remove()
    return to_nhwc(seen[0]).mean(axis=0)


@pytest.mark.parametrize(
    "config", [SMALL, replace(REGIONDRAG, ensemble=3), replace(SMALL, timestep=40)], ids=["draws", "mode", "other time"]
)
def test_features_are_those_of_the_original(config):
    """At a size that the VAE's factor does not divide."""
    key = jr.key(1)
    found, expected = dift(networks()[0], PICTURE, PROMPT, config, key=key), published(PICTURE, config, key)
    assert found.shape == expected.shape == (11, 15, 48) and found.dtype == jnp.float32
    assert distance(found, expected) < PARITY_32


def test_a_change_is_seen():
    """Negative control: a timestep less, the posterior's mean for its draws, another prompt, another key."""
    pipe, key = networks()[0], jr.key(1)
    expected = published(PICTURE, SMALL, key)
    for change in ({"timestep": 260}, {"vae_draws": False}):
        found = dift(pipe, PICTURE, PROMPT, replace(SMALL, **change), key=key)
        assert distance(found, expected) > 10 * PARITY_32
    assert distance(dift(pipe, PICTURE, "", SMALL, key=key), expected) > 10 * PARITY_32
    assert distance(dift(pipe, PICTURE, PROMPT, SMALL, key=jr.key(2)), expected) > 10 * PARITY_32


def test_one_compilation_for_all_but_size_and_ensemble():
    """The key alone decides the noise; prompt, timestep and draws are arrays."""
    pipe, before = networks()[0], _features._cache_size()
    first = dift(pipe, PICTURE, PROMPT, SMALL, key=jr.key(1))
    np.testing.assert_array_equal(dift(pipe, PICTURE, PROMPT, SMALL, key=jr.key(1)), first)
    dift(pipe, PICTURE[::-1], "", replace(SMALL, timestep=99, vae_draws=False), key=jr.key(2))
    assert _features._cache_size() <= before + 1


@pytest.mark.parametrize(
    ("image", "config", "said"),
    [
        (PICTURE[:, :, :1], SMALL, "must be"),
        (PICTURE[:3], SMALL, "less than a latent pixel"),
        (PICTURE, replace(SMALL, timestep=1000), "the model has 1000 timesteps and 3 blocks"),
        (PICTURE, replace(SMALL, up_blocks=4), "the model has 1000 timesteps and 3 blocks"),
    ],
)
def test_bad_input_is_named(image, config, said):
    with pytest.raises(ValueError, match=said):
        dift(networks()[0], image, PROMPT, config, key=jr.key(0))


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="ensemble = 0"):
        DIFTConfig(ensemble=0)
