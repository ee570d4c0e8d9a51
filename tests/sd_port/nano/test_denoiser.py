"""Training the UNet: the loss against its definition, and what the text may do to it."""

from functools import cache

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from flax import nnx

from sd_port.models.clip_text import CLIPTextModel
from sd_port.models.unet import UNet
from sd_port.nano.denoiser import Denoiser, Latents, Lessons
from sd_port.nano.fit import Fit
from theory.schedules import ScaledLinearVP

pytestmark = pytest.mark.hasty

SMALL = {
    "block_out_channels": (16, 16),
    "attention": (False, True),
    "heads": 2,
    "norm_num_groups": 4,
    "text_width": 16,
    "text_layers": 1,
    "text_heads": 2,
}
VOCABULARY, LENGTH, SCHEDULE = 30, 6, ScaledLinearVP()


@pytest.fixture(scope="module")
def networks():
    settings = Denoiser(**SMALL)
    unet = UNet(settings.unet_config(8, 4), rngs=nnx.Rngs(0))
    text = CLIPTextModel(settings.text_config(VOCABULARY, LENGTH), rngs=nnx.Rngs(0))
    (unet_graph, unet_weights), (text_graph, text_weights) = nnx.split(unet), nnx.split(text)
    return (unet_graph, text_graph), unet_weights, text_weights


def data(std: float = 0.0) -> Latents:
    rng = np.random.default_rng(0)
    shape = (10, 8, 8, 4)
    return Latents(
        jnp.asarray(rng.normal(size=shape), jnp.float16),
        jnp.full(shape, std, jnp.float16),
        jnp.asarray(rng.integers(2, VOCABULARY, (10, 3, LENGTH)), jnp.uint16),
        jnp.ones(LENGTH, jnp.uint16),
    )


@cache
def loss_fn(graphs, no_caption: float = 0.1):
    settings = Denoiser(**SMALL, no_caption=no_caption, fit=Fit(steps=1, warmup=0, batch=64, learning_rate=1e-3))
    return jax.jit(settings.loss_fn(*graphs, SCHEDULE, None))


def loss_of(networks, weights=None, *, latents: Latents | None = None, key: int = 0) -> jax.Array:
    graphs, unet, text = networks
    return loss_fn(graphs)(weights or unet, Lessons(latents or data(), text), jr.key(key))[0]


def test_a_network_that_says_nothing_loses_the_noise(networks):
    """With the last layer at zero eps_hat = 0 and the loss is the mean of weight eps², to 4 standard errors.

    The weights are sqrt(max(1, sigma / alpha)), from the betas of the schedule by a running product. Their mean over
    the batch is that over all timesteps but for its spacing, as these are spread evenly.
    """
    graphs, weights, _ = networks
    silent = nnx.clone(nnx.merge(graphs[0], weights))
    silent.conv_out.kernel[...] = jnp.zeros_like(silent.conv_out.kernel[...])
    found = loss_of(networks, nnx.split(silent)[1])
    signal = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    weight = np.sqrt(np.maximum(1, np.sqrt(1 / signal - 1)))
    assert weight.max() > 3 and weight.mean() > 1.5  # it matters
    error = np.sqrt(2 * np.mean(weight**2) / (64 * 8 * 8 * 4))
    assert abs(found - weight.mean()) < 4 * error + np.ptp(weight) / (2 * 64)
    assert abs(loss_of(networks) / weight.mean() - 1) > 0.02  # one that says something at random does worse


def test_without_captions_only_the_empty_one_is_read(networks):
    """Dropping all captions, the loss depends on the embedding of token 1 and on no other; else on many."""
    graphs, weights, text = networks

    def read(no_caption: float) -> np.ndarray:
        def of_text(text: nnx.State) -> jax.Array:
            return loss_fn(graphs, no_caption)(weights, Lessons(data(), text), jr.key(0))[0]

        slope = nnx.merge(graphs[1], jax.jit(jax.grad(of_text))(text))
        return np.flatnonzero(np.abs(np.asarray(slope.embeddings.token_embedding.embedding[...])).sum(1))

    assert read(1.0).tolist() == [1]
    assert len(read(0.0)) > 20 and 1 not in read(0.0)


def test_latents_are_drawn_from_their_posterior(networks):
    """A wide posterior changes the loss, by noise that the key decides."""
    exact, wide = loss_of(networks), loss_of(networks, latents=data(std=1.0))
    assert exact != wide and wide == loss_of(networks, latents=data(std=1.0))
    assert wide != loss_of(networks, latents=data(std=1.0), key=1)
