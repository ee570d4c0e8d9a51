"""What the UNet and the VAE are both made of: residual blocks, and steps down and up in size."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from sd_port.models.build import Build
from sd_port.models.layers import Image


class Resnet(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + embedding of the time))) (ResnetBlock2D of diffusers).

    `time_dim` is the width of the time embedding, None for a network that knows no time (the VAE).
    """

    def __init__(self, build: Build, channels: int, out: int, groups: int, eps: float, time_dim: int | None = None):
        self.norm1 = build.group_norm(groups, channels, eps)
        self.conv1 = build.conv(channels, out)
        if time_dim is not None:
            self.time_emb_proj = build.linear(time_dim, out)
        self.norm2 = build.group_norm(groups, out, eps)
        self.conv2 = build.conv(out, out)
        self.conv_shortcut = build.conv(channels, out, 1) if channels != out else None

    def __call__(self, x: Image, time: Float[Array, "#batch features"] | None = None) -> Image:
        """`time` is the embedding after its silu, which all blocks share."""
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        if time is not None:
            h = h + self.time_emb_proj(time)[:, None, None]
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nnx.Module):
    """Half the size by a strided convolution; `padding` is (1, 1) in the UNet and (0, 1) in the VAE."""

    def __init__(self, build: Build, channels: int, padding: tuple[int, int]):
        self.conv = build.conv(channels, channels, stride=2, padding=padding)

    def __call__(self, x: Image) -> Image:
        return self.conv(x)


class Upsample(nnx.Module):
    """Twice the size (nearest), or one less where an odd size was halved; then a convolution."""

    def __init__(self, build: Build, channels: int):
        self.conv = build.conv(channels, channels)

    def __call__(self, x: Image, height: int, width: int) -> Image:
        return self.conv.upsampled(x, height, width)
