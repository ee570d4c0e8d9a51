"""Training the text encoder first: a caption and its picture are to find each other among others (CLIP).

Learnt from the noise prediction, such a small text encoder knows which words are there and not which belong together:
the "red" of "a red boat with blue sails" changes few numbers of a latent, and only at some times. Matching is a direct
lesson in it, and the only one the text encoder gets. The tower for pictures is thrown away.
"""

from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Annotated

import jax
import jax.numpy as jnp
import jax.random as jr
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from sd_port.models.build import Build
from sd_port.models.config import Channels, Groups, Levels
from sd_port.models.layers import Image, Tokens
from sd_port.nano.denoiser import Latents
from sd_port.nano.fit import Fit, Losses, spread
from theory.types import PRNGKey

COLDEST = 100.0  # the greatest inverse temperature, as in CLIP


@dataclass(frozen=True)
class Contrast:
    """What is on top of the text encoder, and how long it is trained."""

    block_out_channels: Annotated[tuple[Channels, ...], Levels] = (64, 128, 128)
    norm_num_groups: Groups = 16
    fit: Fit = field(default_factory=lambda: Fit(steps=3000, batch=256, learning_rate=1e-3, average=0.99))

    def towers(self, text_width: int, size: int, channels: int, *, rngs: nnx.Rngs) -> "Towers":
        return Towers(self, text_width, size, channels, rngs=rngs)

    def loss_fn(self, towers: nnx.GraphDef, text_encoder: nnx.GraphDef, mesh: Mesh | None):
        """For `fit`: weights are {"towers", "text_encoder"}; data are `Latents`."""
        return partial(_loss, self, towers, text_encoder, mesh)


class Towers(nnx.Module):
    """From latents, and from what the text encoder says, to unit vectors that can be compared."""

    def __init__(self, settings: Contrast, text_width: int, size: int, channels: int, *, rngs: nnx.Rngs):
        build, widths = Build(jnp.float32, jnp.float32, rngs), (channels, *settings.block_out_channels)
        groups = settings.norm_num_groups
        self.convs = nnx.List([build.conv(*pair, stride=2) for pair in pairwise(widths)])
        self.norms = nnx.List([build.group_norm(groups, width, 1e-5) for width in widths[1:]])
        left = -(-size // 2 ** len(self.convs))
        self.image_projection = build.linear(left * left * widths[-1], text_width, bias=False)
        self.text_projection = build.linear(text_width, text_width, bias=False)
        self.log_scale = nnx.Param(jnp.log(jnp.float32(1 / 0.07)))

    def image(self, latents: Image) -> Float[Array, "batch width"]:
        x = latents
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = jax.nn.silu(norm(conv(x)))
        return _unit(self.image_projection(x.reshape(len(x), -1)))

    def text(self, context: Tokens) -> Float[Array, "batch width"]:
        """The mean over all tokens, where CLIP takes the last: the UNet reads all of them."""
        return _unit(self.text_projection(context.mean(1)))


def _loss(
    self: Contrast,
    towers_graph: nnx.GraphDef,
    text_graph: nnx.GraphDef,
    mesh: Mesh | None,
    weights: dict[str, nnx.State],
    data: Latents,
    key: PRNGKey,
) -> tuple[Float[Array, ""], Losses]:
    """Cross entropy of finding the caption's picture and the picture's caption (Radford et al. 2021, figure 3)."""
    image_key, caption_key, latent_key = jr.split(key, 3)
    n = self.fit.batch
    image = jr.randint(image_key, (n,), 0, data.mean.shape[0])
    caption = jr.randint(caption_key, (n,), 0, data.tokens.shape[1])
    mean, std = data.mean[image].astype(jnp.float32), data.std[image].astype(jnp.float32)
    x0 = mean + std * jr.normal(latent_key, mean.shape)
    x0, tokens = spread((x0, data.tokens[image, caption].astype(jnp.int32)), mesh)
    towers, text_encoder = nnx.merge(towers_graph, weights["towers"]), nnx.merge(text_graph, weights["text_encoder"])
    scale = jnp.minimum(jnp.exp(towers.log_scale[...]), COLDEST)
    likeness = scale * towers.image(x0) @ towers.text(text_encoder(tokens)).T
    found = [jnp.diagonal(jax.nn.log_softmax(likeness, axis=axis)).mean() for axis in (0, 1)]
    loss = -(found[0] + found[1]) / 2
    return loss, {"loss": loss, "found": jnp.mean(likeness.argmax(0) == jnp.arange(n))}


def _unit(x: Float[Array, "batch width"]) -> Float[Array, "batch width"]:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
