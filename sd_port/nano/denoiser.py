"""Training the UNet to predict the noise in latents, from scratch.

The text encoder stays as `contrast` left it, as CLIP does in Stable Diffusion. Trained on with the UNet it forgot what
does not pay at once: after 4750 steps "on the left" and "on the right" differed by 2 % of a token's spread, and no
picture followed either; with the encoder left alone the UNet places the sun, the boat and the island within 300 steps.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, NamedTuple

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float16, UInt16
from msgspec import Meta

from sd_port.models.config import Channels, CLIPTextConfig, Groups, Heads, Layers, Levels, UNetConfig
from sd_port.nano.fit import Fit, Losses, spread
from theory.schedules import DiscreteVP
from theory.types import PRNGKey


class Latents(NamedTuple):
    """The pictures: the autoencoder's posterior of every image, and several captions of each."""

    mean: Float16[Array | np.ndarray, "images height width channels"]
    std: Float16[Array | np.ndarray, "images height width channels"]
    tokens: UInt16[Array | np.ndarray, "images captions length"]
    empty: UInt16[Array | np.ndarray, " length"]  # the tokens of no caption


class Lessons(NamedTuple):
    """What is learnt from, and the weights that read its captions."""

    latents: Latents
    text_encoder: nnx.State


@dataclass(frozen=True)
class Denoiser:
    """The UNet and the text encoder that it listens to.

    `no_caption` is how often no caption is shown, for classifier-free guidance (Ho & Salimans 2022).
    """

    block_out_channels: Annotated[tuple[Channels, ...], Levels] = (48, 96, 160)
    attention: Annotated[tuple[bool, ...], Levels] = (False, True, True)  # by level
    layers_per_block: Layers = 1
    heads: Heads = 4
    norm_num_groups: Groups = 16
    text_width: Channels = 128
    text_layers: Layers = 3
    text_heads: Heads = 4
    no_caption: Annotated[float, Meta(ge=0, le=1)] = 0.1
    fit: Fit = field(default_factory=lambda: Fit(steps=12000, batch=32, learning_rate=1e-3))

    def unet_config(self, size: int, channels: int) -> UNetConfig:
        down = tuple("CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in self.attention)
        up = tuple("CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in self.attention[::-1])
        return UNetConfig(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            down_block_types=down,
            up_block_types=up,
            block_out_channels=self.block_out_channels,
            layers_per_block=self.layers_per_block,
            attention_head_dim=self.heads,
            cross_attention_dim=self.text_width,
            norm_num_groups=self.norm_num_groups,
        )

    def text_config(self, vocabulary: int, length: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=self.text_width,
            intermediate_size=2 * self.text_width,
            num_hidden_layers=self.text_layers,
            num_attention_heads=self.text_heads,
            max_position_embeddings=length,
        )

    def loss_fn(self, unet: nnx.GraphDef, text_encoder: nnx.GraphDef, schedule: DiscreteVP, mesh: Mesh | None):
        """For `fit`: weights are the UNet's; data are `Lessons`."""
        return partial(_loss, self, unet, text_encoder, schedule, mesh)


def _loss(
    self: Denoiser,
    unet_graph: nnx.GraphDef,
    text_graph: nnx.GraphDef,
    schedule: DiscreteVP,
    mesh: Mesh | None,
    weights: nnx.State,
    lessons: Lessons,
    key: PRNGKey,
) -> tuple[Float[Array, ""], Losses]:
    """Mean square of eps - eps_hat over images, noise and timesteps 0 to N - 1 (Ho et al. 2020, eq. (14)), weighted.

    The weight is sqrt(max(1, sigma / alpha)). An error of x_0 is one of eps times alpha / sigma, so that without a
    weight the times near 1, at which positions and colours are decided and the caption is all there is, hardly count;
    without the root they would count more than those at which small things become sharp.
    The timesteps of a batch are spread evenly over all, from a random first (Kingma et al. 2021, App. I.1).
    """
    image_key, caption_key, drop_key, latent_key, time_key, noise_key = jr.split(key, 6)
    n, data = self.fit.batch, lessons.latents
    image = jr.randint(image_key, (n,), 0, data.mean.shape[0])
    caption = jr.randint(caption_key, (n,), 0, data.tokens.shape[1])
    dropped = jr.bernoulli(drop_key, self.no_caption, (n, 1))
    tokens = jnp.where(dropped, data.empty[None], data.tokens[image, caption]).astype(jnp.int32)
    mean, std = data.mean[image].astype(jnp.float32), data.std[image].astype(jnp.float32)
    x0 = mean + std * jr.normal(latent_key, mean.shape)
    timestep = jnp.floor((jr.uniform(time_key) + jnp.arange(n) / n) % 1 * schedule.steps)
    t = ((timestep + 1) / schedule.steps)[:, None, None, None]
    eps = jr.normal(noise_key, x0.shape)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x, weight = alpha * x0 + sigma * eps, jnp.sqrt(jnp.maximum(1, sigma / alpha))

    x, eps, weight, timestep, tokens = spread((x, eps, weight, timestep, tokens), mesh)
    unet, text_encoder = nnx.merge(unet_graph, weights), nnx.merge(text_graph, lessons.text_encoder)
    error = unet(x, timestep, unet.text_kv(text_encoder(tokens))) - eps
    loss = jnp.mean(weight * error**2)
    return loss, {"loss": loss}
