"""The autoencoder between images and latents (AutoencoderKL of diffusers; Rombach et al. 2022, Sec. 3.1)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from sd_port.models.attention import Attention
from sd_port.models.blocks import Downsample, Resnet, Upsample
from sd_port.models.build import Build
from sd_port.models.config import VAEConfig
from sd_port.models.layers import Image

EPS = 1e-6  # of every GroupNorm of the VAE


class Posterior(NamedTuple):
    """q(latent | image) = N(mean, diag(std^2)), before scaling_factor; each (batch, height, width, channels)."""

    mean: Image
    std: Image


class MidAttention(Attention):
    """Self-attention of one head over all pixels, added to its input."""

    def __init__(self, build: Build, channels: int, groups: int):
        super().__init__(build, channels, channels, 1, qkv_bias=True)
        self.group_norm = build.group_norm(groups, channels, EPS)

    def over_pixels(self, x: Image) -> Image:
        tokens = self.group_norm(x).reshape(x.shape[0], -1, x.shape[-1])
        return x + self(tokens, self.keys_values(tokens)).reshape(x.shape)


class MidStage(nnx.Module):
    """Residual block, attention, residual block, at the size of the latents."""

    def __init__(self, build: Build, channels: int, groups: int):
        self.resnets = nnx.List([Resnet(build, channels, channels, groups, EPS) for _ in range(2)])
        self.attentions = nnx.List([MidAttention(build, channels, groups)])

    def __call__(self, x: Image) -> Image:
        return self.resnets[1](self.attentions[0].over_pixels(self.resnets[0](x)))


class EncoderStage(nnx.Module):
    """The residual blocks of one size, and half the size after them unless it is the last."""

    def __init__(self, build: Build, config: VAEConfig, level: int):
        outs, groups = config.block_out_channels, config.norm_num_groups
        inputs = [outs[max(level - 1, 0)]] + [outs[level]] * (config.layers_per_block - 1)
        self.resnets = nnx.List([Resnet(build, i, outs[level], groups, EPS) for i in inputs])
        last = level == len(outs) - 1
        self.downsamplers = nnx.List([] if last else [Downsample(build, outs[level], (0, 1))])

    def __call__(self, x: Image) -> Image:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class DecoderStage(nnx.Module):
    """The residual blocks of one size, and twice the size after them unless it is the last."""

    def __init__(self, build: Build, config: VAEConfig, level: int):
        outs, groups = config.block_out_channels, config.norm_num_groups
        inputs = [outs[min(level + 1, len(outs) - 1)]] + [outs[level]] * config.layers_per_block
        self.resnets = nnx.List([Resnet(build, i, outs[level], groups, EPS) for i in inputs])
        self.upsamplers = nnx.List([Upsample(build, outs[level])] if level else [])

    def __call__(self, x: Image) -> Image:
        for resnet in self.resnets:
            x = resnet(x)
        for upsample in self.upsamplers:
            x = upsample(x, 2 * x.shape[1], 2 * x.shape[2])
        return x


class Encoder(nnx.Module):
    """Images (batch, H, W, channels) -> moments (batch, H/f, W/f, 2 latent_channels)."""

    def __init__(self, build: Build, config: VAEConfig):
        outs = config.block_out_channels
        self.conv_in = build.conv(config.in_channels, outs[0])
        self.down_blocks = nnx.List([EncoderStage(build, config, level) for level in range(len(outs))])
        self.mid_block = MidStage(build, outs[-1], config.norm_num_groups)
        self.conv_norm_out = build.group_norm(config.norm_num_groups, outs[-1], EPS)
        self.conv_out = build.conv(outs[-1], 2 * config.latent_channels)

    def __call__(self, x: Image) -> Image:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latents (batch, h, w, latent_channels) -> images (batch, f h, f w, channels)."""

    def __init__(self, build: Build, config: VAEConfig):
        outs = config.block_out_channels
        self.conv_in = build.conv(config.latent_channels, outs[-1])
        self.mid_block = MidStage(build, outs[-1], config.norm_num_groups)
        self.up_blocks = nnx.List([DecoderStage(build, config, level) for level in reversed(range(len(outs)))])
        self.conv_norm_out = build.group_norm(config.norm_num_groups, outs[0], EPS)
        self.conv_out = build.conv(outs[0], config.out_channels)

    def __call__(self, z: Image) -> Image:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """Images in [-1, 1], (batch, H, W, 3), to latents (batch, H/8, W/8, 4) and back; H and W divisible by 8.

    Latents here are those of the network: the pipeline multiplies by `config.scaling_factor`.
    """

    def __init__(
        self,
        config: VAEConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        build = Build(dtype, param_dtype, rngs)
        latent = config.latent_channels
        self.encoder = Encoder(build, config)
        self.decoder = Decoder(build, config)
        self.quant_conv = build.conv(2 * latent, 2 * latent, 1) if config.use_quant_conv else None
        self.post_quant_conv = build.conv(latent, latent, 1) if config.use_post_quant_conv else None
        self.config, self.dtype = config, dtype

    def encode(self, image: Image) -> Posterior:
        """q(latent | image), float32."""
        moments = self.encoder(image)
        moments = moments if self.quant_conv is None else self.quant_conv(moments)
        mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return Posterior(mean, jnp.exp(jnp.clip(log_variance, -30, 20) / 2))  # diffusers' bounds

    def decode(self, latent: Image) -> Image:
        """The image of a latent, in `dtype`, not clipped."""
        return self.decoder(latent if self.post_quant_conv is None else self.post_quant_conv(latent))
