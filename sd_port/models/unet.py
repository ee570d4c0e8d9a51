"""The noise prediction network of Stable Diffusion (UNet2DConditionModel of diffusers)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer

from sd_port.models.blocks import Downsample, Resnet, Upsample
from sd_port.models.build import Build
from sd_port.models.config import UNetConfig
from sd_port.models.layers import Image, Linear, Tokens
from sd_port.models.transformer import TextKV, Transformer

Timesteps = Float[Array, " #batch"] | Integer[Array, " #batch"]
Vector = Float[Array, "#batch _"]


class UNetKV(NamedTuple):
    """Keys and values of a text for every cross-attention of the UNet, in the order of its blocks."""

    down: tuple[tuple[TextKV, ...], ...]
    mid: TextKV
    up: tuple[tuple[TextKV, ...], ...]


def sinusoids(timesteps: Timesteps, dim: int, *, flip_sin_to_cos: bool, shift: float) -> Vector:
    """[cos, sin] (flipped) or [sin, cos] of timestep * 10000^(-i / (dim/2 - shift)), float32.

    Vaswani et al. 2017, Sec. 3.5, as diffusers computes it.
    """
    half = dim // 2
    frequencies = jnp.exp(-jnp.log(10000.0).astype(jnp.float32) * jnp.arange(half, dtype=jnp.float32) / (half - shift))
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies[None]
    parts = (jnp.cos(angles), jnp.sin(angles)) if flip_sin_to_cos else (jnp.sin(angles), jnp.cos(angles))
    return jnp.concatenate(parts, axis=-1)


class TimeEmbedding(nnx.Module):
    """Two linear layers with a silu between them, float32 whatever the rest computes in."""

    def __init__(self, build: Build, dim: int, out: int):
        build = build._replace(dtype=jnp.float32)
        self.linear_1: Linear = build.linear(dim, out)
        self.linear_2: Linear = build.linear(out, out)

    def __call__(self, x: Vector) -> Vector:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class Stage(nnx.Module):
    """What one level needs: residual blocks, each followed by a transformer where the level attends to the text."""

    def __init__(self, build: Build, config: UNetConfig, level: int, inputs: list[int], *, cross: bool):
        channels = config.block_out_channels[level]
        time_dim = 4 * config.block_out_channels[0]
        groups, eps = config.norm_num_groups, config.norm_eps
        self.resnets = nnx.List([Resnet(build, i, channels, groups, eps, time_dim) for i in inputs])
        self.attentions = nnx.List([_transformer(build, config, level) for _ in inputs] if cross else [])

    def text_kv(self, context: Tokens) -> tuple[TextKV, ...]:
        return tuple(attention.text_kv(context) for attention in self.attentions)

    def layer(self, i: int, x: Image, time: Vector, text_kv: tuple[TextKV, ...]) -> Image:
        x = self.resnets[i](x, time)
        return self.attentions[i](x, text_kv[i]) if self.attentions else x


class DownStage(Stage):
    """A level on the way down; returns x and what the way up will want."""

    def __init__(self, build: Build, config: UNetConfig, level: int):
        outs = config.block_out_channels
        inputs = [outs[max(level - 1, 0)]] + [outs[level]] * (config.layers_per_block - 1)
        super().__init__(build, config, level, inputs, cross=config.down_block_types[level].startswith("CrossAttn"))
        last = level == len(outs) - 1
        self.downsamplers = nnx.List([] if last else [Downsample(build, outs[level], (1, 1))])

    def __call__(self, x: Image, time: Vector, text_kv: tuple[TextKV, ...]) -> tuple[Image, list[Image]]:
        skips = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, time, text_kv)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x, skips


class UpStage(Stage):
    """A level on the way up: every residual block takes what the way down left at its size."""

    def __init__(self, build: Build, config: UNetConfig, level: int, below: int, skips: list[int]):
        channels = config.block_out_channels[level]
        widths = [below] + [channels] * (len(skips) - 1)
        inputs = [width + skip for width, skip in zip(widths, skips, strict=True)]
        cross = config.up_block_types[::-1][level].startswith("CrossAttn")
        super().__init__(build, config, level, inputs, cross=cross)
        self.upsamplers = nnx.List([] if level == 0 else [Upsample(build, channels)])

    def __call__(self, x: Image, skips: list[Image], time: Vector, text_kv: tuple[TextKV, ...]) -> Image:
        for i in range(len(self.resnets)):
            x = self.layer(i, jnp.concatenate([x, skips.pop()], axis=-1), time, text_kv)
        for upsample in self.upsamplers:
            x = upsample(x, *skips[-1].shape[1:3])
        return x


class MidStage(nnx.Module):
    """Residual block, transformer, residual block, at the smallest size."""

    def __init__(self, build: Build, config: UNetConfig):
        channels, time_dim = config.block_out_channels[-1], 4 * config.block_out_channels[0]
        groups, eps = config.norm_num_groups, config.norm_eps
        self.resnets = nnx.List([Resnet(build, channels, channels, groups, eps, time_dim) for _ in range(2)])
        self.attentions = nnx.List([_transformer(build, config, len(config.block_out_channels) - 1)])

    def __call__(self, x: Image, time: Vector, text_kv: TextKV) -> Image:
        x = self.attentions[0](self.resnets[0](x, time), text_kv)
        return self.resnets[1](x, time)


def _transformer(build: Build, config: UNetConfig, level: int) -> Transformer:
    return Transformer(
        build,
        config.block_out_channels[level],
        config.cross_attention_dim,
        config.heads[level],
        config.transformer_layers_per_block,
        config.norm_num_groups,
        linear=config.use_linear_projection,
    )


class UNet(nnx.Module):
    """eps(x, timestep, text), or v where the model was trained so.

    x: (batch, height, width, in_channels), any height and width; the output has out_channels, in `dtype`.
    """

    def __init__(
        self,
        config: UNetConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        build = Build(dtype, param_dtype, rngs)
        outs, layers = config.block_out_channels, config.layers_per_block
        levels = range(len(outs))
        self.conv_in = build.conv(config.in_channels, outs[0])
        self.time_embedding = TimeEmbedding(build, outs[0], 4 * outs[0])
        self.down_blocks = nnx.List([DownStage(build, config, level) for level in levels])
        self.mid_block = MidStage(build, config)
        # The way down leaves conv_in, then every layer and every downsampling; the way up takes them in reverse.
        left = [outs[0]]
        for level in levels:
            left += [outs[level]] * (layers if level == levels[-1] else layers + 1)
        ups, below = [], outs[-1]
        for level in reversed(levels):
            ups.append(UpStage(build, config, level, below, [left.pop() for _ in range(layers + 1)]))
            below = outs[level]
        self.up_blocks = nnx.List(ups)
        self.conv_norm_out = build.group_norm(config.norm_num_groups, outs[0], config.norm_eps)
        self.conv_out = build.conv(outs[0], config.out_channels)
        self.config, self.dtype = config, dtype

    def text_kv(self, context: Tokens) -> UNetKV:
        """All that the network wants of a text, (batch, tokens, cross_attention_dim); computed once per prompt."""
        return UNetKV(
            tuple(block.text_kv(context) for block in self.down_blocks),
            self.mid_block.attentions[0].text_kv(context),
            tuple(block.text_kv(context) for block in self.up_blocks),
        )

    def __call__(self, x: Image, timesteps: Timesteps, text_kv: UNetKV) -> Image:
        """timesteps: (batch,) or (1,), the integers of training, 0 to 999, or anything between."""
        x = self.features(x, timesteps, text_kv, len(self.up_blocks))
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))

    def features(self, x: Image, timesteps: Timesteps, text_kv: UNetKV, up_blocks: int) -> Image:
        """What stands after this many blocks of the way up: (batch, height, width, channels) of that level's size.

        Points of two pictures that look alike have like features (Tang et al. 2023, arXiv 2306.03881).
        """
        config = self.config
        waves = sinusoids(
            timesteps,
            config.block_out_channels[0],
            flip_sin_to_cos=config.flip_sin_to_cos,
            shift=config.freq_shift,
        )
        time = jax.nn.silu(self.time_embedding(waves)).astype(self.dtype)

        x = self.conv_in(x)
        skips = [x]
        for block, kv in zip(self.down_blocks, text_kv.down, strict=True):
            x, left = block(x, time, kv)
            skips += left
        x = self.mid_block(x, time, text_kv.mid)
        for block, kv in list(zip(self.up_blocks, text_kv.up, strict=True))[:up_blocks]:
            x = block(x, skips, time, kv)
        return x
