"""Diffusion features: points of two pictures that mean the same have like ones, as a UNet sees the pictures.

Tang et al. 2023 (arXiv 2306.03881): a picture is encoded, noised a little, and shown to the UNet; what stands after
some blocks of its way up is the feature map, the mean over several draws of the noise.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sd_port.checks import check_picture
from sd_port.models.layers import Image, Tokens
from sd_port.pipeline import StableDiffusion
from theory.schedules import DiscreteVP
from theory.types import PRNGKey


@dataclass(frozen=True)
class DIFTConfig:
    """By default that of DragDiffusion's evaluator, and of DIFT's own code.

    timestep: 0 to 999; up_blocks: how many blocks of the way up, 2 for what is there called up_ft_index = 1; ensemble:
    draws of the noise; vae_draws: also draws of the VAE's posterior, one for each noise, instead of its mean.
    """

    timestep: int = 261
    up_blocks: int = 2
    ensemble: int = 8
    vae_draws: bool = True

    def __post_init__(self):
        """Raises ValueError, naming the setting."""
        for name, least in (("timestep", 0), ("up_blocks", 1), ("ensemble", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)} cannot be: it must be at least {least}")


REGIONDRAG = DIFTConfig(vae_draws=False)


def dift(
    pipe: StableDiffusion,
    image: np.ndarray,
    prompt: str = "",
    config: DIFTConfig = DIFTConfig(),
    *,
    key: PRNGKey,
) -> Float[Array, "_ _ _"]:
    """Features (h, w, channels), float32, of a picture (height, width, 3) in [0, 1], at its own size.

    The prompt is what the picture shows; there is no guidance. The same key gives the same features. h and w are those
    of the UNet's level, about height and width over 16 for Stable Diffusion. A size that the VAE's factor does not
    divide is not padded: the VAE's strides drop what is left over, as in the published evaluators. Every size compiles.

    Raises ValueError for what is no picture, one that is smaller than a latent pixel, a model for inpainting, and
    a timestep or a block that the model does not have.
    """
    image, factor = check_picture(image), pipe.vae.config.factor
    if min(image.shape[:2]) < factor:
        raise ValueError(f"the picture is {image.shape[1]} x {image.shape[0]} pixels, less than a latent pixel")
    if pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
        raise ValueError("features are those of a model for text alone, and this one is for inpainting")
    if config.timestep >= pipe.schedule.steps or config.up_blocks > len(pipe.unet.up_blocks):
        raise ValueError(
            f"timestep = {config.timestep} and up_blocks = {config.up_blocks}: "
            f"the model has {pipe.schedule.steps} timesteps and {len(pipe.unet.up_blocks)} blocks on its way up"
        )
    vae_graph, vae = nnx.split(pipe.vae)
    unet_graph, unet = nnx.split(pipe.unet)
    statics = vae_graph, unet_graph, pipe.schedule, config.up_blocks, config.ensemble
    timestep, spread = jnp.int32(config.timestep), jnp.float32(config.vae_draws)
    return _features(*statics, vae, unet, jnp.asarray(image)[None], pipe.embed([prompt]), timestep, spread, key)


@partial(jax.jit, static_argnums=range(5))
def _features(
    vae_graph: nnx.GraphDef,
    unet_graph: nnx.GraphDef,
    schedule: DiscreteVP,
    up_blocks: int,
    ensemble: int,
    vae: nnx.State,
    unet: nnx.State,
    image: Image,
    context: Tokens,
    timestep: Int[Array, ""],
    spread: Float[Array, ""],
    key: PRNGKey,
) -> Float[Array, "_ _ _"]:
    encoder, network = nnx.merge(vae_graph, vae), nnx.merge(unet_graph, unet)
    latent_key, noise_key = jr.split(key)
    posterior = encoder.encode(2 * image - 1)
    shape = (ensemble, *posterior.mean.shape[1:])
    draws = posterior.mean + spread * posterior.std * jr.normal(latent_key, shape, jnp.float32)
    t = ((timestep + 1) / schedule.steps).astype(jnp.float32)
    noise = jr.normal(noise_key, shape, jnp.float32)
    noised = schedule.alpha(t) * encoder.config.scaling_factor * draws + schedule.sigma(t) * noise
    text_kv = jax.tree.map(lambda leaf: jnp.repeat(leaf, ensemble, axis=0), network.text_kv(context))
    return network.features(noised, timestep[None], text_kv, up_blocks).astype(jnp.float32).mean(axis=0)
