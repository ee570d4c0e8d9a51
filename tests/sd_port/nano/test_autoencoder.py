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
from tests.tolerances import ROUNDING_32

pytestmark = pytest.mark.hasty

SETTINGS = Autoencoder(
    block_out_channels=(8, 8, 8), norm_num_groups=4, fit=Fit(steps=1, warmup=0, batch=4, learning_rate=1e-3), kl=1e-2
)
SIZE = 32


@partial(jax.jit, static_argnums=(0, 1))
def run(graph, method, weights, x):
    return getattr(nnx.merge(graph, weights), method)(x)


def called(vae: AutoencoderKL, method: str, x):
    """One program for the whole network, instead of one for each of its operations."""
    graph, weights = nnx.split(vae)
    return run(graph, method, weights, jnp.asarray(x))


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return AutoencoderKL(SETTINGS.config(SIZE), rngs=nnx.Rngs(0))


def test_the_loss_is_its_definition(vae):
    """Weighted squares, squares of differences between neighbours, and the KL to the unit normal, by numpy."""
    graph, weights = nnx.split(vae)
    images = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)
    key = jr.key(1)
    loss, parts = jax.jit(SETTINGS.loss_fn(graph, SIZE, None))(weights, jnp.asarray(images), key)

    picture_key, latent_key = jr.split(key)
    chosen, mattering = pictures(jnp.asarray(images), picture_key, 4, SIZE)
    x = 2 * np.asarray(chosen) - 1
    mean, std = (np.asarray(part, np.float64) for part in called(vae, "encode", x))
    z = mean + std * np.asarray(jr.normal(latent_key, std.shape))
    error = np.asarray(called(vae, "decode", np.float32(z))) - x
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
    chosen, marked = jax.jit(lambda key: pictures(None, key, SETTINGS.fit.batch, SIZE))(picture_key)
    assert 0.05 < float(marked.mean()) < 0.5
    graph, weights = nnx.split(vae)
    plain = Autoencoder(**{**vars(SETTINGS), "objects": 0.0})
    loss_fns = [one.loss_fn(graph, SIZE, None) for one in (SETTINGS, plain)]
    with_objects, without = jax.jit(lambda weights: [loss_fn(weights, None, key) for loss_fn in loss_fns])(weights)
    np.testing.assert_allclose(with_objects[1]["psnr"], without[1]["psnr"], rtol=ROUNDING_32)

    posterior = called(vae, "encode", 2 * chosen - 1)
    z = posterior.mean + posterior.std * jr.normal(latent_key, posterior.mean.shape)
    squared = np.asarray((called(vae, "decode", z) - (2 * chosen - 1)) ** 2)
    more = SETTINGS.objects * np.mean(np.asarray(marked)[..., None] * squared)
    np.testing.assert_allclose(with_objects[0] - without[0], more, rtol=1e-4)  # a difference of two larger numbers


def test_whitening_keeps_the_pictures(vae):
    """Zero mean and unit variance in every channel, the same pictures, the posterior's noise scaled alike."""
    images = np.random.default_rng(0).uniform(size=(4, SIZE, SIZE, 3)).astype(np.float32)
    graph, weights = nnx.split(vae)
    before = called(vae, "encode", 2 * images - 1)
    picture = called(vae, "decode", before.mean)
    assert np.abs(np.asarray(before.mean).std((0, 1, 2)) - 1).max() > 0.1  # or there were nothing to do
    white = whitened(nnx.merge(graph, jax.tree.map(jnp.copy, weights)), jnp.asarray(images))
    after = called(white, "encode", 2 * images - 1)
    np.testing.assert_allclose(np.asarray(after.mean).mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(np.asarray(after.mean).std((0, 1, 2)), 1, atol=1e-4)
    np.testing.assert_allclose(called(white, "decode", after.mean), picture, atol=1e-4)
    ratio = np.asarray(before.mean).std((0, 1, 2))
    np.testing.assert_allclose(np.asarray(after.std) * ratio, before.std, rtol=1e-3)
