"""Training the autoencoder: pictures to latents and back, most carefully where the small things are."""

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import jax.numpy as jnp
import jax.random as jr
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float
from msgspec import Meta

from sd_port.models.config import Channels, Groups, Layers, Levels, VAEConfig
from sd_port.models.layers import Image
from sd_port.models.vae import AutoencoderKL
from sd_port.nano import scenes
from sd_port.nano.fit import Fit, Losses, spread
from theory.types import PRNGKey

Weight = Annotated[float, Meta(ge=0, le=1e9)]  # of a part of the loss


@dataclass(frozen=True)
class Autoencoder:
    """The network and its loss: squared error, more of it on objects and on edges, and a little KL.

    `kl` is per latent number and per pixel value, in the units of the squared error of images in [-1, 1]: the noise
    of the latents then costs about kl / 2 for each of them (it settles where both sides of the bargain are equal).
    """

    block_out_channels: Annotated[tuple[Channels, ...], Levels] = (16, 48, 96)
    layers_per_block: Layers = 1
    norm_num_groups: Groups = 8
    kl: Weight = 3e-4
    edges: Weight = 0.5
    objects: Weight = 4.0
    fit: Fit = field(default_factory=lambda: Fit(steps=4000, batch=16, learning_rate=2e-3))

    def config(self, size: int) -> VAEConfig:
        levels = len(self.block_out_channels)
        return VAEConfig(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=self.block_out_channels,
            layers_per_block=self.layers_per_block,
            norm_num_groups=self.norm_num_groups,
            sample_size=size,
            scaling_factor=1.0,
        )

    def loss_fn(self, graph: nnx.GraphDef, size: int, mesh: Mesh | None):
        """For `fit`: data is an array of images, uint8, or None for scenes, fresh at every step."""
        return partial(_loss, self, graph, size, mesh)


def _loss(
    self: Autoencoder,
    graph: nnx.GraphDef,
    size: int,
    mesh: Mesh | None,
    weights: nnx.State,
    data: Any,
    key: PRNGKey,
) -> tuple[Float[Array, ""], Losses]:
    picture_key, latent_key = jr.split(key)
    image, mattering = pictures(data, picture_key, self.fit.batch, size)
    image, mattering = spread((2 * image - 1, mattering), mesh)
    vae = nnx.merge(graph, weights)
    mean, std = vae.encode(image)
    error = vae.decode(mean + std * jr.normal(latent_key, std.shape)) - image
    kl = 0.5 * (mean**2 + std**2 - 1) - jnp.log(std)
    importance = 1 + self.objects * mattering[..., None]
    edges = sum(jnp.mean(jnp.diff(error, axis=axis) ** 2) for axis in (1, 2))
    squared = jnp.mean(error**2)
    loss = jnp.mean(importance * error**2) + self.edges * edges + self.kl * kl.sum() / image.size
    return loss, {"loss": loss, "psnr": -10 * jnp.log10(squared / 4), "kl": kl.mean()}


def pictures(data: Any, key: PRNGKey, n: int, size: int) -> tuple[Image, Float[Array, "n size size"]]:
    """n images in [0, 1] and, for scenes, 1 where an object is: fresh scenes, or a draw from the data (uint8)."""
    if data is None:
        scene = scenes.draw(key, n)
        marked = jnp.stack(list(scenes.objects(scene, size).values())).any(0)
        return scenes.render(scene, size), marked.astype(jnp.float32)
    chosen = data[jr.randint(key, (n,), 0, len(data))]
    return chosen.astype(jnp.float32) / 255, jnp.zeros((n, size, size))


def whitened(vae: AutoencoderKL, images: Image) -> AutoencoderKL:
    """The same autoencoder with latents of zero mean and unit variance in every channel.

    The change of scale goes into the two 1x1 convolutions around the latents, quant_conv and post_quant_conv, so the
    pictures stay the same and scaling_factor is 1.
    """
    mean = vae.encode(2 * images - 1).mean
    shift, scale = mean.mean((0, 1, 2)), mean.std((0, 1, 2))
    quant, post = vae.quant_conv, vae.post_quant_conv
    assert quant is not None and post is not None
    both = jnp.concatenate([1 / scale, jnp.ones_like(scale)])  # the means, then the logarithms of the variances
    moved = jnp.concatenate([-shift / scale, -2 * jnp.log(scale)])
    quant.kernel[...] = quant.kernel[...] * both[None, None, None]
    quant.bias[...] = quant.bias[...] * both + moved
    kernel = post.kernel[...]
    post.bias[...] = post.bias[...] + shift @ kernel[0, 0]
    post.kernel[...] = kernel * scale[None, None, :, None]
    return vae
