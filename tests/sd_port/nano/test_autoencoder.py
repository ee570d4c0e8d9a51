"""Training the autoencoder: the loss against its definition, and latents of unit variance at no cost."""

from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from flax import nnx

from sd_port.models.vae import AutoencoderKL
from sd_port.nano.autoencoder import Autoencoder, pictures, whitened
from sd_port.nano.fit import Fit
from sd_port.nano.scenes import draw, render
from tests.tolerances import ROUNDING_32

SETTINGS = Autoencoder(
    block_out_channels=(8, 8, 8), norm_num_groups=4, fit=Fit(steps=1, warmup=0, batch=4, learning_rate=1e-3), kl=1e-2
)
SIZE = 32

# Most of the time goes into compiling, and this network is small.
compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return AutoencoderKL(SETTINGS.config(SIZE), rngs=nnx.Rngs(0))


def test_the_loss_is_its_definition(vae):
    """Weighted squares, squares of differences between neighbours, and the KL to the unit normal, by numpy."""
    graph, weights = nnx.split(vae)
    images = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)
    key = jr.key(1)
    loss, parts = compiled(SETTINGS.loss_fn(graph, SIZE, None))(weights, jnp.asarray(images), key)

    picture_key, latent_key = jr.split(key)
    chosen, mattering = pictures(jnp.asarray(images), picture_key, 4, SIZE)
    x = 2 * np.asarray(chosen) - 1
    mean, std = (np.asarray(part, np.float64) for part in vae.encode(jnp.asarray(x)))
    z = mean + std * np.asarray(jr.normal(latent_key, std.shape))
    error = np.asarray(vae.decode(jnp.asarray(z, jnp.float32))) - x
    edges = np.mean((error[:, 1:] - error[:, :-1]) ** 2) + np.mean((error[:, :, 1:] - error[:, :, :-1]) ** 2)
    kl = 0.5 * (mean**2 + std**2 - 1 - 2 * np.log(std))
    expected = np.mean(error**2) + SETTINGS.edges * edges + SETTINGS.kl * kl.sum() / x.size
    assert not mattering.any()  # a user's pictures have no known objects
    np.testing.assert_allclose(loss, expected, rtol=20 * ROUNDING_32)
    np.testing.assert_allclose(parts["psnr"], 10 * np.log10(4 / np.mean(error**2)), rtol=20 * ROUNDING_32)


def test_objects_matter_more(vae):
    """On scenes, an error on a boat costs 1 + objects times that of one on the sky; by numpy."""
    key = jr.key(0)
    picture_key, latent_key = jr.split(key)
    chosen, marked = pictures(None, picture_key, SETTINGS.fit.batch, SIZE)
    assert 0.05 < float(marked.mean()) < 0.5
    graph, weights = nnx.split(vae)
    plain = Autoencoder(**{**vars(SETTINGS), "objects": 0.0})
    with_objects, without = (compiled(one.loss_fn(graph, SIZE, None))(weights, None, key) for one in (SETTINGS, plain))
    np.testing.assert_allclose(with_objects[1]["psnr"], without[1]["psnr"], rtol=ROUNDING_32)

    posterior = vae.encode(2 * chosen - 1)
    z = posterior.mean + posterior.std * jr.normal(latent_key, posterior.mean.shape)
    squared = np.asarray((vae.decode(z) - (2 * chosen - 1)) ** 2)
    more = SETTINGS.objects * np.mean(np.asarray(marked)[..., None] * squared)
    np.testing.assert_allclose(with_objects[0] - without[0], more, rtol=1e-4)  # a difference of two larger numbers


def test_whitening_keeps_the_pictures(vae):
    """Zero mean and unit variance in every channel, the same pictures, the posterior's noise scaled alike."""
    images = render(draw(jr.key(0), 8), SIZE)
    graph, weights = nnx.split(vae)
    before = vae.encode(2 * images - 1)
    picture = vae.decode(before.mean)
    assert np.abs(np.asarray(before.mean).std((0, 1, 2)) - 1).max() > 0.1  # or there were nothing to do
    white = whitened(nnx.merge(graph, jax.tree.map(jnp.copy, weights)), images)
    after = white.encode(2 * images - 1)
    np.testing.assert_allclose(np.asarray(after.mean).mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(np.asarray(after.mean).std((0, 1, 2)), 1, atol=1e-4)
    np.testing.assert_allclose(white.decode(after.mean), picture, atol=1e-4)
    ratio = np.asarray(before.mean).std((0, 1, 2))
    np.testing.assert_allclose(np.asarray(after.std) * ratio, before.std, rtol=1e-3)
